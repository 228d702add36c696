"""The figures of the report as inline SVG: real text, no references to anything outside."""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.report.rows import merge_label, number
from benchmarks.results import AVERAGE, INDIVIDUAL, Leak, Results, Summary, Variant

# Okabe and Ito's palette, told apart under every common colour blindness; shapes differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#1f2933"
MUTED = "#5b6770"
LEAKS: tuple[Leak, ...] = ("leaked_before", "leaked_after", "leaked_own_ratio")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "osrm",
    # A task may be called "$x_1$": its name is text, not mathematics.
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


@contextmanager
def _style() -> Iterator[None]:
    """The report's style whatever the user's matplotlibrc says; everything is put back."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@dataclass(frozen=True)
class Plot:
    """A figure and the sentence that says the same to someone who cannot see it."""

    name: str
    title: str
    alternative: str
    figure: Figure

    def svg(self) -> Markup:
        """One <svg> element: the same text for the same results, ids unique within a page."""
        text = io.StringIO()
        with _style():
            self.figure.savefig(
                text,
                format="svg",
                metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
            )
        body = text.getvalue().partition("<svg")[2].partition(">")
        size = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', body[0])
        assert size is not None
        # matplotlib numbers the ids of every figure from 1 and styles every element of the page.
        drawing = re.sub(r'(\bid="|\bxlink:href="#|url\(#)', rf"\1{self.name}-", body[2])
        drawing = re.sub(r"<style.*?</style>", "", drawing).replace("xlink:href", "href")
        label = f"{self.name}-title {self.name}-alternative"
        # matplotlib escapes the text it draws.
        return Markup(
            f'<svg role="img" aria-labelledby="{label}" {size[0]} style="width:{size[1]}pt">'
            f'<title id="{self.name}-title">{escape(self.title)}</title>'
            f'<desc id="{self.name}-alternative">{escape(self.alternative)}</desc>{drawing}'
        )


@_style()
def average_bars(results: Results) -> Plot:
    """Average test score by method, one bar per variant, the individual score as reference."""
    variants, methods = results.variants(), [INDIVIDUAL, *results.merges()]
    labels = [_label(results, method) for method in methods]
    width = 0.8 / max(len(variants), 1)
    figure, (axes,) = _figure(max(7.6, 1.2 + 0.55 * len(variants) * len(methods)), 3.9)
    told = []
    for index, variant in enumerate(variants):
        summaries = [results.score(variant, method, AVERAGE) for method in methods]
        x = np.arange(len(methods)) + (index - (len(variants) - 1) / 2) * width
        axes.bar(
            x,
            [summary.mean for summary in summaries],
            width * 0.92,
            yerr=_error_bars(summaries),
            color=COLOURS[index % len(COLOURS)],
            error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1.1},
            label=variant.label,
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
        told.append(f"{variant.label}: {_listed(labels, summaries)}")
    axes.plot([], [], color=INK, linestyle="dotted", label="its individual score")
    axes.set_xticks(range(len(methods)), [_wrapped(label) for label in labels])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("average test score")
    axes.grid(axis="y")
    _legend(figure, axes)
    return Plot("bars", "Average score by method", ". ".join(told) + ".", figure)


@_style()
def coefficient_curves(results: Results) -> Plot:
    """Validation average by scaling coefficient: a panel per method, a line per variant."""
    methods = results.merges()
    rows = max(math.ceil(len(methods) / 2), 1)
    figure, panels = _figure(7.6, 0.6 + 2.5 * rows, rows, 2, sharey=True)
    told = []
    for axes, method in zip(panels, methods, strict=False):
        label = _label(results, method)
        axes.set_title(label)
        axes.set_xlabel("scaling coefficient")
        axes.grid()
        for index, variant in enumerate(results.variants()):
            curve = results.curve(variant, method)
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            mean = np.array([summary.mean for summary in curve.values()])
            spread = np.array([summary.spread for summary in curve.values()])
            axes.plot([*curve], mean, f"{marker}-", color=colour, ms=4, label=variant.label)
            axes.fill_between(
                [*curve], mean - spread, mean + spread, color=colour, alpha=0.15, lw=0
            )
            chosen = [value for value in results.coefficients(variant, method) if value in curve]
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
                told.append(f"{label}, {variant.label}: {number(curve[value].mean)} at {value:g}")
    for axes in panels[len(methods) :]:
        axes.set_axis_off()
    for axes in panels[::2]:
        axes.set_ylabel("validation average")
    if methods:
        panels[0].plot([], [], "o", ms=10, mfc="none", mec=MUTED, mew=1.8, label="chosen")
        _legend(figure, panels[0])
    title = "Validation average against the scaling coefficient"
    return Plot("curves", title, f"Chosen: {'; '.join(told)}.", figure)


@_style()
def interference_heatmap(results: Results, variant: Variant) -> Plot:
    """One variant's interference matrix; all variants of a run share the colour scale."""
    names = [task.name for task in results.tasks]
    matrix = np.array(results.interference(variant) or np.full((len(names),) * 2, np.nan))
    off = np.where(np.eye(len(names), dtype=bool), np.nan, matrix)
    limit = colour_limit(results)
    size = 1.7 + 0.39 * len(names)
    figure, (axes,) = _figure(size, size)
    axes.pcolormesh(off, cmap=_blues(), vmin=0, vmax=limit, edgecolors="white", linewidth=1)
    for (i, j), value in np.ndenumerate(matrix):
        dark = i != j and value > 0.6 * limit
        axes.text(
            j + 0.5,
            i + 0.5,
            _short(value),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else MUTED if i == j else INK,
        )
    axes.set(aspect="equal", xlabel="on the data of", ylabel="adapter of")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    ticks = np.arange(len(names)) + 0.5
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    axes.set_title(variant.label)
    told = "No interference was measured."
    if np.isfinite(off).any():
        i, j = np.unravel_index(np.nanargmax(off), off.shape)
        told = (
            f"Off the diagonal the mean is {np.nanmean(off):.2f}; the largest is {off[i, j]:.2f},"
            f" the adapter of {names[i]} on the data of {names[j]}."
        )
    index = results.variants().index(variant)
    return Plot(f"matrix{index}", f"Interference matrix, {variant.label}", told, figure)


@_style()
def leaked_energy(results: Results) -> Plot:
    """Leaked energy of A before and after training, and the trained update's leaked / own ratio."""
    names = [task.name for task in results.tasks]
    variants = results.variants()
    figure, (left, right) = _figure(7.6, 1.3 + 0.4 * len(names), 1, 2, sharey=True)
    told = []
    for index, variant in enumerate(variants):
        y = np.arange(len(names)) + (index - (len(variants) - 1) / 2) * 0.5 / len(variants)
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        before, after, ratio = (
            np.array([results.leak(variant, leak, name).mean for name in names]) for leak in LEAKS
        )
        # A logarithmic axis has no place for an energy that rounds to zero.
        before, after = (np.where(x > 0, x, np.nan) for x in (before, after))
        left.hlines(y, before, after, colors=style["color"], linewidth=1.4)
        left.plot(before, y, **style, ls="", mfc="white", ms=6, label=f"{variant.label}, before")
        left.plot(after, y, **style, ls="", ms=6, label=f"{variant.label}, after")
        right.plot(ratio, y, **style, ls="", ms=6)
        means = [number(results.leak(variant, leak, AVERAGE).mean, ".3g") for leak in LEAKS]
        told.append(
            f"{variant.label}, mean over tasks: {means[0]} before training, {means[1]}"
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
    _legend(figure, left)
    return Plot("leak", "Leaked energy before and after training", ". ".join(told) + ".", figure)


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its panels, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(grid.flat)


def _legend(figure: Figure, axes: Axes) -> None:
    """The panel's legend above the figure, reference lines last."""
    pairs = list(zip(*axes.get_legend_handles_labels(), strict=True))
    pairs.sort(key=lambda pair: isinstance(pair[0], Line2D))
    labels = [label for _, label in pairs]
    # About 13 characters fit into an inch; the symbol and the gap take the room of six.
    columns = int(13 * figure.get_figwidth()) // (6 + max(map(len, labels), default=0))
    figure.legend(
        [handle for handle, _ in pairs], labels, loc="outside upper left", ncols=max(columns, 1)
    )


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
    """The entry drawn darkest: the largest of all variants, but at least 1 and at most 2."""
    matrices = [results.interference(variant) for variant in results.variants()]
    cells = [cell for matrix in matrices for row in matrix for cell in row]
    return min(max([1.0, *filter(math.isfinite, cells)]), 2.0)


def _blues() -> Colormap:
    """White to dark blue; what has no value, the diagonal included, is grey."""
    blues = LinearSegmentedColormap.from_list("blues", ["white", "#084578"])
    return blues.with_extremes(bad="#eef0f2")


def _short(value: float) -> str:
    """At most four characters."""
    return "≥1e4" if value >= 9999.5 else number(value, ".2f" if value < 9.995 else ".0f")
