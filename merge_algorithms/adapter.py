"""LoRA adapters as low-rank factors, read from and written to stock PEFT directories."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from merge_algorithms import diffusers_file
from merge_algorithms.card import CARD_FILE
from merge_algorithms.errors import UserError, suggest
from merge_algorithms.files import atomic_directory, check_replaceable
from merge_algorithms.finite import product_fits
from merge_algorithms.formats import read_json, write_json, write_tensors
from merge_algorithms.heads import HEAD_FILE, check_head_names, read_heads, write_heads
from merge_algorithms.layout import LINEAR, Layouts
from merge_algorithms.peft_config import CONFIG_FILE, read_config
from merge_algorithms.peft_directory import (
    DIFFUSERS_FILE,
    INFO_FILE,
    KEPT,
    PREFIX,
    WEIGHTS_FILE,
    embeds,
    locate,
    read_weights,
)
from merge_algorithms.precision import full_precision
from merge_algorithms.stored_factors import Factors, factor_tensors

Format = Literal["peft", "diffusers"]


@dataclass(frozen=True)
class LowRank:
    """One update dW = b @ a of a module's weight matrix, the LoRA scale already folded into b.

    Attributes:
        b: (d_out, r), float32 or float64 (half precision is widened to float32).
        a: (r, d_in), same dtype.
    """

    b: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise UserError(
                f"LoRA factors of shapes {tuple(self.b.shape)} and {tuple(self.a.shape)} do not"
                " multiply: expected (d_out, r) and (r, d_in)"
            )
        dtype = torch.promote_types(torch.promote_types(self.b.dtype, self.a.dtype), torch.float32)
        object.__setattr__(self, "b", self.b.detach().to(dtype))
        object.__setattr__(self, "a", self.a.detach().to(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of dW."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """The number r of columns of b, an upper bound of the rank of dW."""
        return self.b.shape[1]

    def fits(self) -> bool:
        """Whether float32 holds both factors and, for certain, every entry of dW."""
        return product_fits(self.b, self.a)

    def dense(self) -> Tensor:
        """DW as one (d_out, d_in) tensor."""
        return self.rows(0, len(self.b))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of dW, (stop - start, d_in)."""
        with full_precision(self.b.device):
            return self.b[start:stop] @ self.a

    def scaled(self, factor: float) -> LowRank:
        """Factor * dW."""
        return LowRank(self.b * factor, self.a)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LowRank:
        """The same update on `device`, in `dtype` (never narrower than float32)."""
        return LowRank(self.b.to(device, dtype), self.a.to(device, dtype))


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: an update per module, the task heads, and where it came from.

    Attributes:
        name: Unique among the adapters that are merged together.
        updates: Module name inside the base model -> its update.
        heads: Task name -> {tensor name: tensor}. One adapter has at most one head of its own;
            merged bundles hold several.
        config: PEFT's adapter_config.json; with several heads, whose tensors it does not hold, with
            the task_type and modules_to_save of one alone.
        info: osrm.json (task, seed, provenance), empty for adapters that plain PEFT saved.
        layouts: How the modules that are not linear store their matrix: convolutions, embeddings.
    """

    name: str
    updates: dict[str, LowRank]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    layouts: Layouts = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of all updates, whatever the adapter is called."""
        digest = hashlib.sha256()
        for module, update in sorted(self.updates.items()):
            digest.update(f"{module}{update.shape}{update.b.dtype}".encode())
            for factor in (update.b, update.a):
                digest.update(factor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @classmethod
    def load(cls, source: str | Path, name: str | None = None) -> Adapter:
        """Read a LoRA adapter; alpha / r (rsLoRA: alpha / sqrt(r)) is folded into b.

        Args:
            source: A PEFT directory, a LoRA file of a diffusers pipeline or a directory with
                pytorch_lora_weights.safetensors, or a Hugging Face Hub id ("org/name") if there
                is neither such a local path nor a local folder "org".
            name: Name of the adapter; default: the task in osrm.json, else the directory's name.

        Raises:
            UserError: Nothing there, no safetensors file, damaged or non-finite tensors, or an
                adapter that factors alone do not describe (DoRA, biases, PiSSA, grouped
                convolutions and the like).
        """
        found = locate(source)
        directory = found.parent if found.is_file() else found
        info = read_json(directory / INFO_FILE) if (directory / INFO_FILE).exists() else {}
        name = name or info.get("task") or _default_name(Path(source))
        kept = info.pop(KEPT, {})
        whole = isinstance(info.get("tasks", {}), dict) and isinstance(kept, dict)
        if not isinstance(name, str) or not whole:
            raise UserError(f"{directory / INFO_FILE} is damaged: save the adapter again")
        config: dict[str, Any] = {}
        heads: dict[str, dict[str, Tensor]] = {}
        if found.is_file():
            factors = diffusers_file.read(found)
        else:
            config = read_config(directory)
            factors, own_head = read_weights(directory, config)
            heads = read_heads(directory, name)
            if own_head and name in heads:
                raise UserError(f"{directory} has two heads, one in {WEIGHTS_FILE}: remove one")
            if own_head:
                heads[name] = own_head
            config |= kept
        updates = {m: LowRank(f.b, f.a).scaled(f.scale) for m, f in factors.items()}
        layouts = {m: f.layout for m, f in factors.items() if f.layout != LINEAR}
        return cls(name, updates, heads, config, info, layouts)

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        format: Format = "peft",
        card: str | None = None,
    ) -> None:
        """Write a directory that `PeftModel.from_pretrained` loads, complete or not at all.

        The scale is in the factors, so the file says lora_alpha = r, with a rank_pattern where
        ranks differ by module. A single head goes where its trainer left it: into PEFT's own file
        if it lies in modules_to_save, else into head.safetensors. Several heads go into
        heads/<name>.safetensors, and PEFT then loads the backbone's adapter only.

        Args:
            path: Where to.
            overwrite: Replace an adapter that is there.
            format: 'peft', or 'diffusers' for what a pipeline's `load_lora_weights` reads. The
                names of the modules then begin with the pipeline's component ("unet."), as they
                do in adapters that were loaded from such a file.
            card: Text of README.md, if there is to be one.

        Raises:
            UserError: `path` holds something already (and `overwrite` is false, or it is not an
                adapter), nothing to save, non-finite factors, an unknown format, or what diffusers
                cannot hold.
        """
        check_format(format)
        path = Path(path)
        self._check(path, overwrite)
        factors = {
            module: Factors(update.b, update.a, self.layouts.get(module, LINEAR))
            for module, update in self.updates.items()
        }
        if format == "diffusers":
            diffusers_file.check(self.name, self.updates, self.layouts, self.heads)
        with atomic_directory(path, overwrite) as directory:
            if format == "diffusers":
                diffusers_file.write(directory / DIFFUSERS_FILE, factors)
            else:
                self._write_peft(directory, factors)
            if info := self.info | self._kept():
                write_json(directory / INFO_FILE, info)
            if card is not None:
                (directory / CARD_FILE).write_text(card, encoding="utf-8")

    def _write_peft(self, directory: Path, factors: dict[str, Factors]) -> None:
        embed = embeds(self.heads, self.config)
        tensors: dict[str, Tensor] = {}
        for module, matrices in factors.items():
            tensors |= factor_tensors(f"{PREFIX}{module}", matrices)
        if embed:
            (head,) = self.heads.values()
            tensors |= {f"{PREFIX}{key}": tensor for key, tensor in head.items()}
        write_json(directory / CONFIG_FILE, self._stock_config(embed))
        write_tensors(directory / WEIGHTS_FILE, tensors)
        if len(self.heads) == 1 and not embed:
            (head,) = self.heads.values()
            write_tensors(directory / HEAD_FILE, head)
        elif len(self.heads) > 1:
            write_heads(directory, self.heads)

    def _kept(self) -> dict[str, Any]:
        """What osrm.json keeps of the configuration, which cannot say it beside several heads."""
        keys = ("modules_to_save", "task_type") if len(self.heads) > 1 else ()
        kept = {key: self.config[key] for key in keys if self.config.get(key)}
        return {KEPT: kept} if kept else {}

    def head_info(self, head: str) -> dict[str, Any] | None:
        """What osrm.json says of a head; None for heads that plain PEFT saved.

        An adapter of one task may have been loaded under another name than the task's.
        """
        tasks: dict[str, dict[str, Any]] = self.info.get("tasks", {})
        only = len(tasks) == len(self.heads) == 1
        return next(iter(tasks.values())) if only else tasks.get(head)

    @property
    def base(self) -> str | None:
        """The name of the base model that the configuration records, if any."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the base model that osrm.json records, if any."""
        return self.info.get("model_fingerprint") or None

    def on_base(
        self, name: str, fingerprint: str | None = None, revision: str | None = None
    ) -> Adapter:
        """The same adapter, recording that its base model is called `name` and nothing else of it.

        Args:
            name: A Hub id or path.
            fingerprint: The model's, where it is known: it replaces the one that was recorded.
            revision: The model's on the Hub, likewise.
        """
        config = {**self.config, "base_model_name_or_path": name, "revision": revision}
        info = {key: value for key, value in self.info.items() if key != "model_fingerprint"}
        known = {"model_fingerprint": fingerprint} if fingerprint else {}
        return replace(self, config=config, info=info | known)

    def to(self, device: torch.device | str) -> Adapter:
        """The same adapter with its factors on `device`; merging then happens there."""
        updates = {module: update.to(device) for module, update in self.updates.items()}
        return replace(self, updates=updates)

    def check_finite(self) -> None:
        """Raise UserError naming the first module whose factors or product float32 cannot hold."""
        for module, update in self.updates.items():
            if update.fits():
                continue
            finite = update.a.isfinite().all() and update.b.isfinite().all()
            what = (
                f"factors of {module} whose product is beyond the range of float32"
                if finite
                else f"NaN or infinite values in the factors of {module}"
            )
            raise UserError(
                f"adapter '{self.name}' has {what}: its training diverged, so train it again with"
                " a lower learning rate"
            )

    def _check(self, path: Path, overwrite: bool) -> None:
        if not self.updates:
            raise UserError(f"adapter '{self.name}' has no update to save")
        self.check_finite()
        empty = next((module for module, update in self.updates.items() if not update.rank), None)
        if empty is not None:
            raise UserError(
                f"adapter '{self.name}' has factors of rank 0 for {empty}, which PEFT does not"
                " load: leave the module out"
            )
        check_head_names(self.heads)
        check_adapter_output(path, overwrite)

    def _stock_config(self, embed: bool) -> dict[str, Any]:
        ranks = {module: update.rank for module, update in sorted(self.updates.items())}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        # '^' makes a pattern the full name, whatever other names end the same way.
        pattern = {f"^{re.escape(m)}": r for m, r in ranks.items() if r != rank}
        # A language model's head is its own: such adapters have heads without tensors.
        heads = [head for head in self.heads.values() if head]
        whole = self.config.get("modules_to_save") or []
        if embed:  # of a merge, they are those of all its heads
            own = [key for head in heads for key in head]
            whole = [module for module in whole if any(f"{module}." in key for key in own)]
        keep_task = embed or (len(heads) < 2 and not self.config.get("modules_to_save"))
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self.config.get("base_model_name_or_path"),
            "revision": self.config.get("revision"),
            "auto_mapping": self.config.get("auto_mapping"),
            "task_type": self.config.get("task_type") if keep_task else None,
            "modules_to_save": whole or None if embed else None,
            "target_modules": list(ranks),
            "fan_in_fan_out": bool(self.config.get("fan_in_fan_out")),
            "r": rank,
            "rank_pattern": pattern,
            "lora_alpha": rank,
            "alpha_pattern": pattern,
            "use_rslora": False,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }


def check_adapter_output(path: Path, overwrite: bool) -> None:
    """UserError unless an adapter may be written there."""
    check_replaceable(path, overwrite, "an adapter directory", [CONFIG_FILE, DIFFUSERS_FILE])


def check_format(format: str) -> None:
    """UserError for a format that adapters are not written in."""
    known = get_args(Format)
    if format not in known:
        raise UserError(
            f"adapters are not written in the format '{format}': {suggest(format, known)}"
        )


def _default_name(source: Path) -> str:
    """The directory's name, the repository's, or that of a file with a name of its own."""
    if source.name == DIFFUSERS_FILE:
        return source.resolve().parent.name
    if source.is_file():
        return source.stem
    return source.resolve().name if source.exists() else source.name
