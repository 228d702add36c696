"""What no method may hold at a time: T dense updates, or one where factors will do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from formulas.case import Case
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from merge_algorithms import Adapter, EmrBundle, merge, methods, tiles

T, RANK = 4, 2
SHAPE = D_OUT, D_IN = 192, 128
DENSE = 4 * D_OUT * D_IN  # bytes of one update
TILE = DENSE // 8


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that exist at once, and the numbers of entries of the largest ones.

    Only memory that operations return is seen, and only what was allocated under the mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.shapes: set[tuple[int, ...]] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.shapes.add(tuple(tensor.shape))
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result

    @property
    def largest(self) -> int:
        """Entries of the largest tensor."""
        return max((torch.Size(shape).numel() for shape in self.shapes), default=0)


def is_tensor(thing: object) -> bool:
    return isinstance(thing, Tensor)


def settings(case: Case, adapters: list[Adapter]) -> Iterator[dict[str, Any]]:
    """Every setting that the contract knows; lists have an entry for each of four adapters."""
    read = {"statistics": case.statistics(adapters)} if case.statistics else {}
    for options in case.options:
        yield {
            k: v[: len(adapters)] if isinstance(v, list) else v for k, v in options.items()
        } | read


def test_what_is_measured(random_adapter):
    """All dense updates at once are seen, and so is one after the other."""
    adapters = [random_adapter(f"t{t}", {"m": SHAPE}, RANK, seed=t) for t in range(T)]
    with Allocations() as seen:
        torch.stack([a.updates["m"].dense() for a in adapters]).sum(0)
    assert seen.peak >= 2 * T * DENSE
    assert seen.largest == T * D_OUT * D_IN
    with Allocations() as seen:
        for adapter in adapters:
            adapter.updates["m"].dense()
    assert seen.peak < 2 * DENSE
    assert seen.largest == D_OUT * D_IN


def test_no_method_holds_what_it_need_not(case, random_adapter, monkeypatch):
    """Dense methods: no more than eight times the tile that all tasks share, however large the
    module is. Low-rank methods: no matrix of the module's size.
    """
    monkeypatch.setattr(tiles, "TILE_BYTES", TILE)
    method = methods()[case.method]
    count = method.adapters or T
    adapters = [random_adapter(f"t{t}", {"m": SHAPE}, RANK, seed=t) for t in range(count)]
    for options in settings(case, adapters):
        with Allocations() as seen:
            update = merge(adapters, case.method, **options).updates["m"]
            if not method.low_rank:
                for start, stop in list(tiles.row_tiles(SHAPE))[:3]:
                    update.rows(start, stop)
        if method.low_rank:
            assert seen.largest < D_OUT * D_IN, options
        else:
            assert seen.peak <= 8 * TILE, options
            assert seen.peak > TILE / 2, options


def test_an_emr_bundle_takes_one_update_and_its_masks(random_adapter, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", TILE)
    adapters = [random_adapter(f"t{t}", {"m": SHAPE}, RANK, seed=t) for t in range(T)]
    with Allocations() as seen:
        EmrBundle.build(adapters)
    assert DENSE < seen.peak <= DENSE * (1 + T / 32) + 8 * TILE


def test_a_bundle_is_written_from_one_copy(random_adapter, tmp_path):
    modules = [f"m{i}" for i in range(4)]
    adapters = [random_adapter(f"t{t}", dict.fromkeys(modules, SHAPE), RANK, t) for t in range(T)]
    bundle = EmrBundle.build(adapters)
    with Allocations() as seen:
        bundle.save(tmp_path / "bundle")
    assert seen.peak <= (len(modules) + 1) * DENSE


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_a_threshold_takes_no_more_at_a_high_rank(random_adapter, monkeypatch, method):
    """Its sample, 20 rows of the rank times as many numbers, is evaluated in parts."""
    monkeypatch.setattr(tiles, "TILE_BYTES", TILE)
    with Allocations() as seen:
        merge([random_adapter("t", {"m": SHAPE}, rank=16)], method)
    assert seen.peak <= 8 * TILE


def test_256_adapters(case, random_adapter):
    """Many more ranks than dimensions: nothing but the number of updates that take part changes."""
    count = methods()[case.method].adapters or 256
    shapes = {"m": (6, 5), "n": (4, 7)}
    adapters = [random_adapter(f"t{t}", shapes, rank=1, seed=t) for t in range(count)]
    more = {"statistics": case.statistics(adapters)} if case.statistics else {}
    merged = merge(adapters, case.method, **more)
    for module, update in merged.updates.items():
        rows = update.rows(0, update.shape[0])
        assert rows.shape == shapes[module]
        assert rows.isfinite().all()
        assert rows.any()
