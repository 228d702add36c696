"""Low-rank factors and files against their definitions."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from merge_algorithms import LowRank, UserError
from merge_algorithms.factors import stack, truncate
from merge_algorithms.files import atomic_directory, atomic_file
from merge_algorithms.tiles import Tiled, row_tiles

few = settings(max_examples=25, deadline=None)


@st.composite
def low_rank(draw: st.DrawFn, shape: tuple[int, int]) -> LowRank:
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rank = draw(st.integers(1, 6))
    b = torch.randn(shape[0], rank, generator=numbers, dtype=torch.float64)
    return LowRank(b, torch.randn(rank, shape[1], generator=numbers, dtype=torch.float64))


shapes = st.tuples(st.integers(1, 10), st.integers(1, 10))


@few
@given(data=st.data(), shape=shapes)
def test_stacking_is_the_weighted_sum(data, shape):
    x, y = data.draw(low_rank(shape)), data.draw(low_rank(shape))
    both = stack([x, y], [2.0, -0.5])
    assert both.rank == x.rank + y.rank
    torch.testing.assert_close(both.dense(), 2.0 * x.dense() - 0.5 * y.dense())


@few
@given(data=st.data(), shape=shapes, rank=st.integers(1, 12))
def test_truncation_is_eckart_youngs_for_both_representations(data, shape, rank):
    x = data.draw(low_rank(shape))
    dense = Tiled(shape, x.rows, copies=1)
    s = torch.linalg.svdvals(x.dense())
    total = float((s**2).sum())
    for update in (x, dense):
        best, lost = truncate(update, rank)
        assert best.rank <= rank
        expected = float((s[rank:] ** 2).sum()) / total
        assert lost == pytest.approx(expected, abs=1e-10)
        error = float((best.dense() - x.dense()).square().sum()) / total
        assert error == pytest.approx(expected, abs=1e-10)


def test_truncating_zero_and_bad_ranks():
    zero = LowRank(torch.zeros(4, 3), torch.zeros(3, 5))
    for update in (zero, Tiled((4, 5), zero.rows, copies=1)):
        best, lost = truncate(update, 1)
        assert lost == 0.0
        assert not best.dense().any()
    with pytest.raises(UserError, match="rank 0"):
        truncate(zero, 0)


@few
@given(rows=st.integers(1, 5000), width=st.integers(1, 3000), copies=st.integers(1, 9))
def test_row_tiles_cover_every_row_once(rows, width, copies):
    covered = [i for start, stop in row_tiles((rows, width), copies) for i in range(start, stop)]
    assert covered == list(range(rows))


def test_low_rank_views():
    x = LowRank(torch.arange(6.0).reshape(3, 2), torch.eye(2, 4))
    assert x.shape == (3, 4)
    assert x.rank == 2
    torch.testing.assert_close(x.rows(1, 3), x.dense()[1:3])
    torch.testing.assert_close(x.scaled(-2.0).dense(), -2.0 * x.dense())
    assert x.to("cpu", torch.float64).a.dtype == torch.float64
    assert x.to("cpu", torch.float16).a.dtype == torch.float32


def interrupted(writer) -> None:
    """Write through `writer`, a context manager, and be interrupted half way."""
    with writer as path:
        (path / "x" if path.is_dir() else path).write_text("half")
        raise KeyboardInterrupt


def test_files_appear_complete_or_not_at_all(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(atomic_file(tmp_path / "f"))
    with pytest.raises(KeyboardInterrupt):
        interrupted(atomic_directory(tmp_path / "d"))
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with atomic_file(tmp_path / "f") as path:
        path.write_text("new")
    assert (tmp_path / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_directories_are_replaced_only_when_asked_and_as_a_whole(tmp_path):
    with atomic_directory(tmp_path / "d") as path:
        (path / "x").write_text("one")
    with pytest.raises(UserError, match="already exists"), atomic_directory(tmp_path / "d"):
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupted(atomic_directory(tmp_path / "d", overwrite=True))
    assert (tmp_path / "d" / "x").read_text() == "one"
    with atomic_directory(tmp_path / "d", overwrite=True) as path:
        (path / "y").write_text("two")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_directory_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("one")
    replace = Path.replace

    def fail_to_move_in(self, target):
        if target == tmp_path / "d" and (self / "y").exists():
            raise OSError("disk error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_to_move_in)

    def attempt() -> None:
        with atomic_directory(tmp_path / "d", overwrite=True) as path:
            (path / "y").write_text("two")

    with pytest.raises(OSError, match="disk error"):
        attempt()
    assert (tmp_path / "d" / "x").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("interrupted_at", ["retiring", "moving in"])
def test_an_interrupt_between_the_two_renames_loses_nothing(tmp_path, monkeypatch, interrupted_at):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("one")
    replace = Path.replace

    def replace_and_be_interrupted(self, target):
        incoming = (self / "y").exists()
        moved = replace(self, target)
        if incoming == (interrupted_at == "moving in"):
            monkeypatch.setattr(Path, "replace", replace)
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "replace", replace_and_be_interrupted)

    def attempt() -> None:
        with atomic_directory(tmp_path / "d", overwrite=True) as path:
            (path / "y").write_text("two")

    with pytest.raises(KeyboardInterrupt):
        attempt()
    kept = {"retiring": "x", "moving in": "y"}[interrupted_at]
    assert [p.name for p in (tmp_path / "d").iterdir()] == [kept]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_the_only_copy_survives_when_it_cannot_come_back(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("one")
    replace = Path.replace

    def fail_to_arrive(self, target):
        if target == tmp_path / "d":
            raise OSError("disk error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_to_arrive)

    def attempt() -> None:
        with atomic_directory(tmp_path / "d", overwrite=True) as path:
            (path / "y").write_text("two")

    with pytest.raises(OSError, match="disk error"):
        attempt()
    assert [p.read_text() for p in tmp_path.rglob("x")] == ["one"]
