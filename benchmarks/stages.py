"""The stages of a run built by several processes at a time.

Training small adapters gains next to nothing from a second thread and everything from a second
process, so a run on a CPU is cut into pieces that need nothing of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from benchmarks.workers import Done, Finished, Refused, Stage, Workers, share_of
from merge_algorithms.errors import UserError
from trainers.store import Progress, Report, Store

Piece = TypeVar("Piece")


class Divisible(Protocol[Piece]):
    """A run, picklable, whose stages any process can build."""

    @property
    def run_dir(self) -> Path:
        """Where everything is written."""

    def pieces(self) -> Sequence[Sequence[Piece]]:
        """Phases of pieces, picklable; those of one phase need only earlier phases."""

    def build(self, store: Store, piece: Piece) -> None:
        """Build the stages of one piece."""


class _Builder(Generic[Piece]):
    """Builds pieces in a worker, which keeps what it has loaded from one to the next."""

    def __init__(self, run: Divisible[Piece]) -> None:
        self.run = run
        self.store = Store(run.run_dir)

    def __call__(self, work: tuple[Piece, int, set[Path]], progress: Progress) -> set[Path]:
        """Build one piece.

        Args:
            work: The piece, the threads for it, and the stages that were told of elsewhere.
            progress: Told about the others.

        Returns:
            The stages that are there now.
        """
        piece, threads, known = work
        torch.set_num_threads(threads)
        self.store.progress = progress
        self.store.known |= known
        self.run.build(self.store, piece)
        return self.store.known


def build_stages(run: Divisible[Piece], store: Store, workers: int) -> None:
    """Build every piece of a run if there is more than one process; `store` then knows all stages.

    Args:
        run: What to build.
        store: Of the run directory, locked by this process; its progress is told about every stage.
        workers: How many processes.

    Raises:
        UserError: As a piece raised it, or a process has ended.
        OSError: As a piece came across it.
        RuntimeError: A piece failed otherwise.
    """
    phases = [phase for phase in run.pieces() if phase] if workers > 1 else []
    if not phases:
        return
    running: dict[tuple[int, str], Report] = {}
    with Workers(_Builder(run), min(workers, max(map(len, phases)))) as pool:
        for phase in phases:
            waiting = list(phase)
            threads = share_of(min(pool.count, len(phase)))
            while waiting or len(pool.idle) < pool.count:
                for index in pool.idle[: len(waiting)]:
                    pool.give(index, (waiting.pop(0), threads, store.known))
                for index, message in pool.messages():
                    match message:
                        case Stage(title, done, total):
                            if (index, title) not in running:
                                running[index, title] = store.progress.started(title)
                            else:
                                running[index, title](done, total)
                        case Finished(title, reused):
                            del running[index, title]
                            store.progress.finished(title, reused)
                        case Done(outcome):
                            store.known |= outcome
                        case Refused(reason):
                            raise UserError(reason)
