"""Solves side by side: as many as memory holds of each width, errors and order kept."""

from __future__ import annotations

import threading

import pytest
import torch

from merge_algorithms import UserError
from osrm.side_by_side import side_by_side


@pytest.mark.parametrize(("fit", "most"), [(0, 1), (1, 1), (2, 2), (9, 3)])
def test_as_many_at_once_as_threads_and_half_the_memory_hold(
    fit: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wide one among them does not keep the narrow ones from running together."""
    wide, narrow = 64, 8
    monkeypatch.setattr("osrm.side_by_side.free_memory", lambda device: 2 * fit * 32 * wide**2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    lock, running, peaks = threading.Lock(), {wide: 0, narrow: 0}, {wide: 0, narrow: 0}
    full = {wide: most, narrow: 3 if fit else 1}
    together = {width: threading.Barrier(count) for width, count in full.items()}

    def solve(key: tuple[int, int]) -> int:
        width, number = key
        with lock:
            running[width] += 1
            peaks[width] = max(peaks[width], running[width])
        together[width].wait(timeout=20)  # not before as many run as should
        with lock:
            running[width] -= 1
        return number

    widths = {(width, i): width for i in range(6) for width in (narrow, wide)}
    found = side_by_side(solve, widths)
    assert list(found.items()) == [(key, key[1]) for key in widths]
    assert peaks == full


def test_an_error_comes_through() -> None:
    def solve(key: str) -> None:
        raise UserError(f"{key} has no energy")

    with pytest.raises(UserError, match="b has no energy"):
        side_by_side(solve, {"b": 3})
