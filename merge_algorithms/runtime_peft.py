"""Run-time merges of the adapters that PEFT has loaded into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

from merge_algorithms.adapter import Adapter, LowRank
from merge_algorithms.errors import UserError, suggest
from merge_algorithms.layout import Layout
from merge_algorithms.mixture import Mixture
from merge_algorithms.modules import check_loaded
from merge_algorithms.runtime import Added, add

# Classes of PEFT whose forward() hands over to a variant, by name: some exist only beside the
# quantisation library that they are for.
_LINEAR = frozenset({"Linear", "Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear"})
_CONVOLUTIONS = frozenset({"Conv1d", "Conv2d", "Conv3d"})


def check_names(adapters: Iterable[object]) -> list[str]:
    """The names; UserError if they are not a list of strings."""
    if isinstance(adapters, str):
        raise UserError(f"the adapters are '{adapters}': give a list of names")
    names = [name for name in adapters if isinstance(name, str)]
    if len(names) != len(list(adapters)):
        raise UserError(
            "some of the adapters are names and others are not: give names of adapters that PEFT"
            " has loaded, or Adapter objects and a bare model"
        )
    return names


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """All LoRA layers of `model`, by module name."""
    return {key: m for key, m in model.named_modules() if isinstance(m, LoraLayer)}


def find_layers(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The LoRA layers of `model` that hold one of the adapters, by module name.

    Raises:
        UserError: No such layer, a name that PEFT has not loaded, or a layer that cannot be
            merged at run time.
    """
    layers = lora_layers(model)
    held = {key: _held(layer) for key, layer in layers.items()}
    loaded = sorted(set().union(*held.values()))
    if not loaded:
        raise UserError(
            f"{type(model).__name__} holds no LoRA layer of PEFT, so that adapters cannot be named:"
            " load them with PEFT first, or give Adapter objects"
        )
    for name in names:
        if name not in loaded:
            raise UserError(f"the model has loaded no adapter '{name}': {suggest(name, loaded)}")
    for key, layer in layers.items():
        if layer.merged_adapters:
            raise UserError(
                f"adapter '{layer.merged_adapters[0]}' is merged into the weights of {key}, where"
                " nothing can mask it: call unmerge_adapter() (diffusers: unfuse_lora()) first"
            )
    for key, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper) and module._adapters & set(names):
            raise UserError(
                f"{key} has token embeddings of its own for an adapter (trainable_token_indices),"
                " which cannot be merged: train the adapters without"
            )
    found = {key: layer for key, layer in layers.items() if held[key] & set(names)}
    for key, layer in found.items():
        _check(key, layer, [name for name in names if name in held[key]])
    return found


def as_adapters(model: nn.Module, layers: dict[str, Any], names: Sequence[str]) -> list[Adapter]:
    """The named adapters as factors, views of PEFT's where these are float32 or wider.

    With what tells whether the whole modules that they come with are heads of tasks.
    """
    configs = getattr(model, "peft_config", None) or {}
    whole = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    adapters = []
    for name in names:
        updates, layouts = {}, {}
        for key, layer in layers.items():
            if name not in layer.lora_A:
                continue
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            updates[key] = LowRank(b.flatten(1), a.flatten(1)).scaled(layer.scaling[name])
            if a.ndim > 2:
                layouts[key] = Layout("convolution", tuple(a.shape[2:]))
        saved = [module.modules_to_save[name] for module in whole if name in module._adapters]
        head = {key: value for module in saved for key, value in module.state_dict().items()}
        config = configs[name].to_dict() if name in configs else {}
        heads = {name: head} if head else {}
        adapters.append(Adapter(name, updates, heads, config, layouts=layouts))
    return adapters


def check_kinds(layers: dict[str, Any], added: dict[str, Mixture | Added]) -> None:
    """UserError for a method that needs linear modules and meets others."""
    for key, function in added.items():
        if not isinstance(function, Mixture) and _spatial(layers[key]):
            raise UserError(f"{key} is a convolution, and this method works on linear modules")


def install(stack: ExitStack, layer: Any, names: Sequence[str], function: Mixture | Added) -> None:
    """Make the adapters in one layer act through `function`, until the stack unwinds."""
    present = [name for name in names if name in layer.lora_A]
    merged = (
        _Mixed(layer, names, function) if isinstance(function, Mixture) else partial(_add, function)
    )
    variant = _Merged(present[0], merged)
    own = {name: layer.lora_variant[name] for name in present if name in layer.lora_variant}
    stack.callback(layer.lora_variant.update, own)
    for name in present:
        layer.lora_variant[name] = variant
        stack.callback(layer.lora_variant.pop, name, None)
    _keep(stack, layer, present)


def silence(stack: ExitStack, model: nn.Module, layers: dict[str, Any]) -> None:
    """Let no other adapter act in the model's other LoRA layers, until the stack unwinds."""
    for key, layer in lora_layers(model).items():
        if key not in layers:
            _keep(stack, layer, [])


def _keep(stack: ExitStack, layer: Any, active: list[str]) -> None:
    # Not set_adapter(), which would also change which parameters require gradients.
    for attribute, value in (("_active_adapter", active), ("_disable_adapters", False)):
        stack.callback(setattr, layer, attribute, getattr(layer, attribute))
        setattr(layer, attribute, value)


class _Merged(LoraVariant):
    """PEFT's hook for variants of LoRA: the first adapter's turn stands for all of them."""

    def __init__(self, first: str, merged: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.first, self.merged = first, merged
        for name in ("merge_safe", "merge_unsafe", "unmerge"):
            setattr(self, name, _refuse)

    def forward(  # type: ignore[override]  # PEFT calls it on the instance: `self` fits in
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """The layer's `result` with everything that is added to it."""
        return self.merged(x, result) if active_adapter == self.first else result


def _refuse(*args: Any) -> Any:
    raise UserError("adapters are attached at run time: leave that context before merging them")


class _Mixed:
    """A mixture over the factors that PEFT holds for one layer, as they are at each call."""

    def __init__(self, layer: Any, names: Sequence[str], mixture: Mixture) -> None:
        self.mixture = replace(mixture, updates=())  # copies, which are not needed
        self.layer, self.names, self.dim = layer, names, -_spatial(layer) or None
        self.places = [t for t, name in enumerate(names) if name in layer.lora_A]
        present = [names[t] for t in self.places]
        self.first = [layer.lora_A[name] for name in present]
        self.dropouts = [layer.lora_dropout[name] for name in present]
        self.second = {t: _product(layer.lora_B[names[t]], self.dim) for t in self.places}
        self.weights = [module.weight for module in self.first]
        self.ranks = [len(weight) for weight in self.weights]
        self.drops = any(not isinstance(dropout, nn.Identity) for dropout in self.dropouts)
        dtypes = {weight.dtype for weight in self.weights}
        self.alike = self.dim is None and len(dtypes) == 1 and len(self.weights) > 1

    def __call__(self, x: Tensor, result: Tensor) -> Tensor:
        scaling, factors = self.layer.scaling, self.mixture.factors
        scales = [factors[t] * scaling[self.names[t]] for t in self.places]
        shared = len(set(scales)) == 1
        found = self._inner(x)
        inner = [found[0]] * len(self.names)
        for t, z, scale in zip(self.places, found, scales, strict=True):
            inner[t] = z if shared else z * scale
        scale = scales[0] if shared else 1.0
        return self.mixture.combine(result, inner, lambda t, z: self.second[t](z), self.dim, scale)

    def _inner(self, x: Tensor) -> Sequence[Tensor]:
        """A_t x of the adapters that are present; one product where that is the same."""
        if self.alike and not (self.drops and self.layer.training):
            joined = linear(x, torch.cat(self.weights))
            return joined.split_with_sizes(self.ranks, dim=-1)
        cast = self.layer._cast_input_dtype
        return [
            first(dropout(cast(x, first.weight.dtype)))
            for first, dropout in zip(self.first, self.dropouts, strict=True)
        ]


def _product(module: Any, dim: int | None) -> Callable[[Tensor], Tensor]:
    """A factor's forward pass; of a linear one without what the call of a module costs."""
    return module if dim is not None else partial(linear, weight=module.weight)


def _add(function: Added, x: Tensor, result: Tensor) -> Tensor:
    return add(function, result, x)


def _held(layer: Any) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def _spatial(layer: Any) -> int:
    """How many dimensions the kernel has; 0 for linear layers."""
    return len(getattr(layer.get_base_layer(), "kernel_size", ()))


def _check(key: str, layer: Any, names: Sequence[str]) -> None:
    kinds = {base.__name__ for base in type(layer).__mro__}
    if not kinds & (_LINEAR | _CONVOLUTIONS):
        raise UserError(
            f"{key} is PEFT's {type(layer).__name__}, which takes no run-time merge: leave it out"
            " of the adapters' target_modules, or merge() them and load with PEFT what"
            " save_adapter() writes"
        )
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        raise UserError(
            f"{key} is a convolution in groups, whose outputs are no products of LoRA factors:"
            " leave it out of the adapters' target_modules"
        )
    for name in names:
        variant = layer.lora_variant.get(name)
        kind = type(variant).__name__.removesuffix("Variant")
        # MiCA (arXiv 2604.01694) computes what plain LoRA does: it only trains nothing but A.
        if not (variant is None or isinstance(variant, _Merged) or kind == "MiCALinear"):
            raise UserError(
                f"adapter '{name}' is not plain LoRA but {kind} at {key}, whose output is no sum"
                " that could be masked: train it without, or convert it"
            )
        if layer.lora_bias.get(name):
            raise UserError(
                f"adapter '{name}' has a bias of its own at {key} (lora_bias), which LoRA factors"
                " do not describe: train it without"
            )
        check_loaded(key, layer.lora_A[name].weight)
