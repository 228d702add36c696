"""The figures of an inspection."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.inspection import Inspection, Range, value_range
from benchmarks.report.drawing import (
    COLOURS,
    MARKERS,
    Plot,
    add_legend,
    heatmap,
    new_figure,
    off_diagonal,
    report_style,
)
from benchmarks.report.names import layer_and_kind, without_prefix
from benchmarks.report.plots import interference_limit, interference_plot
from benchmarks.report.rows import number
from merge_algorithms.similarity import rms_cosine

COSINE = "cosine of the pairs"


def plots(inspection: Inspection) -> list[Plot]:
    """RMS cosines and interference of all pairs, if there are any, and everything by depth."""
    made = []
    if len(inspection.names) > 1:
        made.append(rms_plot(inspection))
        if inspection.interference is not None:
            matrix = inspection.interference.numpy()
            limit = interference_limit(matrix.flatten().tolist())
            names = list(inspection.names)
            made.append(interference_plot("interference", matrix, names, limit, ""))
    return [*made, depth_plot(inspection)]


@report_style()
def rms_plot(inspection: Inspection) -> Plot:
    """RMS cosine of every pair; darkest is the most alike, but what chance explains stays light."""
    matrix = rms_cosine(inspection.cosines).numpy()
    off = off_diagonal(matrix)
    limit = max([10 * inspection.chance, *off[np.isfinite(off)]])
    figure = heatmap(matrix, inspection.names, limit, _without_zero)
    pair = inspection.pairs[0]
    told = (
        f"The most alike are {pair.first} and {pair.second}, {number(pair.rms, '.4f')}; unrelated"
        f" updates have about {inspection.chance:.1g}."
    )
    return Plot("rms", "RMS cosine between the adapters", told, figure)


@report_style()
def depth_plot(inspection: Inspection) -> Plot:
    """A panel per diagnostic, a line per kind of module, over the layers of the model."""
    panels = {"norm of the updates": {m: value_range(x) for m, x in inspection.norms.items()}}
    if len(inspection.names) > 1:
        signs = inspection.conflicts.by_module()
        panels = {
            COSINE: inspection.module_cosines(),
            "share of outvoted entries": {m: Range(x, x, x) for m, x in signs.items()},
        } | panels
    uses = {m: use.effective for m, use in inspection.sums.items()}
    title = "effective rank of the sum" if len(inspection.names) > 1 else "effective rank"
    panels[title] = {m: Range(x, x, x) for m, x in uses.items()}
    rows = math.ceil(len(panels) / 2)
    figure, all_axes = new_figure(7.6, 0.8 + 2.5 * rows, rows, 2)
    told = []
    for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.grid()
        for index, (kind, by_layer) in enumerate(_by_kind(values).items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            layers = sorted(by_layer)
            low, mean, high = np.array([by_layer[layer] for layer in layers]).T
            axes.plot(layers, mean, f"{marker}-", color=colour, ms=4, label=kind)
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
        if title != COSINE:
            axes.set_ylim(bottom=0)
        finite = {m: value.mean for m, value in values.items() if math.isfinite(value.mean)}
        if finite:
            module = max(finite, key=lambda m: finite[m])
            told.append(f"{title}: largest {number(finite[module], '.3g')}, in {module}")
    add_legend(figure, all_axes[0])
    return Plot("depth", "By layer", ". ".join(told) + ".", figure)


def _without_zero(cosine: float) -> str:
    return "1" if cosine == 1 else number(cosine, ".4f").lstrip("0")


def _by_kind(values: dict[str, Range]) -> dict[str, dict[int, Range]]:
    """{kind of module: {layer: values}}, the kinds without what all their names share."""
    kinds: dict[str, dict[int, Range]] = {}
    for module, value in values.items():
        layer, kind = layer_and_kind(module)
        kinds.setdefault(kind, {})[layer] = value
    _, short = without_prefix(list(kinds))
    return {short[kind].removeprefix("*."): by_layer for kind, by_layer in kinds.items()}
