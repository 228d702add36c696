"""Finished stages on disk, each keyed by a hash of its inputs: finished or absent, never half."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from merge_algorithms import UserError
from merge_algorithms.files import atomic_directory
from trainers.backbone import pick_dtype

log = logging.getLogger(__name__)

Report = Callable[[int, int], None]

# Kind of stage -> a number, 1 for those not named: raise it whenever a stage of that kind would
# come out otherwise than before, so that none of an earlier version is taken for a new one.
FORMATS = {"covariances": 2, "adapters": 2}


class Progress:
    """Told what a job does; this one says it to the log, the command line's draws bars."""

    def started(self, stage: str) -> Report:
        """A stage begins; returns the function that takes (steps done, steps in all)."""
        log.info("%s", stage)
        return lambda done, total: None

    def finished(self, stage: str, reused: bool) -> None:
        """A stage is there, computed now or found finished."""


class Store:
    """Finished stages below one directory, each in `<kind>/<label>-<hash of its inputs>/`.

    Several processes may build stages at the same time, the same one even: the first to finish it
    wins. One of them holds `lock`, and it starts the others after that.

    Args:
        root: The run directory.
        progress: Told about every stage.

    Attributes:
        known: Stages that are there and were told of.
    """

    def __init__(self, root: str | Path, progress: Progress | None = None) -> None:
        self.root = Path(root)
        self.progress = progress or Progress()
        self.known: set[Path] = set()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory for this process; UserError if another one holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"the run directory {self.root} is in use by another process: wait for it, or"
                " choose another --name"
            ) from error
        try:
            # Left over by processes that were killed: those to come have not begun.
            for left_over in self.root.rglob(".*.tmp"):
                if left_over.is_file():
                    left_over.unlink()
                else:
                    shutil.rmtree(left_over, ignore_errors=True)
            yield
        finally:
            lock.release()

    def run(
        self,
        kind: str,
        label: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path, Report], None],
    ) -> Path:
        """The stage's directory, built now unless it is already there.

        Args:
            kind: Folder of the stage, such as 'adapters'.
            label: Readable name, such as 'osrm-seed0/stsb'.
            inputs: Everything the outcome depends on, as JSON; earlier stages by their key.
            build: Writes the outcome into the (temporary) directory it is given.
        """
        code = {"format": FORMATS.get(kind, 1), "versions": versions()}
        text = json.dumps(
            {"kind": kind, **code, "dtype": str(pick_dtype()), **inputs}, sort_keys=True
        )
        directory = self.root / kind / f"{label}-{stage_key(text)}"
        if directory in self.known:
            return directory
        title = f"{kind} {label}"
        reused = (directory / "stage.json").exists()
        report = self.progress.started(title)
        if not reused:
            try:
                with atomic_directory(directory) as temporary:
                    build(temporary, report)
                    (temporary / "stage.json").write_text(
                        json.dumps(json.loads(text), indent=2) + "\n", encoding="utf-8"
                    )
            except (OSError, UserError):
                # Another process of this run may have built the same meanwhile: one is enough.
                if not (directory / "stage.json").exists():
                    raise
        self.known.add(directory)
        self.progress.finished(title, reused)
        return directory


def stage_key(text: str) -> str:
    """Short hash of a stage's inputs."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: version(name) for name in ("osrm-merge", "torch", "transformers", "peft")}
