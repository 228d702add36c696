"""Stock PEFT directories of LoRA adapters: what is in them, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_algorithms.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
HEADS_DIRECTORY = "heads"
INFO_FILE = "osrm.json"
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MODIFIES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What the algebra of dW = s B A does not cover: configuration key -> what it is.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on the LoRA factors",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "layer replication",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


class Factors(NamedTuple):
    """One module's tensors as they are on disk: dW = scale * b @ a."""

    b: Tensor
    a: Tensor
    scale: float


def locate(source: str | Path) -> Path:
    """The local directory of an adapter, fetched from the Hub if `source` is an id there."""
    path = Path(source)
    # A mistyped path below a folder that exists is no Hub id.
    if not path.exists() and _HUB_ID.fullmatch(str(source)) and not path.parent.is_dir():
        return _download(str(source))
    if not path.is_dir():
        raise UserError(
            f"there is no adapter directory {path}: give the directory that PEFT's"
            " save_pretrained wrote, or a Hub id like org/name"
        )
    if not (path / CONFIG_FILE).exists():
        found = "it is empty" if not any(path.iterdir()) else f"it has no {CONFIG_FILE}"
        raise UserError(
            f"{path} is not a PEFT adapter ({found}): give the directory that PEFT's"
            " save_pretrained wrote"
        )
    if not (path / WEIGHTS_FILE).exists():
        pickles = sorted(file.name for file in path.glob("*.bin"))
        found = f"only the pickle {pickles[0]}, which is never loaded" if pickles else "no weights"
        raise UserError(
            f"{path} has {found}: save the adapter again with safe_serialization=True, which"
            f" writes {WEIGHTS_FILE}"
        )
    return path


def _download(hub_id: str) -> Path:
    import huggingface_hub

    wanted = [CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE, f"{HEADS_DIRECTORY}/*.safetensors", INFO_FILE]
    logger.info("fetching adapter %s from the Hugging Face Hub", hub_id)
    try:
        return locate(Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted)))
    except UserError as error:
        raise UserError(f"{hub_id} on the Hugging Face Hub: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no local directory {hub_id}, and fetching it from the Hugging Face Hub"
            f" failed ({type(error).__name__}): check the path or the id, and the network"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): write the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, if it describes a LoRA that factors alone describe."""
    path = directory / CONFIG_FILE
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path} describes a {kind} adapter: only LoRA adapters can be merged")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise UserError(
                f"{path} uses {what} ({key}), which low-rank factors alone do not describe: train"
                f" the adapter without {key}"
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{path} has bias={config['bias']!r}, trained biases that factors do not describe:"
            " train the adapter with bias='none'"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MODIFIES_BASE):
        raise UserError(
            f"{path} was initialised with {init!r}, which changes the base weights: convert it to"
            " a plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or not config[key] > 0:
            raise UserError(f"{path} has {key}={config.get(key)!r}, expected a positive number")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, known to be finite."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}): copy or save it again"
        ) from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{path} has NaN or infinite values in {key}: its training diverged, so train the"
                " adapter again"
            )
    return tensors


def read_weights(
    directory: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The factors by module, and the tensors of the modules that PEFT saved whole (the head)."""
    path = directory / WEIGHTS_FILE
    factors: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    saved_whole = config.get("modules_to_save") or []
    for full_key, tensor in read_tensors(path).items():
        key = full_key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(key):
            factors.setdefault(match["module"], {})[match["side"]] = tensor
        elif any(f"{module}." in key for module in saved_whole):
            head[key] = tensor
        elif "lora_embedding" in key:
            raise UserError(
                f"{path} has LoRA on an embedding ({full_key}): only linear modules can be merged,"
                " so train the adapter without it in target_modules"
            )
        else:
            raise UserError(
                f"{path} has {full_key}, which is neither a LoRA factor nor part of"
                " modules_to_save: save the adapter again with PEFT"
            )
    if not factors:
        raise UserError(f"{path} has no LoRA factors: save the adapter again with PEFT")
    return {m: _complete(path, m, factors[m], config) for m in sorted(factors)}, head


def _complete(
    path: Path, module: str, factors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Factors:
    if len(factors) < 2:
        (side,) = factors
        missing = "B" if side == "A" else "A"
        raise UserError(f"{path} has lora_{side} of {module} but no lora_{missing}: save it again")
    if any(tensor.ndim != 2 for tensor in factors.values()):
        raise UserError(
            f"{path} has LoRA on a convolution ({module}, factor of shape"
            f" {tuple(factors['A'].shape)}): only linear modules can be merged"
        )
    rank = _from_pattern(config.get("rank_pattern"), module, config["r"])
    if factors["A"].shape[0] != rank:
        raise UserError(
            f"{path} has factors of rank {factors['A'].shape[0]} for {module} but {CONFIG_FILE}"
            f" says {rank}: the two files do not belong together"
        )
    alpha = _from_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return Factors(factors["B"], factors["A"], scale)


def _from_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regular expression, ends the name at a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_heads(directory: Path, name: str) -> dict[str, dict[str, Tensor]]:
    """The heads in files of their own: the adapter's, called `name`, or a bundle's."""
    single = directory / HEAD_FILE
    heads = {name: read_tensors(single)} if single.exists() else {}
    bundle = sorted((directory / HEADS_DIRECTORY).glob("*.safetensors"))
    return heads | {path.stem: read_tensors(path) for path in bundle}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors that share memory are written as separate ones."""
    save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, path)
