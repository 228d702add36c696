"""Time and memory of merging: this package, PEFT, and the methods' dense definitions.

    python -m benchmarks.performance.merging --repeats 3

Everything merges the same random adapters, on the CPU, each piece of work in a process of its own
(see measuring.py). A peer's dense definition that takes minutes is measured on a few modules and
multiplied, which its row says. Results stay in memory; nothing is read from or written to disk
(mergekit_end_to_end.py measures that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from benchmarks.performance import peers
from benchmarks.performance.command import run_as_command
from benchmarks.performance.measuring import Cost, Job, in_seconds, markdown, measure
from benchmarks.performance.problems import LLAMA_3_8B, ROBERTA_LARGE, Problem, small
from merge_algorithms import UserError, methods
from merge_algorithms.errors import suggest

Part = Literal["peers", "roberta-large", "llama-3-8b"]
Measure = Callable[..., Cost]
# KnOTS' SVD of one dense [dW_1 .. dW_T] in float64 takes seconds.
KNOTS_LAYERS = 1


@dataclass(frozen=True)
class Peer:
    """Another implementation of what `ours` computes.

    Attributes:
        label: What it is.
        prepare: Makes its work, from the problem and `arguments`.
        arguments: See `prepare`.
        layers: How many layers it is measured on, if not on all.
    """

    label: str
    prepare: Callable[..., Job]
    arguments: tuple[Any, ...] = ()
    layers: int | None = None

    def cost(self, measure: Measure, problem: Problem) -> Cost:
        """The cost for the whole problem."""
        if self.layers is None or self.layers >= problem.layers:
            return measure(self.prepare, problem, *self.arguments)
        part = replace(problem, layers=self.layers)
        return measure(self.prepare, part, *self.arguments).times(problem.layers / self.layers)

    def describe(self, problem: Problem) -> str:
        """The label, with what was measured if that is not all."""
        if self.layers is None or self.layers >= problem.layers:
            return self.label
        measured = self.layers * len(problem.shapes)
        return f"{self.label}; {measured} of {len(problem.modules)} modules measured"


@dataclass(frozen=True)
class Comparison:
    """One method, and rank to truncate its result to, of this package, and who else has it."""

    label: str
    method: str
    truncated: bool
    peers: tuple[Peer, ...]


COMPARISONS = (
    Comparison(
        "sum, truncated to rank r",
        "task_arithmetic",
        True,
        (Peer("PEFT svd", peers.peft, ("svd",)),),
    ),
    Comparison(
        "KnOTS-TIES",
        "knots_ties",
        False,
        (Peer("dense float64 definition", peers.dense_knots, (), KNOTS_LAYERS),),
    ),
    Comparison(
        "TIES",
        "ties",
        False,
        (Peer("flat dense PyTorch, as the authors", peers.dense_ties),),
    ),
    Comparison(
        "TIES, truncated to rank r",
        "ties",
        True,
        (Peer("PEFT ties_svd, trimmed per module", peers.peft, ("ties_svd",)),),
    ),
)


def compare(
    parts: list[Part] | None = None,
    only: list[str] | None = None,
    small: bool = False,
    repeats: PositiveInt = 1,
    threads: PositiveInt = 2,
) -> None:
    """Measure and print markdown tables.

    Args:
        parts: Which tables: against the peers, every method at RoBERTa-large's shapes, every
            method at Llama-3-8B's; all by default.
        only: Methods of this package to measure; all by default.
        small: A sixteenth of the widths and two layers, to see that everything runs.
        repeats: How often each is measured at least; the median counts.
        threads: Number of threads of torch.
    """
    known = methods()
    for name in only or ():
        if name not in known:
            raise UserError(f"unknown merging method '{name}': {suggest(name, known)}")
    chosen = [name for name in known if only is None or name in only]
    measured = partial(measure, repeats=repeats, threads=threads)
    sized = partial(_sized, is_small=small)
    for part in parts or ("peers", "roberta-large", "llama-3-8b"):
        problem = sized(LLAMA_3_8B if part == "llama-3-8b" else ROBERTA_LARGE)
        print(f"\n{title(problem)}; {threads} threads\n", flush=True)
        table = against_peers if part == "peers" else every_method
        for line in table(problem, chosen, measured):
            print(line, flush=True)


def title(problem: Problem) -> str:
    """What is merged."""
    shapes = ", ".join(f"{d_out} x {d_in}" for d_out, d_in in problem.shapes)
    return f"{problem.name}: {problem.layers} x [{shapes}], T = {problem.tasks}, r = {problem.rank}"


def against_peers(problem: Problem, chosen: Sequence[str], measured: Measure) -> Iterator[str]:
    """A row for each piece of work, the peers' below ours."""

    def rows() -> Iterator[list[str]]:
        for comparison in COMPARISONS:
            if comparison.method not in chosen:
                continue
            rank = problem.rank if comparison.truncated else None
            mine = measured(peers.ours, problem, comparison.method, rank)
            yield [f"{comparison.label}: osrm", *_figures(mine), "1"]
            for peer in comparison.peers:
                cost = peer.cost(measured, problem)
                ratio = f"{cost.seconds / mine.seconds:.1f}"
                yield [f"{comparison.label}: {peer.describe(problem)}", *_figures(cost), ratio]

    return markdown(["work", "seconds", "extra MB", "times as long as osrm"], rows())


def every_method(problem: Problem, chosen: Sequence[str], measured: Measure) -> Iterator[str]:
    """A row for each registered method."""

    def rows() -> Iterator[list[str]]:
        for name in chosen:
            count = methods()[name].adapters or problem.tasks
            note = "" if count == problem.tasks else f" ({count} adapters)"
            result = "low rank" if methods()[name].low_rank else "dense, all rows"
            yield [f"{name}{note}", result, *_figures(measured(peers.ours, problem, name))]

    return markdown(["method", "result", "seconds", "extra MB"], rows())


def _sized(problem: Problem, is_small: bool) -> Problem:
    return small(problem) if is_small else problem


def _figures(cost: Cost) -> list[str]:
    return [in_seconds(cost.seconds), f"{cost.extra:.0f}"]


if __name__ == "__main__":
    run_as_command(compare)
