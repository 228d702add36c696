"""Which positions count: masks of two sides, flattened inputs, and padding of a model's own."""

from __future__ import annotations

import pytest
import torch
import transformers
from input_oracle import assert_matches, oracle, seq2seq_samples, singles
from torch import nn

from osrm import collect_covariance, resolve_targets


@pytest.mark.parametrize("length", [9, 14])
def test_encoder_decoder_masks_each_side_even_at_equal_lengths(length, make_model, texts, batches):
    model, rows, targets = make_model("t5"), texts(6, seed=8), texts(6, seed=9)
    data = [
        a | {f"decoder_{name}": value for name, value in b.items()}
        for a, b in zip(batches(rows, 3, 9), batches(targets, 3, length), strict=True)
    ]
    names = resolve_targets(model, ["q", "k", "v"])
    covariance = collect_covariance(model, data, ["q", "k", "v"])
    assert_matches(covariance, oracle(model, seq2seq_samples(rows, targets), names))
    cross = [f"decoder.block.{i}.layer.1.EncDecAttention.{x}" for i in (0, 1) for x in "kv"]
    assert {covariance.modules[name] for name in cross} == {cross[0]}
    query = "decoder.block.0.layer.1.EncDecAttention.q"
    assert covariance.counts[covariance.modules[query]] == sum(map(len, targets))
    assert covariance.counts[cross[0]] == sum(map(len, rows))


def test_encoder_decoder_without_a_decoder_mask_counts_all_decoder_positions(
    make_model, texts, batches
):
    model, rows, targets = make_model("t5"), texts(4, seed=8), texts(4, 9, shortest=5, longest=5)
    data = [
        a | {"decoder_input_ids": b["input_ids"]}
        for a, b in zip(batches(rows, 2), batches(targets, 2), strict=True)
    ]
    covariance = collect_covariance(model, data, ["q", "k"])
    names = resolve_targets(model, ["q", "k"])
    assert_matches(covariance, oracle(model, seq2seq_samples(rows, targets), names))


def test_decoder_input_derived_from_the_encoder_input_is_masked_alike(make_model, texts, batches):
    model = make_model("t5", transformers.T5ForSequenceClassification)
    rows = texts(6, seed=10)
    names = resolve_targets(model, ["q", "v"])
    data = [batch | {"labels": torch.zeros(3).long()} for batch in batches(rows, 3, 12)]
    covariance = collect_covariance(model, data, ["q", "v"])
    assert_matches(covariance, oracle(model, singles(rows), names))


def test_an_encoder_decoder_inside_a_vision_language_model_is_masked_alike():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        qformer_config={**sizes, "encoder_hidden_size": 16, "vocab_size": 50},
        text_config={**text, "model_type": "t5", "vocab_size": 60, "decoder_start_token_id": 0},
        num_query_tokens=2,
        image_token_index=59,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    ids = torch.arange(3, 19).reshape(2, 8).index_fill(1, torch.tensor([0, 1]), 59)
    batch = {
        "pixel_values": torch.randn(2, 3, 8, 8),
        "input_ids": ids,
        "attention_mask": (torch.arange(8) < torch.tensor([[8], [6]])).long(),
        "labels": torch.tensor([[4, 5, 6, 7], [4, 5, -100, -100]]),
    }
    counts = collect_covariance(model, [batch], ["q"]).counts
    assert counts == {
        "language_model.encoder.block.0.layer.0.SelfAttention.q": 14,
        "language_model.decoder.block.0.layer.0.SelfAttention.q": 6,
        "language_model.decoder.block.0.layer.1.EncDecAttention.q": 6,
    }


def test_the_head_of_a_decoder_reads_the_decoders_tokens():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    part = transformers.BertConfig(**sizes, intermediate_size=48)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(part, part)
    model = transformers.EncoderDecoderModel(config)
    batch = {
        "input_ids": torch.arange(14).reshape(2, 7),
        "attention_mask": torch.ones(2, 7).long(),
        "decoder_input_ids": torch.arange(14).reshape(2, 7),
        "decoder_attention_mask": (torch.arange(7) < torch.tensor([[4], [2]])).long(),
    }
    covariance = collect_covariance(model, [batch], ["transform.dense"])
    assert list(covariance.counts.values()) == [6]


@pytest.mark.parametrize("size", [1, 6])
def test_what_follows_the_decoder_reads_its_tokens(size, make_model, texts, batches):
    """Also where both sides are padded to one length, and only positions tell the masks apart."""
    model = make_model("t5", transformers.T5ForConditionalGeneration)
    rows, targets = texts(6, seed=17), texts(6, seed=18)
    data = [
        a | {f"decoder_{name}": value for name, value in b.items()}
        for a, b in zip(batches(rows, size, 9), batches(targets, size, 9), strict=True)
    ]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert "lm_head" in names
    covariance = collect_covariance(model, data, names)
    assert_matches(covariance, oracle(model, seq2seq_samples(rows, targets), names))


def test_a_classifier_of_decoder_states_reads_one_row_per_text(texts, batches):
    """BART's, at the last end of sequence; it sees texts with one, on both sides of the model."""
    words = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
    config = transformers.BartConfig(**words, **sizes, decoder_start_token_id=1)
    torch.manual_seed(0)
    model = transformers.BartForSequenceClassification(config)
    rows = [[token for token in row if token != 1] + [1] for row in texts(6, seed=19)]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    covariance = collect_covariance(model, batches(rows, 3, 12), names)
    assert_matches(covariance, oracle(model, singles(rows), names))
    assert covariance.counts["classification_head.dense"] == 6


def test_labels_of_tokens_are_not_what_an_encoder_alone_is_to_write():
    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
            config = transformers.T5Config(**sizes, vocab_size=50, decoder_start_token_id=0)
            self.t5 = transformers.T5ForConditionalGeneration(config)

        def forward(self, input_ids, attention_mask):
            return self.t5.encoder(input_ids=input_ids, attention_mask=attention_mask)

    ids = torch.arange(14).reshape(2, 7)
    batch = {"input_ids": ids, "attention_mask": torch.ones(2, 7).long(), "labels": ids}
    covariance = collect_covariance(Tagger(), [batch], ["encoder.block.0.layer.0.SelfAttention.q"])
    assert covariance.tokens == 14


@pytest.mark.parametrize("given", [[], ["decoder_input_ids"]])
def test_labels_say_what_a_decoder_reads_in_training(given):
    words = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
    config = transformers.BartConfig(**words, **sizes, decoder_start_token_id=2)
    model = transformers.BartForConditionalGeneration(config)
    inputs, answers = torch.randint(3, 50, (2, 5)), torch.randint(3, 50, (2, 8))
    labels = answers.clone()
    labels[1, 6:] = -100
    shifted = torch.cat([torch.full((2, 1), 2), answers[:, :-1]], dim=1)
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}
    batch |= {"decoder_input_ids": shifted} if given else {}
    covariance = collect_covariance(model, [batch], ["decoder.layers.0.self_attn.q_proj"])
    samples = [
        {"input_ids": inputs[i : i + 1], "decoder_input_ids": shifted[i : i + 1, :length]}
        for i, length in enumerate((8, 6))
    ]
    assert_matches(covariance, oracle(model, samples, list(covariance.modules)))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, attention_mask):
        return self.layer(x)


@pytest.mark.parametrize("flat", ["all positions", "padding dropped"])
def test_flattened_inputs_are_masked(flat):
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    real = x[mask.bool()]
    batch = {"x": x.flatten(0, 1) if flat == "all positions" else real, "attention_mask": mask}
    covariance = collect_covariance(Reader(), [batch], ["layer"])
    torch.testing.assert_close(covariance.matrices["layer"], real.T @ real / 5)


def padding_model(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": 50, "pad_token_id": 0}
    pairs = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
    pairs |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    pairs |= {"vocab_size": 50, "pad_token_id": 0, "decoder_start_token_id": 2}
    blocks = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    chunks = {"attn_layers": ["local"] * 2, "local_attn_chunk_length": 8, "is_decoder": False}
    chunks |= {"attention_head_size": 16, "feed_forward_size": 48, "axial_pos_embds": False}
    name, options = {
        "longformer": ("Longformer", sizes | {"attention_window": 8}),
        "led": ("LED", pairs | {"attention_window": 8}),
        "big-bird": ("BigBird", sizes | blocks | {"sep_token_id": 1}),
        "bigbird-pegasus": ("BigBirdPegasus", pairs | blocks),
        "reformer": ("Reformer", sizes | chunks),
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("kind", ["longformer", "led", "big-bird", "bigbird-pegasus", "reformer"])
def test_padding_that_the_model_makes_itself_is_left_out(kind, texts, batches):
    """To 32 positions, at the end; as many rows as that are a batch that looks like its texts."""
    model, rows = padding_model(kind), texts(32, seed=16, shortest=29, longest=31)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if "_global" not in name]
    expected = oracle(model, singles(rows), names, [len(row) for row in rows])
    for data in (singles(rows), batches(rows, 5), batches(rows, 32), batches(rows, 32, 32)):
        assert_matches(collect_covariance(model, data, names), expected)
