"""Every setting of the subspace decides rows, filters, the penalty, and the stages' keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import covariance_of

from benchmarks.suites import load_suite
from osrm import Covariance, Gradients, output_filters, subspace_state, wiener_filters
from trainers.backbone import ModelRef, load_tokenizer
from trainers.data import TaskData
from trainers.jobs import Job
from trainers.settings import SubspaceSettings
from trainers.store import Store
from trainers.subspace import make_confinement, task_subspace

D, RANK = 12, 3


def random_covariance(task: str, seed: int) -> Covariance:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(60, D, generator=generator) * torch.rand(D, generator=generator)
    return covariance_of({"query": h}, model="tiny", task=task)


COVARIANCES = {task: random_covariance(task, seed) for seed, task in enumerate("abc")}
C_A, C_B, C_C = (covariance.matrix("query").double() for covariance in COVARIANCES.values())


def rows_of(settings: SubspaceSettings) -> torch.Tensor:
    state = task_subspace(COVARIANCES, "a", RANK, settings)
    assert state is not None
    return state["query"]


def test_filters_are_of_the_mu_rho_and_weights_that_are_set() -> None:
    settings = SubspaceSettings("wiener", mu=1.0, rho=0.3, weights={"b": 3.0, "a": 2.0})
    found = make_confinement("a", None, settings, COVARIANCES, {}).filters
    expected = wiener_filters(COVARIANCES, "a", mu=1.0, rho=0.3, weights={"b": 3.0})
    assert found is not None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("init", ["lora", "osrm", "wiener"])
def test_output_filters_are_of_the_mu_and_weights_that_are_set(init: Any) -> None:
    """There are no gradients of c, which has a weight and a covariance all the same."""
    rows = torch.randn(5, D, generator=torch.Generator().manual_seed(9))
    gradients = {"b": Gradients({"query": rows.T @ rows}, 5)}
    settings = SubspaceSettings(init, weights={"b": 3.0, "c": 2.0, "a": 4.0}, output_mu=0.4)
    state = task_subspace(COVARIANCES, "a", RANK, settings)
    found = make_confinement("a", state, settings, COVARIANCES, gradients).output_filters
    expected = output_filters(gradients, "a", mu=0.4, weights={"b": 3.0})
    assert found.keys() == expected.keys()
    assert torch.equal(found["query"], expected["query"])


@pytest.mark.parametrize(("init", "gamma", "expected"), [("wiener", None, 30), ("lora", 2.0, 2)])
def test_the_penalty_is_of_the_gamma_and_weights_that_are_set(
    init: Any, gamma: float | None, expected: float
) -> None:
    settings = SubspaceSettings(init, weights={"b": 3.0, "a": 2.0}, leak_penalty=gamma)
    found = make_confinement("a", None, settings, COVARIANCES, {})
    assert not found.output_filters
    assert found.gamma == expected
    torch.testing.assert_close(found.others["query"].double(), (3 * C_B + C_C) / 4)


@pytest.mark.parametrize(
    "settings",
    [
        SubspaceSettings("osrm", scale="matched"),
        SubspaceSettings("contrastive", "project", k=5, scale="matched"),
    ],
)
def test_matched_rows_let_through_what_plain_lora_does(settings: SubspaceSettings) -> None:
    rows = rows_of(settings).double()
    a = rows[:RANK]
    through = float((a @ C_A @ a.T).trace())
    assert through == pytest.approx(RANK * float(C_A.trace()) / (3 * D), rel=1e-5)
    lengths = rows.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(len(rows)))
    assert len(rows) == (5 if settings.kept == "project" else RANK)


@pytest.mark.parametrize("energy", [0.15, 0.4])
def test_a_budget_of_energy_decides_the_number_of_rows(energy: float) -> None:
    values = torch.linalg.eigvalsh((3 * C_B + C_C) / 4)
    expected = int((values.cumsum(0) <= energy * values.sum()).sum())
    assert RANK < expected < D
    settings = SubspaceSettings("osrm", "project", k=4, energy=energy, weights={"b": 3.0})
    assert len(rows_of(settings)) == expected


def test_rows_are_of_the_rho_and_weights_that_are_set() -> None:
    settings = SubspaceSettings("contrastive", rho=0.5, weights={"b": 3.0, "a": 2.0})
    expected = subspace_state(COVARIANCES, "a", RANK, "contrastive", rho=0.5, weights={"b": 3.0})
    assert torch.equal(rows_of(settings), expected["query"])


@pytest.fixture
def key(toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The key of the stage that trains an adapter with subspace settings; builds nothing."""
    run = Store.run

    def empty(store: Store, kind: str, label: str, inputs: Any, build: object) -> Path:
        return run(store, kind, label, inputs, lambda directory, report: None)

    monkeypatch.setattr(Store, "run", empty)
    suite = load_suite(str(toy_suite))
    tokenizer = load_tokenizer(suite.model)

    def of(
        tasks: tuple[str, ...] = ("half", "size", "same"),
        metrics: tuple[str, ...] = ("accuracy",),
        rows: Mapping[str, int] = {},
        **settings: Any,
    ) -> str:
        model, subspace = ModelRef("toy/bert", suite.model), SubspaceSettings(**settings)
        known = suite.tasks | {"half": replace(suite.tasks["half"], metrics=metrics)}
        numbers = replace(suite.rows, **rows)
        data = {name: TaskData(known[name], tokenizer, suite.train, numbers) for name in tasks}
        parts = (model, data, suite.adapter, suite.head, suite.train, subspace)
        return Job(Store(tmp_path), *parts).train_adapter("half").name

    return of


OTHERS = {"weights": {"size": 2.0}}


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        # Without the penalty, which reads the weights too.
        ({"init": "wiener", "leak_penalty": 0.0}, [{"mu": 0.3}, {"rho": 0.2}, OTHERS]),
        ({"init": "wiener"}, [{"mu": 0.3}, {"constraint": "init"}, {"leak_penalty": 3.0}, OTHERS]),
        ({"init": "contrastive"}, [{"rho": 0.2}, {"scale": "matched"}, OTHERS]),
        ({"init": "osrm", "constraint": "project"}, [{"k": 12}, {"energy": 0.1}, OTHERS]),
        ({"init": "lora", "leak_penalty": 3.0}, [{"leak_penalty": 4.0}, OTHERS]),
        ({"init": "lora", "output_mu": 0.1}, [{"output_mu": 0.2}, {"output_mu": 0.0}, OTHERS]),
        ({"init": "wiener", "output_mu": 0.15}, [{"output_mu": None}, {"output_mu": 0.2}, OTHERS]),
    ],
)
def test_an_adapter_is_trained_anew_for_settings_that_its_init_reads(
    settings: dict[str, Any], read: list[dict[str, Any]], key: Callable[..., str]
) -> None:
    keys = [key(**settings), *(key(**(settings | change)) for change in read)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        (
            {"init": "wiener"},
            [{"k": 12}, {"energy": 0.1}, {"scale": "matched"}, {"output_mu": 0.0}],
        ),
        ({"init": "contrastive"}, [{"mu": 0.3}, {"k": 12}, {"energy": 0.1}]),
        ({"init": "osrm"}, [{"mu": 0.3}, {"rho": 0.2}, {"k": 12}, {"output_mu": 0.0}]),
        ({"init": "lora"}, [{"mu": 0.3}, {"rho": 0.2}, {"k": 12}, {"scale": "matched"}, OTHERS]),
        ({"init": "lora", "leak_penalty": 3.0}, [{"mu": 0.3}, {"rho": 0.2}]),
        ({"init": "lora", "output_mu": 0.1}, [{"mu": 0.3}, {"rho": 0.2}, {"k": 12}]),
    ],
)
def test_an_adapter_is_found_again_whatever_its_init_does_not_read(
    settings: dict[str, Any], unread: list[dict[str, Any]], key: Callable[..., str]
) -> None:
    assert {key(**(settings | change)) for change in unread} == {key(**settings)}


OTHER_DATA = {"tasks": {"tasks": ("half", "size")}, "covariance": {"rows": {"covariance": 16}}}


@pytest.mark.parametrize(
    ("settings", "anew"),
    [
        ({"init": "lora"}, []),
        ({"init": "lora", "leak_penalty": 3.0}, ["tasks", "covariance"]),
        ({"init": "lora", "output_mu": 0.1}, ["tasks", "covariance"]),
        ({"init": "osrm"}, ["tasks", "covariance"]),
        ({"init": "wiener"}, ["tasks", "covariance"]),
    ],
)
def test_other_data_trains_anew_only_what_reads_it(
    settings: dict[str, Any], anew: list[str], key: Callable[..., str]
) -> None:
    own = key(**settings)
    assert [name for name, other in OTHER_DATA.items() if key(**settings, **other) != own] == anew
    assert key(**settings, metrics=("f1", "accuracy")) == own
    assert key(**settings, rows={"validation": 12}) == own
    assert key(**settings, rows={"train": 60}) != own
