"""The results on a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from benchmarks.correlation import LEAST
from benchmarks.report.rows import (
    SUMMARY,
    SUMMARY_LEGEND,
    Cell,
    coefficient_text,
    correlation_rows,
    leak_rows,
    merge_label,
    score_cells,
    score_rows,
    summary_cells,
)
from benchmarks.results import AVERAGE, Results

FEW = 4  # merges, or arms, that fit beside each other


def results_table(results: Results) -> RenderableType:
    """Scores of every arm, what leaks between its tasks, and the averages of all arms."""
    arms, few = results.arm_names(), len(results.merges()) <= FEW
    leaks = [_leak_table(results, arm) for arm in results.diagnosed()]
    averages = [_average_table(results)] if few else _method_tables(results)
    summary = [_summary_table(results)] if results.merges() else []
    if len(arms) >= LEAST:
        summary.append(_correlation_table(results))
    return Group(
        *(_spaced(_score_table(results, arm)) for arm in arms if few),
        Columns([_spaced(table) for table in leaks if few], padding=(0, 4)),
        *(_spaced(table) for table in (*averages, *summary)),
        Text(_legend(results), style="dim"),
    )


def _score_table(results: Results, arm: str) -> Table:
    table = compact_table(f"{arm}: test scores")
    table.add_column("task", no_wrap=True)
    table.add_column("individual")
    for merge in results.merges():
        scale = f"× {coefficient_text(results, arm, merge)}"
        table.add_column(Text(f"{_broken(merge_label(results, merge))}\n{scale}"))
    for row in score_rows(results, arm):
        if row.task == AVERAGE:
            table.add_section()
        table.add_row(Text(row.task), *map(_text, row.cells))
    return table


def _leak_table(results: Results, arm: str) -> Table:
    table = compact_table(f"{arm}: interference")
    table.add_column("task", no_wrap=True)
    for heading in ("A before", "A after", "leaked/own"):
        table.add_column(Text(heading), justify="right")
    for row in leak_rows(results, arm):
        if row.task == AVERAGE:
            table.add_section()
        table.add_row(Text(row.task), *map(_text, row.cells))
    return table


def _average_table(results: Results) -> Table:
    table = compact_table(f"average of {len(results.tasks)} tasks")
    table.add_column("adapters")
    table.add_column("individual")
    for merge in results.merges():
        table.add_column(Text(_broken(merge_label(results, merge))))
    for arm in results.arm_names():
        cells = score_cells(results, arm, AVERAGE)
        table.add_row(Text(_broken(arm)), *map(_text, cells))
    return table


def _method_tables(results: Results) -> list[Table]:
    """The same the other way round, some arms at a time: a line per merge."""
    tables, names = [], results.arm_names()
    for arms in (names[start : start + FEW] for start in range(0, len(names), FEW)):
        table = compact_table(f"average of {len(results.tasks)} tasks")
        table.add_column("merge")
        for arm in arms:
            table.add_column(Text(_broken(arm)))
        methods = ["individual", *(merge_label(results, merge) for merge in results.merges())]
        columns = [score_cells(results, arm, AVERAGE) for arm in arms]
        for name, *cells in zip(methods, *columns, strict=True):
            table.add_row(Text(name), *map(_text, cells))
        tables.append(table)
    return tables


def _summary_table(results: Results) -> Table:
    table = compact_table("best merge on validation, averages on test rows")
    table.add_column("adapters")
    for column in SUMMARY:
        table.add_column(Text(column.replace("/", "\n/")), justify="right")
    for arm in results.arm_names():
        individual, merge, *rest = summary_cells(results, arm)
        cells = [individual, _broken(merge), *rest]
        table.add_row(Text(_broken(arm)), *map(Text, cells))
    return table


def _correlation_table(results: Results) -> Table:
    table = compact_table("rank correlation of diagnostics with the loss, individual - merged")
    table.add_column("diagnostic")
    for column in ("points", "arms and\ntasks", "arms, within\na task"):
        table.add_column(Text(column), justify="right")
    for name, cells in correlation_rows(results):
        table.add_row(Text(name), *map(Text, cells))
    return table


def compact_table(title: str | None = None) -> Table:
    """An empty table in the style of all: as narrow as its cells."""
    return Table(
        title=None if title is None else Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )


def _spaced(table: Table) -> Padding:
    return Padding(table, (0, 0, 1, 0), expand=False)


def _broken(label: str) -> str:
    """The label on several short lines, broken after underscores, before + and at spaces."""
    label = label.replace("_", "_ ").replace("+", " +")
    lines = textwrap.wrap(label, width=12, break_on_hyphens=False)
    return "\n".join(line.replace("_ ", "_").replace(" +", "+") for line in lines)


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
        f" that on its own. {SUMMARY_LEGEND}. {spread}"
    )
