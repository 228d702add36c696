"""The figures of the study's report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.experiments.lora_summation.predictors import PREDICTORS
from benchmarks.experiments.lora_summation.results import HigherRow, Row, Summation
from benchmarks.experiments.lora_summation.settings import BASE, INDIVIDUAL, JOINT, SUM, published
from benchmarks.experiments.lora_summation.statistics import Fit
from benchmarks.report.drawing import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    Plot,
    add_legend,
    new_figure,
    report_style,
)

CHANGE = "change in perplexity, %"


def plots(results: Summation) -> list[Plot]:
    """All of them."""
    made = [change_bars(results, init) for init in results.inits()]
    made.append(scatter(results))
    return [*made, higher_order(results)] if results.higher_order else made


@report_style()
def change_bars(results: Summation, init: str) -> Plot:
    """The change of every method in every combination, the paper's figures as lines."""
    combinations = results.combinations()
    methods = [m for m in results.methods() if m not in (BASE, INDIVIDUAL, JOINT)]
    width = 0.8 / max(len(methods), 1)
    figure, (axes,) = new_figure(max(7.6, 1.4 * len(combinations) + 2), 3.9)
    told = []
    for index, method in enumerate(methods):
        summaries = [
            results.mean("change", results.select(init, combination, method))
            for combination in combinations
        ]
        x = np.arange(len(combinations)) + (index - (len(methods) - 1) / 2) * width
        axes.bar(
            x,
            [summary.mean for summary in summaries],
            width * 0.92,
            yerr=[summary.spread for summary in summaries],
            color=COLOURS[index % len(COLOURS)],
            error_kw={"ecolor": INK, "capsize": 2, "elinewidth": 1},
            label=method,
        )
        if method == SUM:
            listed = zip(combinations, summaries, strict=True)
            told = [f"{'+'.join(c)} {summary.mean:+.1f} %" for c, summary in listed]
    paper = {i: published(combination) for i, combination in enumerate(combinations)}
    known = {i: value for i, value in paper.items() if value is not None}
    if known:
        axes.hlines(
            list(known.values()),
            [i - 0.42 for i in known],
            [i + 0.42 for i in known],
            colors=INK,
            linestyles="dashed",
            linewidth=1.3,
            label="the paper's sum, GPT-2 Small",
        )
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xticks(range(len(combinations)), ["\n+ ".join(c) for c in combinations])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(CHANGE)
    axes.grid(axis="y")
    add_legend(figure, axes)
    title = f"Change by combination and method, {init} adapters"
    return Plot(f"bars-{init}", title, f"{SUM}: {', '.join(told)}.", figure)


@report_style()
def scatter(results: Summation) -> Plot:
    """The change of the sum on each predictor, with lines and their 95 % prediction bands."""
    known = [p for p in PREDICTORS if any(math.isfinite(getattr(r, p)) for r in results.points())]
    figure, panels = new_figure(7.6, 3.9, 1, max(len(known), 1), sharey=True)
    told = []
    for axes, predictor in zip(panels, known, strict=False):
        for i, init in enumerate(results.inits()):
            for c, combination in enumerate(results.combinations()):
                rows = [r for r in results.points(init) if r.combination == combination]
                _points(axes, rows, predictor, i, c, f"{init}: {'+'.join(combination)}")
        axes.set_xlabel(PREDICTORS[predictor])
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.grid()
        for i, init in enumerate(results.inits()):
            line = results.fits(init).get(predictor)
            if line is not None:
                _line(axes, line, COLOURS[i % len(COLOURS)])
                told.append(
                    f"{PREDICTORS[predictor]}, {init} adapters: R² {line.r2:.2f}, Spearman"
                    f" {line.spearman:+.2f} over {line.points} points"
                )
    panels[0].set_ylabel(CHANGE)
    add_legend(figure, panels[0])
    title = "Change of the sum on each predictor"
    return Plot("scatter", title, ". ".join(told or ["Too few points for a line"]) + ".", figure)


def _points(
    axes: Axes, rows: Sequence[Row], predictor: str, colour: int, marker: int, label: str
) -> None:
    axes.errorbar(
        [getattr(row, predictor) for row in rows],
        [row.change for row in rows],
        [row.change_stderr for row in rows],
        fmt=MARKERS[marker % len(MARKERS)],
        color=COLOURS[colour % len(COLOURS)],
        markersize=5,
        elinewidth=0.8,
        label=label,
    )


def _line(axes: Axes, line: Fit, colour: str) -> None:
    x = np.linspace(*line.x_range, 50)
    middle, half = np.array([line.predict(value) for value in x]).T
    axes.plot(x, middle, color=colour, linewidth=1.2)
    if np.isfinite(half).all():
        axes.fill_between(x, middle - half, middle + half, color=colour, alpha=0.08, lw=0)


@report_style()
def higher_order(results: Summation) -> Plot:
    """Change against no adapter, and against each adapter alone, over the number summed."""
    quantities = {
        "change_base": "against no adapter, %",
        "change_individual": "against each adapter alone, %",
    }
    figure, panels = new_figure(7.6, 3.6, 1, 2)
    told = []
    for axes, (quantity, title) in zip(panels, quantities.items(), strict=True):
        axes.set_title(title)
        axes.set_xlabel("adapters together")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.grid()
        kinds = list(dict.fromkeys((row.init, row.method) for row in results.higher_order))
        for index, (init, method) in enumerate(kinds):
            rows = [r for r in results.higher_order if (r.init, r.method) == (init, method)]
            sizes, means = by_size(rows, quantity)
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(
                [len(row.subset) for row in rows],
                [getattr(row, quantity) for row in rows],
                marker,
                color=colour,
                markersize=3,
                alpha=0.4,
            )
            axes.plot(sizes, means, f"{marker}-", color=colour, ms=5, label=f"{init}: {method}")
            if quantity == "change_base":
                told.append(f"{init} {method}: {_where_worse(sizes, means)}")
    add_legend(figure, panels[0])
    return Plot("higher", "More adapters than three", ". ".join(told) + ".", figure)


def _where_worse(sizes: list[int], means: list[float]) -> str:
    """At which sizes the change against no adapter is for the worse."""
    worse = [size for size, mean in zip(sizes, means, strict=True) if mean > 0]
    if not worse:
        return "never worse"
    last = max((size for size in sizes if size not in worse), default=0)
    lasting = [size for size in worse if size > last]
    where = f"from {lasting[0]} on" if lasting else f"at {', '.join(map(str, worse))} only"
    return f"worse than no adapter {where}"


def by_size(rows: Sequence[HigherRow], quantity: str) -> tuple[list[int], list[float]]:
    """Sizes of the subsets, and the mean of a number over those of each size."""
    sizes = sorted({len(row.subset) for row in rows})
    return sizes, [
        float(np.mean([getattr(r, quantity) for r in rows if len(r.subset) == size]))
        for size in sizes
    ]
