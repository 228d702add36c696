"""From plain PEFT and transformers' Trainer to a merge, and back to stock PEFT and transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from merge_algorithms import Adapter, UserError, merge

LABELS = {"three": 3, "two": 2}
MODULES = ["query", "value", "intermediate.dense"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A backbone without a head, as it is published."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    path = tmp_path_factory.mktemp("models") / "bert"
    BertModel(config).save_pretrained(path)
    return path


def classifier(path: Path, labels: int) -> PreTrainedModel:
    torch.manual_seed(labels)  # the head is new, hence random
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=torch.arange(24).reshape(3, 8) * 7 % 64).logits


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> dict[str, tuple[Path, Tensor]]:
    """Task -> an adapter with a head after a few steps of the Trainer, and its logits."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for task, labels in LABELS.items():
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=4,
            lora_alpha=8,
            target_modules=MODULES,
            use_rslora=task == "two",
            rank_pattern={"value": 2},
        )
        model = get_peft_model(classifier(base, labels), config)
        rows = [
            {"input_ids": torch.arange(8) * (row + labels) % 64, "labels": row % labels}
            for row in range(16)
        ]
        settings = TrainingArguments(
            output_dir=str(folder / "run"),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.02,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, settings, train_dataset=rows).train()
        model.save_pretrained(folder / task)
        found[task] = folder / task, logits(model)
    return found


def load(trained: dict[str, tuple[Path, Tensor]]) -> list[Adapter]:
    return [Adapter.load(path) for path, _ in trained.values()]


def test_what_the_trainer_saved_is_read_whole(base, trained):
    for task, adapter in zip(LABELS, load(trained), strict=True):
        assert adapter.config["base_model_name_or_path"] == str(base)
        assert adapter.heads[task]["classifier.weight"].shape == (LABELS[task], 32)
        assert all(float(update.b.abs().max()) > 0 for update in adapter.updates.values())
        model = classifier(base, LABELS[task])
        model.load_state_dict(adapter.heads[task], strict=False)
        assert not torch.allclose(logits(model), trained[task][1], atol=1e-3)
        merge([adapter]).apply_to(model)
        torch.testing.assert_close(logits(model), trained[task][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["average", "ties"])
@pytest.mark.parametrize("task", list(LABELS))
def test_a_merge_is_a_classifier_for_stock_peft(base, trained, tmp_path, method, task):
    merged = merge(load(trained), method).scaled(0.8)
    expected = classifier(base, LABELS[task])
    expected.load_state_dict(merged.heads[task], strict=False)
    merged.apply_to(expected)
    rank = 32 if method == "ties" else None
    assert max(merged.save_adapter(tmp_path / "out", rank, head=task).values()) < 1e-9
    reloaded = PeftModel.from_pretrained(classifier(base, LABELS[task]), tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(expected), rtol=1e-4, atol=1e-5)


def test_a_merge_is_a_checkpoint_for_transformers(base, trained, tmp_path):
    merged = merge(load(trained))
    merged.save_checkpoint(tmp_path / "out", base)
    for task, labels in LABELS.items():
        merged.save_adapter(tmp_path / task, head=task)
        peft = PeftModel.from_pretrained(classifier(base, labels), tmp_path / task)
        model = classifier(tmp_path / "out", labels)
        model.load_state_dict(merged.heads[task], strict=False)
        torch.testing.assert_close(logits(model), logits(peft), rtol=1e-4, atol=1e-5)


def test_frozen_tensors_that_peft_saves_of_an_adapted_head_are_left_out(tmp_path):
    config = PhiConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                       num_attention_heads=2)  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    get_peft_model(PhiForCausalLM(config), lora).save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.bias" in stored
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.updates.keys() == {"lm_head", "model.layers.0.self_attn.q_proj"}
    assert not adapter.heads


def test_a_resized_vocabulary_is_refused_with_what_to_do(peft_cases, tmp_path):
    case = peft_cases["conv1d"]
    case.base().save_pretrained(tmp_path / "base")
    resized = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(72)
    model = get_peft_model(resized, LoraConfig(**case.lora))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"has \S+\.weight, .*save_embedding_layers=False\) if"):
        Adapter.load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    assert Adapter.load(tmp_path / "b").updates


@pytest.mark.parametrize(("combination", "rank"), [("cat", None), ("svd", 4), ("svd", 1)])
def test_peft_merges_what_we_saved_as_we_do(base, trained, tmp_path, combination, rank):
    """PEFT's two ways that are exact: the concatenation, and its truncation to a rank."""
    weights = [0.75, -0.5]
    adapters = [Adapter(a.name, a.updates, config=a.config) for a in load(trained)]
    for adapter in adapters:
        adapter.save(tmp_path / adapter.name)
    start = classifier(base, 3)
    model = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / "three", "three")
    model.load_adapter(tmp_path / "two", "two")
    model.add_weighted_adapter(["three", "two"], weights, "sum", combination, svd_rank=rank)
    model.set_adapter("sum")
    merge(adapters, weights=weights).save_adapter(tmp_path / "out", rank)
    ours = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / "out")
    assert not torch.allclose(logits(ours), logits(start), atol=1e-3)
    torch.testing.assert_close(logits(model), logits(ours), rtol=1e-4, atol=1e-5)
