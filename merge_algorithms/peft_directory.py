"""Stock PEFT directories of LoRA adapters: what is in them, and what is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_algorithms.errors import UserError
from merge_algorithms.formats import read_json, read_tensors
from merge_algorithms.heads import HEAD_FILE, HEADS_DIRECTORY
from merge_algorithms.hub import fetch
from merge_algorithms.peft_config import CONFIG_FILE, scale_of
from merge_algorithms.stored_factors import Factors, matrices

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
INFO_FILE = "osrm.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
EMR_FILE = "emr.safetensors"
PREFIX = "base_model.model."
KEPT = "peft"
"""Entry of osrm.json beside several heads: what PEFT's configuration is to say of one alone."""

_ADAPTER_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    HEAD_FILE,
    f"{HEADS_DIRECTORY}/*.safetensors",
    INFO_FILE,
    DIFFUSERS_FILE,
)
_FACTOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.default)?(?:\.weight)?")
# VeLoRA (arXiv 2405.17991) compresses what the backward pass keeps by this vector; the forward pass
# is that of plain LoRA (PEFT, lora/variants.py).
_BACKWARD_ONLY = ".lora_velora_embed"
_BASE_COPY = re.compile(r"(.+)\.base_layer\.(weight|bias)")


def locate(source: str | Path) -> Path:
    """The PEFT directory or diffusers file of an adapter; fetched if `source` is a Hub id."""
    path = fetch(source, _ADAPTER_FILES)
    try:
        return _adapter_at(path)
    except UserError as error:
        if path == Path(source):
            raise
        raise UserError(f"{source} on the Hugging Face Hub: {error}") from error


def _adapter_at(path: Path) -> Path:
    if path.is_file():
        return _locate_file(path)
    if not path.is_dir():
        raise UserError(
            f"there is no adapter directory {path}: give the directory that PEFT's"
            " save_pretrained wrote, or a Hub id like org/name"
        )
    if not (path / CONFIG_FILE).exists():
        if (path / DIFFUSERS_FILE).exists():
            return path / DIFFUSERS_FILE
        info = read_json(path / INFO_FILE) if (path / INFO_FILE).exists() else {}
        if "emr" in info or (path / EMR_FILE).exists():  # which is not fetched from the Hub
            raise UserError(
                f"{path} is an EMR bundle, which has a model for each task and is no adapter: score"
                " it with `osrm eval`, or take one task's model with EmrBundle.load(path).merged()"
            )
        found = "it is empty" if not any(path.iterdir()) else f"it has no {CONFIG_FILE}"
        raise UserError(
            f"{path} is not a PEFT adapter ({found}): give the directory that PEFT's"
            f" save_pretrained wrote, or one with diffusers' {DIFFUSERS_FILE}"
        )
    if not (path / WEIGHTS_FILE).exists():
        raise UserError(
            f"{path} has {pickles_or_nothing(path)}: save the adapter again with"
            f" safe_serialization=True, which writes {WEIGHTS_FILE}"
        )
    return path


def pickles_or_nothing(directory: Path) -> str:
    """What an error says of a directory that has no safetensors file."""
    pickles = sorted(file.name for file in directory.glob("*.bin"))
    return f"only the pickle {pickles[0]}, which is never loaded" if pickles else "no weights"


def _locate_file(path: Path) -> Path:
    if path.suffix != ".safetensors" or path.name == WEIGHTS_FILE:
        raise UserError(
            f"{path} is a file, and the only ones that hold a whole adapter are diffusers'"
            " .safetensors: give the directory that PEFT's save_pretrained wrote"
        )
    return path


def read_weights(
    directory: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The factors by module, and the tensors of the modules that PEFT saved whole (the head)."""
    path = directory / WEIGHTS_FILE
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in read_tensors(path).items():
        key = key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif not key.endswith(_BACKWARD_ONLY):
            others[key] = tensor
    if not factors:
        raise UserError(f"{path} has no LoRA factors: save the adapter again with PEFT")
    head = _head(path, others, config, factors)
    found = {m: matrices(path, m, sides) for m, sides in sorted(factors.items())}
    return {m: f._replace(scale=scale_of(path, m, config, f.rank)) for m, f in found.items()}, head


def _head(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], adapted: Container[str]
) -> dict[str, Tensor]:
    head = {}
    for key, tensor in tensors.items():
        if _saved_whole(key, config):
            head[key] = tensor
        elif (match := _BASE_COPY.fullmatch(key)) and match[1] in adapted:
            # PEFT saves the frozen tensors of embeddings and heads that it adapts, in case they
            # were resized.
            logger.warning(
                "%s: the copy %s of a base weight is left out: if the vocabulary was resized, keep"
                " the rows of its new tokens with the base model",
                path,
                key,
            )
        else:
            raise UserError(
                f"{path} has {key}, which is neither a LoRA factor nor part of modules_to_save:"
                " save the adapter again with PEFT, by save_pretrained(...,"
                " save_embedding_layers=False) if the vocabulary of its base model was resized"
            )
    return head


def _saved_whole(key: str, config: Mapping[str, Any]) -> bool:
    return any(f"{module}." in key for module in config.get("modules_to_save") or [])


def embeds(heads: Mapping[str, Iterable[str]], config: Mapping[str, Any]) -> bool:
    """Whether PEFT's own file holds the head: the only one, all of it in modules_to_save."""
    keys = [key for head in heads.values() for key in head]
    return len(heads) == 1 and bool(keys) and all(_saved_whole(key, config) for key in keys)
