"""From covariances to an initialised adapter on every architecture, tiny and random."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from osrm import (
    collect_covariance,
    covariance_memory,
    initialize_lora_osrm_weights,
    leaked_energy,
    lora_a,
    others_moments,
    resolve_targets,
    subspace_state,
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
WORDS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | WORDS | {"num_key_value_heads": 1, "head_dim": 16}
PICTURES = SIZES | {"image_size": 16, "patch_size": 4}
# Relative positions are projected by the layers that project the tokens, as in DeBERTa-v3.
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 50}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48}
OPT |= {"word_embed_proj_dim": 32}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
BART |= WORDS
LED = BART | {"decoder_start_token_id": 2, "attention_window": 8}
BIGBIRD = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
GPT_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]]}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """A model, its target modules, and how many tensors they read."""

    make: Callable[[], nn.Module]
    targets: list[str]
    inputs: int
    data: str = "text"


def text_model(cls: Any, config: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: cls(config(**options))


ARCHITECTURES = {
    "bert": Architecture(
        text_model(tf.BertModel, tf.BertConfig, **SIZES, vocab_size=50),
        ["query", "key", "value", "dense"],
        9,  # per layer 4: attention's input, its output, the block's two; and the pooler
    ),
    "roberta": Architecture(
        text_model(tf.RobertaModel, tf.RobertaConfig, **SIZES, vocab_size=50),
        ["query", "value"],
        2,
    ),
    "distilbert": Architecture(
        text_model(tf.DistilBertModel, tf.DistilBertConfig, **DISTILBERT),
        ["q_lin", "v_lin", "out_lin"],
        4,
    ),
    "deberta-v2": Architecture(
        text_model(tf.DebertaV2Model, tf.DebertaV2Config, **SIZES, vocab_size=50, **DEBERTA),
        ["query_proj", "key_proj", "value_proj"],
        2,
    ),
    "t5": Architecture(
        text_model(tf.T5Model, tf.T5Config, **T5, vocab_size=50, decoder_start_token_id=0),
        ["q", "k", "v"],
        2 + 2 * 2 + 1,  # encoder; decoder's own and cross queries; one for all cross keys
        "pairs",
    ),
    "gpt2": Architecture(
        text_model(tf.GPT2Model, tf.GPT2Config, vocab_size=50, n_embd=32, n_layer=2, n_head=2),
        ["c_attn", "c_fc"],
        4,
    ),
    "llama": Architecture(
        text_model(tf.LlamaModel, tf.LlamaConfig, **GROUPED),
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        6,
    ),
    "qwen2": Architecture(
        text_model(tf.Qwen2Model, tf.Qwen2Config, **GROUPED), ["q_proj", "v_proj"], 2
    ),
    "qwen3": Architecture(
        text_model(tf.Qwen3Model, tf.Qwen3Config, **GROUPED), ["q_proj", "v_proj", "o_proj"], 4
    ),
    "vit": Architecture(
        text_model(tf.ViTModel, tf.ViTConfig, **PICTURES), ["q_proj", "v_proj"], 2, "pictures"
    ),
    "clip-text": Architecture(
        text_model(tf.CLIPTextModel, tf.CLIPTextConfig, **SIZES, **WORDS),
        ["q_proj", "v_proj", "fc1"],
        4,
    ),
    "clip-vision": Architecture(
        text_model(tf.CLIPVisionModel, tf.CLIPVisionConfig, **PICTURES),
        ["q_proj", "v_proj", "fc1"],
        4,
        "pictures",
    ),
}


OUTPUTS = {
    "bert": {"attention.output.dense", "output.dense"},
    "roberta": {"attention.output.dense", "output.dense"},
    "distilbert": {"attention.out_lin", "ffn.lin2"},
    "deberta-v2": {"attention.output.dense", "output.dense"},
    "t5": {"SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen2": {"self_attn.o_proj", "mlp.down_proj"},
    "qwen3": {"self_attn.o_proj", "mlp.down_proj"},
    "vit": {"attention.o_proj", "mlp.fc2"},
    "clip-text": {"self_attn.out_proj", "mlp.fc2"},
    "clip-vision": {"self_attn.out_proj", "mlp.fc2"},
}
MORE_OUTPUTS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "mpnet": (
        text_model(tf.MPNetModel, tf.MPNetConfig, **SIZES, vocab_size=50),
        {"attention.attn.o", "output.dense"},
    ),
    "modernbert": (
        text_model(tf.ModernBertModel, tf.ModernBertConfig, **SIZES, **WORDS),
        {"attn.Wo", "mlp.Wo"},
    ),
    "gpt-neox": (
        text_model(tf.GPTNeoXModel, tf.GPTNeoXConfig, **SIZES, **WORDS),
        {"attention.dense", "mlp.dense_4h_to_h"},
    ),
    "bloom": (
        text_model(tf.BloomModel, tf.BloomConfig, hidden_size=32, n_layer=2, n_head=2, **WORDS),
        {"self_attention.dense", "mlp.dense_4h_to_h"},
    ),
    "gptj": (
        text_model(tf.GPTJModel, tf.GPTJConfig, n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
        {"attn.out_proj", "mlp.fc_out"},
    ),
    "phi": (
        text_model(tf.PhiModel, tf.PhiConfig, **SIZES, **WORDS),
        {"self_attn.dense", "mlp.fc2"},
    ),
    "opt": (
        text_model(tf.OPTModel, tf.OPTConfig, **OPT, vocab_size=50),
        {"self_attn.out_proj", "fc2"},
    ),
    "falcon": (
        text_model(tf.FalconModel, tf.FalconConfig, **FALCON, vocab_size=50),
        {"self_attention.dense", "mlp.dense_4h_to_h"},
    ),
    "bart": (  # whose classifier has an out_proj outside the blocks
        text_model(tf.BartForSequenceClassification, tf.BartConfig, **BART),
        {"self_attn.out_proj", "encoder_attn.out_proj", "fc2"},
    ),
    "led": (
        text_model(tf.LEDModel, tf.LEDConfig, **LED),
        {"self_attn.output", "self_attn.out_proj", "encoder_attn.out_proj", "fc2"},
    ),
    "bigbird-pegasus": (
        text_model(tf.BigBirdPegasusModel, tf.BigBirdPegasusConfig, **BART, **BIGBIRD),
        {"self_attn.output", "self_attn.out_proj", "encoder_attn.out_proj", "fc2"},
    ),
    "gpt-neo": (
        text_model(tf.GPTNeoModel, tf.GPTNeoConfig, **GPT_NEO, vocab_size=50),
        {"attn.attention.out_proj", "mlp.c_proj"},
    ),
    "starcoder2": (
        text_model(tf.Starcoder2Model, tf.Starcoder2Config, **SIZES, **WORDS),
        {"self_attn.o_proj", "mlp.c_proj"},
    ),
    "fnet": (  # no attention
        text_model(tf.FNetModel, tf.FNetConfig, **SIZES, vocab_size=50),
        {"output.dense"},
    ),
    "classifier": (  # whose head has an out_proj, too
        text_model(tf.RobertaForSequenceClassification, tf.RobertaConfig, **SIZES, vocab_size=50),
        {"attention.output.dense", "output.dense"},
    ),
}


@pytest.mark.parametrize("name", [*OUTPUTS, *MORE_OUTPUTS])
def test_outputs_are_the_output_projections_of_every_block(name: str) -> None:
    make, expected = (
        (ARCHITECTURES[name].make, OUTPUTS[name]) if name in OUTPUTS else MORE_OUTPUTS[name]
    )
    found = resolve_targets(make(), ["outputs"])
    parts = [re.split(r"\.\d+\.", module)[-1] for module in found]
    assert set(parts) == expected
    assert min(Counter(parts).values()) == 2  # layers


def test_layers_that_are_shared_count_once() -> None:
    config = tf.AlbertConfig(**SIZES, vocab_size=50, embedding_size=16)
    found = resolve_targets(tf.AlbertModel(config), ["outputs"])
    assert [name.rpartition("0.")[2] for name in found] == ["attention.dense", "ffn_output"]


def test_a_name_of_both_blocks_claims_no_model_where_it_is_of_one() -> None:
    """Better to ask for names than to leave every attention out in silence."""
    block = {"attn": nn.Linear(4, 4), "mlp": nn.ModuleDict({"c_proj": nn.Linear(4, 4)})}
    model = nn.ModuleList(nn.ModuleDict(block) for _ in range(2))
    with pytest.raises(UserError, match=r"'outputs' matches no linear layer.*known: .*c_proj"):
        resolve_targets(model, ["outputs"])


def test_a_model_without_known_outputs_says_what_there_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"'outputs' matches no linear layer of Seq.*; known: 0"):
        resolve_targets(model, ["outputs"])
    named = nn.ModuleDict({"outputs": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    assert resolve_targets(named, ["outputs"]) == ["outputs"]


def text(seed: int, low: int, high: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (8, 1), generator=generator)
    mask = (torch.arange(9) < lengths).long()
    ids = torch.randint(low, high, (8, 9), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}


def batches(kind: str, task: int) -> list[dict[str, Tensor]]:
    """Tasks differ by the words, or the brightness, that they use."""
    low, high = 3 + 15 * task, 18 + 15 * task
    made = []
    for i in range(3):
        seed = 10 * task + i
        if kind == "pictures":
            generator = torch.Generator().manual_seed(seed)
            made.append({"pixel_values": torch.randn(6, 3, 16, 16, generator=generator) + task})
        elif kind == "text":
            made.append(text(seed, low, high))
        else:
            targets = text(seed + 5, low, high)
            decoder = {f"decoder_{name}": value for name, value in targets.items()}
            made.append(text(seed, low, high) | decoder)
    return made


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        states: Tensor = model.eval()(**batch).last_hidden_state
    return states


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_starts_in_the_subspace(name: str) -> None:
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = architecture.make()
    names = resolve_targets(model, architecture.targets)
    covariances = {
        task: collect_covariance(model, batches(architecture.data, i), architecture.targets)
        for i, task in enumerate("abc")
    }
    assert list(covariances["a"].modules) == names
    assert len(covariances["a"].matrices) == architecture.inputs
    if architecture.data == "text":
        key = covariances["a"].modules[names[0]]
        tokens = sum(int(b["attention_mask"].sum()) for b in batches("text", 0))
        assert covariances["a"].counts[key] == tokens

    batch = batches(architecture.data, 0)[0]
    before = outputs(model, batch)
    config = LoraConfig(r=2, target_modules=names, fan_in_fan_out=name == "gpt2")
    peft_model = get_peft_model(model, config)
    others = others_moments(covariances, "a")
    default = {module: leaked_energy(a, others[module]) for module, a in lora_a(peft_model).items()}
    initialize_lora_osrm_weights(peft_model, subspace_state(covariances, "a", rank=2))
    torch.testing.assert_close(outputs(peft_model, batch), before)
    assert set(default) == set(names)
    for module, a in lora_a(peft_model).items():
        assert leaked_energy(a, others[module]) < default[module], module


class Int8Linear(nn.Linear):
    """What quantisations make of nn.Linear: a buffer of whole numbers and a scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        weight = layer.weight.detach()
        scale = weight.abs().amax() / 127
        del self.weight
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Packed(nn.Module):
    """A quantised layer that is no nn.Linear: its weight is packed bytes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", layer.weight.detach().sign().to(torch.int8).flatten())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.qweight.view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight.to(x.dtype) / self.in_features**0.5, self.bias)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name


def quantised(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = ARCHITECTURES["bert"].make()
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.value = kind(attention.query), kind(attention.value)
    return model


@pytest.mark.parametrize("kind", [Int8Linear, Packed])
def test_quantised_bases_pass_through_untouched(kind: type[nn.Module]) -> None:
    model = quantised(kind)
    with untouched(model):
        covariance = collect_covariance(model, batches("text", 0), ["query", "value"])
    assert len(covariance.modules) == 4
    assert covariance_memory(model, ["query", "value"]) == 4 * 4 * 32 * 33


def test_an_adapter_on_a_quantised_base_starts_in_the_subspace() -> None:
    model, targets = quantised(Int8Linear), ["query", "value"]
    covariances = {
        task: collect_covariance(model, batches("text", i), targets) for i, task in enumerate("abc")
    }
    batch = batches("text", 0)[0]
    before = outputs(model, batch)
    state = subspace_state(covariances, "a", rank=2)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    others = others_moments(covariances, "a")
    default = {module: leaked_energy(a, others[module]) for module, a in lora_a(peft_model).items()}
    initialize_lora_osrm_weights(peft_model, state)
    torch.testing.assert_close(outputs(peft_model, batch), before)
    for module, a in lora_a(peft_model).items():
        assert leaked_energy(a, others[module]) < default[module]


def test_a_table_that_is_projected_like_tokens_does_not_count() -> None:
    """Also where no row is padded, without a mask, and for the first module that reads it alone."""
    model = ARCHITECTURES["deberta-v2"].make()
    batch = text(0, 3, 50)
    whole = {"input_ids": batch["input_ids"], "attention_mask": torch.ones(8, 9).long()}
    bare = {"input_ids": batch["input_ids"]}
    real = int(batch["attention_mask"].sum())
    for data, tokens in ((batch, real), (whole, 72), (bare, 72)):
        covariance = collect_covariance(model, [data], ["key_proj"])
        assert set(covariance.counts.values()) == {tokens}
    sizes = {**SIZES, **DEBERTA, "vocab_size": 50, "position_buckets": 8}
    short = text_model(tf.DebertaV2Model, tf.DebertaV2Config, **sizes)()
    row = {"input_ids": torch.arange(16)[None]}  # as long as the table
    assert set(collect_covariance(short, [row], ["key_proj"]).counts.values()) == {16}
