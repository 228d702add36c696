"""Sums over what modules read: one accumulator per distinct input."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from merge_algorithms.modules import input_of
from osrm.covariance import Covariance
from osrm.distributed import Ranks
from osrm.sketch import Moments, Sketch, compress, mirror_
from osrm.spill import Storage
from osrm.tokens import TokenSelector


class _Gram:
    """H^T H, (d, d). Only the upper triangle is summed, in panels of rows: half the work."""

    def __init__(self, width: int, storage: Storage, device: torch.device) -> None:
        self._sum = storage.zeros(width, width, device)
        self._panel = 128 if width <= 1024 else 256  # fast on CPUs for the widths of common models

    def add(self, rows: Tensor) -> None:
        for start in range(0, rows.shape[1], self._panel):
            stop = start + self._panel
            panel = self._sum[start:stop, start:]
            left, right = rows[:, start:stop].T, rows[:, start:]
            if panel.device == rows.device:
                panel.addmm_(left, right)
            else:
                panel.add_((left @ right).to(panel.device))

    def pool(self, ranks: Ranks) -> None:
        ranks.sum_(self._sum)

    def result(self, count: int) -> Tensor:
        self._sum.div_(count)
        mirror_(self._sum)
        return self._sum.cpu()


class _SketchedGram:
    """The top k directions of H^T H, from a buffer of rows.

    It keeps 2 k rows when it is full, and k in the end: a direction that shows slowly is not lost
    at once, which makes the error several times smaller.
    """

    def __init__(self, width: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self._k = k
        self._buffer = torch.empty(buffer_rows(k), width, dtype=dtype, device=device)
        self._filled = 0
        self._trace = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        self._trace += rows.square().sum(1).sum(dtype=torch.float64)
        self._append(rows)

    def pool(self, ranks: Ranks) -> None:
        self._compress(2 * self._k)
        own = self._buffer[: self._filled].clone()
        self._filled = 0
        for rank, count in enumerate(ranks.gather(len(own))):
            theirs = own if rank == ranks.rank else own.new_empty(count, own.shape[1])
            self._append(ranks.broadcast(theirs, rank))
        ranks.sum_(self._trace)

    def result(self, count: int) -> Sketch:
        self._compress(self._k)
        rows = self._buffer[: self._filled] / count**0.5
        return Sketch.of(rows.cpu(), float(self._trace) / count, self._k)

    def _append(self, rows: Tensor) -> None:
        while len(rows):
            if self._filled == len(self._buffer):
                self._compress(2 * self._k)
            taken = rows[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rows = rows[len(taken) :]

    def _compress(self, most: int) -> None:
        top = compress(self._buffer[: self._filled], most)
        self._buffer[: len(top)] = top
        self._filled = len(top)


_Moment = _Gram | _SketchedGram


def buffer_rows(k: int) -> int:
    """Rows that a sketch's buffer holds."""
    return 2 * k + max(k, 128)


def moment_bytes(width: int, sketch: int | None, dtype: torch.dtype) -> int:
    """Memory of one accumulator with its sum."""
    rows = width if sketch is None or width <= sketch else buffer_rows(sketch)
    return (rows + 1) * width * dtype.itemsize


@dataclass
class _Input:
    """What is known of one distinct input."""

    moment: _Moment
    total: Tensor
    count: int = 0
    positions: int = 0


class Accumulator:
    """Sums per distinct input; the first module that reads an input gives it its key.

    Args:
        selector: Says which positions are tokens.
        storage: Makes the accumulators.
        sketch: Keep so many directions of inputs that are wider, instead of all.
    """

    def __init__(self, selector: TokenSelector, storage: Storage, sketch: int | None) -> None:
        self._select = selector.select
        self._storage = storage
        self._sketch = sketch
        self._modules: dict[str, str] = {}
        self._inputs: dict[str, _Input] = {}
        self._batch: int | None = None
        # id of a tensor read in this batch -> (weak reference, version, key). A tensor that is
        # alive and not written to since is the same input; a dead one may have passed on its id.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._read: set[str] = set()
        self._finite: dict[str, Tensor] = {}
        self._failure: UserError | RuntimeError | None = None

    def start(self, batch: int | None) -> None:
        """A batch begins; with None it is not counted."""
        self._batch = batch
        self._seen.clear()
        self._read.clear()
        self._finite.clear()

    def see(
        self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        """Forward pre-hook of the module `name`, with keywords.

        What is wrong with the input waits for `finish`: an error in the middle of the forward pass
        of a sharded model would leave the other ranks waiting in theirs.
        """
        if self._batch is None or self._failure is not None:
            return
        try:
            self._see(name, input_of(args, kwargs))
        except (UserError, RuntimeError) as error:
            self._failure = error

    def finish(self) -> None:
        """The batch is over.

        Raises:
            UserError: an input was not finite, or the mask did not fit it.
            RuntimeError: modules shared an input in another batch, but not in this one.
        """
        # One look at all sums: each would make a GPU wait. Modules may lie on several.
        sums = list(self._finite.values())
        finite = torch.stack([each.to(sums[0].device) for each in sums]).tolist() if sums else []
        for key, is_finite in zip(self._finite, finite, strict=True):
            if not is_finite:
                raise UserError(
                    f"the input of {key} has a NaN or infinite value in batch {self._batch}: check"
                    " the data and the model's weights, or load the model in float32"
                )
        if self._failure is not None:
            raise self._failure

    def _see(self, name: str, x: Tensor) -> None:
        reference, version, key = self._seen.get(id(x), (None, 0, name))
        if reference is None or reference() is not x or version != x._version:
            tokens = self._select(x, name, name in self._read)
            if tokens is None:
                return
            key = name
            self._seen[id(x)] = (weakref.ref(x), x._version, key)
            self._add(key, x, tokens)
        self._read.add(name)
        if self._modules.setdefault(name, key) != key:
            raise RuntimeError(
                f"{name} reads the input of {key} in batch {self._batch} and that of"
                f" {self._modules[name]} before: leave it out of the target modules"
            )

    def _add(self, key: str, x: Tensor, tokens: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        total = flat.sum(0, dtype=self._storage.dtype)
        finite = total.isfinite().all()
        self._finite[key] = finite & self._finite[key] if key in self._finite else finite
        found = self._inputs.get(key) or self._new(key, len(total), x.device)
        found.moment.add(tokens.to(self._storage.dtype))
        found.total += total
        found.count += len(tokens)
        found.positions += len(flat)

    def _new(self, key: str, width: int, device: torch.device) -> _Input:
        dtype = self._storage.dtype
        moment: _Moment
        if self._sketch is None or width <= self._sketch:
            moment = _Gram(width, self._storage, device)
        else:
            moment = _SketchedGram(width, self._sketch, dtype, device)
        total = torch.zeros(width, dtype=dtype, device=device)
        self._inputs[key] = _Input(moment, total)
        return self._inputs[key]

    def pool(self, ranks: Ranks, device: torch.device) -> None:
        """Replace the sums by those over all ranks.

        Args:
            ranks: All.
            device: For inputs that only other ranks have seen.

        Raises:
            UserError: on every rank, if modules share an input on one rank but not on another.
        """
        if ranks.size == 1:
            return
        sizes = {key: (len(x.total), x.count, x.positions) for key, x in self._inputs.items()}
        everywhere = ranks.gather((self._modules, sizes))
        modules: dict[str, str] = {}
        counts: dict[str, list[int]] = {}
        for rank, (theirs, their_sizes) in enumerate(everywhere):
            for name, key in theirs.items():
                if modules.setdefault(name, key) != key:
                    raise UserError(
                        f"{name} reads the input of {key} on rank {rank} and that of"
                        f" {modules[name]} before: leave it out of the target modules"
                    )
            for key, size in their_sizes.items():
                known = counts.setdefault(key, [size[0], 0, 0])
                known[1] += size[1]
                known[2] += size[2]
        self._modules = modules
        for key, (width, count, positions) in counts.items():
            found = self._inputs.get(key) or self._new(key, width, device)
            found.moment.pool(ranks)
            ranks.sum_(found.total)
            found.count, found.positions = count, positions

    def result(self, names: list[str], meta: dict[str, str]) -> Covariance:
        """The covariance of the modules `names`.

        Raises:
            UserError: a module has read no token.
        """
        for name in names:
            key = self._modules.get(name)
            if key is None or not self._inputs[key].count:
                raise UserError(
                    f"{name} read no real token in any batch: leave it out of the target modules"
                    " or check the attention masks"
                )
        means, matrices = {}, {}
        for key, found in self._inputs.items():
            means[key] = (found.total / found.positions).cpu()
            matrices[key] = found.moment.result(found.count)
        return Covariance(
            Moments(matrices),
            means,
            {name: self._modules[name] for name in names},
            {key: found.count for key, found in self._inputs.items()},
            {key: found.positions for key, found in self._inputs.items()},
            meta,
        )
