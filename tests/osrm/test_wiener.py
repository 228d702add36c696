"""Wiener's filter and training through it, against the formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import covariance_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from merge_algorithms import UserError
from osrm import Covariance, FilteredSteps, lora_a, separations, wiener_filters

WIDTH = 7


def covariance(task: str, seed: int, scale: float = 1.0, rank: int = WIDTH) -> Covariance:
    """Two modules that read one input, and one that reads another."""
    numbers = torch.Generator().manual_seed(seed)
    inputs = {}
    for key in ("block.q", "block.out"):
        h = torch.randn(40, rank, generator=numbers, dtype=torch.float64)
        h = scale * h @ torch.randn(rank, WIDTH, generator=numbers, dtype=torch.float64)
        inputs[key] = h
    modules = {"block.q": "block.q", "block.k": "block.q", "block.out": "block.out"}
    return covariance_of(inputs, modules, task=task)


def level(others: np.ndarray) -> float:
    """The mean of the diagonal, at most ten times that without the hundredth with the most energy,
    at least a ten thousandth of itself.
    """
    energies = np.sort(np.diag(others))
    few = int(np.ceil(len(energies) / 100))
    return np.clip(
        10 * energies[: len(energies) - few].mean(), energies.mean() / 1e4, energies.mean()
    )


def oracle(
    covariances: Mapping[str, Covariance],
    task: str,
    key: str,
    weights: dict[str, float],
    mu: float,
    rho: float,
) -> np.ndarray:
    """c C (C + mu sum w_u C_u + rho m I)^-1, c from tr(F C F^T) = tr(C)."""
    moments = {name: c.matrices[key].double().numpy() for name, c in covariances.items()}
    own = moments.pop(task)
    total = sum(weights.get(name, 1.0) for name in moments)
    others = sum(weights.get(name, 1.0) * matrix for name, matrix in moments.items())
    damping = rho * level(others / total) * np.eye(WIDTH)
    found = own @ np.linalg.inv(own + mu * others + damping)
    return found * np.sqrt(np.trace(own) / np.trace(found @ own @ found.T))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tasks=st.integers(2, 4),
    mu=st.sampled_from([0.01, 0.05, 0.15, 1.0]),
    rho=st.sampled_from([1e-3, 0.05, 2.0]),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    rank=st.sampled_from([3, WIDTH]),
)
def test_filters_are_those_of_the_formula(
    seed: int, tasks: int, mu: float, rho: float, weight: float, scale: float, rank: int
) -> None:
    given_ = {f"t{t}": covariance(f"t{t}", 10 * seed + t, scale, rank) for t in range(tasks)}
    weights = {"t1": weight}
    filters = wiener_filters(given_, "t0", weights=weights, mu=mu, rho=rho)
    assert filters.keys() == {"block.q", "block.k", "block.out"}
    assert filters["block.k"] is filters["block.q"]
    for key in ("block.q", "block.out"):
        expected = torch.from_numpy(oracle(given_, "t0", key, weights, mu, rho))
        assert filters[key].dtype == torch.float32
        torch.testing.assert_close(filters[key].double(), expected, rtol=1e-4, atol=1e-5)


def test_directions_pass_by_how_much_of_their_energy_is_the_tasks_own() -> None:
    own, other = covariance("own", 0), covariance("other", 1)
    energies = torch.tensor([4.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    leaks = torch.tensor([0.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    for given_, diagonal in ((own, energies), (other, leaks)):
        for key in given_.matrices:
            given_.matrices[key] = diagonal.diag()
    filters = wiener_filters({"own": own, "other": other}, "own", mu=0.5, rho=1e-6)
    gains = filters["block.q"].diagonal()
    torch.testing.assert_close(filters["block.q"], gains.diag())
    torch.testing.assert_close(
        gains / gains[0], energies / (energies + 0.5 * leaks), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("feature", [0, WIDTH - 1])
def test_enormous_activations_of_one_feature_leave_the_others_readable(feature: int) -> None:
    """As decoders have them: the same for every task, thousands of times the others' energy."""
    given_ = {f"t{t}": covariance(f"t{t}", t) for t in range(3)}
    before = wiener_filters(given_, "t0")["block.q"]
    for cov in given_.values():
        matrix = cov.matrices["block.q"]
        matrix[feature], matrix[:, feature] = 0.0, 0.0
        matrix[feature, feature] = 1e5 * matrix.diagonal().max()
    after = wiener_filters(given_, "t0")["block.q"]
    expected = torch.from_numpy(oracle(given_, "t0", "block.q", {}, 0.05, 0.05))
    torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-5)
    rest = [i for i in range(WIDTH) if i != feature]
    assert after[rest][:, rest].norm() > 0.5 * before[rest][:, rest].norm()


@pytest.mark.parametrize("quiet", [0.0, 1e-12, 1e-6])
def test_features_without_energy_do_not_switch_damping_off(quiet: float) -> None:
    """As behind a ReLU, where most features hardly ever speak: filters of what speaks are the same
    as without them, but for what they count in the mean.
    """

    def filter_of(width: int, rho: float) -> Tensor:
        given_ = {}
        for seed, task in enumerate("ab"):
            h = torch.randn(100, 300, generator=torch.Generator().manual_seed(seed))
            h[:, 120:] *= quiet
            h = h[:, :width]
            given_[task] = covariance_of({"m": h}, task=task)
        return wiener_filters(given_, "a", rho=rho)["m"]

    found, expected = filter_of(300, 0.05), filter_of(120, 0.05 * 120 / 300)
    torch.testing.assert_close(found[:120, :120], expected, rtol=1e-3, atol=1e-3)
    assert found[:, 120:].abs().max() < 0.1


def test_where_one_feature_alone_speaks_damping_is_a_share_of_it() -> None:
    """A ten thousandth of the mean and no less: nothing else would be left to count from."""
    given_ = {f"t{t}": covariance(f"t{t}", t) for t in range(2)}
    for cov in given_.values():
        cov.matrices["block.q"] = torch.diag(torch.tensor([3.0, *[0.0] * (WIDTH - 1)]))
    found = wiener_filters(given_, "t0", mu=0.5, rho=2.0)["block.q"]
    expected = oracle(given_, "t0", "block.q", {}, 0.5, 2.0)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    separation = separations(given_, mu=0.5, rho=2.0)["t0"]["block.q"]
    passes = 3 / (3 * 1.5 + 2 * 1e-4 * 3 / WIDTH)
    assert separation.own == pytest.approx(passes**2, rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), tasks=st.integers(2, 4), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_separations_are_energies_behind_the_filter(seed: int, tasks: int, scale: float) -> None:
    given_ = {f"t{t}": covariance(f"t{t}", 10 * seed + t, scale) for t in range(tasks)}
    found = separations(given_, mu=0.3, rho=0.1)
    assert found.keys() == given_.keys()
    assert found["t0"]["block.k"] == found["t0"]["block.q"]
    for task, modules in found.items():
        for key in ("block.q", "block.out"):
            moments = {name: c.matrices[key].double().numpy() for name, c in given_.items()}
            own = moments.pop(task)
            mean = sum(moments.values()) / len(moments)
            mixed = own + 0.3 * sum(moments.values()) + 0.1 * level(mean) * np.eye(WIDTH)
            f = own @ np.linalg.inv(mixed)
            passed = np.trace(f @ own @ f.T)
            leaked = np.mean([np.trace(f @ moment @ f.T) for moment in moments.values()])
            assert modules[key].own == pytest.approx(passed / np.trace(own), rel=1e-6)
            assert modules[key].leaked == pytest.approx(leaked / passed, rel=1e-6)
            assert 0 < modules[key].own < 1


def few() -> dict[str, Covariance]:
    return {name: covariance(name, seed, 1.0, 2) for seed, name in enumerate(("own", "other"))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "none"}, "none"),
        ({"covariances": {"own": covariance("own", 0)}}, "own"),
        ({"mu": 0.0}, "mu is 0"),
        ({"mu": float("inf")}, "mu is inf"),
        ({"rho": 0.0}, "rho is 0"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"weights": {"nobody": 1.0}}, "nobody"),
        ({"covariances": few(), "rho": 1e-30}, "too small"),
        (
            {"covariances": {"own": covariance("own", 0, 0.0), "other": covariance("o", 1)}},
            "energy",
        ),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "covariances": {"own": covariance("own", 0), "other": covariance("other", 1)},
        "task": "own",
    }
    arguments |= change
    with pytest.raises(UserError, match=message):
        wiener_filters(arguments.pop("covariances"), arguments.pop("task"), **arguments)  # type: ignore[arg-type]


class Two(nn.Module):
    """Two linear layers, the adapter on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def adapted(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = get_peft_model(
        Two(), LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    )
    return model.double()


def test_several_steps_of_one_batch_are_all_filtered() -> None:
    filter_ = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    model = adapted(1)
    layer = model.base_model.model.first
    (a,) = layer.lora_A.values()
    expected = a.weight.detach() @ filter_.double()
    steps = FilteredSteps(model, {"first": filter_})
    steps.start()
    for seed in range(3):  # with nothing said after a step but at the end
        gradient = torch.randn(a.weight.shape, generator=torch.Generator().manual_seed(seed))
        a.weight.grad = gradient.double()
        steps.before_step()
        torch.optim.SGD([a.weight], lr=0.1).step()
        expected = expected - 0.1 * gradient.double() @ filter_.double().T @ filter_.double()
    steps.after_step()
    torch.testing.assert_close(a.weight.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ],
)
@pytest.mark.parametrize("again", [1, 2])
def test_steps_on_a_and_b_are_those_on_m_and_n(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], again: int
) -> None:
    """Against M and N as parameters of their own, which give A = M F and B = H N in every pass."""
    numbers = torch.Generator().manual_seed(0)
    filter_ = torch.randn(WIDTH, WIDTH, generator=numbers, dtype=torch.float64)
    output = torch.randn(5, 5, generator=numbers, dtype=torch.float64)
    data = torch.randn(30, WIDTH, generator=numbers, dtype=torch.float64)
    target = data[:, :1].sin()

    model = adapted(1)
    layer = model.base_model.model.first
    base, (a,), (b,) = layer.base_layer, layer.lora_A.values(), layer.lora_B.values()
    scaling = layer.scaling["default"]
    b.weight.data.zero_()
    m, n = (w.detach().clone().requires_grad_() for w in (a.weight, b.weight))
    oracle_optimiser = make([m, n])
    for _ in range(10):
        oracle_optimiser.zero_grad()
        update = scaling * output @ n @ m @ filter_
        hidden = data @ (base.weight + update).T + base.bias
        last = model.base_model.model.last
        loss = (torch.tanh(hidden) @ last.weight.T + last.bias - target).square().mean()
        loss.backward()
        oracle_optimiser.step()

    both = [
        FilteredSteps(model, {"first": filter_}),
        FilteredSteps(model, {"first": output}, side="outputs"),
    ]
    for steps in both:
        steps.start()
    optimiser = make([a.weight, b.weight])
    for _ in range(10):
        optimiser.zero_grad()
        (model(data) - target).square().mean().backward()
        for steps in again * both:  # a second optimiser may announce its step too
            steps.before_step()
        optimiser.step()
        for steps in 2 * both:  # the second time nothing is left to do
            steps.after_step()
    expected = {"first": (m @ filter_).detach()}
    torch.testing.assert_close(
        {name: rows.double() for name, rows in lora_a(model).items()},
        expected,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(b.weight, output @ n, rtol=1e-4, atol=1e-5)


def test_filters_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="features"):
        FilteredSteps(adapted(1), {"first": torch.eye(WIDTH + 1)})
    with pytest.raises(UserError, match="expected \\(d_in, d_in\\)"):
        FilteredSteps(adapted(1), {"first": torch.eye(WIDTH)[:2]})
    with pytest.raises(UserError, match="first"):
        FilteredSteps(adapted(1), {"other": torch.eye(WIDTH)})
    with pytest.raises(UserError, match="which writes 5 features"):
        FilteredSteps(adapted(1), {"first": torch.eye(WIDTH)}, side="outputs")


def test_a_pool_of_earlier_tasks_filters_as_they_do(tmp_path: Path) -> None:
    """Each of as many tokens, so that the pool is their mean; it weighs two, saved and loaded."""
    own, a, b, c = (covariance(name, seed) for seed, name in enumerate(("own", "a", "b", "c")))
    (a + b).save(tmp_path / "pool.safetensors")
    pool = Covariance.load(tmp_path / "pool.safetensors")
    assert [pool.pooled, (pool + c).pooled, (pool + c - c).pooled, (a + a).pooled] == [2, 3, 2, 1]
    apart = wiener_filters({"own": own, "a": a, "b": b, "c": c}, "own")
    together = wiener_filters({"own": own, "earlier": pool, "c": c}, "own")
    for module, filter_ in apart.items():
        torch.testing.assert_close(together[module], filter_, rtol=1e-3, atol=1e-5)


def test_activations_that_are_the_same_in_every_text_do_not_stop_the_filter() -> None:
    """Three enormous features of every eighth token: float32 sums give them energy below zero."""
    width, tokens = 400, 40_000

    def moments(seed: int) -> tuple[Tensor, Tensor]:
        numbers = torch.Generator().manual_seed(seed)
        h = torch.randn(tokens, width, generator=numbers, dtype=torch.float64)
        h[::8, [5, 42, 79]] = 1e4 * torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)
        rounded = torch.zeros(width, width)
        for batch in h.float().split(32):
            rounded.addmm_(batch.T, batch)
        return rounded / tokens, h.T @ h / tokens

    def of(task: str, matrix: Tensor) -> Covariance:
        counts = {"m": tokens}
        return Covariance(
            {"m": matrix}, {"m": matrix[0]}, {"m": "m"}, counts, counts, {"task": task}
        )

    (own, exact_own), (other, exact_other) = moments(0), moments(1)
    block = other[[[5], [42], [79]], [5, 42, 79]]
    assert torch.linalg.eigvalsh(block.double())[0] < -0.2, "more than the damping"
    rest = [i for i in range(width) if i not in (5, 42, 79)]
    for mu in (0.05, 0.15):
        found, expected = (
            wiener_filters({"own": of("own", a), "other": of("other", b)}, "own", mu=mu)["m"]
            for a, b in ((own, other), (exact_own, exact_other))
        )
        for kept, bound in ((range(width), 0.05 if mu > 0.1 else 0.1), (rest, 0.01)):
            error = (found - expected)[kept][:, kept].norm() / expected[kept][:, kept].norm()
            assert float(error) < bound
