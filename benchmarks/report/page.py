"""The results as one self-contained page: no scripts, nothing fetched, everything escaped."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.report import plots, rows
from benchmarks.report.html import flat, write_html
from benchmarks.report.significance import COLUMNS as COMPARISON_COLUMNS
from benchmarks.report.significance import comparison_cells, comparisons_of
from benchmarks.results import AVERAGE, INDIVIDUAL, Results
from trainers.joint import JOINT


def write_report(results: Results, run_dir: str | Path) -> Path:
    """Write report.html into `run_dir` and return its path; equal results give equal bytes."""
    arms = results.arm_names()
    return write_html(
        Path(run_dir) / "report.html",
        "report.html",
        results=results,
        arms=arms,
        merges=[(merge, rows.merge_label(results, merge)) for merge in results.merges()],
        headline=_headline(results),
        best=_best(results),
        tables=[
            (
                arm,
                rows.score_rows(results, arm),
                rows.leak_rows(results, arm) if arm in results.diagnosed() else [],
            )
            for arm in arms
        ],
        coefficient=lambda arm, merge: rows.coefficient_text(results, arm, merge),
        bars=plots.average_bars(results),
        curves=plots.coefficient_curves(results),
        matrices=[plots.interference_heatmap(results, arm) for arm in results.diagnosed()],
        limit=plots.colour_limit(results),
        leak=plots.leaked_energy(results),
        summary_columns=rows.SUMMARY,
        summary_legend=rows.SUMMARY_LEGEND,
        summary=[(arm, rows.summary_cells(results, arm)) for arm in arms],
        comparisons=comparisons_of(results, Path(run_dir)),
        comparison_columns=COMPARISON_COLUMNS,
        comparison_cells=comparison_cells,
        correlations=rows.correlation_rows(results),
        settings=list(flat(results.settings)),
        notes=_notes(results),
    )


def _headline(results: Results) -> list[tuple[str, list[rows.Cell]]]:
    """By method, its average in every arm; then the average leaked energies."""
    arms = results.arm_names()
    scores = [rows.score_cells(results, arm, AVERAGE) for arm in arms]
    leaks = [rows.leak_cells(results, arm, AVERAGE) for arm in arms]
    names = [INDIVIDUAL, *(rows.merge_label(results, merge) for merge in results.merges())]
    names += ["leaked energy of A before", "leaked energy of A after", "leaked / own, update"]
    columns = [score + leak for score, leak in zip(scores, leaks, strict=True)]
    return [(name, list(cells)) for name, *cells in zip(names, *columns, strict=True)]


def _best(results: Results) -> tuple[str, str, str, str] | None:
    """The best merge of the run: arm, label, score and % of individual."""
    candidates = [
        (mean, arm, merge)
        for arm in results.arm_names()
        for merge in results.merges()
        if merge != JOINT and not math.isnan(mean := results.score(arm, merge, AVERAGE).mean)
    ]
    if not candidates:
        return None
    mean, arm, merge = max(candidates)
    percent = rows.percent_text(results.percent(arm, merge, AVERAGE))
    return arm, rows.merge_label(results, merge), f"{mean:.3f}", percent


def _notes(results: Results) -> list[str]:
    """What a reader must know before believing a difference."""
    seeds = results.seeds()
    notes = [
        f"{len(seeds)} seeds: {', '.join(map(str, seeds))}. Numbers are means over them; ± is the"
        " sample standard deviation, the spread between repetitions, not a confidence interval."
        if len(seeds) > 1
        else "One seed. A difference seen once is not evidence: repeat with several seeds before"
        " believing a small one. No spread can be shown."
    ]
    counted = [(task.test_rows, task.name) for task in results.tasks if task.test_rows]
    if counted:
        fewest, name = min(counted)
        error = math.sqrt(0.8 * 0.2 / fewest)
        notes.append(
            f"Test rows: {', '.join(f'{task} {count:,}' for count, task in counted)}. On the"
            f" {fewest:,} rows of {name} alone, an accuracy of 0.80 has a standard error of"
            f" {error:.3f}."
        )
    notes.append(
        "Scaling coefficients were chosen on the validation average; every score outside the"
        " coefficient plot and the column area comes from test rows, which nothing was chosen on:"
        " what is marked as highest is found afterwards."
    )
    if any(math.isnan(score.score) for score in results.scores):
        notes.append(
            "n/a: the metric is undefined there (a perplexity of no tokens, for example), and so is"
            " every average that includes it."
        )
    return notes
