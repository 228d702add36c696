from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from trainers.metrics import LanguageMetrics, TaskMetrics, make_metrics
from trainers.tasks import Kind, Task

Array = NDArray[np.float64]


def metrics_of(kind: Kind, *names: str, num_labels: int = 1) -> TaskMetrics:
    task = Task("mood", ("text",), {"dir": "data"}, kind=kind, metrics=names)
    return make_metrics(task, num_labels)


def one_hot(classes: list[int], num_labels: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), num_labels).float()


def f1(found: Array, true: Array, label: float) -> float:
    hits = np.sum((found == label) & (true == label))
    return 2 * hits / (np.sum(found == label) + np.sum(true == label))


def matthews(found: Array, true: Array, num_labels: int) -> float:
    """The multi-class coefficient: covariance of the one-hot codes over their deviations."""
    x, y = np.eye(num_labels)[found.astype(int)], np.eye(num_labels)[true.astype(int)]
    x, y = x - x.mean(0), y - y.mean(0)
    below = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / below)


def pearson(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def mean_ranks(x: Array) -> Array:
    return np.array([np.sum(x < value) + (np.sum(x == value) + 1) / 2 for value in x])


def update_in_batches(metrics: TaskMetrics, outputs: torch.Tensor, labels: torch.Tensor) -> None:
    for start in range(0, len(labels), 7):
        metrics.update(outputs[start : start + 7], labels[start : start + 7])


@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(2, 40))
@settings(deadline=None, max_examples=25)
def test_classification_agrees_with_the_formulas(seed: int, num_labels: int, rows: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, num_labels, generator=draw)
    labels = torch.randint(num_labels, (rows,), generator=draw)
    labels[0], logits[0] = 0, one_hot([1], num_labels)[0] * 9  # at least two classes
    labels[1], logits[1] = 1, one_hot([0], num_labels)[0] * 9
    metrics = metrics_of(
        "classification", "accuracy+f1", "accuracy", "f1", "matthews", num_labels=num_labels
    )
    update_in_batches(metrics, logits, labels)
    scores = metrics.compute()

    found, true = logits.argmax(1).numpy().astype(float), labels.numpy().astype(float)
    accuracy = np.mean(found == true)
    scored = [1] if num_labels == 2 else sorted({*found, *true})
    expected_f1 = np.mean([f1(found, true, c) for c in scored])
    assert list(scores) == ["accuracy+f1", "accuracy", "f1", "matthews"]
    assert scores["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert scores["f1"] == pytest.approx(expected_f1, abs=1e-6)
    assert scores["accuracy+f1"] == pytest.approx((accuracy + expected_f1) / 2, abs=1e-6)
    assert scores["matthews"] == pytest.approx(matthews(found, true, num_labels), abs=1e-5)


@given(st.integers(0, 2**31), st.integers(3, 40), st.floats(0.01, 100))
@settings(deadline=None, max_examples=25)
def test_regression_agrees_with_the_formulas(seed: int, rows: int, unit: float) -> None:
    draw = np.random.default_rng(seed)
    labels = np.round(draw.normal(size=rows) * 2) * unit  # with ties
    labels[:2] = -unit, 9 * unit
    outputs = labels + draw.normal(size=rows) * unit
    metrics = metrics_of("regression", "pearson+spearman", "spearman", "pearson")
    update_in_batches(metrics, torch.tensor(outputs)[:, None], torch.tensor(labels))
    scores = metrics.compute()

    rounded = outputs.astype(np.float32).astype(float)
    expected = {
        "pearson": pearson(outputs, labels),
        "spearman": pearson(mean_ranks(rounded), mean_ranks(labels.astype(np.float32))),
    }
    assert scores["pearson"] == pytest.approx(expected["pearson"], abs=1e-4)
    assert scores["spearman"] == pytest.approx(expected["spearman"], abs=1e-4)
    assert scores["pearson+spearman"] == pytest.approx(sum(expected.values()) / 2, abs=1e-4)


def test_labels_far_from_zero_cost_no_digits() -> None:
    draw = np.random.default_rng(0)
    labels = 1e7 + np.round(draw.normal(size=100) * 20)
    outputs = (labels + draw.normal(size=100) * 20).astype(np.float32)
    metrics = metrics_of("regression", "pearson")
    update_in_batches(metrics, torch.tensor(outputs), torch.tensor(labels))
    expected = pearson(outputs.astype(float), labels)
    assert metrics.compute()["pearson"] == pytest.approx(expected, abs=1e-3)


def test_f1_of_two_classes_is_that_of_class_one() -> None:
    metrics = metrics_of("classification", "f1", num_labels=2)
    metrics.update(one_hot([0, 0, 0, 1, 0], 2), torch.tensor([0, 0, 0, 1, 1]))
    assert metrics.compute()["f1"] == pytest.approx(2 / 3)


@pytest.mark.filterwarnings("error")
def test_constant_predictions_correlate_with_nothing() -> None:
    metrics = metrics_of("regression", "pearson+spearman", "pearson")
    metrics.update(torch.full((5,), 2.5), torch.arange(5.0))
    assert metrics.compute() == {"pearson+spearman": 0.0, "pearson": 0.0}
    metrics.reset()
    for batch in torch.arange(100.0).square().split([32, 7, 1, 32, 28]):
        metrics.update(torch.full((len(batch), 1), 0.1), batch)
    assert metrics.compute() == {"pearson+spearman": pytest.approx(0, abs=1e-6), "pearson": 0.0}
    alone = metrics_of("classification", "matthews", num_labels=2)
    alone.update(one_hot([0, 0, 0], 2), torch.tensor([0, 1, 0]))
    assert alone.compute() == {"matthews": 0.0}


def test_metrics_keep_their_dtype_in_a_module_that_is_converted() -> None:
    """As by Lightning's precision bf16-true, in which a sum of tokens would stop at 256."""
    language = LanguageMetrics(("log_likelihood",))
    regression = metrics_of("regression", "pearson")
    module = nn.ModuleList([language, regression]).to(torch.bfloat16)
    outputs = torch.arange(50.0) + 1000
    for _ in range(40):
        language.update(torch.ones(8), torch.full((8,), 3), torch.ones(8))
        regression.update(outputs, outputs.square())
    assert module[0].sums.dtype == torch.float64
    assert language.scores() == {"log_likelihood": pytest.approx(-1 / 3)}
    x = outputs.double().repeat(40)
    expected = torch.corrcoef(torch.stack([x, x.square()]))[0, 1]
    assert regression.compute()["pearson"] == pytest.approx(float(expected), abs=1e-4)


def test_reset_forgets_and_half_precision_outputs_are_welcome() -> None:
    metrics = metrics_of("regression", "pearson")
    metrics.update(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    metrics.reset()
    metrics.update(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16), torch.tensor([2, 4, 6]))
    assert metrics.compute()["pearson"] == pytest.approx(1.0)
