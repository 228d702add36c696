"""The study as one self-contained page, and its headline as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from benchmarks.experiments.lora_summation.plots import by_size, plots
from benchmarks.experiments.lora_summation.predictors import PREDICTORS
from benchmarks.experiments.lora_summation.relation import ALL
from benchmarks.experiments.lora_summation.results import Summation
from benchmarks.experiments.lora_summation.settings import (
    BASE,
    INDIVIDUAL,
    JOINT,
    SUM,
    UNION,
    published,
)
from benchmarks.report.html import flat, write_html


class Cell(NamedTuple):
    """A number as text, and what is written small beside it."""

    text: str
    note: str = ""


def write_page(results: Summation, run_dir: str | Path) -> Path:
    """Write report.html into `run_dir` and return its path; equal results give equal bytes."""
    methods = results.methods()
    return write_html(
        Path(run_dir) / "report.html",
        "page.html",
        Path(__file__).parent,
        results=results,
        headline=headline(results),
        merges=[m for m in methods if m not in (BASE, INDIVIDUAL, JOINT)],
        tables=[
            (init, task, list(change_rows(results, init, task)))
            for init in results.inits()
            for task in (UNION, *results.tasks)
        ],
        levels=[(init, list(level_rows(results, init))) for init in results.inits()],
        methods=methods,
        regressions=list(regression_rows(results)),
        higher=list(higher_rows(results)),
        plots=plots(results),
        truncated=truncation_text(results),
        settings=list(flat(results.settings)),
    )


def headline(results: Summation) -> list[tuple[str, list[Cell]]]:
    """Combination -> the sum's change for every initialisation, and the paper's."""
    rows = []
    for combination in results.combinations():
        cells = [change_cell(results, init, combination, SUM, UNION) for init in results.inits()]
        paper = published(combination)
        cells.append(Cell("" if paper is None else f"{paper:+.2f} %"))
        rows.append((" + ".join(combination), cells))
    return rows


def change_cell(
    results: Summation, init: str, combination: tuple[str, ...], method: str, task: str
) -> Cell:
    """Mean change over seeds; beside it the spread over seeds and the mean standard error."""
    rows = results.select(init, combination, method, task)
    if not rows:
        return Cell("")
    change, error = results.mean("change", rows), results.mean("change_stderr", rows).mean
    spread = "" if math.isnan(change.spread) else f"± {change.spread:.2f};"
    return Cell(f"{change.mean:+.2f} %", f"{spread} rows ± {error:.2f}".strip())


def change_rows(results: Summation, init: str, task: str) -> Iterator[tuple[str, list[Cell]]]:
    """Combination -> the change of every merge on the test rows of `task`."""
    merges = [m for m in results.methods() if m not in (BASE, INDIVIDUAL, JOINT)]
    for combination in results.combinations():
        if task == UNION or task in combination:
            cells = [change_cell(results, init, combination, m, task) for m in merges]
            yield " + ".join(combination), cells


def level_rows(results: Summation, init: str) -> Iterator[tuple[str, list[Cell]]]:
    """Combination and task -> the perplexity of every method."""
    for combination in results.combinations():
        for task in (UNION, *combination):
            cells = []
            for method in results.methods():
                rows = results.select(init, combination, method, task)
                error = results.mean("perplexity_stderr", rows).mean
                value = results.mean("perplexity", rows).mean
                cells.append(Cell(f"{value:.3f}", f"± {error:.3f}"))
            yield f"{' + '.join(combination)}: {task}", cells


def regression_rows(results: Summation) -> Iterator[tuple[str, list[str]]]:
    """Every line: which points, then slope, R^2, Spearman's correlation and its p, points."""
    for init in (ALL, *results.inits()):
        for means in (False, True) if len(results.seeds()) > 1 else (False,):
            for predictor, line in results.fits(init, means).items():
                points = "means over seeds" if means else "every seed"
                yield (
                    f"{PREDICTORS[predictor]}, {init} adapters, {points}",
                    [
                        f"{line.intercept:+.2f}",
                        f"{line.slope:+.3g} ± {line.slope_stderr:.2g}",
                        f"{line.r2:.3f}",
                        f"{line.spearman:+.3f}",
                        f"{line.p:.3g}",
                        str(line.points),
                    ],
                )


def higher_rows(results: Summation) -> Iterator[tuple[str, list[str]]]:
    """Initialisation, method, size -> mean changes, least and largest change against the base."""
    kinds = dict.fromkeys((row.init, row.method) for row in results.higher_order)
    for init, method in kinds:
        rows = [r for r in results.higher_order if (r.init, r.method) == (init, method)]
        alone = dict(zip(*by_size(rows, "change_individual"), strict=True))
        cosines = dict(zip(*by_size(rows, "rms_cosine"), strict=True))
        for size, mean in zip(*by_size(rows, "change_base"), strict=True):
            changes = [r.change_base for r in rows if len(r.subset) == size]
            yield (
                f"{init}, {method}, {size} adapters",
                [
                    f"{mean:+.2f} %",
                    f"{min(changes):+.2f} .. {max(changes):+.2f} %",
                    f"{alone[size]:+.2f} %",
                    f"{cosines[size]:.4f}",
                    str(len(changes)),
                ],
            )


def truncation_text(results: Summation) -> str:
    """One sentence on what the maximal length cut off."""
    told = []
    for task, parts in results.truncated.items():
        for part, cut in parts.items():
            if cut["rows"]:
                told.append(
                    f"{task} {part}: {cut['rows']} of {cut['of_rows']} rows lose"
                    f" {cut['tokens']} tokens"
                )
    if not told:
        return "No text was longer than the maximal length."
    return "Texts longer than the maximal length were cut. " + "; ".join(told) + "."


def summary_table(results: Summation) -> Table:
    """The headline for the terminal."""
    table = Table("sum against joint training", *results.inits(), "paper", box=None)
    table.caption = (
        "change in perplexity on the union's test rows, mean over seeds; ± spread over seeds; rows"
        " ±: standard error over test rows"
    )
    for name, cells in headline(results):
        table.add_row(name, *(f"{cell.text} {cell.note}" for cell in cells))
    return table
