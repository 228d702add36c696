"""The modules of a model that updates refer to."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from merge_algorithms.finite import LIMIT, largest
from merge_algorithms.layout import LINEAR, Layout, Layouts
from merge_algorithms.tiles import Tiled, Update, row_tiles


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and data parallelism, which put a prefix before its names."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrapped(compiled) if isinstance(compiled, nn.Module) else model


def find_modules(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    layouts: Layouts = MappingProxyType({}),
) -> dict[str, nn.Module]:
    """The modules of `model` with these names, (d_out, d_in) matrices and layouts.

    Raises:
        UserError: A model or module that PEFT has wrapped, a name the model lacks (with the
            nearest it has), a module without floating point weights, another layout or shape, or
            a grouped convolution.
    """
    if _is_a(model, "PeftModel"):
        raise UserError(
            "the model is a PeftModel, whose modules have other names and adapters of their own:"
            " pass the bare base model, loaded anew or as its unload() returns it"
        )
    present = dict(model.named_modules())
    found = {}
    for name, shape in shapes.items():
        known = name if name in present else without_text_model(name)
        if known not in present:
            raise UserError(_missing(model, name))
        module = found[name] = present[known]
        if _is_a(module, "BaseTunerLayer"):
            raise UserError(
                f"{name} still carries a PEFT adapter, which would count as well: call unload() or"
                " merge_and_unload() of its PeftModel first, or load the base model anew"
            )
        weight = getattr(module, "weight", None)
        if weight is None and not _is_quantised(module):
            raise UserError(
                f"{name} is a {type(module).__name__}, which has no weight of its own that an"
                " update could be added to: write the merge with save_adapter() and load it with"
                " PEFT"
            )
        if (
            not isinstance(weight, Tensor)
            or weight.ndim < 2
            or not weight.is_floating_point()
            or weight.itemsize == 1  # float8, which torch only stores
        ):
            raise UserError(
                f"{name} is a {type(module).__name__} without a floating point weight matrix:"
                " load the model unquantised"
            )
        layout, expected = layout_of(module, weight), layouts.get(name, LINEAR)
        if layout != expected:
            raise UserError(
                f"{name} is {layout} in {type(model).__name__} but the update is for {expected}:"
                " load the base model that the adapters were trained on"
            )
        if getattr(module, "groups", 1) != 1:
            raise UserError(
                f"{name} is a convolution in groups, whose weight is no product of LoRA factors:"
                " leave it out of the adapters' target_modules"
            )
        actual = matrix_shape(weight.shape, is_transposed(module))
        if actual != shape:
            raise UserError(
                f"{name} has a weight of shape {actual} in {type(model).__name__} but the update"
                f" is {shape}: load the base model that the adapters were trained on"
            )
    return found


def _is_quantised(module: nn.Module) -> bool:
    """Whether tensors of a module's own hold no numbers, as where codes replace the weight."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not tensor.is_floating_point() for tensor in tensors)


def without_text_model(name: str) -> str:
    """A name inside CLIPTextModel as transformers 5 has it: without the `text_model` of before."""
    return name.replace(".text_model.", ".", 1)


def layout_of(module: nn.Module, weight: Tensor) -> Layout:
    """How `module` stores the matrix that an update changes."""
    if isinstance(module, nn.Embedding):
        return Layout("embedding")
    return LINEAR if weight.ndim == 2 else Layout("convolution", tuple(weight.shape[2:]))


def own_weights(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The modules' weights; UserError for one that is not a parameter of its module alone."""
    owners: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
    return {name: _own(name, module, owners) for name, module in modules.items()}


def _own(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    keys = owners.get(id(weight), [])
    if not keys:
        raise UserError(
            f"{name} computes its weight anew in every call (a parametrization), so that nothing"
            " added to it would stay: remove the parametrization first"
        )
    if len(keys) > 1:
        other = next(key for key in keys if key != f"{name}.weight")
        instead = "" if isinstance(module, nn.Embedding) else ", or use attach()"
        raise UserError(
            f"{name} shares its weight with {other}, which the update must not change: untie the"
            f" two{instead}"
        )
    return weight


def check_loaded(name: str, weight: Tensor) -> Tensor:
    """The weight; UserError if it has no values (meta device), which would swallow an update."""
    if weight.is_meta:
        raise UserError(
            f"{name} is on the meta device, where it has no values (not loaded, or offloaded by"
            " accelerate): load the whole model into memory"
        )
    return weight


def matrix_shape(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """(d_out, d_in) of a weight."""
    first, rest = shape[0], math.prod(shape[1:])
    return (rest, first) if transposed else (first, rest)


def _is_a(thing: nn.Module, name: str) -> bool:
    """Whether a class called `name` is among its types: PEFT is not imported for that alone."""
    return any(base.__name__ == name for base in type(thing).__mro__)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (d_in, d_out): embeddings, transformers' Conv1D (GPT-2)."""
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def add_update(name: str, weight: Tensor, transposed: bool, update: Update) -> None:
    """Add dW to the weight of module `name`, tile by tile: float32 or wider sums, rounded once.

    Raises:
        UserError: A sum that the weight's dtype cannot hold; tiles before it are changed.
    """
    matrix = weight.T if transposed else weight
    for start, stop in row_tiles(update.shape):
        rows, target = update.rows(start, stop), matrix[start:stop]
        dtype = torch.promote_types(weight.dtype, rows.dtype)
        total = target.to(dtype) + rows.to(weight.device, dtype).reshape(target.shape)
        total = total.to(weight.dtype)
        if not math.isfinite(largest(total)):
            raise beyond(name, weight.dtype)
        target.copy_(total)


def check_fits(name: str, update: Update) -> None:
    """UserError for factors or a product of factors that float32 cannot hold.

    What is not low-rank passes: see `checked`.
    """
    if isinstance(update, LowRank) and not update.fits():
        raise beyond(name, torch.float32)


def checked(name: str, update: Update) -> Update:
    """The update, known to fit float32 (see `check_fits`) or checked wherever it is evaluated."""
    check_fits(name, update)
    if isinstance(update, LowRank):
        return update
    return Tiled(update.shape, partial(_checked_rows, name, update), copies=1)


def _checked_rows(name: str, update: Update, start: int, stop: int) -> Tensor:
    rows = update.rows(start, stop)
    if not largest(rows) <= LIMIT:
        raise beyond(name, torch.float32)
    return rows


def beyond(name: str, dtype: torch.dtype) -> UserError:
    """The error for a merge that is too large to be written."""
    return UserError(
        f"the merge at {name} is beyond the range of {str(dtype).removeprefix('torch.')}: lower its"
        " weights or its scale, or leave out the adapter whose factors are so large there"
    )


def _missing(model: nn.Module, name: str) -> str:
    """The error for a module the model lacks, with the nearest names among its weight matrices."""
    matrices = [
        key
        for key, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim >= 2
    ]
    return (
        f"{type(model).__name__} has no module {name}: the nearest are"
        f" {nearest(name, matrices)}; load the model class that the adapters were trained on"
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """Up to three of the names that look most like `name`, those with the same end first."""
    last = name.rpartition(".")[2]
    same_end = [key for key in known if key.rpartition(".")[2] == last]
    return ", ".join(difflib.get_close_matches(name, same_end or known, n=3, cutoff=0.0)) or "none"


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, calls of `module` go through `forward`.

    A hook would do, were compiled models not blind to hooks that come after their compilation. One
    that does nothing is there as well: torch's fused encoder layers heed hooks and nothing else.
    """
    own = module.__dict__.get("forward")
    mark = module.register_forward_hook(lambda *_: None)
    module.forward = forward
    try:
        yield
    finally:
        mark.remove()
        if own is None:
            del module.forward
        else:
            module.forward = own


def input_of(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a layer with one input is called with, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))
