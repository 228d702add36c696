"""The study as one self-contained page, and its headlines as tables for the terminal."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.experiments.orthogonal_dropout.findings import sentences
from benchmarks.experiments.orthogonal_dropout.plots import SCORES, plots
from benchmarks.experiments.orthogonal_dropout.results import ALONE, AVERAGE, REAL, Measured
from benchmarks.report.html import flat, write_html

Grid = tuple[str, list[str], list[tuple[str, list[str]]]]
"""Caption, columns, and rows of a name and cells."""


def write_page(measured: Measured, run_dir: str | Path) -> Path:
    """Write report.html into `run_dir` and return its path."""
    run_dir = Path(run_dir)
    return write_html(
        run_dir / "report.html",
        "page.html",
        Path(__file__).parent,
        measured=measured,
        sentences=sentences(measured),
        plots=list(plots(measured)),
        grids=list(grids(measured)),
        pictures=[
            (title, base64.b64encode((run_dir / path).read_bytes()).decode())
            for title, path in measured.pictures.items()
        ],
        settings=[*flat(measured.settings), *measured.facts.items(), *measured.versions.items()],
    )


def grids(measured: Measured) -> Iterator[Grid]:
    """Every table of the page."""
    for init in measured.values("init", part="images", metric="both", samples=1):
        yield composition(measured, init)
        yield by_pair(measured, init)
        yield alone(measured, init)
    for init in measured.values("init", part="text"):
        yield texts(measured, init)
    for dropout in measured.values("dropout", part="redundancy"):
        yield redundancy(measured, dropout)
    if measured.select(part="sdxl"):
        yield sdxl(measured)


def composition(measured: Measured, init: str) -> Grid:
    """Means over pairs and seeds by the way of merging, beside real renderings."""
    known: dict[str, Any] = {"part": "images", "init": init}
    columns = [*SCORES, "frechet distance"]
    rows = [
        (label, [str(measured.mean_of(label, **known, metric=c, styled=True)) for c in columns])
        for label in measured.values("label", **known)
        if label != ALONE
    ]
    real = [str(measured.mean(part="images", method=REAL, metric=c)) for c in columns]
    caption = f"Object x style, {init} adapters: mean ± standard error over pairs and seeds"
    return caption, columns, [*rows, (REAL, real)]


def by_pair(measured: Measured, init: str) -> Grid:
    """The share of pictures with both, pair by pair."""
    known: dict[str, Any] = {"part": "images", "init": init, "metric": "both"}
    labels = [x for x in measured.values("label", **known) if x != ALONE]
    rows = [
        (
            f"{name} {style}",
            [str(measured.mean_of(label, **known, task=name, style=style)) for label in labels],
        )
        for name in measured.values("task", **known, method="direct")
        for style in measured.values("style", **known, method="direct")
    ]
    return f"Both, pair by pair, {init} adapters", labels, rows


def alone(measured: Measured, init: str) -> Grid:
    """What each adapter does alone."""
    known: dict[str, Any] = {"part": "images", "init": init, "method": ALONE}
    columns = [*SCORES, "frechet distance"]
    rows = [
        (task, [str(measured.mean(**known, task=task, metric=c)) for c in columns])
        for task in measured.values("task", **known)
    ]
    return f"Each adapter alone, {init}", columns, rows


def texts(measured: Measured, init: str) -> Grid:
    """Every merge on every task."""
    known: dict[str, Any] = {"part": "text", "init": init}
    tasks = measured.values("task", **known)
    rows = []
    for label in measured.values("label", **known):
        static = any(r.label == label and r.samples is None for r in measured.select(**known))
        name = label if not static or label == "individual" else f"{label}, static"
        cells = [str(measured.mean_of(label, **known, task=task)) for task in tasks]
        coefficients = [r.coefficient for r in measured.select(**known) if r.label == label]
        used = sorted({c for c in coefficients if c is not None})
        rows.append((name, [*cells, ", ".join(f"{c:g}" for c in used)]))
    return f"Merges of the text adapters, {init}", [*tasks, "coefficient"], rows


def redundancy(measured: Measured, dropout: float) -> Grid:
    """Every task against the drop rate."""
    known: dict[str, Any] = {"part": "redundancy", "dropout": dropout}
    rates = sorted(measured.values("drop_rate", **known))
    rows = []
    for task in measured.values("task", **known):
        for metric in measured.values("metric", **known, task=task):
            if metric in ("style", "both"):
                continue
            wanted = {**known, "task": task, "metric": metric}
            cells = [f"{measured.mean(**wanted, drop_rate=rate).value:.3f}" for rate in rates]
            name = "mean over tasks" if task == AVERAGE else f"{task}, {metric}"
            rows.append((name, cells))
    caption = f"Single adapters against their drop rate, trained with LoRA dropout {dropout:g}"
    return caption, [f"{rate:g}" for rate in rates], rows


def sdxl(measured: Measured) -> Grid:
    """CLIP scores of scenes."""
    known: dict[str, Any] = {"part": "sdxl"}
    columns: list[tuple[str, float | None]] = list(
        dict.fromkeys((r.method, r.drop_rate) for r in measured.select(**known))
    )
    rows = [
        (
            scene,
            [
                str(measured.mean(**known, task=scene, method=method, drop_rate=rate))
                for method, rate in columns
            ],
        )
        for scene in measured.values("task", **known)
    ]
    names = [m if rate is None else f"one adapter, p = {rate:g}" for m, rate in columns]
    return "CLIP score of pictures and prompt", names, rows


def summary_tables(measured: Measured) -> Iterator[Table]:
    """What the run found, for the terminal."""
    for caption, columns, rows in grids(measured):
        if "pair by pair" in caption or "alone" in caption or len(columns) > 8:
            continue
        table = Table("", *columns, title=caption, title_justify="left", box=None)
        for name, cells in rows:
            table.add_row(name, *cells)
        yield table
    findings = Table(title="findings", title_justify="left", show_header=False, box=None)
    for sentence in sentences(measured):
        findings.add_row(sentence)
    yield findings
