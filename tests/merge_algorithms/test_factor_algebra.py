"""Low-rank factors against their definitions."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from merge_algorithms import Adapter, LowRank, UserError, merge
from merge_algorithms.factors import compact, left_vectors, polar, stack, svd, truncate
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
    assert both.rank == min(x.rank + y.rank, *shape)
    torch.testing.assert_close(both.dense(), 2.0 * x.dense() - 0.5 * y.dense())


@pytest.mark.parametrize(("count", "eps"), [(2, 1e-7), (8, 3e-7), (8, 1e-3)])
def test_what_is_left_of_a_sum_that_cancels_is_truncated_as_well(count, eps):
    """Copies of one A that hardly moved, under opposite weights."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 64, generator=draw), torch.randn(64, 8, generator=draw)
    updates = [LowRank(b, a + eps * torch.randn(8, 64, generator=draw)) for _ in range(count)]
    difference = stack(updates, [1.0, -1.0] * (count // 2))
    best, lost = truncate(difference.to("cpu", torch.float64), 8)
    exact = difference.b.double() @ difference.a.double()
    energies = torch.linalg.svdvals(exact).square()
    optimum = float(energies[8:].sum() / energies.sum())
    assert lost == pytest.approx(optimum, abs=1e-6)
    error = float((best.dense() - exact).square().sum() / energies.sum())
    assert error == pytest.approx(optimum, abs=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("shape", [(320, 256), (256, 320)])
def test_a_few_of_many_dimensions_of_a_dense_update_are_the_best_ones(shape, decay):
    draw = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(d, 256, generator=draw, dtype=torch.float64)).Q for d in shape
    )
    s = torch.exp(-decay * torch.arange(256.0, dtype=torch.float64))
    dense = (u * s) @ v.T
    best, lost = truncate(Tiled(shape, lambda start, stop: dense[start:stop], 1), 6)
    optimum = float(s[6:].square().sum() / s.square().sum())
    assert lost == pytest.approx(optimum, abs=1e-9)
    error = float((best.dense() - dense).square().sum() / s.square().sum())
    assert error == pytest.approx(optimum, abs=1e-9)
    assert best.rank == 6


class Largest(TorchDispatchMode):
    """Notes the entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (96, 64)])
def test_more_ranks_than_dimensions_are_summed_up_in_place(shape):
    draw = torch.Generator().manual_seed(0)
    updates = [
        LowRank(torch.randn(shape[0], 8, generator=draw), torch.randn(8, shape[1], generator=draw))
        for _ in range(256)
    ]
    w = torch.linspace(-1, 2, 256, dtype=torch.float64)
    with Largest() as largest:
        total = stack(updates, w.tolist())
    assert largest.entries <= shape[0] * shape[1]
    assert total.rank == 64
    expected = sum(x * u.b.double() @ u.a.double() for x, u in zip(w, updates, strict=True))
    assert (total.dense() - expected).norm() <= 1e-6 * expected.norm()
    best, lost = truncate(total, 8)
    energies = torch.linalg.svdvals(expected).square()
    assert lost == pytest.approx(float(energies[8:].sum() / energies.sum()), abs=1e-6)
    error = (best.dense() - expected).square().sum() / energies.sum()
    assert float(error) == pytest.approx(lost, abs=1e-6)


def test_many_adapters_merge_and_save_at_full_rank(tmp_path):
    draw = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            f"t{t}",
            {"m": LowRank(torch.randn(16, 4, generator=draw), torch.randn(4, 12, generator=draw))},
        )
        for t in range(20)
    ]
    merged = merge(adapters)
    assert merged.ranks == {"m": 80}
    assert merged.save_adapter(tmp_path / "out") == {"m": 0.0}
    loaded = Adapter.load(tmp_path / "out").updates["m"]
    assert loaded.rank == 12
    torch.testing.assert_close(loaded.dense(), merged.updates["m"].dense())


@few
@given(data=st.data(), shape=shapes, repeats=st.integers(1, 3))
def test_singular_triplets_stop_at_the_numerical_rank(data, shape, repeats):
    x = data.draw(low_rank(shape))
    wide = LowRank(torch.cat([x.b] * repeats, 1), torch.cat([x.a] * repeats))
    u, s, v = svd(wide)
    k = int(torch.linalg.matrix_rank(x.dense(), rtol=1e-6))
    assert len(s) == k
    torch.testing.assert_close(s, repeats * torch.linalg.svdvals(x.dense())[:k])
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(v.T @ v, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(u * s @ v.T, repeats * x.dense())
    assert len(svd(wide, scale=1e9 * float(s[0])).s) == 0
    same = compact(wide)
    assert same.rank == min(wide.rank, *shape)
    torch.testing.assert_close(same.dense(), wide.dense())


@few
@given(data=st.data(), shape=shapes)
def test_left_vectors_span_the_columns_and_have_fixed_signs(data, shape):
    x = data.draw(low_rank(shape)).dense()
    u = left_vectors(x)
    torch.testing.assert_close(u @ (u.T @ x), x)
    torch.testing.assert_close(left_vectors(-x), u)
    assert (u.max(0).values >= -u.min(0).values - 1e-12).all()


def test_left_vectors_of_nothing_are_one_direction():
    for width in (0, 3):
        u = left_vectors(torch.zeros(4, width, dtype=torch.float64))
        assert u.shape == (4, 1)
        assert float(u.norm()) == pytest.approx(1.0)


@few
@given(data=st.data(), shape=shapes)
def test_polar_factors_are_the_nearest_partial_isometries(data, shape):
    x = data.draw(low_rank(shape)).dense()
    k = int(torch.linalg.matrix_rank(x, rtol=1e-6))
    found = polar(x)
    singular = torch.linalg.svdvals(found)
    torch.testing.assert_close(singular[:k], torch.ones(k, dtype=torch.float64))
    assert float(singular[k:].sum()) < 1e-9
    # x = found (x^T x)^(1/2): the nuclear norm is the inner product with the polar factor.
    assert float((found * x).sum()) == pytest.approx(float(torch.linalg.svdvals(x).sum()))


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
