"""Diagnostics from the factors against their definitions on dense float64 updates."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from merge_algorithms import Adapter, LowRank, UserError
from merge_algorithms.factors import stack
from merge_algorithms.similarity import (
    chance_cosine,
    cosines,
    inner_products,
    rank_use,
    rms_cosine,
    sign_conflicts,
    singular_values,
)

few = settings(max_examples=25, deadline=None)
SHAPES = {"h.0.q": (9, 7), "h.0.v": (5, 7), "h.1.q": (9, 4)}


def dense(adapter: Adapter, module: str) -> torch.Tensor:
    if module not in adapter.updates:
        return torch.zeros(SHAPES[module], dtype=torch.float64)
    update = adapter.updates[module]
    return update.b.double() @ update.a.double()


@st.composite
def adapter_lists(draw: st.DrawFn) -> list[Adapter]:
    """Different ranks, scales and target modules; every module is somebody's."""
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    adapters = []
    for t in range(draw(st.integers(1, 4))):
        chosen = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1)) if t else SHAPES
        scale = 10.0 ** draw(st.integers(-4, 3))
        updates = {}
        for module in sorted(chosen):
            d_out, d_in = SHAPES[module]
            rank = draw(st.integers(1, 6))
            b = scale * torch.randn(d_out, rank, generator=numbers)
            updates[module] = LowRank(b, torch.randn(rank, d_in, generator=numbers))
        adapters.append(Adapter(f"t{t}", updates))
    return adapters


@few
@given(adapter_lists())
def test_inner_products_and_cosines(adapters):
    products, found = inner_products(adapters), cosines(adapters)
    assert set(products) == set(found) == set(SHAPES)
    for module in SHAPES:
        flat = torch.stack([dense(adapter, module).flatten() for adapter in adapters])
        length = flat.norm(dim=1)
        scale = length[:, None] * length
        assert products[module].dtype == torch.float64
        assert ((products[module] - flat @ flat.T).abs() <= 1e-12 * scale).all()
        expected = flat @ flat.T / scale  # 0/0 is NaN where a module is missing
        torch.testing.assert_close(found[module], expected, rtol=0, atol=1e-12, equal_nan=True)
        assert (found[module].diagonal()[length > 0] == 1).all()


@few
@given(adapter_lists())
def test_rms_cosine_is_over_the_modules_that_both_change(adapters):
    rms = rms_cosine(cosines(adapters))
    for i, one in enumerate(adapters):
        for j, other in enumerate(adapters):
            squares = []
            for module in one.updates.keys() & other.updates.keys():
                x, y = dense(one, module), dense(other, module)
                squares.append(float((x * y).sum() / (x.norm() * y.norm())) ** 2)
            expected = math.sqrt(sum(squares) / len(squares)) if squares else math.nan
            assert float(rms[i, j]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_adapters_without_a_common_module_have_no_cosine(random_adapter):
    one = random_adapter("a", {"x": (4, 4)})
    other = random_adapter("b", {"y": (4, 4)})
    rms = rms_cosine(cosines([one, other]))
    assert rms[0, 1].isnan()
    assert rms[0, 0] == rms[1, 1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "rank"), [((30, 20), 3), ((30, 20), 8), ((256, 256), 16)])
def test_what_cancels_to_rounding_has_no_direction(random_adapter, shape, rank, dtype):
    for seed in range(50):
        adapter = random_adapter("a", {"x": shape}, rank, seed, dtype)
        update = adapter.updates["x"]
        # An update and its opposite in another basis: their sum is float rounding only.
        draw = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=dtype)).Q
        opposite = LowRank(-update.b @ turn, turn.T @ update.a)
        nothing = Adapter("nothing", {"x": stack([update, opposite], [1.0, 1.0])})
        found = cosines([adapter, nothing])["x"]
        assert found[0, 0] == 1
        assert found[1].isnan().all()
        assert inner_products([nothing])["x"] == 0


def test_an_untrained_adapter_has_no_direction(random_adapter):
    trained = random_adapter("a")
    updates = {m: LowRank(torch.zeros_like(u.b), u.a) for m, u in trained.updates.items()}
    found = cosines([trained, Adapter("new", updates)])
    assert all(matrix[1].isnan().all() and matrix[0, 0] == 1 for matrix in found.values())


def test_the_basis_of_the_factors_does_not_matter(random_adapter):
    one, other = random_adapter("a"), random_adapter("b", seed=1)
    g = torch.randn(3, 3, dtype=torch.float64)
    turned = Adapter(
        "a",
        {
            m: LowRank(u.b.double() @ g, torch.linalg.inv(g) @ u.a.double())
            for m, u in one.updates.items()
        },
    )
    before, after = cosines([one, other]), cosines([turned, other])
    for module, matrix in before.items():
        torch.testing.assert_close(after[module], matrix, rtol=0, atol=1e-9)


def test_unrelated_updates_have_the_cosine_of_chance(random_adapter):
    shapes = {"x": (30, 20), "y": (10, 40)}
    pairs = [
        [random_adapter("a", shapes, seed=2 * s), random_adapter("b", shapes, 5, seed=2 * s + 1)]
        for s in range(300)
    ]
    mean_square = sum(float(rms_cosine(cosines(p))[0, 1]) ** 2 for p in pairs) / len(pairs)
    assert math.sqrt(mean_square) == pytest.approx(chance_cosine(pairs[0]), rel=0.1)
    assert chance_cosine(pairs[0]) == pytest.approx(math.sqrt((1 / 600 + 1 / 400) / 2))


@few
@given(adapter_lists())
def test_sign_conflicts_are_the_entries_against_the_sum(adapters):
    found = sign_conflicts(adapters)
    assert found.share == 1
    total = torch.zeros(2, len(adapters), dtype=torch.int64)
    for module in SHAPES:
        updates = torch.stack([dense(adapter, module) for adapter in adapters])
        negative = updates.sum(0) < 0
        outvoted = ((updates < 0) != negative) & (updates != 0)
        counts = outvoted.sum((1, 2)), (updates != 0).sum((1, 2))
        # Entries and sums that vanish to float32 rounding may fall on either side.
        assert (found.outvoted[module] - counts[0]).abs().max() <= 1
        assert torch.equal(found.nonzero[module], counts[1])
        share = float(counts[0].sum() / counts[1].sum())
        assert found.by_module()[module] == pytest.approx(share, abs=0.03)
        total += torch.stack([found.outvoted[module], counts[1]])
    torch.testing.assert_close(found.by_adapter(), total[0].double() / total[1])


def test_opposite_adapters_and_equal_ones(random_adapter):
    update = random_adapter("a", {"x": (6, 5)}).updates["x"]
    one, same = Adapter("a", {"x": update}), Adapter("b", {"x": update})

    def opposite(scale: float) -> Adapter:
        return Adapter("c", {"x": update.scaled(scale)})

    assert sign_conflicts([one, same]).by_module() == {"x": 0.0}
    assert sign_conflicts([one, opposite(-0.5)]).by_adapter().tolist() == [0.0, 1.0]
    # A sum of exactly 0 elects +: one of every two entries is against it.
    tie = sign_conflicts([one, opposite(-1.0)])
    assert tie.by_module() == {"x": 0.5}
    assert tie.by_adapter().sum() == 1


def test_a_sample_of_rows_is_drawn_by_the_seed_and_is_close(random_adapter):
    shapes = {"x": (2000, 50), "y": (1000, 50)}
    adapters = [random_adapter(f"t{t}", shapes, seed=t) for t in range(3)]
    exact = sign_conflicts(adapters, entries=None)
    sampled = sign_conflicts(adapters, entries=90_000)
    assert (exact.share, sampled.share) == (1, 0.2)
    assert torch.equal(sampled.nonzero["x"], torch.full((3,), 400 * 50))
    assert torch.equal(sampled.nonzero["y"], torch.full((3,), 200 * 50))
    torch.testing.assert_close(sampled.by_adapter(), exact.by_adapter(), rtol=0, atol=0.02)
    again, other = (sign_conflicts(adapters, entries=90_000, seed=seed) for seed in (0, 1))
    assert torch.equal(again.outvoted["x"], sampled.outvoted["x"])
    assert not torch.equal(other.outvoted["x"], sampled.outvoted["x"])


@few
@given(adapter_lists(), st.integers(1, 8))
def test_rank_use_is_that_of_the_dense_update(adapters, keep):
    for adapter in adapters:
        for module, update in adapter.updates.items():
            values = torch.linalg.svdvals(dense(adapter, module))
            found = singular_values(update)
            assert found.dtype == torch.float64
            torch.testing.assert_close(
                found, values[: len(found)], rtol=0, atol=1e-12 * float(values[0])
            )
            use = rank_use(update, keep)
            assert use.available == min(update.rank, *update.shape)
            shares = (values / values.sum()).clamp(min=1e-300)
            effective = float(torch.exp(-(shares * shares.log()).sum()))
            assert use.effective == pytest.approx(effective, rel=1e-6)
            kept = float(values[:keep].square().sum() / values.square().sum())
            assert use.kept == pytest.approx(kept, rel=1e-9)
            assert use.numerical == int((values > 1e-6 * values[0]).sum())


def test_the_rank_of_equal_adapters_does_not_add_up(random_adapter):
    update = random_adapter("a", {"x": (12, 10)}).updates["x"]
    both = rank_use(stack([update, update], [1.0, 1.0]), keep=3)
    assert (both.available, both.numerical) == (6, 3)
    assert both.kept == pytest.approx(1)
    assert both.effective == pytest.approx(rank_use(update, 3).effective, rel=1e-5)


def test_flat_spectra_use_their_whole_rank():
    flat = LowRank(torch.eye(7)[:, :4], 3 * torch.eye(9)[:4])
    assert rank_use(flat, 1).effective == pytest.approx(4)
    assert rank_use(flat, 1).kept == pytest.approx(1 / 4)
    one = LowRank(torch.ones(7, 4), torch.ones(4, 9))
    assert rank_use(one, 1).effective == pytest.approx(1, abs=1e-5)
    assert rank_use(one, 1).numerical == 1


@pytest.mark.parametrize("rank", [0, 2])
def test_a_zero_update_uses_no_rank(rank):
    use = rank_use(LowRank(torch.zeros(4, rank), torch.ones(rank, 5)), 1)
    assert (use.available, use.numerical, use.effective) == (rank, 0, 0.0)
    assert math.isnan(use.kept)


def test_an_update_that_cancels_uses_no_rank(random_adapter):
    update = random_adapter("a", {"x": (12, 10)}).updates["x"]
    use = rank_use(stack([update, update], [1.0, -1.0]), 1)
    assert (use.available, use.numerical, use.effective) == (6, 0, 0.0)
    assert math.isnan(use.kept)


@pytest.mark.parametrize("call", [inner_products, cosines, chance_cosine, sign_conflicts])
def test_adapters_that_do_not_belong_together(call, random_adapter):
    with pytest.raises(UserError, match="no adapter"):
        call([])
    with pytest.raises(UserError, match="two adapters are called 'a'"):
        call([random_adapter("a"), random_adapter("a")])
    with pytest.raises(UserError, match="only adapters of one base model"):
        call([random_adapter("a", {"x": (3, 4)}), random_adapter("b", {"x": (4, 4)})])


def test_a_sample_of_nothing_is_refused(random_adapter):
    with pytest.raises(UserError, match="entries=0"):
        sign_conflicts([random_adapter("a")], entries=0)
