"""The modules of a model that updates refer to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from merge_algorithms.errors import UserError


def find_modules(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, nn.Module]:
    """The linear modules of `model` with these names and (d_out, d_in) weights.

    Raises:
        UserError: A model or module that PEFT has wrapped, a name the model lacks (with the
            nearest it has), a module without a floating point weight matrix, or another shape.
    """
    if _is_a(model, "PeftModel"):
        raise UserError(
            "the model is a PeftModel, whose modules have other names and adapters of their own:"
            " pass the bare base model, loaded anew or as its unload() returns it"
        )
    present = dict(model.named_modules())
    found = {}
    for name, shape in shapes.items():
        if name not in present:
            raise UserError(_missing(model, name))
        module = found[name] = present[name]
        if _is_a(module, "BaseTunerLayer"):
            raise UserError(
                f"{name} still carries a PEFT adapter, which would count as well: call unload() or"
                " merge_and_unload() of its PeftModel first, or load the base model anew"
            )
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise UserError(
                f"{name} is a {type(module).__name__} without a floating point weight matrix:"
                " load the model unquantised"
            )
        actual = tuple(weight.shape[::-1] if is_transposed(module) else weight.shape)
        if actual != shape:
            raise UserError(
                f"{name} has a weight of shape {actual} in {type(model).__name__} but the update"
                f" is {shape}: load the base model that the adapters were trained on"
            )
    return found


def _is_a(thing: nn.Module, name: str) -> bool:
    """Whether a class called `name` is among its types: PEFT is not imported for that alone."""
    return any(base.__name__ == name for base in type(thing).__mro__)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (d_in, d_out), as transformers' Conv1D (GPT-2) does."""
    return type(module).__name__ == "Conv1D"


def add_rows(module: nn.Module, start: int, rows: Tensor) -> None:
    """Add rows of dW to the weight in place: float32 or wider arithmetic, rounded once."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    matrix = weight.detach().T if is_transposed(module) else weight.detach()
    target = matrix[start : start + rows.shape[0]]
    dtype = torch.promote_types(weight.dtype, rows.dtype)
    target.copy_(target.to(dtype) + rows.to(weight.device, dtype))


def _missing(model: nn.Module, name: str) -> str:
    """The error for a module the model lacks, with the nearest names among its weight matrices."""
    matrices = [
        key
        for key, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2
    ]
    last = name.rpartition(".")[2]
    same_end = [key for key in matrices if key.rpartition(".")[2] == last]
    near = difflib.get_close_matches(name, same_end or matrices, n=3, cutoff=0.0)
    return (
        f"{type(model).__name__} has no module {name}: the nearest are"
        f" {', '.join(near) or 'none'}; load the model class that the adapters were trained on"
    )
