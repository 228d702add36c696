"""Paired bootstrap comparisons as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from benchmarks.report.table import compact_table
from benchmarks.results import INDIVIDUAL, Results
from benchmarks.scores import METRICS
from benchmarks.significance import Bootstrap, Comparison, Side, best_side, paired

COLUMNS = ("score", "difference", "95 % interval", "p")


def comparisons_of(results: Results, run_dir: Path) -> list[Comparison]:
    """Every arm against the first: each by its best merge on validation, and each individually.

    Only where both have predictions, of the same rows in the same order; and none at all if a
    headline metric is not one of rows.
    """
    parts = {part for task in results.tasks for part in task.metric.split("+")}
    arms = results.arm_names()
    alone = [arm.name for arm in results.arms if arm.predictions is not None]
    merged = {
        Side(arm.name, merge.method)
        for arm in results.arms
        for merge in arm.merges
        if merge.predictions is not None
    }
    ways = [
        [side for side in (best_side(results, arm) for arm in arms) if side in merged],
        [Side(arm, INDIVIDUAL) for arm in arms if arm in alone],
    ]
    if not parts <= set(METRICS):
        return []
    comparisons: list[Comparison] = []
    for baseline, *others in filter(None, ways):
        sides = [side for side in others if paired(results, run_dir, side, baseline)]
        if sides:
            # Apart, for the two ways may have other arms first, and those other rows.
            bootstrap = Bootstrap(results, run_dir, [baseline, *sides])
            comparisons += [bootstrap.compare(side, baseline) for side in sides]
    return comparisons


def comparison_cells(comparison: Comparison) -> list[str]:
    """The COLUMNS."""
    return [
        f"{comparison.means[0]:.3f}",
        f"{comparison.difference:+.3f}",
        f"{comparison.low:+.3f} to {comparison.high:+.3f}",
        f"{comparison.p:.3f}" if comparison.p >= 0.001 else "< 0.001",
    ]


def comparison_table(comparisons: Sequence[Comparison], seeds: int) -> Table:
    """One line per comparison, below what it is compared with."""
    table = compact_table()
    table.caption = (
        f"Test rows resampled within every task, paired; mean over {seeds} seed"
        f"{'' if seeds == 1 else 's'}. The interval is that of the rows, not of the seeds."
        " Rows of one group, such as the texts that answer one question, are drawn together."
    )
    table.caption_justify = "left"
    table.add_column("test average of")
    for column in COLUMNS:
        table.add_column(Text(column), justify="right", no_wrap=True)
    baseline: Side | None = None
    for comparison in comparisons:
        if comparison.second != baseline:
            baseline = comparison.second
            table.add_section()
            table.add_row(_name(baseline), f"{comparison.means[1]:.3f}", style="dim")
        table.add_row(_name(comparison.first), *map(Text, comparison_cells(comparison)))
    return table


def _name(side: Side) -> Text:
    return Text(str(side).replace("+", " +").replace("/", " /"))
