"""KnOTS and Core Space: where their coordinates come from, and what must not disturb them."""

from __future__ import annotations

import pytest
import torch
from formulas import elementwise, subspace
from torch import Tensor

from merge_algorithms import Adapter, LowRank, UserError, merge

SHAPES = {"q": (96, 64), "v": (48, 64)}


def factors(seed: int, rank: int, shape: tuple[int, int], dtype=torch.float32) -> LowRank:
    """Random factors with a decaying spectrum."""
    draw = torch.Generator().manual_seed(seed)
    decay = 0.7 ** torch.arange(rank, dtype=dtype)
    b = torch.randn(shape[0], rank, generator=draw, dtype=dtype) * decay
    return LowRank(b, torch.randn(rank, shape[1], generator=draw, dtype=dtype))


def adapters(count: int, **kind) -> list[Adapter]:
    """Ranks 2, 3, 4, ..; every third one lacks a module."""
    return [
        Adapter(
            f"t{t}",
            {
                m: factors(10 * t + i, 2 + t, shape, **kind)
                for i, (m, shape) in enumerate(SHAPES.items())
                if i == 0 or t % 3
            },
        )
        for t in range(count)
    ]


def one(name: str, update: LowRank) -> Adapter:
    return Adapter(name, {"m": update})


def stacked(found: list[Adapter]) -> dict[str, Tensor]:
    modules = {m: u.shape for a in found for m, u in a.updates.items()}
    return {
        m: torch.stack(
            [
                a.updates[m].to("cpu", torch.float64).dense()
                if m in a.updates
                else torch.zeros(shape).double()
                for a in found
            ]
        )
        for m, shape in modules.items()
    }


def assert_same(merged, expected, relative=1e-5) -> None:
    for module, x in expected.items():
        error = (merged.updates[module].dense().double() - x).norm()
        assert error <= relative * x.norm()


@pytest.mark.parametrize("options", [{}, {"density": 0.5, "scope": "tensor", "combine": "sum"}])
def test_knots_ties_is_its_dense_definition(options):
    found = adapters(6)
    w = [1.0, 0.5, 2.0, 1.0, 0.3, 1.5]
    expected = subspace.knots_ties(stacked(found), torch.tensor(w).double(), **options)
    assert_same(merge(found, "knots_ties", w, **options), expected)


def test_core_space_is_its_dense_definition():
    found = adapters(6)
    w = [1.0, 0.5, 2.0, 1.0, 0.3, 1.5]
    expected = subspace.core_space(stacked(found), torch.tensor(w).double())
    assert_same(merge(found, "core_space", w), expected)


def test_linear_merges_of_core_matrices_are_those_of_the_updates():
    found = adapters(5)
    expected = {m: u.dense().double() for m, u in merge(found).updates.items()}
    for reference in ("balanced", "stored"):
        merged = merge(found, "core_space", inner="task_arithmetic", reference=reference)
        assert_same(merged, expected, relative=1e-6)


def test_stored_factors_as_the_reference_are_the_authors():
    """U_B and V_A from the stacks of the factors as they are, M_t = U_B^T b_t a_t V_A."""
    found = [one(f"t{t}", factors(t, 3, (40, 30), torch.float64)) for t in range(4)]
    updates = [a.updates["m"] for a in found]
    left = torch.linalg.svd(torch.cat([u.b for u in updates], 1), full_matrices=False).U
    right = torch.linalg.svd(torch.cat([u.a for u in updates]), full_matrices=False).Vh.T
    cores = torch.stack([left.T @ u.b @ u.a @ right for u in updates])
    core = elementwise.ties({"m": cores}, torch.ones(4).double(), density=0.3)["m"]
    options = {"inner_options": {"density": 0.3}}
    merged = merge(found, "core_space", reference="stored", **options)
    assert_same(merged, {"m": left @ core @ right.T}, relative=1e-9)
    other = merge(found, "core_space", **options).updates["m"].dense()
    assert (merged.updates["m"].dense() - other).norm() > 0.01 * other.norm()


@pytest.mark.parametrize("method", ["knots_ties", "core_space"])
def test_copies_of_one_adapter_merge_to_it(method):
    update = factors(0, 4, (40, 30))
    options = {"density": 1.0} if method == "knots_ties" else {"inner_options": {"density": 1.0}}
    merged = merge([one(f"t{t}", update) for t in range(3)], method, **options)
    assert_same(merged, {"m": update.dense().double()}, relative=1e-6)
    assert merged.updates["m"].rank == 4


@pytest.mark.parametrize("method", ["knots_ties", "core_space"])
def test_rounding_errors_do_not_vote(method):
    """Adapters that share no input and, but for a rotation, no output: the mean over one task."""
    turn = torch.linalg.qr(factors(9, 40, (40, 40), torch.float64).b).Q
    found = []
    for t in range(3):
        update = factors(t, 3, (40, 30), torch.float64)
        b, a = torch.zeros_like(update.b), torch.zeros_like(update.a)
        outputs, inputs = slice(13 * t, 13 * t + 13), slice(10 * t, 10 * t + 10)
        b[outputs], a[:, inputs] = update.b[outputs], update.a[:, inputs]
        found.append(one(f"t{t}", LowRank(turn @ b, a)))
    options = {"density": 1.0} if method == "knots_ties" else {"inner_options": {"density": 1.0}}
    assert_same(merge(found, method, **options), {"m": stacked(found)["m"].sum(0)}, relative=1e-9)


def test_copies_in_another_basis_add_no_direction():
    """float32 rounding leaves a second copy 1e-7 away from the first one's span."""
    update = factors(0, 4, (40, 30))
    g = torch.eye(4) + 0.3 * factors(1, 4, (4, 4)).b
    copy = LowRank(update.b @ g.inverse(), g @ update.a)
    for method in ("knots_ties", "core_space"):
        merged = merge([one("a", update), one("b", copy)], method)
        assert merged.updates["m"].rank == 4


def test_weights_act_after_the_basis():
    found = adapters(3)
    heavier = merge(found, "knots_ties", [2.0, 2.0, 2.0])
    expected = {m: 2 * u.dense().double() for m, u in merge(found, "knots_ties").updates.items()}
    assert_same(heavier, expected)
    alone = merge(found, "knots_ties", [1.0, 0.0, 0.0], density=1.0)
    assert_same(alone, {m: x[0] for m, x in stacked(found).items() if m in found[0].updates}, 1e-6)


@pytest.mark.parametrize("method", ["knots_ties", "knots_dare", "core_space"])
def test_more_ranks_than_dimensions(method):
    found = [one(f"t{t}", factors(t, 8, (32, 24))) for t in range(12)]
    merged = merge(found, method)
    assert merged.updates["m"].rank <= 24
    assert merged.updates["m"].dense().isfinite().all()
    if method != "knots_dare":
        expected = getattr(subspace, method)(stacked(found), torch.ones(12).double())
        assert_same(merged, expected)


@pytest.mark.parametrize("method", ["knots_ties", "knots_dare", "core_space"])
def test_zero_updates(method, tmp_path):
    zero = LowRank(torch.zeros(8, 2), torch.ones(2, 6))
    merged = merge([one("a", zero), one("b", zero)], method)
    assert not merged.updates["m"].dense().any()
    merged.save_adapter(tmp_path / "zero")
    assert not Adapter.load(tmp_path / "zero").updates["m"].dense().any()


def test_inner_methods_that_cannot_work_are_refused(random_adapter):
    adapters = [random_adapter("a"), random_adapter("b", seed=1)]
    with pytest.raises(UserError, match=r"'regmean' reads the covariance .* choose one"):
        merge(adapters, "core_space", inner="regmean")
    with pytest.raises(UserError, match="inner_options='density'"):
        merge(adapters, "core_space", inner_options="density")
    with pytest.raises(UserError, match="'slerp' merges exactly 2 adapters but there are 3"):
        merge([*adapters, random_adapter("c", seed=2)], "core_space", inner="slerp")
    with pytest.raises(UserError, match="'direct' works at run time only"):
        merge(adapters, "core_space", inner="direct")


def test_inner_options_are_recorded(random_adapter, tmp_path):
    merged = merge([random_adapter("a")], "core_space", inner_options={"density": 0.5})
    merged.save_adapter(tmp_path / "out")
    options = Adapter.load(tmp_path / "out").info["merge"]["options"]
    assert options["inner_options"] == {"density": 0.5}


@pytest.mark.parametrize("seed", range(20))
def test_core_space_never_keeps_rounding_errors_alone(seed):
    """One update's core is diagonal: what a mask leaves is some of its singular values, or 0."""
    b = torch.tensor([[1.5410, -0.2934], [-2.1788, 0.5684]])
    a = torch.tensor([[-1.0845, -1.3986], [0.4033, 0.8380]])
    options = {"inner": "dare_ties", "inner_options": {"density": 0.25}}
    adapter = Adapter("task0", {"q": LowRank(b, a)}, config={})
    kept = merge([adapter], "core_space", seed=seed, **options).updates["q"].dense().double()
    largest = float((b @ a).double().norm())
    assert float(kept.norm()) == 0 or float(kept.norm()) > 1e-3 * largest
