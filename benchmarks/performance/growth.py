"""How time and memory of merging grow with the number of adapters and with the width.

    python -m benchmarks.performance.growth --output runs/growth

One module of d x d, adapters of rank 8: T from 2 to 256 at d = 1024, d from 512 to 8192 at T = 8.
The exponents are the slopes of straight lines through the larger half of the points, on
logarithmic scales: the smaller half shows fixed costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from jsonargparse.typing import PositiveInt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.performance import peers
from benchmarks.performance.command import run_as_command
from benchmarks.performance.measuring import Cost, in_seconds, markdown, measure
from benchmarks.performance.problems import Problem
from benchmarks.report.drawing import COLOURS, MARKERS, report_style
from merge_algorithms import UserError
from merge_algorithms.errors import suggest

# Method -> whether its result is truncated to rank r.
METHODS = {"task_arithmetic": True, "ties": False, "knots_ties": False, "regmean": False}
RANK = 8
# Less than this many MB are the allocator's rather than the method's.
NOISE = 8.0

# Number of adapters, or width -> cost
Curve = dict[int, Cost]
Measure = Callable[..., Cost]


def grow(
    only: list[str] | None = None,
    output: Path = Path("runs/growth"),
    small: bool = False,
    repeats: PositiveInt = 1,
    threads: PositiveInt = 2,
) -> None:
    """Measure, print markdown tables with the exponents, and plot.

    Args:
        only: Methods to measure; all four by default.
        output: Directory of the plots, growth.svg and growth.png.
        small: At most 8 adapters and a width of 64, to see that everything runs.
        repeats: How often each is measured at least; the median counts.
        threads: Number of threads of torch.
    """
    for name in only or ():
        if name not in METHODS:
            raise UserError(f"'{name}' is not measured here: {suggest(name, METHODS)}")
    chosen = [name for name in METHODS if only is None or name in only]
    width, tasks = (32, 4) if small else (1024, 8)
    sweeps = {
        f"T, at d = {width}": [
            _square(width, count) for count in _doubling(2, 8 if small else 256)
        ],
        f"d, at T = {tasks}": [
            _square(d, tasks) for d in _doubling(16 if small else 512, 64 if small else 8192)
        ],
    }
    figures: dict[str, dict[str, Curve]] = {}
    for what, problems in sweeps.items():
        print(f"\nGrowth with {what}; r = {RANK}, {threads} threads\n")
        figures[what] = {name: {} for name in chosen}
        measured = partial(measure, repeats=repeats, threads=threads)
        for line in as_table(what[0], problems, figures[what], measured):
            print(line, flush=True)
    plot(figures, output)
    print(f"\n{output / 'growth.svg'}")


def as_table(
    what: str, problems: Iterable[Problem], curves: Mapping[str, Curve], measured: Measure
) -> Iterator[str]:
    """Measure, filling `curves`: seconds and MB at every point, the exponents below."""

    def rows() -> Iterator[list[str]]:
        for problem in problems:
            point = problem.tasks if what == "T" else problem.shapes[0][0]
            row = [str(point)]
            for name, curve in curves.items():
                rank = RANK if METHODS[name] else None
                cost = curve[point] = measured(peers.ours, problem, name, rank)
                row += [in_seconds(cost.seconds), f"{cost.extra:.0f}"]
            yield row
        row = ["growth"]
        for curve in curves.values():
            seconds = exponent((x, cost.seconds) for x, cost in curve.items())
            extra = exponent(((x, cost.extra) for x, cost in curve.items()), NOISE)
            row += [_power(what, seconds), _power(what, extra)]
        yield row

    headers = [heading for name in curves for heading in (f"{name}, s", f"{name}, MB")]
    return markdown([what, *headers], rows())


def exponent(points: Iterable[tuple[float, float]], least: float = 0.0) -> float:
    """The slope of log y over log x in the larger half of the points; nan with fewer than two.

    Args:
        points: Pairs (x, y), x rising.
        least: Points with a smaller y do not count.
    """
    points = list(points)
    counted = [(x, y) for x, y in points[len(points) // 2 :] if y > least]
    if len(counted) < 2:
        return math.nan
    logarithms = np.log(counted)
    return float(np.polyfit(logarithms[:, 0], logarithms[:, 1], 1)[0])


def plot(figures: Mapping[str, Mapping[str, Curve]], output: Path) -> None:
    """One column of axes per sweep, seconds above memory."""
    output.mkdir(parents=True, exist_ok=True)
    with report_style():
        figure = Figure(figsize=(4.5 * len(figures), 6.5), layout="constrained")
        axes = figure.subplots(2, len(figures), squeeze=False)
        for column, (what, curves) in enumerate(figures.items()):
            name, _, fixed = what.partition(", ")
            for row, label in enumerate(("seconds", "extra memory, MB")):
                _draw(axes[row][column], curves, memory=row == 1)
                axes[row][column].set(xlabel=f"{name} ({fixed})", ylabel=label)
            axes[0][column].legend()
        for suffix in ("svg", "png"):
            figure.savefig(output / f"growth.{suffix}", dpi=150)


def _draw(axes: Axes, curves: Mapping[str, Curve], memory: bool) -> None:
    for (name, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        # A logarithmic axis has no zero.
        values = [max(1.0, c.extra) if memory else c.seconds for c in curve.values()]
        axes.loglog(list(curve), values, marker=marker, color=colour, label=name)
    ticks = list(next(iter(curves.values())))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid()


def _square(width: int, tasks: int) -> Problem:
    return Problem("one module", ((width, width),), 1, tasks, RANK)


def _doubling(first: int, last: int) -> list[int]:
    return [first << i for i in range((last // first).bit_length())]


def _power(what: str, value: float) -> str:
    return "-" if math.isnan(value) else f"{what}^{round(value, 2) + 0.0:.2f}"


if __name__ == "__main__":
    run_as_command(grow)
