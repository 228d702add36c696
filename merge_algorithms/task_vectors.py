"""Several adapters, checked and aligned module by module: what every method works on."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from merge_algorithms.adapter import Adapter, LowRank
from merge_algorithms.bases import common_base
from merge_algorithms.errors import UserError
from merge_algorithms.factors import cancels
from merge_algorithms.layout import LINEAR, Layout, Layouts
from merge_algorithms.modules import without_text_model

logger = logging.getLogger(__name__)

_LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_LANGUAGE_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class TaskVectors:
    """The updates of T adapters of one base model.

    Attributes:
        names: T adapter names, in the caller's order.
        weights: T weights w_t.
        modules: Module name (sorted) -> its T updates of one shape, dtype and device; an adapter
            without the module contributes a zero update of rank 0. What is lost in the rounding
            of its own factors is exactly zero: methods that normalise would raise it to an update.
        seed: Decides every random choice.
        statistics: For methods that need them, T mappings from module name to a statistic of that
            adapter's data (see `Method.needs`), in float32 or wider; else empty.
        layouts: Layouts of the modules that are not linear. Methods need not know them.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    modules: dict[str, tuple[LowRank, ...]]
    seed: int = 0
    statistics: tuple[Mapping[str, Tensor], ...] = ()
    layouts: Layouts = field(default_factory=dict)

    def groups(self, scope: str) -> list[list[str]]:
        """The modules that are one vector together: all ('global') or each alone ('tensor')."""
        return [[module] for module in self.modules] if scope == "tensor" else [list(self.modules)]

    def generator(self, module: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator that depends on the seed and the module's name, nothing else."""
        digest = hashlib.sha256(f"{self.seed}:{module}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def align(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, seed: int = 0
) -> TaskVectors:
    """Check that the adapters belong together and align their modules.

    Raises:
        UserError: No adapter, a repeated name, weights that do not fit, different base models,
            module names that come from differently wrapped models, different shapes or layouts,
            non-finite factors, or modules of a language model that were saved whole.
    """
    if not adapters:
        raise UserError("there is no adapter to merge: give at least one")
    names = tuple(adapter.name for adapter in adapters)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(
            f"two adapters are called '{repeated}': give them different names"
            " (Adapter.load(path, name=...), NAME=PATH on the command line)"
        )
    common_base(adapters)
    adapters = _one_spelling(adapters)
    for adapter in adapters:
        adapter.check_finite()
        _check_whole_modules(adapter)
    return TaskVectors(
        names,
        check_weights(names, weights),
        _modules(adapters),
        seed,
        layouts=_common_layouts(adapters),
    )


def _one_spelling(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters, with a text encoder's modules under one name where they have two.

    As diffusers does when it loads them: files of before transformers 5 say `text_model` where
    those of today do not.
    """
    names = {module for adapter in adapters for module in adapter.updates}
    old = {module.partition(".text_model.")[0] for module in names if ".text_model." in module}
    mixed = {part for part in old if any(name.startswith(f"{part}.encoder.") for name in names)}

    def spelling(module: str) -> str:
        return (
            without_text_model(module) if module.partition(".text_model.")[0] in mixed else module
        )

    return [
        replace(
            adapter,
            updates={spelling(module): update for module, update in adapter.updates.items()},
            layouts={spelling(module): layout for module, layout in adapter.layouts.items()},
        )
        for adapter in adapters
    ]


def _check_whole_modules(adapter: Adapter) -> None:
    """Refuse trained modules of a language model: no head of a task that could be kept beside."""
    whole, mapping = adapter.config.get("modules_to_save"), adapter.config.get("auto_mapping") or {}
    language = adapter.config.get("task_type") in _LANGUAGE_TASKS
    language |= str(mapping.get("base_model_class")).endswith(_LANGUAGE_CLASSES)
    if language and whole and any(adapter.heads.values()):
        raise UserError(
            f"adapter '{adapter.name}' was saved with whole modules ({', '.join(whole)}:"
            " modules_to_save), which are no low-rank updates and cannot be merged: train the"
            " adapter without modules_to_save, with LoRA on these modules instead"
        )


def check_weights(names: Sequence[str], weights: Sequence[float] | None) -> tuple[float, ...]:
    """One finite weight per adapter, 1 by default; UserError if all of them are 0."""
    if weights is None:
        return (1.0,) * len(names)
    values = one_per_adapter(names, "weight", weights)
    for name, value in zip(names, values, strict=True):
        if not math.isfinite(value):
            raise UserError(f"the weight of adapter '{name}' is {value}: give a finite number")
    if not any(values):
        raise UserError("all weights are 0, which merges nothing: give one that is not")
    return values


def one_per_adapter(names: Sequence[str], what: str, values: Any) -> tuple[float, ...]:
    """The values as floats; UserError if they are no numbers, or not one for each name."""
    try:
        if isinstance(values, str):
            raise TypeError
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"the {what}s are {values!r}: give a list of numbers, one per adapter"
        ) from None
    if len(numbers) != len(names):
        raise UserError(f"{len(numbers)} {what}s for {len(names)} adapters: give one per adapter")
    return numbers


def _modules(adapters: Sequence[Adapter]) -> dict[str, tuple[LowRank, ...]]:
    every = [update for adapter in adapters for update in adapter.updates.values()]
    if not every:
        raise UserError("the adapters hold no update at all: there is nothing to merge")
    device = every[0].b.device
    wide = any(update.b.dtype == torch.float64 for update in every)
    dtype = torch.float64 if wide else torch.float32
    union = sorted({module for adapter in adapters for module in adapter.updates})
    _check_wrapping(adapters)
    modules = {}
    for module in union:
        present = {a.name: _clean(a.updates[module]) for a in adapters if module in a.updates}
        shape = _common_shape(module, present)
        zero = LowRank(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))
        modules[module] = tuple(present.get(a.name, zero).to(device, dtype) for a in adapters)
    holders = Counter(module for adapter in adapters for module in adapter.updates)
    for adapter in adapters:
        own = sorted(adapter.updates)
        missing = [module for module in union if module not in adapter.updates]
        if own and missing and all(holders[module] == 1 for module in own):
            logger.warning(
                "adapter '%s' shares no module with the others: it has %s, they have %s; if these"
                " are one module, named by an older and a newer transformers, load the older"
                " adapter into the model with PEFT and save it again",
                adapter.name,
                own[0],
                missing[0],
            )
        elif missing:
            logger.info(
                "adapter '%s' lacks %d of the %d modules: its update is zero there",
                adapter.name,
                len(missing),
                len(union),
            )
    return modules


def _clean(update: LowRank) -> LowRank:
    """The update, or zeros of its rank where it is nothing but rounding errors."""
    return update.scaled(0.0) if cancels(update) else update


def _common_shape(module: str, updates: dict[str, LowRank]) -> tuple[int, int]:
    (first, update), *others = updates.items()
    for name, other in others:
        if other.shape != update.shape:
            raise UserError(
                f"{module} is {update.shape} in adapter '{first}' but {other.shape} in '{name}':"
                " only adapters of one base model can be merged"
            )
    return update.shape


def _common_layouts(adapters: Sequence[Adapter]) -> Layouts:
    layouts: dict[str, Layout] = {}
    owners: dict[str, str] = {}
    for adapter in adapters:
        for module in adapter.updates:
            layout = adapter.layouts.get(module, LINEAR)
            owner = owners.setdefault(module, adapter.name)
            if layouts.setdefault(module, layout) != layout:
                raise UserError(
                    f"{module} is {layouts[module]} in adapter '{owner}' but {layout} in"
                    f" '{adapter.name}': only adapters of one base model can be merged"
                )
    return {module: layout for module, layout in layouts.items() if layout != LINEAR}


def _check_wrapping(adapters: Sequence[Adapter]) -> None:
    """Names that differ by a prefix only are one module seen through two model classes."""
    owners: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        for module in adapter.updates:
            owners.setdefault(module, []).append(adapter)
    for long in owners:
        short = long
        while short := short.partition(".")[2]:
            for one, other in product(owners.get(short, ()), owners[long]):
                if one.updates.keys().isdisjoint(other.updates):
                    raise UserError(
                        f"adapter '{one.name}' calls a module {short}, '{other.name}' calls it"
                        f" {long}: they were trained on different model classes (with and without a"
                        " head), so train them on the same one"
                    )


def check_statistics(
    tasks: TaskVectors,
    method: str,
    needs: str,
    statistics: Mapping[str, Mapping[str, Tensor]] | None,
) -> tuple[Mapping[str, Tensor], ...]:
    """The statistics in the order of the adapters; UserError if they are not what is needed."""
    if not needs:
        if statistics is not None:
            raise UserError(f"method '{method}' reads no statistics of the data: leave them out")
        return ()
    remedy = f"`osrm {needs}` collects a task's {needs} file"
    if statistics is None:
        raise UserError(f"method '{method}' needs the {needs} of every adapter's data: {remedy}")
    for name in tasks.names:
        if name not in statistics:
            raise UserError(
                f"method '{method}' needs the {needs} of adapter '{name}', but there are only"
                f" those of {', '.join(statistics) or 'none'}: {remedy}"
            )
        for module, updates in tasks.modules.items():
            if module not in statistics[name]:
                flag = "--targets" if needs == "fisher" else "--adapter.targets"
                raise UserError(
                    f"the {needs} of '{name}' lacks {module}: collect it at the modules of all"
                    f" adapters (`osrm {needs}` with {flag})"
                )
            d_out, d_in = updates[0].shape
            expected = (d_in, d_in) if needs == "covariance" else (d_out, d_in)
            found = tuple(statistics[name][module].shape)
            if found != expected:
                raise UserError(
                    f"the {needs} of '{name}' is {found} at {module} but the update calls for"
                    f" {expected}: collect it on the model that the adapters are for"
                )
    return tuple(statistics[name] for name in tasks.names)
