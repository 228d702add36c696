"""JSON and safetensors files: read with errors in one sentence, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_algorithms.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): write the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, known to be finite."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}): copy or save it again"
        ) from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:  # float8, which torch only stores
            tensor = tensors[key] = tensor.float()
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{path} has NaN or infinite values in {key}: its training diverged, so train the"
                " adapter again"
            )
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors that share memory are written as separate ones."""
    stored: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; a copy of every one would double it.
        stored[key] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    save_file(stored, path)
