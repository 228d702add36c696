"""LoRA files of diffusers pipelines: pytorch_lora_weights.safetensors.

One file holds the adapters of several components; a module's name begins with its component, as
in "unet.down_blocks.0.." or "text_encoder.text_model..". The scales are stated in one of three
ways: the components' LoraConfig in the file's metadata, an alpha per module, or not at all, which
means that they are 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from merge_algorithms.errors import UserError
from merge_algorithms.formats import read_tensors, write_tensors
from merge_algorithms.layout import LINEAR, Layouts
from merge_algorithms.peft_config import check_config, scale_of
from merge_algorithms.stored_factors import Factors, factor_tensors, matrices

_METADATA = "lora_adapter_metadata"
_COMPONENT = re.compile(r"((unet|transformer|text_encoder)(_\w+)?|connectors|text_conditioner)\..+")
# What the layer inside a module is called, from the newest form to the oldest.
_SIDES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
}
_ATTENTION_PROCESSOR = re.compile(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def read(path: Path) -> dict[str, Factors]:
    """The factors by module; names keep their component.

    Raises:
        UserError: A damaged file, tensors that are not LoRA factors (DoRA magnitudes, biases,
            other tools' names), one factor without the other, or scales that are not clear.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in read_tensors(path).items():
        if key.endswith(".alpha") and tensor.numel() == 1:
            alphas[key.removesuffix(".alpha")] = float(tensor)
            continue
        module, side = _parse(path, key)
        sides = factors.setdefault(module, {})
        if side in sides:
            raise UserError(
                f"{path} has factor {side} of {module} twice, under an old and a new name, {key} is"
                " one: drop those of one kind"
            )
        sides[side] = tensor
    if not factors:
        raise UserError(f"{path} has no LoRA factors: save it again with save_lora_weights")
    configs = _read_configs(path)
    if configs and alphas:
        raise UserError(f"{path} states its scales twice, as alphas and in its metadata: drop one")
    found = {m: matrices(path, m, sides) for m, sides in sorted(factors.items())}
    if configs:
        return {m: f._replace(scale=_configured(path, m, f, configs)) for m, f in found.items()}
    if alphas:
        scaled = {m: f._replace(scale=_stated(path, m, f, alphas)) for m, f in found.items()}
        if strays := sorted(alphas.keys() - found.keys()):
            raise UserError(
                f"{path} has an alpha for {strays[0]} but no factors: some of the file is missing,"
                " so save it again"
            )
        return scaled
    return found


def _parse(path: Path, key: str) -> tuple[str, str]:
    for suffix, side in _SIDES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), side
    if match := _ATTENTION_PROCESSOR.fullmatch(key):
        name = "to_out.0" if match[2] == "out" else f"to_{match[2]}"
        return f"{match[1]}.{name}", "A" if match[3] == "down" else "B"
    if "dora_scale" in key or "lora_magnitude_vector" in key:
        raise UserError(
            f"{path} has {key}, which belongs to DoRA: low-rank factors alone do not describe it,"
            " so train the adapter without DoRA"
        )
    raise UserError(
        f"{path} has {key}, which is not a LoRA factor as diffusers names them: give a PEFT"
        " directory, or a file that save_lora_weights of a diffusers pipeline wrote"
    )


def _read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Component -> its LoraConfig, from metadata whose keys are "component.field"."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    if not text:
        return {}
    try:
        fields = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} has a damaged {_METADATA} ({error}): save it again") from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, dot, name = key.partition(".")
        if not dot:
            raise UserError(
                f"{path} holds one component's adapter, as save_lora_adapter of a model writes it,"
                " and does not name the component: write it with the pipeline's save_lora_weights"
            )
        configs.setdefault(component, {})[name] = value
    return configs


def _configured(
    path: Path, module: str, factors: Factors, configs: Mapping[str, Mapping[str, Any]]
) -> float:
    component, _, inner = module.partition(".")
    if component not in configs:
        raise UserError(
            f"{path} describes {', '.join(configs)} in its metadata but not {component}, which has"
            " factors: write it with the pipeline's save_lora_weights"
        )
    check_config(path, configs[component])
    return scale_of(path, inner, configs[component], factors.rank)


def _stated(path: Path, module: str, factors: Factors, alphas: Mapping[str, float]) -> float:
    if module not in alphas:
        raise UserError(
            f"{path} has alphas but none for {module}, so its scale is not clear: save it again"
        )
    return alphas[module] / factors.rank


def check(name: str, modules: Iterable[str], layouts: Layouts, heads: Sized) -> None:
    """UserError for what a pipeline would not read back."""
    if heads:
        raise UserError(
            f"adapter '{name}' has task heads, which a diffusers file does not hold: save it in"
            " the format peft"
        )
    for module in modules:
        if not _COMPONENT.fullmatch(module):
            raise UserError(
                f"{module} of adapter '{name}' does not begin with a pipeline's component such as"
                " unet, transformer or text_encoder: save it in the format peft"
            )
        if layouts.get(module, LINEAR).kind == "embedding":
            raise UserError(
                f"{module} of adapter '{name}' is an embedding, whose LoRA diffusers does not"
                " read: save it in the format peft"
            )


def write(path: Path, factors: Mapping[str, Factors]) -> None:
    """Write factors of scale 1, padded with zeros to one rank per component.

    The file states no scale, and a pipeline then takes alpha = r from the ranks it finds; where
    they are all the same there is nothing to guess.
    """
    ranks: dict[str, int] = {}
    for module, stored in factors.items():
        component = module.partition(".")[0]
        ranks[component] = max(ranks.get(component, 0), stored.rank)
    tensors: dict[str, Tensor] = {}
    for module, stored in factors.items():
        missing = ranks[module.partition(".")[0]] - stored.rank
        b, a = pad(stored.b, (0, missing)), pad(stored.a, (0, 0, 0, missing))
        tensors |= factor_tensors(module, stored._replace(b=b, a=a))
    write_tensors(path, tensors)
