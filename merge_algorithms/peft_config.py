"""PEFT's configuration of a LoRA adapter: what it says, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_algorithms.errors import UserError
from merge_algorithms.formats import read_json

CONFIG_FILE = "adapter_config.json"
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


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, if it describes a LoRA that factors alone describe."""
    path = directory / CONFIG_FILE
    config = read_json(path)
    check_config(path, config)
    return config


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what factors alone do not describe in a LoRA configuration that `path` holds."""
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
        if not _is_positive(config.get(key)):
            raise UserError(f"{path} has {key}={config.get(key)!r}, expected a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not (isinstance(pattern, Mapping) and all(map(_is_positive, pattern.values()))):
            raise UserError(
                f"{path} has {key}={pattern!r}, expected positive numbers by module name"
            )
        for name in pattern:
            try:
                re.compile(name)
            except re.error as error:
                raise UserError(
                    f"{path} has the module name '{name}' in {key}, which is no regular expression"
                    f" ({error}): correct it"
                ) from error


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def scale_of(path: Path, module: str, config: Mapping[str, Any], rank: int) -> float:
    """Alpha / r, or alpha / sqrt(r) with rsLoRA; UserError if `config` gives another r."""
    expected = _from_pattern(config.get("rank_pattern"), module, config["r"])
    if rank != expected:
        raise UserError(
            f"{path} has factors of rank {rank} for {module} but the configuration says"
            f" {expected}: the two do not belong together"
        )
    alpha = _from_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _from_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regular expression, ends the name at a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
