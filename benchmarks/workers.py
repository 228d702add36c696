"""Processes that work side by side, and die with the process that started them."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch

from benchmarks.hush import hush
from benchmarks.interrupts import handled
from merge_algorithms.errors import UserError
from trainers.store import Progress, Report

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
    """The piece of work is none that can be done: a UserError's sentence.

    `again`: it may be another time, for only the memory ran out.
    """

    reason: str
    again: bool = False


@dataclass(frozen=True)
class Failed:
    """Nothing can be done here any more: an OSError's sentence, such as that of a full disk."""

    reason: str


@dataclass(frozen=True)
class Crashed:
    """Anything else went wrong, which is a defect: its traceback."""

    trace: str


class HungUp(BaseException):
    """The parent is gone; no Exception, so that no work can take it for one of its own."""


Message = Stage | Finished | Done | Refused | Failed | Crashed
Task = Callable[[Any, Progress], Any]
"""Does one piece of work; told where it may say what stage it is at."""


class PipeProgress(Progress):
    """Tells the parent; a parent that is gone ends the work."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def started(self, stage: str) -> Report:
        """Say which stage, and how far it is."""
        self.tell(Stage(stage))
        return lambda done, total: self.tell(Stage(stage, done, total))

    def finished(self, stage: str, reused: bool) -> None:
        """Say that it is there."""
        self.tell(Finished(stage, reused))

    def tell(self, message: Message) -> None:
        """Send a message.

        Raises:
            HungUp: Nobody reads it.
        """
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            _hang_up()


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
        threads = share_of(self.count)
        task = pickle.dumps(self.task)  # to read it imports much, which only then is hushed
        with _ctrl_c_ignored():
            for _ in range(self.count):
                ours, theirs = context.Pipe()
                arguments = (task, theirs, threads)
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.workers.append(_Worker(process, ours))
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.connection.close()
            if worker.busy:  # the others see that nobody writes any more
                worker.process.terminate()
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
        """Let an idle one do a piece of work.

        Raises:
            UserError: The process has ended.
        """
        worker = self.workers[index]
        worker.busy = True
        with _alive(worker):
            worker.connection.send(work)

    def messages(self) -> Iterator[tuple[int, Stage | Finished | Done | Refused]]:
        """What the busy ones say, each by its number, as soon as one of them says something.

        Raises:
            OSError: What one of them came across.
            UserError: A process has ended, such as one that was killed for want of memory.
            RuntimeError: Anything else went wrong in one of them.
        """
        busy = [(index, worker) for index, worker in enumerate(self.workers) if worker.busy]
        ready = wait([worker.connection for _, worker in busy])
        for index, worker in ((i, worker) for i, worker in busy if worker.connection in ready):
            with _alive(worker):
                message: Message = worker.connection.recv()
            if isinstance(message, Failed):
                raise OSError(message.reason)
            if isinstance(message, Crashed):
                raise RuntimeError(f"a worker process failed:\n{message.trace}")
            worker.busy = isinstance(message, Stage | Finished)
            yield index, message


def share_of(processes: int) -> int:
    """The threads of torch that each of so many processes may have."""
    return max(torch.get_num_threads() // processes, 1)


@contextmanager
def _alive(worker: _Worker) -> Iterator[None]:
    """Talk to a process; UserError if it has ended."""
    try:
        yield
    except (EOFError, OSError):
        worker.process.join(PATIENCE)
        raise UserError(
            f"a worker process ended with status {worker.process.exitcode}: what is finished is"
            " kept; run again, with fewer --workers if the memory ran out"
        ) from None


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """For processes that are started meanwhile: Ctrl-C reaches the parent, which ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _hang_up(*_: object) -> NoReturn:
    """Leave by way of every `finally`, which nothing disturbs: no half stage is left behind."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise HungUp


def _serve(pickled: bytes, connection: Connection, threads: int) -> None:
    """Do what comes through the pipe until it is closed."""
    hush()
    task: Task = pickle.loads(pickled)
    for number in (signal.SIGINT, signal.SIGTERM):  # before and after the work
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    progress = PipeProgress(connection)
    with suppress(HungUp), handled(signal.SIGTERM, _hang_up, HungUp):
        while _serve_once(task, connection, progress):
            pass


def _serve_once(task: Task, connection: Connection, progress: PipeProgress) -> bool:
    """Do one piece of work; False where there is none any more."""
    try:
        work = connection.recv()
    except (EOFError, ConnectionResetError):
        return False  # the parent has hung up
    started = time.monotonic()
    message: Message
    try:
        outcome = task(work, progress)
        message = Done(outcome, time.monotonic() - started)
    except UserError as error:
        message = Refused(str(error))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        remedy = "run again with fewer --workers, or a smaller --train.batch_size"
        message = Refused(f"{reason}: {remedy}", again=True)
    except OSError as error:
        message = Failed(str(error))
    except Exception:
        message = Crashed(traceback.format_exc())
    progress.tell(message)
    return True
