"""The mean of a model's outputs over several draws of its masks, in one batched pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Arguments of transformers' models whose first dimension is a length, which may equal the batch.
NOT_BATCHED = frozenset({"cache_position"})


@contextmanager
def averaged(model: nn.Module, samples: int) -> Iterator[None]:
    """Within the context, `model` returns the mean over `samples` copies of each of its inputs.

    Tensors whose first dimension is that of the first tensor argument are repeated; those of the
    result whose first dimension is the repeated one are averaged, in float32 or wider. Caches keep
    all copies, so generation continues where it was. What does not fit into memory as one batch is
    split, unless the call comes with a cache.
    """
    inner = _unwrapped(model)
    own = inner.__dict__.get("forward")
    forward = inner.forward

    @functools.wraps(forward)
    def sampled(*args: Any, **kwargs: Any) -> Any:
        return _sampled(forward, samples, args, kwargs)

    inner.forward = sampled
    try:
        yield
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, whose generate() does not pass the wrapper's forward()."""
    get = getattr(model, "get_base_model", None)
    inner = get() if callable(get) else model
    return inner if isinstance(inner, nn.Module) else model


def _sampled(forward: Callable[..., Any], samples: int, args: Any, kwargs: dict[str, Any]) -> Any:
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
    sums: list[Tensor] = []
    for done in range(0, samples, share):
        count = min(share, samples - done)
        repeat = functools.partial(_repeat, batch, count)
        repeated = {k: v if k in NOT_BATCHED else _map(v, repeat) for k, v in kwargs.items()}
        output = forward(*_map(args, repeat), **repeated)
        parts = [_sum(batch, count, tensor) for tensor in _tensors(output)]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    totals = iter(sums)
    return _map(output, lambda t: (next(totals) / samples).to(t.dtype))


def _repeat(batch: int, count: int, tensor: Tensor) -> Tensor:
    if tensor.ndim == 0 or len(tensor) != batch:
        return tensor
    return tensor.repeat(count, *[1] * (tensor.ndim - 1))


def _sum(batch: int, count: int, tensor: Tensor) -> Tensor:
    """Over the copies, or of as many values that are common to them."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.ndim == 0 or len(tensor) != count * batch:
        return tensor.to(wide) * count
    return tensor.unflatten(0, (count, batch)).sum(0, dtype=wide)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(tree, note)
    return found


def _map(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of mappings, lists and tuples with changed tensors, all else as it was."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        items = {key: _map(value, change) for key, value in tree.items()}
        return items if type(tree) is dict else type(tree)(**items)
    if isinstance(tree, list | tuple):
        parts = [_map(value, change) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
