"""Processes that work side by side: what they say, and how they end."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from jsonargparse import Namespace

from benchmarks.commands.common import PROCESS, count_workers
from benchmarks.workers import Done, Finished, Refused, Stage, Workers
from merge_algorithms import UserError
from merge_algorithms.files import atomic_directory
from trainers.backbone import ModelRef, load_skeleton
from trainers.store import Progress


class Slow:
    """Takes long to collect, as a model in reference cycles does."""

    def __init__(self, begun: Path) -> None:
        self.begun = begun

    def __del__(self) -> None:
        self.begun.touch()
        time.sleep(60)


class Announced:
    """Work that comes with a library that announces itself when imported."""

    def __getstate__(self) -> dict[str, str]:
        return {"logger": "bitsandbytes.backends.cpu.ops"}

    def __setstate__(self, state: dict[str, str]) -> None:
        logging.getLogger(state["logger"]).warning("no kernel")

    def __call__(self, given: Any, progress: Progress) -> Any:
        return given


def work(given: Any, progress: Progress) -> Any:
    """What the processes of these tests do."""
    kind, value = given
    if kind == "stage":
        report = progress.started(value)
        report(1, 2)
        progress.finished(value, False)
        return torch.get_num_threads()
    if kind == "raise":
        raise value
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "collect":
        Slow(value / "collecting")
    with atomic_directory(value / "stage") as path:
        (path / "begun").touch()
        time.sleep(60)
    return None


def said(pool: Workers, index: int, given: Any) -> list[Any]:
    pool.give(index, given)
    found = []
    while index not in pool.idle:
        found += [message for _, message in pool.messages()]
    return found


def test_a_stage_is_told_of_and_the_outcome_comes_last() -> None:
    with Workers(work, 2) as pool:
        *stages, done = said(pool, 1, ("stage", "adapters x"))
        assert stages == [
            Stage("adapters x"),
            Stage("adapters x", 1, 2),
            Finished("adapters x", False),
        ]
        assert isinstance(done, Done)
        assert done.outcome == 1
        assert done.seconds > 0


def test_errors_come_through_and_the_process_lives_on() -> None:
    with Workers(work, 1) as pool:
        assert said(pool, 0, ("raise", UserError("too few"))) == [Refused("too few")]
        out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
        (refused,) = said(pool, 0, ("raise", out))
        assert refused.reason.startswith("CUDA out of memory: run again with fewer --workers, or")
        assert refused.again
        pool.give(0, ("raise", OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            list(pool.messages())
    with Workers(work, 1) as pool:
        pool.give(0, ("raise", EOFError("half a file")))
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*EOFError: half a file"):
            list(pool.messages())


def test_a_process_that_dies_is_one_sentence() -> None:
    with Workers(work, 1) as pool:
        pool.give(0, ("die", None))
        with pytest.raises(UserError, match=r"ended with status -9: .* fewer --workers"):
            list(pool.messages())


def test_so_is_one_that_dies_with_nothing_to_do() -> None:
    with Workers(work, 1) as pool:
        said(pool, 0, ("stage", "x"))
        pool.workers[0].process.kill()
        pool.workers[0].process.join()
        with pytest.raises(UserError, match="ended with status -9"):
            said(pool, 0, ("stage", "y"))


@pytest.mark.parametrize(("kind", "sign"), [("write", "begun"), ("collect", "collecting")])
def test_leaving_ends_work_that_says_nothing_and_leaves_no_half_stage(
    kind: str, sign: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Workers(work, 1) as pool:
        pool.give(0, (kind, tmp_path))
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob(sign)) and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / sign).unlink(missing_ok=True)
        started = time.monotonic()
    assert time.monotonic() - started < 15
    assert pool.workers[0].process.exitcode == 0
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err


def test_leaving_idle_ones_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(work, 2) as pool:
        said(pool, 0, ("stage", "x"))
    assert [worker.process.exitcode for worker in pool.workers] == [0, 0]
    assert "Traceback" not in capfd.readouterr().err


def test_as_many_as_there_are_threads_and_the_memory_holds(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tiny_model("bert"))
    weights = 4 * sum(p.numel() for p in load_skeleton(path).parameters())
    config, model = Namespace(workers=None), ModelRef(name=path, path=path)
    free = SimpleNamespace(available=3 * (PROCESS + 2 * weights))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert count_workers(config, model) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert count_workers(config, model) == 3
    free.available -= 1
    assert count_workers(config, model) == 2
    monkeypatch.setattr("osrm.spill._group_limit", lambda group: 2 * (PROCESS + 2 * weights))
    free.available = 2**40  # of a host whose container may have less
    assert count_workers(config, model) == 2
    monkeypatch.setattr("osrm.spill._group_limit", lambda group: None)
    free.available = 0
    assert count_workers(config, model) == 1
    free.available = 2**40
    assert count_workers(config, None) == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert count_workers(config, model) == 1
    assert count_workers(Namespace(workers=5), model) == 5


def test_libraries_are_hushed_before_they_are_imported(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(Announced(), 1) as pool:
        done = said(pool, 0, 3)[-1]
    assert done.outcome == 3
    assert "no kernel" not in capfd.readouterr().err
