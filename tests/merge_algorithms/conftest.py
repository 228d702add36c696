from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from merge_algorithms import Adapter


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on what others have drawn before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Adapter]:
    return factories.random_adapter


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(10, 12), nn.Linear(10, 8)


class _Model(nn.Module):
    """Modules named and shaped as in SHAPES."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_Layer(), _Layer()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([f(x) for layer in self.layer for f in (layer.query, layer.value)], -1)


@pytest.fixture
def linear_model() -> nn.Module:
    torch.manual_seed(0)
    return _Model()


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(24).reshape(3, 8) * 7 % 64}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-2, 2, 2 * 3 * 12 * 12).sin().reshape(2, 3, 12, 12)}


@dataclass
class PeftCase:
    """A tiny random transformers model and the way PEFT adapts it."""

    build: Callable[[], nn.Module]
    lora: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = _tokens

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def save(self, path: Path, seed: int = 1, **changes: Any) -> Callable[[], Tensor]:
        """Save an adapter with stock PEFT; return the logits of the model it was saved from."""
        model = get_peft_model(copy.deepcopy(self.base()), LoraConfig(**self.lora | changes))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(path)
        return lambda: self.logits(model)

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(**self.inputs()).logits


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=3,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    )


def _resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )


_CLASSIFIER = {
    "task_type": "SEQ_CLS",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["query", "value"],
}
_PEFT_CASES = {
    "plain": PeftCase(_bert, {**_CLASSIFIER, "task_type": None}),
    "classifier": PeftCase(_bert, _CLASSIFIER),
    "rslora": PeftCase(_bert, {**_CLASSIFIER, "use_rslora": True}),
    "alpha_pattern": PeftCase(
        _bert, {**_CLASSIFIER, "alpha_pattern": {"layer.1.attention.self.query": 20, "value": 3}}
    ),
    "rank_pattern": PeftCase(
        _bert, {**_CLASSIFIER, "rank_pattern": {"query": 2, "^bert.encoder.layer.0.*value": 7}}
    ),
    "conv1d": PeftCase(
        _gpt2,
        {
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_attn", "mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "convolution": PeftCase(
        _resnet,
        {
            "task_type": None,
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["convolution"],
            "rank_pattern": {"shortcut.convolution": 2},
            "alpha_pattern": {"embedder.convolution": 3},
        },
        _pixels,
    ),
    "embedding": PeftCase(
        _bert,
        {
            **_CLASSIFIER,
            "target_modules": ["word_embeddings", "query"],
            "use_rslora": True,
            "rank_pattern": {"word_embeddings": 5},
        },
    ),
}
_NOT_LINEAR = ("convolution", "embedding")


@pytest.fixture(params=list(_PEFT_CASES))
def peft_case(request: pytest.FixtureRequest) -> PeftCase:
    return _PEFT_CASES[request.param]


@pytest.fixture(params=[name for name in _PEFT_CASES if name not in _NOT_LINEAR])
def linear_peft_case(request: pytest.FixtureRequest) -> PeftCase:
    """The cases that can be merged at run time."""
    return _PEFT_CASES[request.param]


@pytest.fixture(scope="session")
def peft_cases() -> dict[str, PeftCase]:
    return _PEFT_CASES
