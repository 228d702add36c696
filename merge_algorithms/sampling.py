"""The mean of a model's outputs over several draws of its masks, in one batched pass."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from merge_algorithms.modules import forward_replaced

# Arguments of transformers' models whose first dimension is a length, which may equal the batch.
NOT_BATCHED = frozenset({"cache_position", "logits_to_keep"})


@contextmanager
def averaged(model: nn.Module, samples: int) -> Iterator[None]:
    """Within the context, `model` returns the mean over `samples` copies of each of its inputs.

    Tensors whose first dimension is that of the first tensor argument are repeated; those of the
    result whose first dimension is the repeated one are averaged, in float32 or wider. Caches keep
    all copies, so generation continues where it was. What does not fit into memory as one batch is
    split, unless the call comes with a cache.

    A call raises UserError where there is no such mean: integers that differ between the draws,
    states of an encoder that ran once for all of them, or a cache that has lost its copies.
    """
    inner = _called(model)
    forward = inner.forward
    if getattr(forward, "__func__", None) is nn.Module.forward:
        raise UserError(
            f"{type(inner).__name__} has no forward pass whose outputs could be averaged: attach to"
            " the module that is called, or leave out samples"
        )

    @functools.wraps(forward)
    def sampled(*args: Any, **kwargs: Any) -> Any:
        return _sampled(forward, samples, args, kwargs)

    with forward_replaced(inner, sampled):
        yield


def _called(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, whose generate() does not pass the wrapper's forward()."""
    get = getattr(model, "get_base_model", None)
    inner = get() if callable(get) else model
    return inner if isinstance(inner, nn.Module) else model


def _sampled(forward: Callable[..., Any], samples: int, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("encoder_outputs") is not None:
        raise UserError(
            f"the encoder's outputs came with the call, from one draw and not from {samples}: give"
            " samples=1 to generate with an encoder-decoder model"
        )
    share = samples
    while True:
        try:
            return _mean(forward, samples, share, args, kwargs)
        except torch.OutOfMemoryError:
            if share == 1 or kwargs.get("past_key_values") is not None:
                raise
        share = -(-share // 2)


def _mean(
    forward: Callable[..., Any], samples: int, share: int, args: Any, kwargs: dict[str, Any]
) -> Any:
    """The mean of `samples` outputs, at most `share` of them in one batch."""
    batched = {key: value for key, value in kwargs.items() if key not in NOT_BATCHED}
    first = next((t for t in _tensors((args, batched)) if t.ndim), None)
    batch = 1 if first is None else len(first)
    totals: list[Tensor] = []
    for done in range(0, samples, share):
        count = min(share, samples - done)
        _check_cache(kwargs.get("past_key_values"), count * batch)
        repeat = functools.partial(_repeat, batch, count)
        repeated = {k: v if k in NOT_BATCHED else _map(v, repeat) for k, v in kwargs.items()}
        output = forward(*_map(args, repeat), **repeated)
        parts = [_total(batch, count, tensor) for tensor in _tensors(output)]
        totals = [_plus(a, b) for a, b in zip(totals, parts, strict=True)] if totals else parts
    found = iter(totals)
    return _map(output, lambda t: _mean_of(next(found), samples, t))


def _check_cache(cache: Any, rows: int) -> None:
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.numel() and len(keys) != rows:
            raise UserError(
                f"the cache has {len(keys)} rows in place of {rows}: beam search picks rows without"
                " the copies that samples made, so give num_beams=1, or samples=1"
            )


def _repeat(batch: int, count: int, tensor: Tensor) -> Tensor:
    if tensor.ndim == 0 or len(tensor) != batch:
        return tensor
    return tensor.repeat(count, *[1] * (tensor.ndim - 1))


def _total(batch: int, count: int, tensor: Tensor) -> Tensor:
    """The sum over the copies, or of as many values that are common to them."""
    copies = tensor.ndim > 0 and len(tensor) == count * batch
    if not _has_mean(tensor):
        return _common(tensor.unflatten(0, (count, batch))) if copies else tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if not copies:
        return tensor.to(wide) * count
    return tensor.unflatten(0, (count, batch)).sum(0, dtype=wide)


def _plus(total: Tensor, part: Tensor) -> Tensor:
    return total + part if _has_mean(total) else _common(torch.stack([total, part]))


def _mean_of(total: Tensor, samples: int, like: Tensor) -> Tensor:
    return (total / samples).to(like.dtype) if _has_mean(like) else total


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _common(copies: Tensor) -> Tensor:
    """The first of copies (n, ...) that are all the same."""
    if not bool((copies == copies[:1]).all()):
        raise UserError(
            f"an output of type {copies.dtype} differs between the draws, and such have no mean:"
            " let the model return the scores that it was made of, or give samples=1"
        )
    return copies[0]


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(tree, note)
    return found


def _map(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of mappings, sequences and dataclasses with changed tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) is dict:
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, Mapping):
        items = copy.copy(tree)
        for key, value in tree.items():
            items[key] = _map(value, change)  # type: ignore[index]  # those of models take values
        return items
    if isinstance(tree, list | tuple):
        parts = [_map(value, change) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = copy.copy(tree)
        for field in dataclasses.fields(tree):
            value = _map(getattr(tree, field.name), change)
            object.__setattr__(changed, field.name, value)
        return changed
    return tree
