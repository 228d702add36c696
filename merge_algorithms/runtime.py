"""Merging while a model runs: adapters attached to its modules, the weights left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from merge_algorithms.adapter import Adapter
from merge_algorithms.errors import UserError
from merge_algorithms.mixture import FRESH, Mixture, Words
from merge_algorithms.modules import (
    check_loaded,
    find_modules,
    forward_replaced,
    input_of,
    unwrapped,
)
from merge_algorithms.precision import full_precision
from merge_algorithms.registry import Method, get_method
from merge_algorithms.sampling import averaged
from merge_algorithms.task_vectors import TaskVectors, align

Added = Callable[[Tensor], Tensor]
Masks = Literal["fresh"] | int

_attached: WeakSet[nn.Module] = WeakSet()


@contextmanager
def attach(
    model: nn.Module,
    adapters: Sequence[Adapter] | Sequence[str],
    method: str = "orthogonal_mc_dropout",
    weights: Sequence[float] | None = None,
    masks: Masks = "fresh",
    samples: int = 1,
    **options: Any,
) -> Iterator[nn.Module]:
    """Within the context, `model` adds the adapters' merged outputs; afterwards it is as before.

    On a bare base model what is added is computed in the adapters' float32 (or wider), also under
    autocast, and rounded once, with the sum, to the dtype of the module's output. In a model that
    holds PEFT LoRA layers (a PeftModel, or one that transformers or diffusers loaded adapters
    into) they compute as they do otherwise, with PEFT's precision, scales and dropout; only the
    named adapters act, whichever are active outside; of their heads (modules_to_save of a
    classifier), the active adapter's. Gradients flow through to the input, and to
    PEFT's factors where these require them. Works with caches of keys and values, compiled, and
    in DistributedDataParallel.

    Args:
        model: The bare base model, its modules named as in the adapters; or any module with PEFT
            LoRA layers inside.
        adapters: Any number of adapters of the bare model; or the names of adapters that PEFT has
            loaded into it.
        method: 'direct', 'mc_dropout' or 'orthogonal_mc_dropout' (arXiv 2510.03262), or any
            registered run-time method.
        weights: One w_t per adapter, 1 by default.
        masks: 'fresh': new in every call, from torch's own generator of the device. A seed makes
            the whole sequence reproducible: still new in every call, and the same in the next
            context with that seed. Activation checkpointing needs fresh masks, which it draws
            again for its second forward pass.
        samples: K > 1 averages the outputs of `model` over K draws of the masks, in one batch of K
            copies of its inputs, or in as few as fit into memory. For models whose arguments and
            results have the batch as their first dimension.
        **options: The method's options, such as drop_rates (one p_t per adapter).

    Yields:
        The same model.

    Raises:
        UserError: As for `merge`; a module that the model lacks, or of a kind that run-time merging
            does not cover; a name that PEFT has not loaded; adapters that are merged into the
            weights; DoRA and other variants that compute more than LoRA does; a model that is
            attached to already. The model is then untouched.
    """
    inner = unwrapped(model)
    chosen = get_method(method, runtime=True)
    values = chosen.check_options(options)
    chosen.check_count(len(adapters))
    _check_samples(chosen, samples)
    seed = _seed(chosen, masks)
    with ExitStack() as stack:
        if all(isinstance(adapter, Adapter) for adapter in adapters):
            # Read as bare only if all are adapters; an empty list is refused by align().
            bare = [adapter for adapter in adapters if isinstance(adapter, Adapter)]
            tasks = align(bare, weights, seed)
            modules = _modules(inner, tasks)
            added = _added(chosen, values, _local(tasks, modules), masks)
            _claim(stack, modules)
            for name, function in added.items():
                if isinstance(function, Mixture):
                    _ = function.stacked
                merged = partial(_added_to, modules[name].forward, function)
                stack.enter_context(forward_replaced(modules[name], merged))
        else:
            # PEFT is loaded already where a model has its layers, and not needed otherwise.
            from merge_algorithms import runtime_peft

            names = runtime_peft.check_names(adapters)
            layers = runtime_peft.find_layers(inner, names)
            tasks = align(runtime_peft.as_adapters(inner, layers, names), weights, seed)
            added = _added(chosen, values, tasks, masks)
            runtime_peft.check_kinds(layers, added)
            _claim(stack, runtime_peft.lora_layers(inner))
            for name, function in added.items():
                runtime_peft.install(stack, layers[name], names, function)
            runtime_peft.silence(stack, inner, layers)
        if samples > 1:
            stack.enter_context(averaged(inner, samples))
        yield model


def _added(
    method: Method, options: dict[str, Any], tasks: TaskVectors, masks: Masks
) -> dict[str, Mixture | Added]:
    """The method's functions by module; mixtures get words of their own where there is a seed."""
    functions: dict[str, Mixture | Added] = method.function(tasks, **options)
    for name, function in functions.items():
        if isinstance(function, Mixture):
            words = FRESH if masks == "fresh" else Words(partial(tasks.generator, name))
            functions[name] = replace(function, words=words).restricted()
    return functions


def _modules(model: nn.Module, tasks: TaskVectors) -> dict[str, nn.Module]:
    """The linear modules of a bare model that the updates are for."""
    if tasks.layouts:
        module, layout = next(iter(tasks.layouts.items()))
        raise UserError(
            f"{module} is {layout}, and merging at run time works on linear modules: use merge(),"
            " or load the adapters with PEFT and name them"
        )
    shapes = {module: updates[0].shape for module, updates in tasks.modules.items()}
    return find_modules(model, shapes)


def _local(tasks: TaskVectors, modules: dict[str, nn.Module]) -> TaskVectors:
    """The updates where the modules are."""
    local = {}
    for name, updates in tasks.modules.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        device = check_loaded(name, weight).device
        local[name] = tuple(update.to(device) for update in updates)
    return replace(tasks, modules=local)


def _added_to(
    forward: Callable[..., Tensor], function: Mixture | Added, *args: Tensor, **kwargs: Tensor
) -> Tensor:
    return add(function, forward(*args, **kwargs), input_of(args, kwargs))


def add(function: Mixture | Added, output: Tensor, x: Tensor) -> Tensor:
    """A linear module's output plus what the function makes of its input, in full precision."""
    with full_precision(output.device):
        if isinstance(function, Mixture):
            return function.onto(output, x)
        return (output + function(x)).to(output.dtype)


def _claim(stack: ExitStack, modules: dict[str, Any]) -> None:
    """Refuse modules that another context is using, and free these when this one ends."""
    for name, module in modules.items():
        if module in _attached:
            raise UserError(
                f"{name} has adapters attached already, and merges do not nest: leave that context"
                " first, or name all adapters in one"
            )
    for module in modules.values():
        _attached.add(module)
        stack.callback(_attached.discard, module)


def _seed(method: Method, masks: Masks) -> int:
    if masks != "fresh" and (isinstance(masks, bool) or not isinstance(masks, int)):
        raise UserError(f"masks={masks!r} is not possible: give 'fresh' or a seed, an integer")
    if masks != "fresh":
        return masks
    return int(torch.randint(2**62, ())) if method.seeded else 0


def _check_samples(method: Method, samples: int) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise UserError(f"{samples!r} samples are not possible: give an integer of at least 1")
    if samples > 1 and not method.seeded:
        raise UserError(
            f"method '{method.name}' draws no masks, so all of {samples} samples would be the same:"
            " leave out samples"
        )
