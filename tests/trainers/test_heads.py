"""The head and pooling of each paper configuration are transformers' own, logit for logit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks.suites import load_suite
from trainers.backbone import load_backbone, load_tokenizer, token_states
from trainers.heads import TaskHead
from trainers.settings import HeadSettings

# Suite -> the tiny model's kind and where transformers keeps the head's layers.
PAPER = {
    "glue-roberta-large": ("roberta", {"dense": "classifier.dense", "out": "classifier.out_proj"}),
    "glue-t5-large": (
        "t5",
        {"dense": "classification_head.dense", "out": "classification_head.out_proj"},
    ),
    "glue-llama-3-8b": ("llama", {"out": "score"}),
}


@pytest.mark.parametrize("suite", PAPER)
def test_paper_heads_give_the_logits_of_transformers(
    suite: str, tiny_model: Callable[[str], Path]
) -> None:
    kind, layers = PAPER[suite]
    path = str(tiny_model(kind))
    tokenizer = load_tokenizer(path)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(path, num_labels=3, pad_token_id=tokenizer.pad_token_id)
    reference = AutoModelForSequenceClassification.from_config(config).eval()
    backbone = load_backbone(path, torch.float32)  # on a GPU bfloat16 is the default
    backbone.load_state_dict(_backbone_state(reference, backbone.state_dict()))
    settings = load_suite(suite).head
    head = TaskHead(32, 3, settings).eval()
    head.load_state_dict(_head_state(reference, layers, head.state_dict()))

    texts = (["w1 w2", "w3", "w4 w5 w6 w7"], ["w9 w8 w7", "w3 w3", "w0"])
    batch = dict(tokenizer(*texts, padding=True, return_tensors="pt"))
    with torch.no_grad():
        expected = reference(**batch).logits
        actual = head(token_states(backbone, batch), batch["attention_mask"])

    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def _backbone_state(reference: torch.nn.Module, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{reference.base_model_prefix}."
    state = {key.removeprefix(prefix): value for key, value in reference.state_dict().items()}
    # AutoModel adds a pooler to RoBERTa, which the classifier lacks and nothing here reads.
    return {key: state.get(key, value) for key, value in wanted.items()}


def _head_state(
    reference: torch.nn.Module, layers: Mapping[str, str], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    state = dict(wanted)
    for ours, theirs in layers.items():
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" in state:
                state[f"{ours}.{leaf}"] = reference.get_submodule(theirs).state_dict()[leaf]
    assert all(f"{ours}.weight" in wanted for ours in layers)
    return state


def test_pooling_reads_real_tokens_only() -> None:
    states = torch.tensor([[[1.0], [2.0], [100.0]], [[3.0], [4.0], [5.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = {"mean": [1.5, 4.0], "cls": [1.0, 3.0], "last": [2.0, 5.0]}
    for pooling, values in expected.items():
        head = TaskHead(1, 2, HeadSettings(pooling=pooling))  # type: ignore[arg-type]
        assert head.pool(states, mask).squeeze(-1).tolist() == values


def test_regression_speaks_the_units_of_its_target() -> None:
    head = TaskHead(4, 1, HeadSettings(), target_mean=10.0, target_std=2.0).eval()
    torch.nn.init.zeros_(head.out.weight)
    torch.nn.init.ones_(head.out.bias)
    outputs = head(torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.long))
    torch.testing.assert_close(outputs, torch.full((3, 1), 12.0))


def test_bfloat16_states_give_float32_logits() -> None:
    head = TaskHead(4, 2, HeadSettings())
    outputs = head(torch.randn(3, 2, 4, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.long))
    assert outputs.dtype == torch.float32
