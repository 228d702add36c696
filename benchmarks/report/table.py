"""The results on a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from benchmarks.report.rows import (
    Cell,
    coefficient_text,
    leak_rows,
    merge_label,
    score_cells,
    score_rows,
)
from benchmarks.results import AVERAGE, Results, Variant


def results_table(results: Results) -> RenderableType:
    """Scores of every variant, what leaks between its tasks, and the averages of all variants."""
    variants = results.variants()
    leaks = [_leak_table(results, variant) for variant in variants]
    return Group(
        *(_spaced(_score_table(results, variant)) for variant in variants),
        Columns([_spaced(table) for table in leaks], padding=(0, 4)),
        _spaced(_average_table(results)),
        Text(_legend(results), style="dim"),
    )


def _score_table(results: Results, variant: Variant) -> Table:
    table = _table(f"{variant.label}: test scores")
    table.add_column("task", no_wrap=True)
    table.add_column("individual")
    for merge in results.merges():
        scale = f"× {coefficient_text(results, variant, merge)}"
        table.add_column(Text(f"{_broken(merge_label(results, merge))}\n{scale}"))
    for row in score_rows(results, variant):
        if row.task == AVERAGE:
            table.add_section()
        table.add_row(Text(row.task), *map(_text, row.cells))
    return table


def _leak_table(results: Results, variant: Variant) -> Table:
    table = _table(f"{variant.label}: interference")
    table.add_column("task", no_wrap=True)
    for heading in ("A before", "A after", "leaked/own"):
        table.add_column(Text(heading), justify="right")
    for row in leak_rows(results, variant):
        if row.task == AVERAGE:
            table.add_section()
        table.add_row(Text(row.task), *map(_text, row.cells))
    return table


def _average_table(results: Results) -> Table:
    table = _table(f"average of {len(results.tasks)} tasks")
    table.add_column("adapters")
    table.add_column("individual")
    for merge in results.merges():
        table.add_column(Text(_broken(merge_label(results, merge))))
    for variant in results.variants():
        cells = score_cells(results, variant, AVERAGE)
        table.add_row(Text(_broken(variant.label)), *map(_text, cells))
    return table


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )


def _spaced(table: Table) -> Padding:
    return Padding(table, (0, 0, 1, 0), expand=False)


def _broken(label: str) -> str:
    """The label on several short lines, broken after underscores and at spaces."""
    lines = textwrap.wrap(label.replace("_", "_ "), width=12)
    return "\n".join(line.replace("_ ", "_") for line in lines)


def _text(cell: Cell) -> Text:
    """Score and percentage on one line, the spread below the score."""
    text = Text(f"{cell.score:>6}", style="bold" if cell.best else "")
    if cell.percent:
        text.append(f" {cell.percent:>4}", style="" if cell.best else "dim")
    if cell.spread:
        text.append(f"\n{cell.spread:>6}", style="dim")
    return text


def _legend(results: Results) -> str:
    seeds = len(results.seeds())
    spread = (
        f"±: standard deviation over {seeds} seeds."
        if seeds > 1
        else "One seed: small differences are not evidence."
    )
    return (
        "%: of the individual score. Bold: best merge of the row. ×: coefficient, chosen on"
        " validation. A before/after: energy of the other tasks' inputs that passes A, before and"
        " after training. leaked/own: the trained update's energy on the other tasks' inputs over"
        f" that on its own. {spread}"
    )
