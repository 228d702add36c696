"""The figures of a run's report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.report.drawing import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    Matrix,
    Plot,
    add_legend,
    heatmap,
    new_figure,
    off_diagonal,
    report_style,
)
from benchmarks.report.rows import merge_label, number
from benchmarks.results import AVERAGE, INDIVIDUAL, Results, Summary
from trainers.joint import JOINT

LEAKS = ("leaked_before", "leaked_after", "leaked_own_ratio")


@report_style()
def average_bars(results: Results) -> Plot:
    """Average test score by method, one bar per arm; individual and joint scores as references."""
    joint = {row.arm for row in results.scores if row.merge == JOINT}
    arms = [arm for arm in results.arm_names() if arm not in joint]
    methods = [INDIVIDUAL, *(method for method in results.merges() if method != JOINT)]
    labels = [_label(results, method) for method in methods]
    width = 0.8 / max(len(arms), 1)
    figure, (axes,) = new_figure(max(7.6, 1.2 + 0.55 * len(arms) * len(methods)), 3.9)
    told = []
    for index, arm in enumerate(arms):
        summaries = [results.score(arm, method, AVERAGE) for method in methods]
        x = np.arange(len(methods)) + (index - (len(arms) - 1) / 2) * width
        axes.bar(
            x,
            [summary.mean for summary in summaries],
            width * 0.92,
            yerr=_error_bars(summaries),
            color=COLOURS[index % len(COLOURS)],
            error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1.1},
            label=arm,
        )
        axes.hlines(
            [summaries[0].mean] * len(x[1:]),
            x[1:] - width * 0.46,
            x[1:] + width * 0.46,
            colors=INK,
            linestyles="dotted",
            linewidth=1.3,
        )
        for position, summary in zip(x, summaries, strict=True):
            # The foot of the bar: error bars and reference lines meet at its head.
            inside = summary.mean > 0.1
            colour = ("white" if index % len(COLOURS) < 3 else INK) if inside else INK
            axes.annotate(
                number(summary.mean),
                (position, 0 if inside else np.nanmax([summary.mean, 0])),
                (0, 5),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontweight="bold",
                fontsize=8.5,
            )
        told.append(f"{arm}: {_listed(labels, summaries)}")
    axes.plot([], [], color=INK, linestyle="dotted", label="its individual score")
    for arm in results.arm_names():
        if arm in joint:
            mean = results.score(arm, JOINT, AVERAGE).mean
            text = f"{arm} {number(mean)}"
            axes.axhline(mean, color=MUTED, linestyle="dashed", linewidth=1.1, label=text, zorder=0)
            told.append(f"{text}, one adapter trained on all tasks")
    axes.set_xticks(range(len(methods)), [_wrapped(label) for label in labels])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("average test score")
    axes.grid(axis="y")
    add_legend(figure, axes)
    return Plot("bars", "Average score by method", ". ".join(told) + ".", figure)


@report_style()
def coefficient_curves(results: Results) -> Plot:
    """Validation average by scaling coefficient: a panel per method, a line per arm."""
    methods = [method for method in results.merges() if method != JOINT]
    rows = max(math.ceil(len(methods) / 2), 1)
    figure, panels = new_figure(7.6, 0.6 + 2.5 * rows, rows, 2, sharey=True)
    told = []
    for axes, method in zip(panels, methods, strict=False):
        label = _label(results, method)
        axes.set_title(label)
        axes.set_xlabel("scaling coefficient")
        axes.grid()
        for index, arm in enumerate(results.arm_names()):
            curve = results.curve(arm, method)
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            mean = np.array([summary.mean for summary in curve.values()])
            spread = np.array([summary.spread for summary in curve.values()])
            axes.plot([*curve], mean, f"{marker}-", color=colour, ms=4, label=arm)
            axes.fill_between(
                [*curve], mean - spread, mean + spread, color=colour, alpha=0.15, lw=0
            )
            chosen = [value for value in results.coefficients(arm, method) if value in curve]
            axes.plot(
                chosen,
                [curve[value].mean for value in chosen],
                "o",
                ms=12,
                mfc="none",
                mec=colour,
                mew=1.8,
            )
            for value in chosen:
                told.append(f"{label}, {arm}: {number(curve[value].mean)} at {value:g}")
    for axes in panels[len(methods) :]:
        axes.set_axis_off()
    for axes in panels[::2]:
        axes.set_ylabel("validation average")
    if methods:
        panels[0].plot([], [], "o", ms=10, mfc="none", mec=MUTED, mew=1.8, label="chosen")
        add_legend(figure, panels[0])
    title = "Validation average against the scaling coefficient"
    return Plot("curves", title, f"Chosen: {'; '.join(told)}.", figure)


def interference_heatmap(results: Results, arm: str) -> Plot:
    """One arm's interference matrix; all arms of a run share the colour scale."""
    names = [task.name for task in results.tasks]
    matrix = np.array(results.interference(arm) or np.full((len(names),) * 2, np.nan))
    index = results.arm_names().index(arm)
    return interference_plot(f"matrix{index}", matrix, names, colour_limit(results), arm)


def interference_plot(
    name: str, matrix: Matrix, names: list[str], limit: float, label: str
) -> Plot:
    """What each adapter does to each task's inputs, relative to its own; `limit` is darkest."""
    axes = {"title": label, "xlabel": "on the data of", "ylabel": "adapter of"}
    figure = heatmap(matrix, names, limit, _short, **axes)
    off = off_diagonal(matrix)
    told = "No interference was measured."
    if np.isfinite(off).any():
        i, j = np.unravel_index(np.nanargmax(off), off.shape)
        told = (
            f"Off the diagonal the mean is {np.nanmean(off):.2f}; the largest is {off[i, j]:.2f},"
            f" the adapter of {names[i]} on the data of {names[j]}."
        )
    return Plot(name, f"Interference matrix{label and f', {label}'}", told, figure)


@report_style()
def leaked_energy(results: Results) -> Plot:
    """Leaked energy of A before and after training, and the trained update's leaked / own ratio."""
    names = [task.name for task in results.tasks]
    arms = results.diagnosed()
    figure, (left, right) = new_figure(7.6, 1.3 + 0.4 * len(names), 1, 2, sharey=True)
    told = []
    for index, arm in enumerate(arms):
        y = np.arange(len(names)) + (index - (len(arms) - 1) / 2) * 0.5 / len(arms)
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        before, after, ratio = (
            np.array([results.diagnostic(arm, leak, name).mean for name in names]) for leak in LEAKS
        )
        # A logarithmic axis has no place for an energy that rounds to zero.
        before, after = (np.where(x > 0, x, np.nan) for x in (before, after))
        left.hlines(y, before, after, colors=style["color"], linewidth=1.4)
        left.plot(before, y, **style, ls="", mfc="white", ms=6, label=f"{arm}, before")
        left.plot(after, y, **style, ls="", ms=6, label=f"{arm}, after")
        right.plot(ratio, y, **style, ls="", ms=6)
        means = [number(results.diagnostic(arm, leak, AVERAGE).mean, ".3g") for leak in LEAKS]
        told.append(
            f"{arm}, mean over tasks: {means[0]} before training, {means[1]}"
            f" after; leaked / own {means[2]}"
        )
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.set_title("leaked energy of A")
    left.set_xlabel("logarithmic scale")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    right.axvline(1, color=INK, linestyle="dotted", linewidth=1.3)
    right.set_xlim(left=0)
    right.set_title("leaked / own energy, trained update")
    right.set_xlabel("1: as strong on the other tasks as on its own")
    for axes in (left, right):
        axes.grid()
        axes.tick_params(axis="y", length=0)
    add_legend(figure, left)
    return Plot("leak", "Leaked energy before and after training", ". ".join(told) + ".", figure)


def _label(results: Results, merge: str) -> str:
    return merge_label(results, merge).replace("_", " ")


def _wrapped(label: str) -> str:
    name, bracket, qualifier = label.partition(" (")
    return textwrap.fill(name, 14) + bracket.replace(" ", "\n") + qualifier


def _error_bars(summaries: Iterable[Summary]) -> list[float] | None:
    spreads = [summary.spread for summary in summaries]
    return None if all(map(math.isnan, spreads)) else spreads


def _listed(labels: list[str], summaries: list[Summary]) -> str:
    return ", ".join(
        f"{label} {number(summary.mean)}" for label, summary in zip(labels, summaries, strict=True)
    )


def colour_limit(results: Results) -> float:
    """The entry drawn darkest: the largest of all arms, but at least 1 and at most 2."""
    matrices = [results.interference(arm) for arm in results.diagnosed()]
    return interference_limit([cell for matrix in matrices for row in matrix for cell in row])


def interference_limit(cells: Iterable[float]) -> float:
    """The entry of interference matrices that is drawn darkest, from 1 to 2."""
    return min(max([1.0, *filter(math.isfinite, cells)]), 2.0)


def _short(value: float) -> str:
    """At most four characters."""
    return "≥1e4" if value >= 9999.5 else number(value, ".2f" if value < 9.995 else ".0f")
