"""The tables' contents as text, once for the terminal and the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.correlation import RECEIVED, correlations
from benchmarks.results import (
    ALIGNED_SUFFIX,
    AVERAGE,
    INDIVIDUAL,
    RUNTIME_SUFFIX,
    Results,
    Summary,
    area_under,
)
from trainers.joint import JOINT

DIAGNOSTICS = {
    "leaked_before": "leaked energy of A before",
    "leaked_after": "leaked energy of A after",
    "leaked_own_ratio": "leaked / own, update",
    RECEIVED: "received: the others' updates on the task's inputs",
}
UNDEFINED = "n/a"
SUMMARY = ("alone", "best merge", "merged", "kept", "of 1st", "at × 1", "area", "leaked/own")
SUMMARY_LEGEND = (
    "alone: the individual score; kept: % of it; of 1st: % of the first arm's; at × 1: the same"
    " merge with nothing tuned; area: mean height of its validation curve"
)


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
    if merge.endswith(ALIGNED_SUFFIX):
        return f"{merge.removesuffix(ALIGNED_SUFFIX)} (aligned heads)"
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


def coefficient_text(results: Results, arm: str, merge: str) -> str:
    """The chosen coefficient, or their range where the seeds chose differently."""
    chosen = results.coefficients(arm, merge)
    if not chosen:
        return UNDEFINED
    return "–".join(f"{value:g}" for value in dict.fromkeys((chosen[0], chosen[-1])))


def score_rows(results: Results, arm: str) -> list[Row]:
    """Every task and the average."""
    metrics = {task.name: task.metric for task in results.tasks} | {AVERAGE: "mean"}
    return [Row(task, metric, score_cells(results, arm, task)) for task, metric in metrics.items()]


def score_cells(results: Results, arm: str, task: str) -> list[Cell]:
    """The individual score of one task and every merge's; the best merge is marked."""
    merges = results.merges()
    means = {merge: results.score(arm, merge, task).mean for merge in merges if merge != JOINT}
    best = max((mean for mean in means.values() if not math.isnan(mean)), default=math.nan)
    individual = _cell(results.score(arm, INDIVIDUAL, task), ".3f")
    return [individual] + [
        _cell(
            results.score(arm, merge, task),
            ".3f",
            percent=percent_text(results.percent(arm, merge, task)),
            best=means.get(merge) == best,
        )
        for merge in merges
    ]


def summary_cells(results: Results, arm: str) -> list[str]:
    """The arm's best merge on validation, in the SUMMARY columns."""
    individual = results.score(arm, INDIVIDUAL, AVERAGE).mean
    ratio = number(results.diagnostic(arm, "leaked_own_ratio", AVERAGE).mean, ".2f")
    merge = results.best_merge(arm)
    if merge is None:
        return [number(individual), *[UNDEFINED] * 6, ratio]
    merged = results.score(arm, merge, AVERAGE).mean
    reference = results.score(results.arm_names()[0], INDIVIDUAL, AVERAGE).mean
    curve = {c: summary.mean for c, summary in results.curve(arm, merge).items()}
    return [
        number(individual),
        f"{merge_label(results, merge)} × {coefficient_text(results, arm, merge)}",
        number(merged),
        percent_text(results.percent(arm, merge, AVERAGE)),
        percent_text(100 * merged / reference if reference > 0 else math.nan),
        number(results.untuned(arm, merge, AVERAGE).mean),
        number(area_under(curve)),
        ratio,
    ]


def correlation_rows(results: Results) -> list[tuple[str, list[str]]]:
    """By diagnostic: points, correlation with the loss over all of them, and within a task."""
    return [
        (
            DIAGNOSTICS.get(found.diagnostic, found.diagnostic.replace("_", " ")),
            [str(found.points), *(number(x, "+.2f") for x in (found.pooled, found.within))],
        )
        for found in correlations(results)
        if not math.isnan(found.pooled)
    ]


def leak_rows(results: Results, arm: str) -> list[LeakRow]:
    """Every task and the average."""
    return [
        LeakRow(task, leak_cells(results, arm, task))
        for task in [*(info.name for info in results.tasks), AVERAGE]
    ]


def leak_cells(results: Results, arm: str, task: str) -> list[Cell]:
    """Leaked energy of A before and after training, and leaked / own energy of the update."""
    return [
        _cell(results.diagnostic(arm, "leaked_before", task), ".3g"),
        _cell(results.diagnostic(arm, "leaked_after", task), ".3g"),
        _cell(results.diagnostic(arm, "leaked_own_ratio", task), ".3g"),
    ]


def _cell(summary: Summary, form: str, percent: str = "", best: bool = False) -> Cell:
    spread_form = ".1g" if form == ".3g" else form
    spread = "" if math.isnan(summary.spread) else f"±{format(summary.spread, spread_form)}"
    return Cell(number(summary.mean, form), spread, percent, best)
