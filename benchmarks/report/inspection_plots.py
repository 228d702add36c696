"""The figures of an inspection."""

from __future__ import annotations

import math

import numpy as np
import torch

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
Panels = dict[str, dict[str, Range]]


def plots(inspection: Inspection) -> list[Plot]:
    """Cosines, overlap and interference of all pairs, if there are any; everything by depth."""
    made = []
    if len(inspection.names) > 1:
        made += [rms_plot(inspection), overlap_plot(inspection)]
        if inspection.interference is not None:
            matrix = inspection.interference.numpy()
            limit = interference_limit(matrix.flatten().tolist())
            names = list(inspection.names)
            made.append(interference_plot("interference", matrix, names, limit, ""))
    made.append(depth_plot("depth", "By layer", update_panels(inspection)))
    if inspection.energies is not None:
        panels = subspace_panels(inspection)
        made.append(depth_plot("reads", "What A reads, by layer", panels))
    return made


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
def overlap_plot(inspection: Inspection) -> Plot:
    """How much of the A of every pair span the same; what chance explains stays light."""
    matrix = inspection.overlap.numpy()
    off = off_diagonal(matrix)
    finite = off[np.isfinite(off)]
    chance = 0.0 if math.isnan(inspection.overlap_chance) else inspection.overlap_chance
    figure = heatmap(matrix, inspection.names, max([2 * chance, 0.1, *finite]), _share)
    told = "No two adapters have a module in common."
    if len(finite):
        i, j = np.unravel_index(np.nanargmax(off), off.shape)
        told = (
            f"The most is {off[i, j]:.3f}, of {inspection.names[i]} and {inspection.names[j]};"
            f" unrelated subspaces have {chance:.3f}. 1 if one contains the other, 0 if they are"
            " orthogonal; mean over the modules."
        )
    return Plot("overlap", "Overlap of the subspaces that A reads", told, figure)


def update_panels(inspection: Inspection) -> Panels:
    """What the adapters alone say."""
    several = len(inspection.names) > 1
    panels = {"norm of the updates": {m: value_range(x) for m, x in inspection.norms.items()}}
    if several:
        signs = inspection.conflicts.by_module()
        panels = {
            COSINE: inspection.module_cosines(),
            "share of outvoted entries": {m: Range(x, x, x) for m, x in signs.items()},
        } | panels
    uses = {m: use.effective for m, use in inspection.sums.items()}
    title = "effective rank of the sum" if several else "effective rank"
    panels[title] = {m: Range(x, x, x) for m, x in uses.items()}
    if several:
        panels["overlap of the A"] = inspection.module_overlaps()
    return panels


def subspace_panels(inspection: Inspection) -> Panels:
    """What the covariances say of A and of the inputs; ranges over the adapters or tasks."""
    assert inspection.energies is not None
    found = {
        "leaked energy of A": [
            {m: e.leaked for m, e in energies.items()} for energies in inspection.energies
        ],
        "leaked / own energy of the updates": [
            {m: e.leaked_shift / e.own_shift for m, e in energies.items() if e.own_shift > 0}
            for energies in inspection.energies
        ],
    }
    if inspection.decomposed is not None:
        found[f"share of A in the others' bottom {inspection.decomposed.k}"] = [
            {m: share.k for m, share in inside.items()} for inside in inspection.decomposed.inside
        ]
        found["effective rank of the inputs"] = [
            {m: s.effective_rank for m, s in modules.items() if m in inspection.cosines}
            for modules in inspection.decomposed.spectra.values()
        ]
    return {
        title: {
            module: value_range(torch.tensor([v[module] for v in values if module in v]))
            for module in inspection.cosines
        }
        for title, values in found.items()
    }


@report_style()
def depth_plot(name: str, heading: str, panels: Panels) -> Plot:
    """A panel per diagnostic, a line per kind of module, over the layers of the model."""
    rows = math.ceil(len(panels) / 2)
    figure, all_axes = new_figure(7.6, 0.8 + 2.5 * rows, rows, 2)
    told = []
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, values) in zip(all_axes, panels.items(), strict=False):
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
    return Plot(name, heading, ". ".join(told) + ".", figure)


def _share(value: float) -> str:
    return "1" if value > 0.9995 else number(value, ".2f").removeprefix("0")


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
