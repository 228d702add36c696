from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from factories import covariance_of, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.experiments.lora_summation.page import write_page
from benchmarks.experiments.lora_summation.plots import higher_order
from benchmarks.experiments.lora_summation.predictors import Predictors
from benchmarks.experiments.lora_summation.relation import Relation, expected_changes
from benchmarks.experiments.lora_summation.results import HigherRow, Row, Summation
from benchmarks.experiments.lora_summation.scoring import Scorer
from benchmarks.experiments.lora_summation.settings import groups, published, sample_subsets, shares
from benchmarks.experiments.lora_summation.statistics import (
    Rows,
    change,
    fit,
    perplexity,
    spearman,
    student_quantile,
)
from merge_algorithms import Adapter, UserError
from osrm import Covariance
from trainers.causal import RowLosses
from trainers.store import Store


def rows(seed: int, count: int = 60, extra: float = 0.0) -> Rows:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 60, count).astype(float)
    return Rows(tokens * generator.normal(3 + extra, 0.3, count), tokens)


def test_perplexity_is_the_token_weighted_one() -> None:
    found = rows(0)
    level = sum(found.nll) / sum(found.tokens)
    assert perplexity(found).value == pytest.approx(math.exp(level), rel=1e-12)
    parts = [rows(1), rows(2)]
    union = Rows.union(parts)
    assert union.loss == pytest.approx(
        sum(p.nll.sum() for p in parts) / sum(p.tokens.sum() for p in parts)
    )


def test_the_standard_error_of_a_change_is_paired() -> None:
    """Against the spread of the change over bootstrap samples of rows."""
    reference = rows(0, 200)
    generator = np.random.default_rng(1)
    shift = generator.normal(0.1, 0.05, 200)
    other = Rows(reference.nll + shift * reference.tokens, reference.tokens)
    found = change(other, reference)
    drawn = []
    for _ in range(600):
        index = generator.integers(0, 200, 200)
        a, b = (Rows(x.nll[index], x.tokens[index]) for x in (other, reference))
        drawn.append(100 * math.expm1(a.loss - b.loss))
    assert found.value == pytest.approx(100 * math.expm1(other.loss - reference.loss), rel=1e-9)
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.15)
    # Were they not of the same rows, the error would be that of both perplexities.
    assert found.stderr < 0.3 * 100 * perplexity(reference).stderr / perplexity(reference).value


def test_the_error_of_a_union_is_that_of_rows_within_their_domains() -> None:
    """Against its formula, and the spread over bootstrap samples of each domain's own rows.

    Were rows drawn from all domains together, whose levels differ, it would be twice as large.
    """
    parts, others = ([rows(1, 40), rows(2, 90, extra)] for extra in (2.0, 2.5))
    union, reference = Rows.union(parts), Rows.union(others)
    level, reference_level = (
        sum(p.nll.sum() for p in of) / sum(p.tokens.sum() for p in of) for of in (parts, others)
    )
    total = sum(p.tokens.sum() for p in parts)
    alone, paired = 0.0, 0.0
    for part, other in zip(parts, others, strict=True):
        residuals = part.nll - level * part.tokens
        difference = residuals - (other.nll - reference_level * other.tokens)
        for_each = len(residuals) / (len(residuals) - 1)
        alone += for_each * sum((residuals - residuals.mean()) ** 2)
        paired += for_each * sum((difference - difference.mean()) ** 2)
    found = perplexity(union)
    assert found.stderr == pytest.approx(math.exp(level) * math.sqrt(alone) / total, rel=1e-12)
    ratio = math.exp(level - reference_level)
    expected = 100 * ratio * math.sqrt(paired) / total
    assert change(union, reference).stderr == pytest.approx(expected, rel=1e-12)

    generator, drawn = np.random.default_rng(0), []
    for _ in range(600):
        samples = []
        for part in parts:
            index = generator.integers(0, len(part.nll), len(part.nll))
            samples.append(Rows(part.nll[index], part.tokens[index]))
        drawn.append(perplexity(Rows.union(samples)).value)
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.15)
    assert perplexity(Rows(union.nll, union.tokens)).stderr > 1.5 * found.stderr


def test_losses_beyond_what_a_float_holds_are_a_large_number() -> None:
    worst = Rows(np.array([900.0, 1800.0]), np.array([1.0, 2.0]))
    assert perplexity(worst).value == pytest.approx(math.exp(700))
    assert math.isfinite(change(worst, rows(0, 2)).value)


def test_one_row_has_no_error() -> None:
    assert perplexity(Rows(np.array([3.0]), np.array([1.0]))).stderr == math.inf


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=4, max_size=12).filter(
        lambda points: len({x for x, _ in points}) > 2 and len({y for _, y in points}) > 1
    )
)
def test_the_line_is_that_of_least_squares(points: list[tuple[int, int]]) -> None:
    x, y = (np.array(values, float) for values in zip(*points, strict=True))
    line = fit(list(x), list(y))
    assert line is not None
    design = np.stack([np.ones_like(x), x], 1)
    (intercept, slope), *_ = np.linalg.lstsq(design, y, rcond=None)
    assert (line.intercept, line.slope) == pytest.approx((intercept, slope), abs=1e-9)
    residuals = y - design @ [intercept, slope]
    variance = residuals @ residuals / (len(x) - 2)
    assert line.r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-9)
    covariance = variance * np.linalg.inv(design.T @ design)
    assert line.slope_stderr == pytest.approx(math.sqrt(max(covariance[1, 1], 0)), abs=1e-9)
    new = np.array([1.0, 2.5])
    expected, margin = line.predict(2.5)
    assert expected == pytest.approx(new @ [intercept, slope], abs=1e-9)
    error = math.sqrt(max(variance + new @ covariance @ new, 0))
    assert margin == pytest.approx(student_quantile(0.975, len(x) - 2) * error, abs=1e-9)


def test_no_line_through_too_little() -> None:
    assert fit([1, 2], [1, 2]) is None
    assert fit([1, 1, 1], [1, 2, 3]) is None
    assert fit([1, math.nan, 2], [1, 2, 3]) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (100, 1.984)],
)
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=0.02)


def ranks(values: Sequence[float]) -> list[float]:
    return [
        1 + sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2
        for value in values
    ]


def test_spearman_and_its_p_match_all_permutations() -> None:
    x, y = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [2.0, 7.0, 1.0, 8.0, 2.0, 0.5]
    rho, p = spearman(np.array(x), np.array(y))
    expected = np.corrcoef(ranks(x), ranks(y))[0, 1]
    assert rho == pytest.approx(expected)
    every = [np.corrcoef(ranks(x), order)[0, 1] for order in permutations(ranks(y))]
    exact = np.mean(np.abs(every) >= abs(expected) - 1e-12)
    assert p == pytest.approx(exact, abs=0.01)
    assert math.isnan(spearman(np.array([1.0, 2, 3]), np.array([1.0, 1, 1]))[0])


def adapters() -> tuple[list[Adapter], dict[str, Covariance]]:
    names = ("math", "medicine", "finance")
    made = [random_adapter(name, {"layer": (6, 5)}, 2, seed) for seed, name in enumerate(names)]
    numbers = torch.Generator().manual_seed(3)
    inputs = {name: {"layer": torch.randn(40, 5, generator=numbers)} for name in names}
    return made, {name: covariance_of(h) for name, h in inputs.items()}


def test_predictors_match_their_formulas() -> None:
    made, covariances = adapters()
    found = Predictors(made, covariances).of(["math", "medicine", "finance"])
    dense = [(a.updates["layer"].b @ a.updates["layer"].a).double() for a in made]
    cosines = [
        float((u * v).sum() / u.norm() / v.norm())
        for i, u in enumerate(dense)
        for v in dense[i + 1 :]
    ]
    assert found["rms_cosine"] == pytest.approx(math.sqrt(np.mean(np.square(cosines))), rel=1e-5)
    shifts = [
        [float(torch.trace(u @ covariances[a.name].matrices["layer"].double() @ u.T)) for a in made]
        for u in dense
    ]
    ratios = [shifts[i][j] / shifts[i][i] for i in range(3) for j in range(3) if i != j]
    assert found["interference"] == pytest.approx(np.mean(ratios), rel=1e-5)
    assert math.isnan(Predictors(made, None).of(["math", "finance"])["interference"])


def test_a_relation_predicts_from_its_file(tmp_path: Path) -> None:
    made, covariances = adapters()
    line = fit([0.1, 0.2, 0.3, 0.5], [1.0, 2.5, 3.0, 6.0])
    assert line is not None
    lines = {"rms_cosine": line, "interference": line}
    relation = Relation("model", ("math", "medicine"), {"all": {}, "lora": lines, "osrm": {}})
    relation.save(tmp_path / "relation.json")
    loaded = Relation.load(tmp_path / "relation.json")
    assert loaded == relation
    found = expected_changes(made, loaded, covariances)
    assert len(found) == 2 * 4
    first = found[0]
    assert (first.combination, first.init) == (("math", "medicine"), "lora")
    assert first.expected == pytest.approx(line.intercept + line.slope * first.value)
    assert first.outside == (not 0.1 <= first.value <= 0.5)
    assert all(p.predictor == "rms_cosine" for p in expected_changes(made, loaded))
    confined = [replace(a, info={"subspace": {"init": "osrm"}}) for a in made]
    assert expected_changes(confined, loaded) == []  # nothing is known of such adapters
    with pytest.raises(UserError, match="at least two adapters"):
        expected_changes(made[:1], loaded)
    content = json.loads((tmp_path / "relation.json").read_text())
    slope = copy.deepcopy(content)
    slope["fits"]["lora"]["rms_cosine"]["slope"] = "steep"
    for other in ({}, [], content | {"fits": []}, content | {"fits": {"all": {"x": None}}}, slope):
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="cannot be read as a fitted relation"):
            Relation.load(tmp_path / "other.json")


def test_groups_and_subsets() -> None:
    assert groups(["a", "b"]) == [("a", "b")]
    assert groups(["a", "b", "c"])[-1] == ("a", "b", "c")
    assert published(("qa_finance", "qa_math")) == 4.54
    assert published(("math", "law")) is None
    assert shares(["a", "b", "c"], 8) == {"a": 3, "b": 3, "c": 2}
    names = [f"x{i}" for i in range(8)]
    chosen = sample_subsets(names, 3, 0)
    assert chosen == sample_subsets(names, 3, 0)
    assert len(set(chosen)) == len(chosen) == 3 * 6 + 1
    assert chosen[-1] == tuple(names)


def test_an_undefined_loss_is_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fused:
        @contextmanager
        def on(self, backbone: object, coefficient: float) -> Iterator[None]:
            self.coefficient = coefficient
            yield

    fused, nll = Fused(), {0.5: math.nan, 1.0: 3.0, 2.0: 2.0}

    def losses(*_: object) -> RowLosses:
        one = torch.ones(2)
        return RowLosses(nll[fused.coefficient] * one, one, one)

    monkeypatch.setattr("benchmarks.experiments.lora_summation.scoring.losses", losses)
    rows: Any = SimpleNamespace(fingerprint=str, max_length=8, rows=lambda part: [])
    model: Any = SimpleNamespace(fingerprint="model")
    scorer = Scorer(Store(tmp_path), model, {"math": rows}, [], torch.float32)
    scorer.backbone = torch.nn.Identity()
    found = scorer.score("sum", ["math"], {}, lambda: fused, list(nll))  # type: ignore[arg-type]
    assert found.coefficient == 2.0


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ((-1.0, -2.0, -1.0), "never worse"),
        ((-1.0, 2.0, 1.0), "worse than no adapter from 3 on"),
        ((1.0, -2.0, 1.0), "worse than no adapter from 4 on"),
        ((1.0, 2.0, -1.0), "worse than no adapter at 2, 3 only"),
    ],
)
def test_from_where_on_sums_are_worse_than_no_adapter(
    changes: tuple[float, ...], where: str
) -> None:
    results = Summation("run", "qa", "quick", "tiny", "", ["math"], {}, {}, {})
    for size, value in enumerate(changes, 2):
        subset = tuple("abcd"[:size])
        results.higher_order.append(
            HigherRow(0, "lora", subset, "lora_sum", 5.0, value, rms_cosine=0.1, interference=0.2)
        )
    assert f"lora lora_sum: {where}." in higher_order(results).alternative


def test_sums_that_came_to_nothing_are_reported(tmp_path: Path) -> None:
    results = Summation("run", "qa", "quick", "tiny", "", ["math", "code"], {}, {}, {})
    for seed, method in product((0, 1), ("joint", "lora_sum")):
        lost = math.inf if method == "lora_sum" else 0.0
        for task in ("union", "math", "code"):
            row = Row(seed, "lora", ("math", "code"), method, task, 1.0, 3.0, 0.1, lost, 0.1, 0, 0)
            results.rows.append(replace(row, perplexity=3.0 + lost))
    found = results.mean("change", results.select("lora", ("math", "code"), "lora_sum"))
    assert [math.isnan(number) for number in found[:2]] == [True, True]
    results.save(tmp_path)
    assert "+nan %" in write_page(results, tmp_path).read_text(encoding="utf-8")
