"""The heads of an adapter or a merge, in files beside its factors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from merge_algorithms.errors import UserError
from merge_algorithms.formats import read_tensors, write_tensors

HEAD_FILE = "head.safetensors"
HEADS_DIRECTORY = "heads"
_HEAD_NAME = re.compile(r"\w[\w.+-]*")


def read_heads(directory: Path, name: str) -> dict[str, dict[str, Tensor]]:
    """The heads in files of their own: the adapter's, called `name`, or a bundle's."""
    single = directory / HEAD_FILE
    heads = {name: read_tensors(single)} if single.exists() else {}
    bundle = sorted((directory / HEADS_DIRECTORY).glob("*.safetensors"))
    return heads | {path.stem: read_tensors(path) for path in bundle}


def check_head_names(heads: Iterable[str]) -> None:
    """UserError for a head whose name cannot be a file's."""
    for name in heads:
        if not _HEAD_NAME.fullmatch(name):
            raise UserError(
                f"head '{name}' cannot be a file name: use letters, digits, '.', '_', '+', '-'"
            )


def write_heads(directory: Path, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write every head to heads/<name>.safetensors."""
    (directory / HEADS_DIRECTORY).mkdir()
    for name, head in heads.items():
        write_tensors(directory / HEADS_DIRECTORY / f"{name}.safetensors", head)
