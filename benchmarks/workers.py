"""Processes that work side by side, and die with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from merge_algorithms.errors import UserError
from trainers import jobs

PATIENCE = 20  # seconds that a process gets to leave its stage behind


@dataclass(frozen=True)
class Stage:
    """A worker is at this stage, so many steps far."""

    title: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Finished:
    """A worker has left a stage, which it computed or found."""

    title: str
    reused: bool


@dataclass(frozen=True)
class Done:
    """A worker has finished its piece of work, in so many seconds."""

    outcome: Any
    seconds: float


@dataclass(frozen=True)
class Refused:
    """The piece of work is none that can be done: a UserError's sentence."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """Nothing can be done here any more: an OSError's sentence, such as that of a full disk."""

    reason: str


Message = Stage | Finished | Done | Refused | Failed
Task = Callable[[Any, jobs.Progress], Any]
"""Does one piece of work; told where it may say what stage it is at."""


class PipeProgress(jobs.Progress):
    """Tells the parent; a parent that is gone ends the work by a BrokenPipeError."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def started(self, stage: str) -> jobs.Report:
        """Say which stage, and how far it is."""
        self.connection.send(Stage(stage))
        return lambda done, total: self.connection.send(Stage(stage, done, total))

    def finished(self, stage: str, reused: bool) -> None:
        """Say that it is there."""
        self.connection.send(Finished(stage, reused))


@dataclass
class _Worker:
    """A process, the parent's end of the pipe to it, and whether it has something to do."""

    process: BaseProcess
    connection: Connection
    busy: bool = False


class Workers:
    """A context in which processes are at hand; leaving it ends them, whatever they are at.

    Args:
        task: Does a piece of work in the process; it and the work must be picklable.
        count: How many processes; they share the cores' threads out evenly.
    """

    def __init__(self, task: Task, count: int) -> None:
        self.task = task
        self.count = count
        self.workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        # A fresh interpreter: a fork would inherit the threads' locks, but not the threads.
        context = multiprocessing.get_context("spawn")
        threads = max(cores() // self.count, 1)
        for _ in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self.task, theirs, threads), daemon=True)
            process.start()
            theirs.close()
            self.workers.append(_Worker(process, ours))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            worker.connection.close()
        deadline = time.monotonic() + PATIENCE
        for worker in self.workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
            worker.process.kill()
            worker.process.join()

    @property
    def idle(self) -> list[int]:
        """The numbers of those that have nothing to do."""
        return [index for index, worker in enumerate(self.workers) if not worker.busy]

    def give(self, index: int, work: Any) -> None:
        """Let an idle one do a piece of work."""
        self.workers[index].busy = True
        self.workers[index].connection.send(work)

    def messages(self) -> Iterator[tuple[int, Stage | Finished | Done | Refused]]:
        """What the busy ones say, each by its number, as soon as one of them says something.

        Raises:
            OSError: What one of them came across.
            UserError: A process has ended, such as one that was killed for want of memory.
        """
        busy = [(index, worker) for index, worker in enumerate(self.workers) if worker.busy]
        ready = wait([worker.connection for _, worker in busy])
        for index, worker in ((i, worker) for i, worker in busy if worker.connection in ready):
            try:
                message: Message = worker.connection.recv()
            except EOFError:
                worker.process.join()
                raise UserError(
                    f"a worker process ended with status {worker.process.exitcode}: what is"
                    " finished is kept; run again, with fewer --workers if the memory ran out"
                ) from None
            if isinstance(message, Failed):
                raise OSError(message.reason)
            worker.busy = isinstance(message, Stage | Finished)
            yield index, message


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(task: Task, connection: Connection, threads: int) -> None:
    """Do what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which hangs up
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # as the command line does
    try:
        while True:
            work = connection.recv()
            started = time.monotonic()
            try:
                outcome = task(work, PipeProgress(connection))
            except UserError as error:
                connection.send(Refused(str(error)))
            except (BrokenPipeError, ConnectionResetError):
                return
            except OSError as error:
                connection.send(Failed(str(error)))
            else:
                connection.send(Done(outcome, time.monotonic() - started))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has hung up
