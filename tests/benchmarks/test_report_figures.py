"""The figures of a report: well formed, described, and true to the results."""

from __future__ import annotations

import dataclasses
import math
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import matplotlib
import pytest

from benchmarks.report.plots import (
    Plot,
    average_bars,
    coefficient_curves,
    interference_heatmap,
    leaked_energy,
)
from benchmarks.results import AVERAGE, Results

MakeResults = Callable[..., Results]
LORA, OSRM = "lora", "osrm"


def figures(results: Results) -> list[Plot]:
    return [
        average_bars(results),
        coefficient_curves(results),
        *(interference_heatmap(results, variant) for variant in results.arm_names()),
        leaked_energy(results),
    ]


def test_figures_are_well_formed_and_described(make_results: MakeResults) -> None:
    for plot in figures(make_results(seeds=(0, 1))):
        root = ElementTree.fromstring(plot.svg())
        assert root.get("role") == "img"
        assert [child.tag for child in root][:2] == ["title", "desc"]
        assert root[0].text == plot.title
        assert root[1].text == plot.alternative
        assert "nan" not in plot.svg()


def test_figure_texts(make_results: MakeResults) -> None:
    results = make_results()
    bars, curves, lora, osrm, leak = (
        [text.text for text in ElementTree.fromstring(plot.svg()).iter("text")]
        for plot in figures(results)
    )
    for variant in (LORA, OSRM):
        for merge in results.merges():
            assert f"{results.score(variant, merge, AVERAGE).mean:.3f}" in bars
    assert {"task arithmetic", "ties", "chosen"} <= set(curves)
    for texts, variant in ((lora, LORA), (osrm, OSRM)):
        for row in results.interference(variant):
            assert {f"{cell:.2f}" for cell in row} <= set(texts)
    assert {"lora, before", "osrm, after", "medsubject"} <= set(leak)


def test_alternatives_say_what_the_figures_show(make_results: MakeResults) -> None:
    results = make_results()
    results.arms[0].interference[1][2] = 3.456
    bars, curves, lora, _, leak = (plot.alternative for plot in figures(results))
    assert f"ties {results.score(OSRM, 'ties', AVERAGE).mean:.3f}" in bars
    assert f"ties, osrm: {results.curve(OSRM, 'ties')[0.8].mean:.3f} at 0.8" in curves
    assert "largest is 3.46, the adapter of trec on the data of movie" in lora
    assert f"{results.diagnostic(OSRM, 'leaked_before', AVERAGE).mean:.3g} before" in leak


def test_every_arm_gets_its_own_bars_and_matrix(make_results: MakeResults) -> None:
    results = make_results()
    results.scores += [
        dataclasses.replace(row, arm="frozen+k8") for row in results.scores if row.arm != "lora"
    ]
    results.arms.append(dataclasses.replace(results.arms[1], name="frozen+k8"))
    plots = figures(results)
    assert len(plots) == 6
    assert len({plot.name for plot in plots}) == 6
    assert "frozen+k8" in plots[0].svg()


def test_joint_training_is_a_line_and_no_bar(make_results: MakeResults) -> None:
    results = make_results()
    plain = average_bars(results)
    results.scores += [
        dataclasses.replace(row, arm="together", merge="joint", score=0.875)
        for row in results.scores
        if row.arm == LORA and row.merge == "individual"
    ]
    bars, curves = average_bars(results), coefficient_curves(results)
    assert (
        bars.alternative == f"{plain.alternative} together 0.875, one adapter trained on all tasks."
    )
    assert len(bars.figure.axes[0].patches) == len(plain.figure.axes[0].patches)
    assert "together 0.875" in bars.svg()
    assert "n/a" not in bars.svg()
    assert "together" not in curves.alternative


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_energies_without_a_logarithm(make_results: MakeResults, value: float) -> None:
    results = make_results()
    for arm in results.arms:
        before = arm.diagnostics["leaked_before"]
        before.update(dict.fromkeys(before, value))
        arm.diagnostics["leaked_own_ratio"]["sms"] = value
        arm.interference[0][1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plot in figures(results):
            ElementTree.fromstring(plot.svg())


def test_matplotlib_is_left_as_it_was(make_results: MakeResults) -> None:
    before = dict(matplotlib.rcParams)
    average_bars(make_results()).svg()
    assert dict(matplotlib.rcParams) == before
