from __future__ import annotations

import math

import pytest
import torch
from factories import covariance_of, random_adapter

from merge_algorithms.adapter import Adapter, LowRank
from merge_algorithms.errors import UserError
from osrm import (
    adapter_leaked_energy,
    interference_matrix,
    leaked_energy,
    leaked_over_own,
    leaked_own_ratio,
    module_energies,
    output_shift,
)

D, R, TASKS = 12, 3, ["a", "b", "c"]


def make_adapter(name: str, seed: int, modules=("0.query", "0.value", "1.value")) -> Adapter:
    return random_adapter(name, dict.fromkeys(modules, (9, D)), R, seed)


@pytest.fixture
def samples():
    """Task -> module -> the inputs themselves, (tokens, D); query and value read the same."""
    result = {}
    for i, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(i)
        h = torch.randn(2, 30 + 10 * i, D, generator=generator, dtype=torch.float64)
        h = h * torch.rand(2, 1, D, generator=generator)
        result[task] = {"0.query": h[0], "0.value": h[0], "1.value": h[1]}
    return result


@pytest.fixture
def covariances(samples):
    modules = {"0.query": "0.query", "0.value": "0.query", "1.value": "1.value"}
    return {
        task: covariance_of({k: inputs[k] for k in modules.values()}, modules, task=task)
        for task, inputs in samples.items()
    }


@pytest.fixture
def adapters():
    return [make_adapter(task, 10 + i) for i, task in enumerate(TASKS)]


def dense_shift(adapter, inputs):
    """Sum over modules of the mean over tokens of ||dW h||^2, with dW formed."""
    return sum(
        float((inputs[module] @ (u.b.double() @ u.a.double()).T).square().sum(1).mean())
        for module, u in adapter.updates.items()
    )


def test_output_shift_is_the_mean_square_output(adapters, samples, covariances):
    update = adapters[0].updates["0.query"]
    h = samples["b"]["0.query"]
    expected = (h @ update.dense().double().T).square().sum(1).mean()
    found = output_shift(update, covariances["b"].matrix("0.query"))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_interference_matrix_against_dense_updates(adapters, samples, covariances):
    found = interference_matrix(adapters, covariances)
    assert found.dtype == torch.float64
    assert torch.equal(found.diagonal(), torch.ones(3, dtype=torch.float64))
    for i, adapter in enumerate(adapters):
        for j, task in enumerate(TASKS):
            expected = dense_shift(adapter, samples[task]) / dense_shift(
                adapter, samples[adapter.name]
            )
            assert found[i, j] == pytest.approx(expected, rel=1e-5)


def test_rows_and_columns_follow_the_order_of_the_adapters(adapters, covariances):
    found = interference_matrix(adapters, covariances)
    order = [2, 0, 1]
    turned = interference_matrix([adapters[i] for i in order], covariances)
    torch.testing.assert_close(turned, found[order][:, order], rtol=1e-12, atol=0)


def test_leaked_own_ratio_is_the_mean_of_the_rest_of_the_row(adapters, covariances):
    matrix = interference_matrix(adapters, covariances)
    for i, adapter in enumerate(adapters):
        expected = float(matrix[i, [j for j in range(3) if j != i]].mean())
        assert leaked_own_ratio(adapter, covariances, adapter.name) == pytest.approx(expected)


def test_module_energies_against_the_samples(adapters, samples, covariances):
    """Oracle: every token through A, scaled to norm 1, and through dW, formed."""
    adapter = adapters[1]
    adapter.updates["1.value"].a.zero_()
    found = module_energies(adapter, covariances, "b")
    assert set(found) == set(adapter.updates)
    for module, update in adapter.updates.items():
        a, dw = update.a.double(), update.b.double() @ update.a.double()

        def mean_square(matrix, task, module=module):
            return float((samples[task][module] @ matrix.T).square().sum(1).mean())

        leaked = [mean_square(dw, task) for task in "ac"]
        assert found[module].leaked_shift == pytest.approx(sum(leaked) / 2, rel=1e-5)
        assert found[module].own_shift == pytest.approx(mean_square(dw, "b"), rel=1e-5)
        if module == "1.value":
            assert math.isnan(found[module].leaked)
            continue
        unit = a / a.norm()
        through = [mean_square(unit, task) for task in "abc"]
        assert found[module].leaked == pytest.approx((through[0] + through[2]) / 2, rel=1e-5)
        assert found[module].own == pytest.approx(through[1], rel=1e-5)
    ratio = sum(e.leaked_shift for e in found.values()) / sum(e.own_shift for e in found.values())
    assert leaked_own_ratio(adapter, covariances, "b") == pytest.approx(ratio, rel=1e-12)
    assert leaked_over_own(found.values()) == pytest.approx(ratio, rel=1e-12)


def test_an_untrained_adapter_has_no_ratio(adapters, covariances):
    updates = {
        module: LowRank(torch.zeros_like(u.b), u.a) for module, u in adapters[0].updates.items()
    }
    untrained = Adapter("a", updates, {}, {}, {})
    assert math.isnan(leaked_own_ratio(untrained, covariances, "a"))
    assert math.isnan(leaked_over_own(module_energies(untrained, covariances, "a").values()))
    matrix = interference_matrix([untrained, *adapters[1:]], covariances)
    assert matrix[0].isnan().all()
    assert matrix[1:].isfinite().all()


def test_adapter_leaked_energy_is_the_mean_over_modules(adapters, covariances):
    adapter = adapters[0]
    energies = [
        leaked_energy(
            u.a, (covariances["b"].matrix(m).double() + covariances["c"].matrix(m).double()) / 2
        )
        for m, u in adapter.updates.items()
    ]
    found = adapter_leaked_energy(adapter, covariances, "a")
    assert found == pytest.approx(sum(energies) / 3, rel=1e-9)
    only_a = {module: update.a for module, update in adapter.updates.items()}
    assert adapter_leaked_energy(only_a, covariances, "a") == found


def test_what_does_not_fit_is_refused(adapters, covariances):
    stranger = make_adapter("a", 1, modules=("bert.0.query",))
    for call, message in [
        (lambda: interference_matrix([stranger], covariances), "has no module 'bert.0.query'"),
        (lambda: leaked_own_ratio(stranger, covariances, "a"), "has no module 'bert.0.query'"),
        (lambda: adapter_leaked_energy(stranger, covariances, "a"), "has no module"),
        (lambda: adapter_leaked_energy({}, covariances, "a"), "has no module: load it again"),
        (lambda: leaked_own_ratio(adapters[0], covariances, "x"), "no covariance of task 'x'"),
        (lambda: leaked_own_ratio(adapters[0], {"a": covariances["a"]}, "a"), "only task"),
        (
            lambda: interference_matrix([make_adapter("aa", 1)], covariances),
            "no covariance of task 'aa'; did you mean 'a'",
        ),
        (lambda: output_shift(adapters[0].updates["0.query"], torch.eye(5)), "different modules"),
    ]:
        with pytest.raises(UserError, match=message):
            call()


def test_leaked_energy_is_the_mean_square_of_a_h_over_the_norm():
    h, a = torch.randn(50, 7).double(), torch.randn(3, 7)
    expected = float((h @ a.double().T).square().sum() / 50 / a.double().square().sum())
    assert leaked_energy(a, h.T @ h / 50) == pytest.approx(expected, rel=1e-12)
    assert leaked_energy(5 * a, h.T @ h / 50) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "message"), [(torch.ones(2, 3), "different modules"), (torch.zeros(2, 4), "A is zero")]
)
def test_leaked_energy_refuses(a, message):
    with pytest.raises(UserError, match=message):
        leaked_energy(a, torch.eye(4))
