"""A study's trials as a self-contained page and as a table on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from benchmarks.report.drawing import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    Plot,
    add_legend,
    new_figure,
    report_style,
)
from benchmarks.report.html import write_html
from benchmarks.report.rows import number
from benchmarks.report.table import compact_table
from benchmarks.results import area_under, merit
from benchmarks.study_results import StudyResults, StudyTrial, TrialOutcome
from benchmarks.study_space import INITS

COLUMNS = ("individual", "merged", "by", "at 1", "area", "leaked/own")


def write_study_report(results: StudyResults, run_dir: str | Path) -> Path:
    """Write study.html into `run_dir` and return its path."""
    on_front = {trial.number for trial in results.front()}
    ordered = sorted(results.scored(), key=lambda pair: -merit(pair[1].merged))
    return write_html(
        Path(run_dir) / "study.html",
        "study.html",
        results=results,
        plot=pareto_plot(results),
        columns=COLUMNS,
        rows=[
            (trial, trial.number in on_front, _cells(trial, outcome)) for trial, outcome in ordered
        ],
        refused=[trial for trial in results.trials if trial.refused],
    )


def front_table(results: StudyResults) -> Table:
    """The Pareto front and the references."""
    table = compact_table(f"Pareto front of {len(results.scored())} trials, validation")
    table.add_column("adapters")
    for column in COLUMNS:
        table.add_column(Text(column), justify="right")
    front = results.front()
    for trial in front:
        table.add_row(*_line(trial))
    table.add_section()
    for trial, _ in results.scored():
        if trial.reference and trial not in front:
            table.add_row(*_line(trial), style="dim")
    return table


@report_style()
def pareto_plot(results: StudyResults) -> Plot:
    """Individual against merged scores: colours by initialisation, a line along the front."""
    figure, (axes,) = new_figure(7.6, 5.2)
    scored = results.scored()
    for init, colour, marker in zip(INITS, COLOURS, MARKERS, strict=False):
        points = [
            (outcome.individual, outcome.merged)
            for trial, outcome in scored
            if trial.arm.subspace.init == init
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, color=colour, ms=6, alpha=0.8, label=init)
    front = [(trial, trial.outcome) for trial in results.front() if trial.outcome is not None]
    axes.plot(
        [outcome.individual for _, outcome in front],
        [outcome.merged for _, outcome in front],
        "-",
        color=MUTED,
        lw=1.2,
        zorder=0,
        label="Pareto front",
    )
    for trial, outcome in scored:
        if trial.reference:
            axes.annotate(
                trial.reference,
                (outcome.individual, outcome.merged),
                (6, -9),
                textcoords="offset points",
                color=INK,
                fontsize=8,
            )
    axes.set_xlabel("individual: average validation score, every task with its own adapter")
    axes.set_ylabel("merged: best method and coefficient")
    axes.grid()
    if scored:
        add_legend(figure, axes)
    told = "; ".join(
        f"{trial.arm.name}: individual {number(outcome.individual)}, merged"
        f" {number(outcome.merged)}"
        for trial, outcome in front
    )
    alternative = f"On the Pareto front: {told}." if front else "No trial has been scored yet."
    return Plot("pareto", "Individual against merged scores", alternative, figure)


def _line(trial: StudyTrial) -> list[Text]:
    assert trial.outcome is not None
    name = trial.arm.name.replace("+", " +") + (f" ({trial.reference})" if trial.reference else "")
    return [Text(name), *map(Text, _cells(trial, trial.outcome))]


def _cells(trial: StudyTrial, outcome: TrialOutcome) -> list[str]:
    """The table's COLUMNS."""
    method, coefficient = outcome.best
    untuned = outcome.curve.get(1.0)
    return [
        number(outcome.individual),
        number(outcome.merged),
        f"{method} × {coefficient:g}",
        "n/a" if untuned is None else number(untuned),
        number(area_under(outcome.curve)),
        number(outcome.leaked_own_ratio, ".2f"),
    ]
