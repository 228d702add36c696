"""The figures of the study's report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.experiments.orthogonal_dropout.results import (
    ALONE,
    AVERAGE,
    INDIVIDUAL,
    REAL,
    Measured,
)
from benchmarks.report.drawing import (
    COLOURS,
    INK,
    MARKERS,
    Plot,
    add_legend,
    new_figure,
    report_style,
)

SCORES = ("object", "style", "both")


def plots(measured: Measured) -> Iterator[Plot]:
    """Those that there are numbers for."""
    for name, title, wanted in (
        ("texts", "texts, mean of the headline metrics", {"task": AVERAGE}),
        ("glyphs", "pictures, share with the object", {"metric": "object"}),
    ):
        if measured.select(part="redundancy", **wanted):
            yield redundancy(measured, name, title, wanted)
    for init in measured.values("init", part="images", metric="both", samples=1):
        yield composition(measured, init)
    for init in measured.values("init", part="text"):
        yield texts(measured, init)


@report_style()
def redundancy(measured: Measured, name: str, title: str, wanted: dict[str, str]) -> Plot:
    """Quality of single adapters against their drop rate, a line for each training dropout."""
    figure, (axes,) = new_figure(7.2, 3.6)
    told = []
    known: dict[str, Any] = {"part": "redundancy", **wanted}
    for index, dropout in enumerate(measured.values("dropout", **known)):
        rates = sorted(measured.values("drop_rate", **known, dropout=dropout))
        means = [measured.mean(**known, dropout=dropout, drop_rate=rate) for rate in rates]
        axes.errorbar(
            rates,
            [mean.value for mean in means],
            [0 if math.isnan(mean.error) else mean.error for mean in means],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=2,
            label=f"LoRA dropout {dropout:g}",
        )
        told.append(f"dropout {dropout:g}: {means[0].value:.3f} to {means[-1].value:.3f}")
    axes.set(xlabel="drop rate p of the adapter's outputs", ylabel="score")
    axes.grid(axis="y")
    add_legend(figure, axes)
    alternative = f"From the lowest to the highest drop rate, {'; '.join(told)}."
    return Plot(f"redundancy-{name}", f"Redundancy: {title}", alternative, figure)


@report_style()
def composition(measured: Measured, init: str) -> Plot:
    """Shares of pictures with the object, the style and both, by the way of merging."""
    known: dict[str, Any] = {"part": "images", "init": init}
    labels = [x for x in measured.values("label", **known) if x != ALONE]
    figure, (axes,) = new_figure(7.6, 3.6)
    width, told = 0.8 / len(labels), []
    for index, label in enumerate(labels):
        means = [measured.mean_of(label, **known, metric=metric, styled=True) for metric in SCORES]
        x = np.arange(len(SCORES)) + (index - (len(labels) - 1) / 2) * width
        axes.bar(
            x,
            [mean.value for mean in means],
            width * 0.92,
            yerr=[0 if math.isnan(mean.error) else mean.error for mean in means],
            color=COLOURS[index % len(COLOURS)],
            error_kw={"ecolor": INK, "capsize": 2, "elinewidth": 1},
            label=label,
        )
        told.append(f"{label} {means[-1].value:.3f}")
    for index, metric in enumerate(SCORES):
        real = measured.mean(part="images", method=REAL, metric=metric)
        axes.plot(
            [index - 0.42, index + 0.42],
            [real.value] * 2,
            color=INK,
            linestyle="dashed",
            label=REAL if not index else "_",
        )
    axes.set_xticks(range(len(SCORES)), ["object", "style", "both"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("share of pictures")
    axes.grid(axis="y")
    add_legend(figure, axes)
    title = f"Object x style, {init} adapters"
    return Plot(f"composition-{init}", title, f"Both: {', '.join(told)}.", figure)


@report_style()
def texts(measured: Measured, init: str) -> Plot:
    """The mean over tasks by merge."""
    known: dict[str, Any] = {"part": "text", "init": init, "task": AVERAGE}
    labels = measured.values("label", **known)
    names = {
        label: f"{label}, static"
        for row in measured.select(**known)
        if row.samples is None and (label := row.label) != INDIVIDUAL
    }
    figure, (axes,) = new_figure(7.2, 0.34 * len(labels) + 1.1)
    means = [measured.mean_of(label, **known) for label in labels]
    axes.barh(
        range(len(labels)),
        [mean.value for mean in means],
        0.7,
        xerr=[0 if math.isnan(mean.error) else mean.error for mean in means],
        color=[INK if label == INDIVIDUAL else COLOURS[0] for label in labels],
        error_kw={"ecolor": "#9aa5b1", "capsize": 2},
    )
    axes.set_yticks(range(len(labels)), [names.get(label, label) for label in labels])
    axes.invert_yaxis()
    axes.set_xlabel("mean of the tasks' headline metrics, test rows")
    axes.grid(axis="x")
    listed = zip(labels, means, strict=True)
    alternative = ", ".join(f"{names.get(label, label)} {mean.value:.3f}" for label, mean in listed)
    return Plot(f"texts-{init}", f"Merges of the text adapters, {init}", f"{alternative}.", figure)
