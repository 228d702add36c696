"""RegMean and Fisher merging: what their formulas leave open, and bad statistics."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from merge_algorithms import Adapter, LowRank, UserError, merge

few = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def dense(merged):
    return {m: u.rows(0, u.shape[0]) for m, u in merged.updates.items()}


def second_moment(tokens, width, seed):
    h = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return h.T @ h / tokens


@pytest.fixture
def two(random_adapter):
    return [random_adapter(name, seed=seed) for seed, name in enumerate("ab")]


@pytest.fixture
def covariances(two):
    return {
        a.name: {m: second_moment(60, u.shape[1], seed) for m, u in a.updates.items()}
        for seed, a in enumerate(two)
    }


@pytest.fixture
def informations(two):
    draw = torch.Generator().manual_seed(0)
    return {
        a.name: {m: torch.rand(u.shape, generator=draw) for m, u in a.updates.items()} for a in two
    }


def loss(update, adapters, covariances, module):
    """sum_t E_t ||(dW - dW_t) h||^2."""
    total = 0.0
    for adapter in adapters:
        x = update - adapter.updates[module].dense()
        total += float((x @ covariances[adapter.name][module] * x).sum())
    return total


@few
@given(seed=st.integers(0, 999), size=st.floats(1e-3, 1.0))
def test_no_other_update_is_nearer_to_the_adapters_outputs(two, covariances, seed, size):
    best = dense(merge(two, "regmean", statistics=covariances, off_diagonal=1.0, ridge=0.0))
    for module, update in best.items():
        moved = torch.randn(update.shape, generator=torch.Generator().manual_seed(seed)) * size
        found = loss(update, two, covariances, module)
        assert found < loss(update + moved, two, covariances, module)


def test_covariances_of_disjoint_features_reproduce_every_adapter():
    """What only task a reads comes from a, what only b reads from b, whatever else they say."""
    draw = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(n, {"m": LowRank(torch.randn(6, 2, generator=draw),
                                 torch.randn(2, 8, generator=draw))})
        for n in "ab"
    ]  # fmt: skip
    reads = {"a": torch.diag(torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 0])),
             "b": torch.diag(torch.tensor([0.0, 0, 0, 0, 1, 2, 3, 4]))}  # fmt: skip
    statistics = {name: {"m": c} for name, c in reads.items()}
    merged = dense(merge(adapters, "regmean", statistics=statistics, ridge=0.0))["m"]
    a, b = (adapter.updates["m"].dense() for adapter in adapters)
    torch.testing.assert_close(merged, torch.cat([a[:, :4], b[:, 4:]], 1))


def test_one_adapter_is_exact_whatever_the_ridge_and_the_tokens(random_adapter):
    adapter = random_adapter("a", {"m": (20, 30)}, rank=4)
    expected = adapter.updates["m"].dense()
    for tokens in (1, 3, 200):
        for options in ({}, {"ridge": 0.5}, {"off_diagonal": 1.0, "ridge": 1e-3}):
            statistics = {"a": {"m": second_moment(tokens, 30, 1) * 1e4}}
            merged = dense(merge([adapter], "regmean", statistics=statistics, **options))["m"]
            torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6 * float(expected.norm()))


def test_the_number_of_tokens_gives_no_weight_but_the_weight_does(two, covariances):
    doubled = {n: {m: 2 * c for m, c in by.items()} for n, by in covariances.items()}
    expected = dense(merge(two, "regmean", statistics=covariances))
    found = dense(merge(two, "regmean", [2.0, 2.0], statistics=doubled))
    weighted = dense(merge(two, "regmean", [3.0, 1.0], statistics=covariances))
    tripled = covariances | {"a": {m: 3 * c for m, c in covariances["a"].items()}}
    for module, x in expected.items():
        torch.testing.assert_close(found[module], x)
    for module, x in dense(merge(two, "regmean", statistics=tripled)).items():
        torch.testing.assert_close(weighted[module], x)
        assert not torch.allclose(x, expected[module], rtol=1e-2)


def test_modules_with_the_same_covariances_are_solved_together(monkeypatch, random_adapter):
    shapes = {"0.query": (6, 10), "0.key": (8, 10), "0.value": (10, 10), "1.query": (6, 10)}
    adapters = [random_adapter(n, shapes, seed=seed) for seed, n in enumerate("ab")]
    shared = {n: [second_moment(40, 10, 10 * ord(n) + i) for i in range(2)] for n in "ab"}
    statistics = {n: {m: c[int(m[0])] for m in shapes} for n, c in shared.items()}
    copies = {n: {m: c.clone() for m, c in by.items()} for n, by in statistics.items()}
    solved = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda total: solved.append(len(total)) or cholesky(total)
    )
    together = dense(merge(adapters, "regmean", statistics=statistics))
    assert len(solved) == 2
    apart = dense(merge(adapters, "regmean", statistics=copies))
    assert len(solved) == 6
    for module, x in apart.items():
        torch.testing.assert_close(together[module], x)


def test_more_ranks_than_features(random_adapter):
    """Rank 20 in sum over width 5: the result needs no more than 5."""
    names = "abcde"
    adapters = [random_adapter(n, {"m": (7, 5)}, rank=4, seed=seed) for seed, n in enumerate(names)]
    statistics = {n: {"m": second_moment(30, 5, seed)} for seed, n in enumerate(names)}
    merged = merge(adapters, "regmean", statistics=statistics, off_diagonal=1.0, ridge=0.0)
    assert merged.updates["m"].rank == 5
    moments = torch.stack([statistics[n]["m"] for n in names]).double()
    updates = torch.stack([a.updates["m"].dense() for a in adapters]).double()
    expected = (updates @ moments).sum(0) @ moments.sum(0).inverse()
    torch.testing.assert_close(dense(merged)["m"].double(), expected, rtol=1e-4, atol=1e-5)


def test_fisher_information_of_one_entry_decides_that_entry(two, informations):
    module = "layer.0.query"
    for by in informations.values():
        by[module] = torch.ones(12, 10)
    informations["a"][module][3, 4] = 1e6
    merged = dense(merge(two, "fisher", statistics=informations))[module]
    a, b = (x.updates[module].dense() for x in two)
    expected = (a + b) / 2
    torch.testing.assert_close(float(merged[3, 4]), float(a[3, 4]), rtol=1e-4, atol=1e-5)
    expected[3, 4] = merged[3, 4]
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1e-100, 1e-60, 1e-36, 1e-3, 1e30, 1e100])
def test_fisher_information_has_no_unit(two, informations, scale, normalize):
    """Nor have the weights, beyond what float32 holds: information may come in float64."""
    options = {"statistics": informations, "normalize": normalize}
    expected = dense(merge(two, "fisher", [1.0, 0.5], **options))
    scaled = {n: {m: x.double() * scale for m, x in by.items()} for n, by in informations.items()}
    if 1e-37 < scale < 1e37:
        scaled = {n: {m: x.float() for m, x in by.items()} for n, by in scaled.items()}
    options["statistics"] = scaled
    for weights in ([1.0, 0.5], [1e-60, 5e-61]):
        for module, x in dense(merge(two, "fisher", weights, **options)).items():
            torch.testing.assert_close(x, expected[module])


def test_any_floor_will_do(two, informations):
    """Where no task has information, floors below float32's range weigh as larger ones do."""
    for by in informations.values():
        for x in by.values():
            x[:, ::2] = 0
    expected = dense(merge(two, "fisher", statistics=informations, floor=1e-9))
    for module, x in dense(merge(two, "fisher", statistics=informations, floor=1e-60)).items():
        torch.testing.assert_close(x, expected[module], rtol=1e-4, atol=1e-5)


def test_normalised_information_is_of_equal_size(two, informations):
    expected = dense(merge(two, "fisher", statistics=informations, normalize=True))
    louder = informations | {"a": {m: 50 * x for m, x in informations["a"].items()}}
    for module, x in dense(merge(two, "fisher", statistics=louder, normalize=True)).items():
        torch.testing.assert_close(x, expected[module])
    for module, x in dense(merge(two, "fisher", statistics=louder)).items():
        assert not torch.allclose(x, expected[module], rtol=1e-2)


def test_where_nothing_is_known_the_floor_decides(two, informations):
    module = "layer.0.value"
    for by in informations.values():
        by[module].zero_()
    merged = dense(merge(two, "fisher", statistics=informations, normalize=True))[module]
    a, b = (x.updates[module].dense() for x in two)
    assert merged.isfinite().all()
    share = (merged - b) / (a - b)
    torch.testing.assert_close(share, share.mean().expand_as(share), rtol=1e-2, atol=1e-2)
    assert 0.4 < float(share.mean()) < 0.6


def test_fisher_tiles_are_evaluated_one_at_a_time(monkeypatch, two, informations):
    merged = merge(two, "fisher", statistics=informations)
    expected = dense(merged)
    monkeypatch.setattr("merge_algorithms.tiles.TILE_BYTES", 4 * 4 * 10 * 2)
    heights = []
    rows = LowRank.rows

    def seen(update, start, stop):
        heights.append(stop - start)
        return rows(update, start, stop)

    monkeypatch.setattr(LowRank, "rows", seen)
    for module, x in dense(merged).items():
        torch.testing.assert_close(x, expected[module])
    assert max(heights) == 2


def test_weights_that_make_no_mean(two, covariances, informations):
    for method, statistics in (("regmean", covariances), ("fisher", informations)):
        with pytest.raises(UserError, match="all weights are 0"):
            merge(two, method, [0.0, 0.0], statistics=statistics)
        with pytest.raises(UserError, match=r"at least 0 but adapter 'b' has -0\.5"):
            merge(two, method, [1.0, -0.5], statistics=statistics)
    for method in ("average", "linear"):
        with pytest.raises(UserError, match="sum to 0"):
            merge([*two, Adapter("c", two[0].updates)], method, [0.1, 0.2, -0.3])
    for method in ("lora_sum", "slerp"):
        with pytest.raises(UserError, match=r"adapter 'b' has 0\.5"):
            merge(two, method, [1.0, 0.5])


def test_an_adapter_of_weight_zero_takes_no_part(two, covariances, informations):
    for method, statistics in (("regmean", covariances), ("fisher", informations)):
        found = dense(merge(two, method, [1.0, 0.0], statistics=statistics))
        for module, x in dense(merge(two[:1])).items():
            torch.testing.assert_close(found[module], x, rtol=1e-4, atol=1e-5)


def test_statistics_that_cannot_be_used(two, covariances, informations):
    module = "layer.0.value"

    def changed(statistics, tensor):
        return statistics | {"b": statistics["b"] | {module: tensor}}

    singular = {n: by | {module: torch.zeros(10, 10)} for n, by in covariances.items()}
    few_tokens = {n: by | {module: second_moment(2, 10, 0)} for n, by in covariances.items()}
    nothing = {m: torch.zeros_like(x) for m, x in informations["b"].items()}
    cases = [
        ("regmean", None, "needs the covariance of every adapter's data", {}),
        ("regmean", {"a": covariances["a"]}, "needs the covariance of adapter 'b'", {}),
        ("regmean", changed(covariances, torch.ones(9, 9)), r"\(9, 9\) at layer\.0\.value", {}),
        ("regmean", changed(covariances, torch.full((10, 10), math.nan)),
         r"'b' is not finite at layer\.0\.value", {}),
        ("regmean", singular, r"singular at layer\.0\.value: raise ridge", {}),
        ("regmean", few_tokens, r"singular at layer\.0\.value: raise ridge",
         {"off_diagonal": 1.0, "ridge": 0.0}),
        ("fisher", None, "needs the fisher of every adapter's data", {}),
        ("fisher", covariances, r"\(10, 10\) at layer\.0\.query", {}),
        ("fisher", changed(informations, torch.full((8, 10), -1.0)),
         r"'b' has negative or non-finite values at layer\.0\.value", {}),
        ("fisher", changed(informations, torch.full((8, 10), math.inf)),
         r"'b' has negative or non-finite values at layer\.0\.value", {}),
        ("fisher", informations | {"b": nothing}, "'b' is zero everywhere", {}),
    ]  # fmt: skip
    for method, statistics, message, options in cases:
        with pytest.raises(UserError, match=message):
            merge(two, method, statistics=statistics, **options)
