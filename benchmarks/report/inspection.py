"""An inspection for people: the same tables on the terminal and in a self-contained page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.inspection import Forecast, Inspection, Pair, Range, value_range
from benchmarks.report import inspection_plots
from benchmarks.report.html import write_html
from benchmarks.report.names import natural_order, without_prefix
from benchmarks.report.rows import UNDEFINED, number
from benchmarks.report.table import compact_table
from benchmarks.subspace_inspection import Decomposed
from merge_algorithms.similarity import RankUse

MOST_PAIRS = 30
WIDEST_MATRIX = 10


@dataclass(frozen=True)
class Grid:
    """A table: what its rows are, how to read it, and its cells as text."""

    title: str
    how: str
    columns: list[str]
    rows: list[list[str]]


def grids(inspection: Inspection) -> list[Grid]:
    """The tables, details first: modules, pairs, what adapters do to tasks, adapters."""
    made = [_modules(inspection)]
    if len(inspection.names) > 1:
        made.append(_pairs(inspection))
    if inspection.interference is not None and len(inspection.names) <= WIDEST_MATRIX:
        made.append(_interference(inspection))
    if inspection.decomposed is not None:
        made.append(_inputs(inspection.decomposed))
    if inspection.energies or any(map(math.isfinite, (x for s in inspection.starts for x in s))):
        made.append(_subspaces(inspection))
    if inspection.forecast is not None:
        made.append(_forecast(inspection.forecast))
    return [*made, _adapters(inspection)]


def inspection_table(inspection: Inspection) -> RenderableType:
    """The tables for a terminal of 80 columns, and a sentence on each."""
    parts = [(_table(grid), Text(f"{grid.how}\n", style="dim")) for grid in grids(inspection)]
    return Group(*(part for pair in parts for part in pair))


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the tables and figures as one HTML file that refers to nothing outside."""
    write_html(
        path,
        "inspection.html",
        names=inspection.names,
        modules=len(inspection.cosines),
        closest=next(iter(inspection.pairs), None),
        chance=_cosine(inspection.chance),
        cosine=_cosine,
        grids=grids(inspection)[::-1],
        plots=inspection_plots.plots(inspection),
    )


def _modules(inspection: Inspection) -> Grid:
    several = len(inspection.names) > 1
    prefix, short = without_prefix(list(inspection.cosines))
    signs, cosines = inspection.conflicts.by_module(), inspection.module_cosines()
    rows = []
    for module in sorted(short, key=natural_order):
        row = [short[module], number(value_range(inspection.norms[module]).mean, ".3g")]
        if several:
            row += [*_range(cosines[module]), _percent(signs[module])]
        rows.append([*row, *_rank(inspection.sums[module])])
    compared = ["min", "mean", "max", "signs"] if several else []
    of = "the sum" if several else "the update"
    how = f"norm: of an update{', mean over the adapters' if several else ''}. "
    if several:
        how += (
            "min, mean, max: cosine of the pairs. signs: entries against the sign of their sum"
            f"{_sampled(inspection)}. "
        )
    how += (
        f"rank: of {of}, used / available; eff.: its effective rank; top {inspection.keep}: its"
        f" energy that rank {inspection.keep} keeps."
    )
    title = f"{len(rows)} modules" + (f" of {prefix}" if prefix else "")
    kept = f"top {inspection.keep}"
    return Grid(title, how, ["module", "norm", *compared, "rank", "eff.", kept], rows)


def _pairs(inspection: Inspection) -> Grid:
    pairs = inspection.pairs
    shown = pairs[:MOST_PAIRS]
    how = (
        "RMS: root of the mean squared cosine over the modules that both change; unrelated"
        f" updates of these shapes have about {_cosine(inspection.chance)}. min, mean, max: the"
        " modules' cosines. A: how much of the smaller span of A is in the larger, mean over the"
        f" modules; unrelated spans have {number(inspection.overlap_chance)}."
    )
    title = "pairs, the most alike first" + (
        f" ({len(shown)} of {len(pairs)})" if len(shown) < len(pairs) else ""
    )
    columns = ["adapter", "and", "RMS", "min", "mean", "max", "A"]
    return Grid(title, how, columns, [_pair(pair) for pair in shown])


def _pair(pair: Pair) -> list[str]:
    cells = [_cosine(pair.rms), *_range(pair.cosine), number(pair.overlap)]
    return [pair.first, pair.second, *cells]


def _interference(inspection: Inspection) -> Grid:
    assert inspection.interference is not None
    rows = [
        [name, *(number(value, ".3g") for value in row)]
        for name, row in zip(inspection.names, inspection.interference.tolist(), strict=True)
    ]
    how = (
        "How strongly the adapter of a row acts on the inputs of a column's task, relative to"
        " those of its own."
    )
    return Grid("interference", how, ["adapter of", *inspection.names], rows)


def _forecast(forecast: Forecast) -> Grid:
    relation, predictions = forecast
    rows = [
        [
            " + ".join(each.combination),
            each.predictor.replace("_", " "),
            number(each.value) + ("*" if each.outside else ""),
            number(each.expected, "+.1f"),
            number(each.margin, ".1f"),
            f"{number(each.spearman, '+.2f')} (p {number(each.p, '.2g')})",
        ]
        for each in predictions
    ]
    how = (
        "An extrapolation, no measurement. expected: percent by which the perplexity of the sum"
        " differs from that of one adapter trained on the merged data, by a line fitted to sums of"
        f" other adapters of {relation.model} ({', '.join(relation.tasks)}). +-: half width of the"
        " 95 % prediction interval, from the scatter in that study alone. *: outside the values"
        " that the line was fitted on. rank correlation: how well the predictor ranked the sums of"
        " that study; where it did not, the line says little more than their mean."
    )
    columns = ["sum of", "predicted from", "value", "expected", "+-", "rank correlation"]
    return Grid("forecast of the sum's perplexity", how, columns, rows)


def _inputs(decomposed: Decomposed) -> Grid:
    r, k = decomposed.rank, decomposed.k
    rows = [
        [task, number(effective, ".1f"), f"{bottom_r:.2g}", f"{bottom_k:.2g}"]
        for task, (effective, bottom_r, bottom_k) in decomposed.by_task().items()
    ]
    how = (
        f"eff.: effective rank of the second moment. bottom {r}, bottom {k}: share of the energy in"
        " so many directions, those with the least. Means over the modules."
    )
    return Grid("inputs", how, ["inputs of", "eff.", f"bottom {r}", f"bottom {k}"], rows)


def _subspaces(inspection: Inspection) -> Grid:
    """A row per adapter: what its A reads; only what is known of any adapter."""
    energies, decomposed, starts = (
        inspection.adapter_energies(),
        inspection.decomposed,
        inspection.starts,
    )
    parts: list[tuple[str, dict[str, list[str]]]] = []
    if energies:
        columns = {
            "leaked": [number(energy.leaked, ".3g") for energy in energies],
            "own": [number(energy.own, ".3g") for energy in energies],
        }
        how = (
            "leaked, own: energy that A, its rows scaled to length 1, lets through of the other"
            " tasks' inputs and of its own, mean over the modules."
        )
        parts.append((how, columns))
        before = [number(start.leaked, ".3g") for start in starts]
        parts.append(("before: leaked before training.", {"before": before}))
    if decomposed:
        inside, k = decomposed.by_adapter(), f"in {decomposed.k}"
        columns = {
            "in r": [_percent(share.rank) for share in inside],
            k: [_percent(share.k) for share in inside],
        }
        how = (
            f"in r, {k}: share of A's span in the r (its rank) and in the {decomposed.k} directions"
            " in which the others' inputs have the least energy."
        )
        parts.append((how, columns))
    turned = {
        "drift": [_angle(start.drift_mean) for start in starts],
        "max": [_angle(start.drift_max) for start in starts],
    }
    how = "drift, max: angle by which A's span has turned in training, mean and largest."
    parts.append((how, turned))
    known = [
        (how, columns)
        for how, columns in parts
        if any(cell != UNDEFINED for cells in columns.values() for cell in cells)
    ]
    cells = [cells for _, columns in known for cells in columns.values()]
    return Grid(
        "what A reads",
        " ".join(how for how, _ in known),
        ["adapter", *(name for _, columns in known for name in columns)],
        [list(row) for row in zip(inspection.names, *cells, strict=True)],
    )


def _adapters(inspection: Inspection) -> Grid:
    several = len(inspection.names) > 1
    norms, outvoted = inspection.adapter_norms().tolist(), inspection.conflicts.by_adapter()
    columns = ["adapter", "modules", "rank", "used", "eff.", "norm"]
    columns += ["outvoted"] if several else []
    columns += ["leaked/own"] if inspection.leaked_own else []
    rows = []
    for t, name in enumerate(inspection.names):
        uses = inspection.adapter_ranks(t)
        effective = sum(use.effective for use in uses) / len(uses) if uses else 0.0
        row = [name, str(len(uses)), _span([use.available for use in uses])]
        row += [_span([use.numerical for use in uses]), f"{effective:.1f}", f"{norms[t]:.3g}"]
        row += [_percent(float(outvoted[t]))] if several else []
        row += [number(inspection.leaked_own[t], ".3g")] if inspection.leaked_own else []
        rows.append(row)
    how = "used: numerical rank; eff.: effective rank, mean over the modules; norm: of the whole."
    if inspection.leaked_own:
        how += (
            " leaked/own: energy of the update on the other tasks' inputs over that on its own;"
            " the lower, the less it disturbs."
        )
    return Grid("adapters", how, columns, rows)


def _table(grid: Grid) -> Table:
    table = compact_table(grid.title)
    words = {"module", "adapter", "and", "adapter of", "inputs of"}
    for column in grid.columns:
        is_number = column not in words
        table.add_column(
            Text(column),
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=is_number,
        )
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table


def _cosine(value: float) -> str:
    return number(value, ".4f")


def _range(cosines: Range) -> list[str]:
    return [number(value) for value in cosines]


def _rank(use: RankUse) -> list[str]:
    return [f"{use.numerical}/{use.available}", f"{use.effective:.1f}", _percent(use.kept)]


def _span(values: list[int]) -> str:
    least, most = min(values, default=0), max(values, default=0)
    return str(least) if least == most else f"{least}-{most}"


def _percent(share: float) -> str:
    return number(100 * share, ".1f") + ("%" if share == share else "")


def _angle(radians: float) -> str:
    return number(math.degrees(radians), ".1f") + ("°" if radians == radians else "")


def _sampled(inspection: Inspection) -> str:
    share = inspection.conflicts.share
    return "" if share == 1 else f" (from {share:.1%} of the rows; --exact counts all)"
