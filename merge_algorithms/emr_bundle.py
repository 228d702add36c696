"""EMR-Merging (arXiv 2405.17461) on disk: every task's model in one directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_algorithms.adapter import Adapter
from merge_algorithms.card import CARD_FILE, model_card
from merge_algorithms.emr import Rescale, masked, unify
from merge_algorithms.errors import UserError, suggest
from merge_algorithms.files import atomic_directory, check_replaceable
from merge_algorithms.formats import read_json, read_tensors, write_json, write_tensors
from merge_algorithms.heads import HEADS_DIRECTORY, check_head_names, read_heads, write_heads
from merge_algorithms.hub import fetch
from merge_algorithms.layout import Layout
from merge_algorithms.merge import Merged, merge
from merge_algorithms.modules import checked
from merge_algorithms.peft_directory import EMR_FILE, INFO_FILE
from merge_algorithms.registry import get_method
from merge_algorithms.task_vectors import align
from merge_algorithms.tiles import Tiled, Update

_FILES = (EMR_FILE, INFO_FILE, f"{HEADS_DIRECTORY}/*.safetensors")


@dataclass(frozen=True)
class EmrBundle:
    """An EMR merge for all its tasks: 4 bytes and T bits for every entry of a merged weight.

    That is less than T weights, but more than T adapters of a rank below about d / 64 + d / 2T:
    adapters that are at hand can be served from their factors, by `attach`.

    Attributes:
        unified: tau as a merge of its own, with the heads of all tasks.
        masks: Module name -> the M_t, eight entries of a row in a byte, uint8
            (T, d_out, ceil(d_in / 8)).
        rescalers: Adapter name -> lambda_t, in the order of the masks.
        owners: Head -> name of the adapter that it came with.
    """

    unified: Merged
    masks: Mapping[str, Tensor]
    rescalers: Mapping[str, float]
    owners: Mapping[str, str]

    @classmethod
    def build(
        cls,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
        rescale: Rescale = "sums",
    ) -> EmrBundle:
        """Merge adapters for all their tasks; arguments and errors as of `merge` and `emr`."""
        tasks = align(adapters, weights)
        options = {"task": tasks.names[0], "rescale": rescale}
        get_method("emr", runtime=True).check_options(options)
        tau, masks, rescalers = unify(tasks, range(len(adapters)), rescale)
        shared = replace(
            merge(adapters, "task_arithmetic", weights),
            updates={module: _held(whole) for module, whole in tau.items()},
            method="emr",
            options={"rescale": rescale},
        )
        named = dict(zip(tasks.names, rescalers, strict=True))
        return cls(shared, masks, named, {head: a.name for a in adapters for head in a.heads})

    def merged(self, name: str) -> Merged:
        """The model of one adapter's task.

        `merged(name).apply_to(model)` is undone on leaving its context; `save_adapter` makes it an
        adapter of its own.

        Raises:
            UserError: There is no adapter of that name.
        """
        if name not in self.rescalers:
            raise UserError(f"the bundle has no task '{name}': {suggest(name, self.rescalers)}")
        index = list(self.rescalers).index(name)
        updates = {
            module: Tiled(
                tau.shape,
                partial(_served, tau, self.masks[module][index]),
                copies=2,
                factor=self.rescalers[name],
            )
            for module, tau in self.unified.updates.items()
        }
        return replace(
            self.unified,
            updates=updates,
            heads={h: t for h, t in self.unified.heads.items() if self.owners[h] == name},
            options={"task": name, **self.unified.options},
            evaluation={},
        )

    def scaled(self, coefficient: float | Mapping[str, float]) -> EmrBundle:
        """The same bundle times `coefficient`, which is what `Merged.scaled` takes."""
        return replace(self, unified=self.unified.scaled(coefficient))

    def heads(self) -> Adapter:
        """All heads and what is known of them, as an adapter that changes nothing."""
        info: dict[str, Any] = {"tasks": {h: i for h, i in self.unified.head_info.items() if i}}
        if self.unified.base_fingerprint is not None:
            info["model_fingerprint"] = self.unified.base_fingerprint
        return Adapter("emr", {}, dict(self.unified.heads), dict(self.unified.config), info)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write emr.safetensors, osrm.json, the heads and a card, complete or not at all.

        Raises:
            UserError: `path` holds something and `overwrite` is false, or is no bundle; values
                that float32 cannot hold.
        """
        path = Path(path)
        check_bundle_output(path, overwrite)
        check_head_names(self.unified.heads)
        whole = {m: checked(m, u).rows(0, u.shape[0]) for m, u in self.unified.updates.items()}
        tensors = {f"unified.{module}": tau for module, tau in whole.items()}
        tensors |= {f"masks.{module}": mask for module, mask in self.masks.items()}
        info = self.unified.info(self.unified.heads)
        info["emr"] = {
            "rescalers": [[name, rescaler] for name, rescaler in self.rescalers.items()],
            "owners": dict(self.owners),
            "ranks": dict(self.unified.ranks),
            "config": dict(self.unified.config),
            "layouts": {m: asdict(layout) for m, layout in self.unified.layouts.items()},
        }
        card = model_card(
            info["merge"], path.name, "osrm", self.unified.config, self.unified.heads, {}
        )
        with atomic_directory(path, overwrite) as directory:
            write_tensors(directory / EMR_FILE, tensors)
            write_json(directory / INFO_FILE, info)
            if self.unified.heads:
                write_heads(directory, self.unified.heads)
            (directory / CARD_FILE).write_text(card, encoding="utf-8")

    @classmethod
    def load(cls, source: str | Path) -> EmrBundle:
        """Read what `save` wrote, from a directory or, if there is none, a Hub id.

        Raises:
            UserError: No bundle there, or damaged files.
        """
        path = fetch(source, _FILES)
        if not is_bundle(path) or not (path / INFO_FILE).exists():
            raise UserError(f"{path} is not an EMR bundle: give the directory that save() wrote")
        tensors = read_tensors(path / EMR_FILE)
        tau, masks = _named(tensors, "unified."), _named(tensors, "masks.")
        heads = read_heads(path, "")
        info = read_json(path / INFO_FILE)
        try:
            bundle = _described(info, tau, masks, heads)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path / INFO_FILE} is damaged: save the bundle again") from error
        for module, whole in tau.items():
            packed = (len(bundle.rescalers), len(whole), -(-whole.shape[-1] // 8))
            if module not in masks or masks[module].shape != packed:
                raise UserError(
                    f"{path / EMR_FILE} has no masks of shape {packed} for {module}: save the"
                    " bundle again"
                )
        return bundle


def is_bundle(source: str | Path) -> bool:
    """Whether a bundle lies in this directory or, if there is none, under this Hub id."""
    return (fetch(source, _FILES) / EMR_FILE).is_file()


def check_bundle_output(path: Path, overwrite: bool) -> None:
    """UserError unless a bundle may be written there."""
    check_replaceable(path, overwrite, "an EMR bundle", [EMR_FILE])


def _described(
    info: Mapping[str, Any],
    tau: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    heads: dict[str, dict[str, Tensor]],
) -> EmrBundle:
    """A bundle from what osrm.json says of its tensors; errors of any kind if it does not fit."""
    record, emr = info["merge"], info["emr"]
    rescalers = {str(name): float(rescaler) for name, rescaler in emr["rescalers"]}
    weights = tuple(float(weight) for weight in record["weights"])
    coefficient = record["coefficient"]
    if not isinstance(coefficient, dict):
        coefficient = dict.fromkeys(tau, float(coefficient))
    if len(weights) != len(rescalers) or not {*emr["owners"].values()} <= rescalers.keys():
        raise ValueError
    known = dict(info.get("tasks", {}))
    unified = Merged(
        updates={module: _held(whole) for module, whole in tau.items()},
        heads=heads,
        head_info={head: known.get(head) for head in heads},
        config=dict(emr["config"]),
        method="emr",
        options=dict(record["options"]),
        names=tuple(rescalers),
        weights=weights,
        seed=0,
        ranks={module: int(emr["ranks"][module]) for module in tau},
        coefficients=coefficient,
        evaluation=dict(record.get("evaluation", {})),
        layouts={m: Layout(x["kind"], tuple(x["kernel"])) for m, x in emr["layouts"].items()},
        base_fingerprint=info.get("model_fingerprint"),
    )
    return EmrBundle(unified, masks, rescalers, {head: emr["owners"][head] for head in heads})


def _held(whole: Tensor) -> Tiled:
    """A matrix in memory as an update."""
    d_out, d_in = whole.shape
    return Tiled((d_out, d_in), lambda start, stop: whole[start:stop], copies=1)


def _served(tau: Update, packed: Tensor, start: int, stop: int) -> Tensor:
    return masked(tau.rows(start, stop), packed[start:stop])


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
