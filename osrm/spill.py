"""Where accumulators live: in memory, or in files that the system pages when they do not fit."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from merge_algorithms.errors import UserError

logger = logging.getLogger(__name__)

Spill = Literal["auto"] | bool

# Accumulators may take this share of what is free: the model's activations need room too.
_SHARE = 0.8


@dataclass(frozen=True)
class Storage:
    """Makes accumulators.

    Attributes:
        dtype: Of the accumulators.
        directory: Of the files behind accumulators, which are on the CPU then; None: in memory.
    """

    dtype: torch.dtype
    directory: Path | None = None

    def zeros(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """A (rows, columns) accumulator of zeros, on `device` if it is in memory.

        Raises:
            UserError: the file system has no room for it.
        """
        if self.directory is None:
            return torch.zeros(rows, columns, dtype=self.dtype, device=device)
        size = rows * columns * self.dtype.itemsize
        handle, name = tempfile.mkstemp(prefix="osrm-", dir=self.directory)
        try:
            _allocate(handle, size)
            tensor = torch.from_file(name, shared=True, size=rows * columns, dtype=self.dtype)
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot hold an accumulator of {size / 1e9:.1f} GB ({error}):"
                " choose a spill directory with more room, or keep a sketch"
            ) from error
        finally:
            os.close(handle)
            Path(name).unlink()  # the mapping keeps the content until the tensor is gone
        return tensor.view(rows, columns)


def choose_storage(
    bound: int, spill: Spill, directory: str | Path | None, dtype: torch.dtype, device: torch.device
) -> Storage:
    """Memory where `bound` bytes fit into it, else files.

    Args:
        bound: The most that the accumulators take, in bytes.
        spill: "auto" compares with what is free on the device and on the host, which the result
            ends up on; True takes files, False memory.
        directory: For the files; None is the system's directory for temporary files.
        dtype: Of the accumulators.
        device: Where the model's inputs are.

    Raises:
        UserError: no such directory.
    """
    folder = Path(directory or tempfile.gettempdir())
    if not folder.is_dir():
        raise UserError(f"the spill directory {folder} does not exist: make it or choose another")
    free = free_memory(device)
    if spill == "auto":
        spill = bound > _SHARE * free
    logger.info(
        "covariance accumulators take at most %.2f GB, %.2f GB are free: they go %s",
        bound / 1e9,
        free / 1e9,
        f"to files in {folder} ({shutil.disk_usage(folder).free / 1e9:.2f} GB free)"
        if spill
        else "to memory",
    )
    return Storage(dtype, folder if spill else None)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the host, and on `device` if that is a GPU: the smaller number."""
    free: int = psutil.virtual_memory().available
    limit = _group_limit(Path("/sys/fs/cgroup"))
    if limit is not None:
        free = min(free, limit)
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free


def _group_limit(group: Path) -> int | None:
    """What the control group (a container, a batch job) leaves, or None if it sets no limit."""
    try:
        most = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if most == "max":
        return None
    return max(0, int(most) - used + int(stat.get("inactive_file", 0)))  # caches give way


def _allocate(handle: int, size: int) -> None:
    """Reserve the space: a full disk is an error here and not a crash on access later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)
