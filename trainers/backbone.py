"""Loading a pretrained model and running it as a plain function of a batch."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from merge_algorithms import Adapter, UserError
from trainers.tasks import Kind

# Of texts; those of pictures are called position_embedding.
_POSITION_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe")


@dataclass(frozen=True)
class ModelRef:
    """A pretrained model.

    Attributes:
        name: What adapters record as their base model: a Hub id, or the path given.
        path: What is loaded: the same, or a local directory that holds the same model.
    """

    name: str
    path: str

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of configuration, weights and tokenizer (of a Hub id: of its commit)."""
        return _fingerprint(self.path)


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype() -> torch.dtype:
    """Storage of frozen weights: bfloat16 on a GPU that computes in it, else float32."""
    return torch.bfloat16 if _gpu_has_bfloat16() else torch.float32


def frozen_dtype(precision: object) -> torch.dtype:
    """Storage of frozen weights when Lightning's Trainer is given this precision, None if none.

    Lightning converts them to what a "true" precision says, but not what bfloat16 has rounded away.
    """
    exact = ("16-true", "32", "32-true", "64", "64-true")
    return torch.float32 if str(precision) in exact else pick_dtype()


def pick_precision() -> Literal["bf16-mixed", "32-true"]:
    """The faster precision of Lightning's Trainer: bf16-mixed on a GPU or CPU made for it.

    A CPU is if it has a matrix unit for bfloat16 (AMX).
    """
    # Older PyTorch cannot tell.
    cpu: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if cpu.get("amx_bf16") or _gpu_has_bfloat16() else "32-true"


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def auto_class(kind: Kind) -> type:
    """Which of transformers' Auto classes the tasks of a kind are trained on.

    Language models are whole, with the head that they predict with, so that their adapters name
    the modules as those of anyone else's do.
    """
    return AutoModelForCausalLM if kind == "causal_lm" else AutoModel


def load_backbone(
    model: str, dtype: torch.dtype | None = None, kind: type = AutoModel
) -> nn.Module:
    """The encoder or decoder under any AutoModel checkpoint, frozen, in evaluation mode.

    Args:
        model: A local directory or Hub id with safetensors weights. No remote code is run and no
            pickle is loaded.
        dtype: Of its weights; None takes `pick_dtype()`.
        kind: Another of transformers' Auto classes.
    """
    disable_progress_bar()
    # Lightning's trainer and the model it trained hold each other: make room for the next one.
    gc.collect()
    try:
        backbone: nn.Module = kind.from_pretrained(  # type: ignore[attr-defined]
            model, dtype=dtype or pick_dtype(), use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_cannot_load("model", model, error)) from error
    backbone.requires_grad_(False)
    backbone.eval()
    return backbone


def compute_in(model: nn.Module, dtype: torch.dtype, exact: Iterable[str] = ()) -> None:
    """Let every forward pass compute in a dtype, under autocast; the weights stay as they are.

    Args:
        model: In float32.
        dtype: float32 changes nothing.
        exact: Names of modules that go on in float32: those with an update in their weights, which
            rounding the sum of both would blur.
    """
    if dtype == torch.float32:
        return
    device = pick_device().type
    for name in exact:
        module = model.get_submodule(name)
        module.forward = torch.autocast(device, enabled=False)(_in_float32(module.forward))
    model.forward = torch.autocast(device, dtype)(model.forward)


def _in_float32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: forward(x.float())


def load_skeleton(model: str, kind: type = AutoModel) -> PreTrainedModel:
    """The same modules without their weights, to check settings in no time."""
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            skeleton: PreTrainedModel = kind.from_config(config)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load("configuration", model, error)) from error
    return skeleton


def bare(adapter: Adapter, backbone: nn.Module) -> Adapter:
    """The adapter under the backbone's names: "encoder.." for "bert.encoder.." of a classifier."""
    present = {name for name, _ in backbone.named_modules()}
    prefix = f"{backbone.base_model_prefix}."

    def own(module: str) -> str:
        short = module.removeprefix(prefix)
        return short if short in present else module

    return replace(
        adapter,
        updates={own(module): update for module, update in adapter.updates.items()},
        layouts={own(module): layout for module, layout in adapter.layouts.items()},
    )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with a padding token (end-of-sequence where it has none).

    Its model_max_length, often left open, is no more than what the model has positions for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load("tokenizer", model, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(load_skeleton(model)))
    return tokenizer


def _positions(skeleton: nn.Module) -> float:
    """How many tokens a model has positions for: infinite where it computes them for any number.

    The first rows of a table may be reserved, as RoBERTa's and OPT's are.
    """
    return min(
        (
            table.num_embeddings
            - int(getattr(table, "offset", 0))
            - (0 if table.padding_idx is None else table.padding_idx + 1)
            for name, table in skeleton.named_modules()
            if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES
        ),
        default=math.inf,
    )


def _fingerprint(model: str) -> str:
    digest = hashlib.sha256()
    path = Path(model)
    if not path.is_dir():
        config = AutoConfig.from_pretrained(model)
        commit = getattr(config, "_commit_hash", None)
        if commit is None:  # the configuration is all there is to tell models apart
            known = config.to_dict()
            known.pop("transformers_version", None)
            commit = json.dumps(known, sort_keys=True, default=str)
        digest.update(f"{model} {commit}".encode())
        return digest.hexdigest()[:16]
    for pattern in ("config.json", "*.safetensors", "*token*", "vocab*", "merges.txt", "*.model"):
        for file in sorted(filter(Path.is_file, path.glob(pattern))):
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def model_inputs(backbone: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the backbone reads of a batch.

    The decoder of an encoder-decoder reads the same text shifted right, as
    T5ForSequenceClassification does. Its mask says which positions are real; being causal, it
    computes the same states there without.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    config: Any = backbone.config
    if config.is_encoder_decoder:
        start = config.decoder_start_token_id
        inputs["decoder_input_ids"] = shift_right(inputs["input_ids"], start)
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


def token_states(backbone: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Last hidden states, (batch, length, d); of an encoder-decoder those of the decoder."""
    states: Tensor = backbone(**model_inputs(backbone, batch)).last_hidden_state
    return states


def shift_right(ids: Tensor, start: int) -> Tensor:
    """Token ids (batch, length) moved one place to the right behind the start token."""
    shifted = ids.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted


def _cannot_load(what: str, model: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"the {what} of '{model}' cannot be loaded ({reason}): expected a directory with"
        " config.json, model.safetensors and tokenizer files, or a Hub id that is reachable"
    )
