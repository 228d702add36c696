"""How many tokens a model reads, where its tokenizer does not say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.suites import Suite
from merge_algorithms import UserError
from trainers.backbone import load_backbone, load_tokenizer
from trainers.data import TaskData

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# What the decoder reads is the text that the encoder reads, so the shorter table counts.
LED = transformers.LEDConfig(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, attention_window=8,
    max_encoder_position_embeddings=256, max_decoder_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
OPT = transformers.OPTConfig(
    vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1,
    num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
# DeBERTa as it is published, and with positions added to the words, as its paper does not.
MODELS = {
    "bert": (transformers.BertConfig(**SMALL, pad_token_id=0), 64),
    "roberta": (transformers.RobertaConfig(**SMALL, pad_token_id=1), 62),
    "deberta": (
        transformers.DebertaV2Config(
            **SMALL, relative_attention=True, position_biased_input=False, pos_att_type=["p2c"]
        ),
        math.inf,
    ),
    "biased deberta": (transformers.DebertaV2Config(**SMALL, position_biased_input=True), 64),
    "t5": (
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
            pad_token_id=0, decoder_start_token_id=0,
        ),
        math.inf,
    ),
    "led": (LED, 64),
    "opt": (OPT, 64),
    "llama": (transformers.LlamaConfig(**SMALL, num_key_value_heads=4), math.inf),
    "gpt2": (
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64),
        64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_as_long_as_the_model_has_positions_for(
    name: str, suite: Suite, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    config, most = MODELS[name]
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    for file in tiny_model("bert").glob("*token*"):
        values = json.loads(file.read_text(encoding="utf-8"))
        values.pop("model_max_length", None)
        (tmp_path / file.name).write_text(json.dumps(values), encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path))

    def read(length: int) -> None:
        """Have the settings checked, and the model read a text of that length."""
        train = replace(suite.train, max_length=length)
        TaskData(suite.tasks["half"], tokenizer, train, suite.rows)
        ids = {"input_ids": torch.full((1, length), 5)}
        if config.is_encoder_decoder:
            ids["decoder_input_ids"] = ids["input_ids"]
        load_backbone(str(tmp_path), torch.float32)(**ids)

    if most == math.inf:
        read(100)
        return
    read(int(most))
    with pytest.raises(UserError, match=f"is {most + 1}, but the model reads at most {most} token"):
        read(int(most) + 1)
    tokenizer.model_max_length = 1000
    with pytest.raises((IndexError, RuntimeError)):
        read(int(most) + 1)
