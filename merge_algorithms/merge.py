"""Adapters in, one merged update per module out: as a model's weights or as a LoRA adapter."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_algorithms.adapter import Adapter, Format, LowRank, check_adapter_output, check_format
from merge_algorithms.bases import base_revision, common_base
from merge_algorithms.card import CARD_FILE, model_card
from merge_algorithms.checkpoint import Checkpoint
from merge_algorithms.errors import UserError, suggest
from merge_algorithms.factors import truncate
from merge_algorithms.files import atomic_directory, check_vacant
from merge_algorithms.formats import write_json
from merge_algorithms.heads import check_head_names, write_heads
from merge_algorithms.layout import Layouts
from merge_algorithms.modules import (
    add_update,
    check_fits,
    check_loaded,
    checked,
    find_modules,
    is_transposed,
    own_weights,
    unwrapped,
)
from merge_algorithms.peft_directory import INFO_FILE
from merge_algorithms.registry import get_method
from merge_algorithms.task_vectors import align, check_statistics
from merge_algorithms.tiles import Update


def merge(
    adapters: Sequence[Adapter],
    method: str = "task_arithmetic",
    weights: Sequence[float] | None = None,
    seed: int = 0,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> Merged:
    """Merge adapters of one base model.

    Args:
        adapters: At least one, with different names. A module that one of them lacks is a zero
            update there. The order does not matter.
        method: Name of a registered method, see `methods`.
        weights: One finite w_t per adapter, 1 by default.
        seed: Decides every random choice of the method.
        statistics: Adapter name -> module name -> what a method that needs the data reads of it,
            such as the covariance of `Covariance.by_module()`; see `Method.needs`.
        **options: The method's options.

    Returns:
        The merged updates; heads stay per task.

    Raises:
        UserError: Adapters that do not belong together, an unknown method or option, a value out
            of range, non-finite weights or factors, or statistics that are missing or do not fit.
    """
    chosen = get_method(method)
    values = chosen.check_options(options)
    chosen.check_count(len(adapters))
    tasks = align(adapters, weights, seed)
    tasks = replace(tasks, statistics=check_statistics(tasks, method, chosen.needs, statistics))
    updates = chosen.function(tasks, **values)
    for module, update in updates.items():
        check_fits(module, update)
    return Merged(
        updates=updates,
        heads=_heads(adapters),
        head_info={name: a.head_info(name) for a in adapters for name in a.heads},
        config=_config(adapters),
        method=method,
        options=values,
        names=tasks.names,
        weights=tasks.weights,
        seed=seed,
        ranks={m: sum(update.rank for update in updates) for m, updates in tasks.modules.items()},
        layouts=tasks.layouts,
        base_fingerprint=next(filter(None, (a.base_fingerprint for a in adapters)), None),
    )


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        updates: Module name -> merged update (d_out, d_in).
        heads: Task name -> that task's head, never averaged.
        head_info: Task name -> what its adapter's osrm.json says of the head, if anything.
        config: What an adapter of this merge says about its base model.
        method: Name of the method.
        options: All its options.
        names: The merged adapters.
        weights: Their weights.
        seed: Seed of the method's random choices.
        ranks: Module name -> sum of the adapters' ranks.
        coefficients: What the modules have been scaled by since; those that are not named, by 1.
        evaluation: What is known of its scores, as JSON, for the record and the model card:
            {"scores": {split: {task: {metric: score}}}} and, of a search, how it went.
        layouts: Layouts of the modules that are not linear.
        base_fingerprint: Of the base model, if an adapter records it.
    """

    updates: Mapping[str, Update]
    heads: dict[str, dict[str, Tensor]]
    head_info: dict[str, dict[str, Any] | None]
    config: dict[str, Any]
    method: str
    options: dict[str, Any]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int
    ranks: dict[str, int]
    coefficients: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    layouts: Layouts = field(default_factory=dict)
    base_fingerprint: str | None = None

    def scaled(self, coefficient: float | Mapping[str, float]) -> Merged:
        """The same merge times `coefficient`, the lambda of the papers; costs next to nothing.

        Args:
            coefficient: One number for all modules, or {pattern: number}: a module takes the
                number of the first pattern that, as a regular expression, is found in its name,
                and keeps its update as it is if none is.

        Raises:
            UserError: A number that is not finite, or a pattern that is invalid or found nowhere.
        """
        if not isinstance(coefficient, Mapping):
            coefficient = {"": coefficient}
        factors = match_coefficients(coefficient, self.updates)
        return replace(
            self,
            updates={m: update.scaled(factors[m]) for m, update in self.updates.items()},
            coefficients={m: self.coefficients.get(m, 1.0) * f for m, f in factors.items()},
        )

    def apply_to(self, model: nn.Module) -> Applied:
        """Add the updates to the weights of `model` in place, tile by tile.

        Sums are formed in float32 (or wider) and rounded once to the weights' dtype. The parts of
        a diffusers pipeline are one model under the names that its LoRA files use, as in
        nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}). A model may
        be compiled, or wrapped for data parallelism.

        Returns:
            A handle that holds copies of the weights it replaced. As a context manager, or by
            `restore()`, it puts them back bit by bit.

        Raises:
            UserError: The model lacks a module, has another shape or layout, is quantised or not
                loaded, or one of the weights is tied to another module or computed from other
                parameters; the model is then untouched.
        """
        model = unwrapped(model)
        shapes = {name: update.shape for name, update in self.updates.items()}
        modules = find_modules(model, shapes, self.layouts)
        weights = own_weights(model, modules)
        for name, weight in weights.items():
            check_loaded(name, weight)
        applied = Applied({name: (w, w.detach().clone()) for name, w in weights.items()})
        try:
            with torch.no_grad():
                for name, update in self.updates.items():
                    transposed = is_transposed(modules[name])
                    add_update(name, weights[name].detach(), transposed, update)
        except BaseException:
            applied.restore()
            raise
        return applied

    def save_adapter(
        self,
        path: str | Path,
        rank: int | None = None,
        head: str | None = None,
        overwrite: bool = False,
        format: Format = "peft",
    ) -> dict[str, float]:
        """Write the merge as one stock PEFT directory with a model card, see `Adapter.save`.

        Args:
            path: Where to.
            rank: Truncate every module to this rank. None keeps low-rank results exactly, and
                truncates dense ones to the sum of the adapters' ranks.
            head: Keep this task's head only: with modules_to_save it becomes a complete
                classifier for PEFT. None keeps all heads beside the adapter.
            overwrite: Replace an adapter that is there.
            format: 'peft', or 'diffusers' for the LoRA file of a pipeline.

        Returns:
            Module name -> share of the squared norm that truncation lost.

        Raises:
            UserError: Unknown head or format, rank below 1, or a path that is taken.
        """
        check_format(format)
        check_adapter_output(Path(path), overwrite)
        if head is not None and head not in self.heads:
            raise UserError(f"there is no head '{head}' in this merge: {suggest(head, self.heads)}")
        heads = self.heads if head is None else {head: self.heads[head]}
        info = self.info(heads)
        truncated, lost = self._truncate(rank)
        name = Path(path).name
        card = model_card(info["merge"], name, format, self.config, heads, lost)
        adapter = Adapter(name, truncated, heads, self.config, info, self.layouts)
        adapter.save(path, overwrite, format, card)
        return lost

    def save_checkpoint(self, path: str | Path, base: str | Path, overwrite: bool = False) -> None:
        """Write the merge into a copy of the base model's checkpoint, with a model card.

        Sums are formed in float32 (or wider) and rounded once to the checkpoint's dtype, weight
        by weight; everything else is copied. The result loads like the base does. The tasks'
        heads go into heads/<name>.safetensors beside it.

        Args:
            path: Where to.
            base: A transformers directory with safetensors files, or a Hub id if there is no such
                local path. It is not changed.
            overwrite: Replace a checkpoint that is there.

        Raises:
            UserError: A base that is quantised, damaged, or lacks a module of the merge, a tied
                weight, a model class that transformers does not have, or a path that is taken.
        """
        path = Path(path)
        check_vacant(path, overwrite)  # before a base is fetched
        checkpoint = Checkpoint.open(base)
        checkpoint.check_output(path, overwrite)
        check_head_names(self.heads)
        plan = checkpoint.plan(self.updates, self.layouts)
        info = self.info(self.heads)
        card = model_card(info["merge"], path.name, "transformers", self.config, self.heads, {})
        with atomic_directory(path, overwrite) as directory:
            checkpoint.write(directory, self.updates, plan)
            if self.heads:
                write_heads(directory, self.heads)
            write_json(directory / INFO_FILE, info)
            (directory / CARD_FILE).write_text(card, encoding="utf-8")

    def _truncate(self, rank: int | None) -> tuple[dict[str, LowRank], dict[str, float]]:
        """The updates at this rank, or at the sum of the adapters', and what each lost."""
        kept: dict[str, LowRank] = {}
        lost: dict[str, float] = {}
        for module, update in self.updates.items():
            limit = min(self.ranks[module] if rank is None else rank, *update.shape)
            kept[module], lost[module] = truncate(checked(module, update), limit)
        return kept, lost

    def info(self, heads: Iterable[str]) -> dict[str, Any]:
        """What osrm.json says of the merge and of these heads."""
        names = list(heads)
        info: dict[str, Any] = {"merge": self._record()}
        if self.base_fingerprint is not None:
            info["model_fingerprint"] = self.base_fingerprint
        described = {name: self.head_info[name] for name in names if self.head_info[name]}
        if described:
            info["tasks"] = described
        if len(names) == 1:
            info["task"] = names[0]
        return info

    def _record(self) -> dict[str, Any]:
        known = {"evaluation": dict(self.evaluation)} if self.evaluation else {}
        return known | {
            "method": self.method,
            "options": {name: _plain(value) for name, value in self.options.items()},
            "adapters": list(self.names),
            "weights": list(self.weights),
            "coefficient": self._coefficient(),
            "seed": self.seed,
        }

    def _coefficient(self) -> float | dict[str, float]:
        """One number where all modules share it."""
        values = {self.coefficients.get(module, 1.0) for module in self.updates}
        return values.pop() if len(values) == 1 else dict(self.coefficients)


def match_coefficients(
    coefficients: Mapping[str, float], modules: Iterable[str]
) -> dict[str, float]:
    """Every module's coefficient: that of the first pattern found in its name, else 1."""
    modules = list(modules)
    for pattern, value in coefficients.items():
        if not math.isfinite(value):
            raise UserError(f"the scaling coefficient is {value}: give a finite number")
        try:
            found = any(re.search(pattern, module) for module in modules)
        except re.error as error:
            raise UserError(
                f"'{pattern}' is not a regular expression ({error}): give part of a module's name"
            ) from error
        if not found:
            raise UserError(
                f"the coefficient of '{pattern}' fits no module: {suggest(pattern, modules)}"
            )
    return {
        module: next(
            (value for pattern, value in coefficients.items() if re.search(pattern, module)), 1.0
        )
        for module in modules
    }


class Applied:
    """What `Merged.apply_to` changed, and how to undo it."""

    def __init__(self, replaced: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._replaced = replaced

    def restore(self) -> None:
        """Put the original weights back; a second call does nothing."""
        with torch.no_grad():
            for weight, original in self._replaced.values():
                weight.copy_(original)
        self._replaced = {}

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _plain(value: Any) -> Any:
    """An option as JSON can hold it; data (covariances, say) is recorded by its type only."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return type(value).__name__


def _heads(adapters: Sequence[Adapter]) -> dict[str, dict[str, Tensor]]:
    counts = Counter(name for adapter in adapters for name in adapter.heads)
    repeated = next((name for name, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise UserError(f"two adapters have a head called '{repeated}': load them as other names")
    return {name: head for adapter in adapters for name, head in adapter.heads.items()}


def _config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the adapters agree on about the base model, and every head module any of them has."""
    configs = [adapter.config for adapter in adapters]
    agreed = {
        key: configs[0].get(key)
        for key in ("auto_mapping", "task_type")
        if all(config.get(key) == configs[0].get(key) for config in configs)
    }
    heads = {module for config in configs for module in config.get("modules_to_save") or []}
    base = common_base(adapters)
    return agreed | {
        "base_model_name_or_path": base,
        "revision": base_revision(adapters, base),
        "modules_to_save": sorted(heads) or None,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
    }
