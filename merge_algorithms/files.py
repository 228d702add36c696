"""Files and directories that are either complete or absent."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from merge_algorithms.errors import UserError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; it takes the name `path` only on success.

    Raises UserError if `path` holds anything and `overwrite` is false.
    """
    path = Path(path)
    occupied = check_vacant(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        if occupied:
            _exchange(temporary, path)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_vacant(path: Path, overwrite: bool) -> bool:
    """Whether `path` holds anything; UserError if it does and `overwrite` is false.

    Nor may it be a way to the working directory or one above it, which has no name to put the
    result under.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path} names no directory of its own: choose another output path")
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not overwrite:
        raise UserError(
            f"{path} already exists: choose another output path or allow it to be overwritten"
            " (--overwrite)"
        )
    return occupied


def check_replaceable(path: Path, overwrite: bool, what: str, marks: Sequence[str]) -> None:
    """UserError unless `path` is free, or may be overwritten and holds what it is to hold again.

    Args:
        path: Where a directory is to be written.
        overwrite: Whether what is there may be replaced.
        what: What it must be for that, such as "an adapter".
        marks: Files by which that is known; one of them is enough.
    """
    if check_vacant(path, overwrite) and not any((path / mark).exists() for mark in marks):
        raise UserError(
            f"{path} is not {what}, so it is not overwritten: choose another output path"
        )


def _exchange(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, which comes back if that fails or is interrupted."""
    retired = _beside(path) / path.name
    try:
        retired.parent.mkdir()
        path.replace(retired)
        new.replace(path)
    finally:
        if retired.exists() and not path.exists():
            retired.replace(path)
        # Not reached if that failed as well: `retired` is the only copy then.
        shutil.rmtree(retired.parent, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name that nothing has yet.

    Whoever makes it does so where it is also removed: an interrupt can follow at once.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
