"""Merging while a model runs: adapters attached to its modules, the weights left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merge_algorithms.adapter import Adapter
from merge_algorithms.errors import UserError
from merge_algorithms.modules import check_loaded, find_modules
from merge_algorithms.precision import full_precision
from merge_algorithms.registry import get_method
from merge_algorithms.task_vectors import align


@contextmanager
def attach(
    model: nn.Module,
    adapters: Sequence[Adapter],
    method: str = "orthogonal_mc_dropout",
    weights: Sequence[float] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Iterator[nn.Module]:
    """Within the context, `model` adds the adapters' merged outputs; afterwards it is as before.

    What is added is computed in the adapters' float32 (or wider), also under autocast, and rounded
    once, with the sum, to the dtype of the module's output. Gradients flow through it to the
    input. Do not combine a seeded method with activation checkpointing: the recomputation in the
    backward pass draws other masks than the forward pass did, and the gradients are wrong.

    Args:
        model: The bare base model (not wrapped by PEFT), its modules named as in the adapters.
        adapters: Any number of adapters of that model.
        method: 'direct', 'mc_dropout' or 'orthogonal_mc_dropout' (arXiv 2510.03262), or any
            registered run-time method.
        weights: One w_t per adapter, 1 by default.
        seed: Makes the sequence of masks reproducible; None draws a seed from torch's generator.
        **options: The method's options, such as drop_rates (one p_t per adapter).

    Yields:
        The same model. Masks are fresh in every call; average the predictions of several calls
        for a Monte Carlo estimate.

    Raises:
        UserError: As for `merge`, or a module that is not linear or that the model lacks; the
            model is then untouched.
    """
    chosen = get_method(method, runtime=True)
    values = chosen.check_options(options)
    chosen.check_count(len(adapters))
    if seed is None and chosen.seeded:
        seed = int(torch.randint(2**62, ()))
    tasks = align(adapters, weights, seed or 0)
    if tasks.layouts:
        module, layout = next(iter(tasks.layouts.items()))
        raise UserError(
            f"{module} is {layout}, and merging at run time works on linear modules: use merge()"
        )
    shapes = {module: updates[0].shape for module, updates in tasks.modules.items()}
    modules = find_modules(model, shapes)
    local = {}
    for name, updates in tasks.modules.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        device = check_loaded(name, weight).device
        local[name] = tuple(update.to(device) for update in updates)
    added = chosen.function(replace(tasks, modules=local), **values)
    with ExitStack() as hooks:
        for name, function in added.items():
            hook = partial(_add, function)
            handle = modules[name].register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield model


def _add(
    function: Callable[[Tensor], Tensor],
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    with full_precision(output.device):
        return (output + function(x)).to(output.dtype)
