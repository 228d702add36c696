"""How figures look, and how they become part of a page: inline SVG, real text, nothing outside."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
# Okabe and Ito's palette, told apart under every common colour blindness; shapes differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#1f2933"
MUTED = "#5b6770"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "osrm",
    # A task may be called "$x_1$": its name is text, not mathematics.
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


@contextmanager
def report_style() -> Iterator[None]:
    """The report's style whatever the user's matplotlibrc says; everything is put back."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@dataclass(frozen=True)
class Plot:
    """A figure and the sentence that says the same to someone who cannot see it."""

    name: str
    title: str
    alternative: str
    figure: Figure

    def svg(self) -> Markup:
        """One <svg> element: the same text for the same results, ids unique within a page."""
        text = io.StringIO()
        with report_style():
            self.figure.savefig(
                text,
                format="svg",
                metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
            )
        body = text.getvalue().partition("<svg")[2].partition(">")
        size = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', body[0])
        assert size is not None
        # matplotlib numbers the ids of every figure from 1 and styles every element of the page.
        drawing = re.sub(r'(\bid="|\bxlink:href="#|url\(#)', rf"\1{self.name}-", body[2])
        drawing = re.sub(r"<style.*?</style>", "", drawing).replace("xlink:href", "href")
        label = f"{self.name}-title {self.name}-alternative"
        # matplotlib escapes the text it draws.
        return Markup(
            f'<svg role="img" aria-labelledby="{label}" {size[0]} style="width:{size[1]}pt">'
            f'<title id="{self.name}-title">{escape(self.title)}</title>'
            f'<desc id="{self.name}-alternative">{escape(self.alternative)}</desc>{drawing}'
        )


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its panels, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(grid.flat)


def add_legend(figure: Figure, axes: Axes) -> None:
    """The panel's legend above the figure, reference lines last."""
    pairs = list(zip(*axes.get_legend_handles_labels(), strict=True))
    pairs.sort(key=lambda pair: isinstance(pair[0], Line2D))
    labels = [label for _, label in pairs]
    # About 13 characters fit into an inch; the symbol and the gap take the room of six.
    columns = int(13 * figure.get_figwidth()) // (6 + max(map(len, labels), default=0))
    figure.legend(
        [handle for handle, _ in pairs], labels, loc="outside upper left", ncols=max(columns, 1)
    )


@report_style()
def heatmap(
    matrix: Matrix, names: Sequence[str], limit: float, text: Callable[[float], str], **labels: str
) -> Figure:
    """A square matrix of things against each other; the diagonal is written but not coloured.

    Args:
        matrix: (n, n); NaN is grey.
        names: n names, of rows and columns.
        limit: The value that is drawn darkest; 0 is white.
        text: How to write a value; nothing is written if there are more than 24 names.
        **labels: Settings of the axes, such as title and xlabel.
    """
    few = len(names) <= 24
    size = 1.7 + (0.39 * len(names) if few else 9.3)
    figure, (axes,) = new_figure(size, size)
    off = off_diagonal(matrix)
    # Thousands of cells are one picture instead of as many shapes.
    edges = {"edgecolors": "white", "linewidth": 1} if few else {"rasterized": True}
    axes.pcolormesh(off, cmap=_blues(), vmin=0, vmax=limit, **edges)
    for (i, j), value in np.ndenumerate(matrix) if few else ():
        dark = i != j and value > 0.6 * limit
        axes.text(
            j + 0.5,
            i + 0.5,
            text(value),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else MUTED if i == j else INK,
        )
    axes.set(aspect="equal", **labels)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    step = math.ceil(len(names) / 48)
    ticks = np.arange(0, len(names), step) + 0.5
    axes.set_xticks(ticks, names[::step], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names[::step])
    return figure


def off_diagonal(matrix: Matrix) -> Matrix:
    """The matrix with NaN in place of its diagonal."""
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


def _blues() -> Colormap:
    """White to dark blue; what has no value, the diagonal included, is grey."""
    blues = LinearSegmentedColormap.from_list("blues", ["white", "#084578"])
    return blues.with_extremes(bad="#eef0f2")
