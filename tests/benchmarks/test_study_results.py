"""The Pareto front, the finalists and the rows of a study, without running one."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.arms import ArmSettings
from benchmarks.report.study import pareto_plot, write_study_report
from benchmarks.results import area_under
from benchmarks.study_results import StudyResults, StudyTrial, TrialOutcome
from trainers.settings import AdapterSettings, SubspaceSettings, TrainSettings

Points = list[tuple[float, float]]


def arm(rank: int) -> ArmSettings:
    subspace = SubspaceSettings("contrastive", "project")
    return ArmSettings(f"arm{rank}", AdapterSettings(rank=rank), TrainSettings(), subspace)


def study(points: Points) -> StudyResults:
    trials = [
        StudyTrial(i, arm(i + 1), "", TrialOutcome(x, {"ties": {1.0: y}}, 0.5), 3.0)
        for i, (x, y) in enumerate(points)
    ]
    return StudyResults("run", "pair", "quick", "tiny", ["ties"], trials)


scores = st.lists(
    st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), min_size=1, max_size=12
)


@settings(max_examples=50)
@given(scores)
def test_the_front_holds_every_point_that_no_other_beats(points: Points) -> None:
    best = {
        (x, y)
        for x, y in points
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points)
    }
    front = [points[trial.number] for trial in study(points).front()]
    assert sorted(front) == sorted(best), "equal points count once"
    assert front == sorted(front, reverse=True)


@settings(max_examples=50)
@given(scores)
def test_finalists_are_the_ends_of_the_front_and_one_between(points: Points) -> None:
    results = study(points)
    front = [trial.arm for trial in results.front()]
    finalists = results.finalists()
    assert len(finalists) == min(len(front), 3)
    assert (finalists[0], finalists[-1]) == (front[0], front[-1])
    assert all(one in front for one in finalists)
    without = results.finalists([front[0]])
    assert front[0] not in without


def test_the_finalist_between_is_far_from_both_ends() -> None:
    results = study([(1.0, 0.0), (0.99, 0.1), (0.6, 0.55), (0.02, 0.98), (0.0, 1.0)])
    assert [one.name for one in results.finalists()] == ["arm1", "arm3", "arm5"]


def test_undefined_scores_are_worse_than_any(tmp_path: Path) -> None:
    results = study([(math.nan, 0.9), (0.5, 0.4), (0.9, math.nan), (0.4, 0.5)])
    assert [trial.arm.name for trial in results.front()] == ["arm2", "arm4"]
    curves = {"ties": {0.5: math.nan, 1.0: 0.1, 2.0: 0.3}}
    results.trials.append(StudyTrial(5, arm(5), "known", TrialOutcome(math.nan, curves, 0.5)))
    outcome = results.trials[-1].outcome
    assert outcome is not None
    assert (outcome.best, outcome.merged) == (("ties", 2.0), 0.3)
    results.save(tmp_path / "study.csv")
    with (tmp_path / "study.csv").open(newline="", encoding="utf-8") as file:
        assert [row["ties"] for row in csv.DictReader(file)] == ["0.9", "0.4", "", "0.5", "0.3"]
    page = write_study_report(results, tmp_path).read_text(encoding="utf-8")
    names = [page.index(f">arm{number}<") for number in (1, 4, 2, 5, 3)]
    assert names == sorted(names), "from the highest merged score to the undefined one"


def test_a_row_by_hand(tmp_path: Path) -> None:
    curves = {"ties": {0.5: 0.5, 1.0: 0.7, 2.0: 0.3}, "average": {0.5: 0.6, 1.0: 0.2, 2.0: 0.0}}
    results = study([])
    results.merges = ["ties", "average"]
    results.trials = [
        StudyTrial(4, arm(8), "known", TrialOutcome(0.9, curves, 0.25), 12.345),
        StudyTrial(7, arm(16), refused="it does not fit"),
    ]
    results.save(tmp_path / "study.csv")
    with (tmp_path / "study.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["trial"], first["name"], first["reference"]) == ("4", "arm8", "known")
    assert (first["constraint"], first["k"], first["rank"]) == ("project", "48", "8")
    assert (first["merge"], first["coefficient"], first["merged"]) == ("ties", "1.0", "0.7")
    assert (first["average"], first["average_at_1"]) == ("0.6", "0.2")
    # (0.5 * (0.5 + 0.7) / 2 + 1 * (0.7 + 0.3) / 2) / 1.5
    assert float(first["area"]) == pytest.approx(0.8 / 1.5)
    assert (first["on_front"], first["seconds"]) == ("True", "12.3")
    assert (second["refused"], second["merged"], second["seconds"]) == ("it does not fit", "", "")
    page = write_study_report(results, tmp_path).read_text(encoding="utf-8")
    assert "it does not fit" in page
    assert "known" in page


def test_area_of_one_point_and_of_a_line() -> None:
    assert area_under({0.3: 0.7}) == 0.7
    assert area_under({2.0: 1.0, 0.0: 0.0}) == pytest.approx(0.5)


def test_the_plot_says_what_it_shows() -> None:
    plot = pareto_plot(study([(0.8, 0.7), (0.9, 0.6), (0.7, 0.5)]))
    assert ElementTree.fromstring(plot.svg()).get("role") == "img"
    assert "arm1: individual 0.800, merged 0.700" in plot.alternative
    assert "arm3" not in plot.alternative
    assert "No trial" in pareto_plot(study([])).alternative
