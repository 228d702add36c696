"""The tables' contents as text, once for the terminal and the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.results import AVERAGE, INDIVIDUAL, RUNTIME_SUFFIX, Results, Summary, Variant

UNDEFINED = "n/a"


@dataclass(frozen=True)
class Cell:
    """One number: score, spread over seeds ('' for one seed), % of individual, best of its row."""

    score: str
    spread: str
    percent: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A task (or their average): the individual score, then every merge."""

    task: str
    metric: str
    cells: list[Cell]


@dataclass(frozen=True)
class LeakRow:
    """A task (or their average): leaked energy of A before and after training, leaked / own."""

    task: str
    cells: list[Cell]


def merge_label(results: Results, merge: str) -> str:
    """A merge's name for people; run-time merges say how many samples they average."""
    if not merge.endswith(RUNTIME_SUFFIX):
        return f"{merge} (static)" if merge + RUNTIME_SUFFIX in results.merges() else merge
    samples = {
        info.samples
        for arm in results.arms
        for info in arm.merges
        if info.method == merge and info.samples is not None
    }
    counts = "/".join(map(str, sorted(samples)))
    how = f"{counts} sample{'' if counts == '1' else 's'}" if samples else "run time"
    return f"{merge.removesuffix(RUNTIME_SUFFIX)} ({how})"


def number(value: float, form: str = ".3f") -> str:
    """The number in a format, or 'n/a'."""
    return UNDEFINED if math.isnan(value) else format(value, form)


def percent_text(percent: float) -> str:
    """A rounded percentage."""
    return UNDEFINED if math.isnan(percent) else f"{percent:.0f}%"


def coefficient_text(results: Results, variant: Variant, merge: str) -> str:
    """The chosen coefficient, or their range where the seeds chose differently."""
    chosen = results.coefficients(variant, merge)
    if not chosen:
        return UNDEFINED
    return "–".join(f"{value:g}" for value in dict.fromkeys((chosen[0], chosen[-1])))


def score_rows(results: Results, variant: Variant) -> list[Row]:
    """Every task and the average."""
    metrics = {task.name: task.metric for task in results.tasks} | {AVERAGE: "mean"}
    return [
        Row(task, metric, score_cells(results, variant, task)) for task, metric in metrics.items()
    ]


def score_cells(results: Results, variant: Variant, task: str) -> list[Cell]:
    """The individual score of one task and every merge's; the best merge is marked."""
    merges = results.merges()
    means = {merge: results.score(variant, merge, task).mean for merge in merges}
    best = max((mean for mean in means.values() if not math.isnan(mean)), default=math.nan)
    individual = _cell(results.score(variant, INDIVIDUAL, task), ".3f")
    return [individual] + [
        _cell(
            results.score(variant, merge, task),
            ".3f",
            percent=percent_text(results.percent(variant, merge, task)),
            best=means[merge] == best,
        )
        for merge in merges
    ]


def leak_rows(results: Results, variant: Variant) -> list[LeakRow]:
    """Every task and the average."""
    return [
        LeakRow(task, leak_cells(results, variant, task))
        for task in [*(info.name for info in results.tasks), AVERAGE]
    ]


def leak_cells(results: Results, variant: Variant, task: str) -> list[Cell]:
    """Leaked energy of A before and after training, and leaked / own energy of the update."""
    return [
        _cell(results.leak(variant, "leaked_before", task), ".3g"),
        _cell(results.leak(variant, "leaked_after", task), ".3g"),
        _cell(results.leak(variant, "leaked_own_ratio", task), ".3g"),
    ]


def _cell(summary: Summary, form: str, percent: str = "", best: bool = False) -> Cell:
    spread_form = ".1g" if form == ".3g" else form
    spread = "" if math.isnan(summary.spread) else f"±{format(summary.spread, spread_form)}"
    return Cell(number(summary.mean, form), spread, percent, best)
