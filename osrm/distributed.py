"""The processes of torch.distributed that measure something together."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from merge_algorithms.errors import UserError

T = TypeVar("T")

# Numbers that are sent at once: matrices go tile by tile.
_TILE = 2**24


class Ranks:
    """All ranks of the default process group; where there is none, one alone, of size 1.

    Every method is to be called on all ranks alike, and those that exchange tensors or values
    only if there are several.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        # Not every backend reads host memory.
        on_host = together and "cpu:" in dist.get_backend_config()
        self._device = torch.device("cuda" if together and not on_host else "cpu")

    def any_left(self, left: bool, failure: Exception | None) -> bool:
        """Whether any rank has work left.

        Raises:
            Exception: `failure` on the rank that it happened on,
            UserError: on all others, so that none waits for a rank that has failed.
        """
        if self.size > 1:
            flags = torch.tensor([left, failure is not None], dtype=torch.int32).to(self._device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            left, failed = map(bool, flags.tolist())
            if failed:
                self._raise_together(failure)
        if failure is not None:
            raise failure
        return left

    def gather(self, value: T) -> list[T]:
        """The value of every rank, by rank; small, it is pickled."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def sum_(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the ranks; the same bits on all of them."""
        for tile in tensor.view(-1).split(_TILE):
            sent = tile.to(self._device)
            dist.all_reduce(sent)
            if sent is not tile:
                tile.copy_(sent)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """`tensor` of rank `source`; the others pass one of its shape and dtype."""
        sent = tensor.to(self._device, copy=True)
        dist.broadcast(sent, source)
        return sent.to(tensor.device)

    def _raise_together(self, failure: Exception | None) -> None:
        messages = self.gather(None if failure is None else str(failure))
        if failure is not None:
            return
        rank, message = next((i, text) for i, text in enumerate(messages) if text is not None)
        raise UserError(f"rank {rank} of {self.size} failed: {message}")
