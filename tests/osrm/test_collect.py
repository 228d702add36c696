from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from osrm import collect_covariance, resolve_targets

TARGETS = {
    "bert": ["query", "key", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_fc"],
    "llama": ["q_proj", "v_proj", "gate_proj", "up_proj"],
    "t5": ["q", "k", "v"],
}


def oracle(model, samples, names, lengths=None):
    """C = H^T H / n per module in float64: every sample runs alone, so there is no padding.

    Unless the model pads by itself: of each sample so many positions are real, the first ones.
    """
    inputs = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0].flatten(0, -2).double())
        )
        for name in names
    ]
    model.eval()
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for handle in handles:
        handle.remove()
    if lengths is not None:
        inputs = {
            name: [rows[:length] for rows, length in zip(h, lengths, strict=True)]
            for name, h in inputs.items()
        }
    stacked = {name: torch.cat(h) for name, h in inputs.items()}
    return {name: (h.T @ h / len(h), len(h)) for name, h in stacked.items()}


def singles(rows):
    return [{"input_ids": torch.tensor([row])} for row in rows]


def seq2seq_samples(rows, targets):
    return [
        {"input_ids": torch.tensor([a]), "decoder_input_ids": torch.tensor([b])}
        for a, b in zip(rows, targets, strict=True)
    ]


def assert_matches(covariance, expected):
    assert set(covariance.modules) == set(expected)
    for name, (matrix, tokens) in expected.items():
        found = covariance.matrix(name)
        assert found.dtype == torch.float32
        assert torch.equal(found, found.T)
        torch.testing.assert_close(
            found.double(), matrix, rtol=0, atol=1e-5 * float(matrix.abs().max())
        )
        assert covariance.counts[covariance.modules[name]] == tokens


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("size", "length"), [(1, None), (4, None), (7, 20)])
def test_streaming_equals_the_one_shot_oracle_whatever_the_padding(
    kind, size, length, make_model, texts, batches
):
    model, rows = make_model(kind), texts(10, seed=1)
    names = resolve_targets(model, TARGETS[kind])
    covariance = collect_covariance(model, batches(rows, size, length), TARGETS[kind])
    assert list(covariance.modules) == names
    assert covariance.tokens == sum(map(len, rows))
    assert_matches(covariance, oracle(model, singles(rows), names))


def test_left_padding_is_left_out_too(make_model, texts, batches):
    model, rows = make_model("llama"), texts(6, seed=2)
    covariance = collect_covariance(model, batches(rows, 6, 15, side="left"), ["q_proj"])
    names = resolve_targets(model, ["q_proj"])
    assert_matches(covariance, oracle(model, singles(rows), names))


def test_without_a_mask_every_position_counts(make_model, texts, batches):
    model = make_model("bert")
    data = [{"input_ids": batch["input_ids"]} for batch in batches(texts(6, seed=2), 3)]
    covariance = collect_covariance(model, data, ["query"])
    expected = oracle(model, data, resolve_targets(model, ["query"]))
    assert_matches(covariance, expected)


def test_means_are_over_all_positions_padding_included(make_model, texts, batches):
    model, data = make_model("bert"), batches(texts(5, seed=3), 2, 12)
    covariance = collect_covariance(model, data, ["query"])
    name = resolve_targets(model, ["query"])[0]
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1).double())
    )
    with torch.no_grad():
        for batch in data:
            model.eval()(**batch)
    handle.remove()
    torch.testing.assert_close(
        covariance.means[name].double(), torch.cat(seen).mean(0), atol=1e-6, rtol=1e-5
    )
    assert covariance.positions[name] == 5 * 12


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(8)), size=st.integers(1, 8), extra=st.integers(0, 6))
def test_order_batch_size_and_padding_change_nothing(
    order, size, extra, make_model, texts, batches
):
    model, rows = make_model("bert"), texts(8, seed=4)
    reference = collect_covariance(model, batches(rows, 1), ["value"])
    data = batches([rows[i] for i in order], size, 9 + extra)
    covariance = collect_covariance(model, data, ["value"])
    assert covariance.counts == reference.counts
    for key, matrix in reference.matrices.items():
        torch.testing.assert_close(
            covariance.matrices[key], matrix, rtol=0, atol=2e-6 * float(matrix.abs().max())
        )


def test_modules_that_read_the_same_tensor_share_a_key(make_model, texts, batches):
    data = batches(texts(4, seed=5))
    bert = collect_covariance(make_model("bert"), data, TARGETS["bert"])
    for layer in range(2):
        block = f"encoder.layer.{layer}"
        shared = {bert.modules[f"{block}.attention.self.{x}"] for x in ("query", "key", "value")}
        assert shared == {f"{block}.attention.self.query"}
        assert bert.modules[f"{block}.intermediate.dense"] == f"{block}.intermediate.dense"
    assert len(bert.matrices) == 4

    llama = collect_covariance(make_model("llama"), data, TARGETS["llama"])
    assert llama.modules["layers.0.self_attn.v_proj"] == "layers.0.self_attn.q_proj"
    assert llama.modules["layers.0.mlp.up_proj"] == "layers.0.mlp.gate_proj"
    assert len(llama.matrices) == 4


def test_a_tensor_changed_in_place_between_two_reads_is_not_shared():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            self.first(x)
            self.second(x)
            x.mul_(2)
            return self.third(x)

    x = torch.randn(2, 3, 4)
    covariance = collect_covariance(
        Reader(), [{"x": x.clone()}, {"x": x.clone()}], ["first", "second", "third"]
    )
    assert covariance.modules == {"first": "first", "second": "first", "third": "third"}
    torch.testing.assert_close(covariance.matrices["third"], 4 * covariance.matrices["first"])


def test_sharing_that_changes_between_batches_is_an_error():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, copy):
            return self.first(x), self.second(x.clone() if copy else x)

    x = torch.randn(2, 3, 4)
    with pytest.raises(
        RuntimeError, match="second reads the input of second in batch 1 and that of first"
    ):
        collect_covariance(
            Fickle(), [{"x": x, "copy": False}, {"x": x, "copy": True}], ["first", "second"]
        )


def test_a_layer_registered_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 4))
            self.second = nn.Sequential(self.first[0])

        def forward(self, x):
            return self.first(x)

    x = torch.randn(2, 3, 4)
    covariance = collect_covariance(Twice(), [{"x": x}], ["0"])
    assert list(covariance.modules) == ["first.0"]
    flat = x.flatten(0, 1)
    torch.testing.assert_close(covariance.matrices["first.0"], flat.T @ flat / 6)


def test_a_module_that_runs_at_every_layer_counts_every_run(texts, batches):
    config = transformers.AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
    )
    model, rows = transformers.AlbertModel(config), texts(5, seed=6)
    names = resolve_targets(model, ["query"])
    covariance = collect_covariance(model, batches(rows, 2), ["query"])
    assert covariance.tokens == 3 * sum(map(len, rows))
    assert_matches(covariance, oracle(model, singles(rows), names))


def test_pooled_inputs_have_one_row_per_sequence(make_model, texts, batches):
    model, rows = make_model("bert"), texts(6, seed=7)
    covariance = collect_covariance(model, batches(rows, 4), ["pooler.dense"])
    assert covariance.tokens == 6
    assert_matches(covariance, oracle(model, singles(rows), ["pooler.dense"]))


@pytest.mark.parametrize("length", [9, 14])
def test_encoder_decoder_masks_each_side_even_at_equal_lengths(length, make_model, texts, batches):
    model, rows, targets = make_model("t5"), texts(6, seed=8), texts(6, seed=9)
    data = [
        a | {f"decoder_{name}": value for name, value in b.items()}
        for a, b in zip(batches(rows, 3, 9), batches(targets, 3, length), strict=True)
    ]
    names = resolve_targets(model, TARGETS["t5"])
    covariance = collect_covariance(model, data, TARGETS["t5"])
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


def test_products_stay_float32_in_half_precision_under_autocast(make_model, texts, batches):
    model = make_model("bert").eval().bfloat16()
    data = [{"input_ids": batch["input_ids"]} for batch in batches(texts(6, seed=13), 3)]
    name = resolve_targets(model, ["query"])[1]
    expected, _ = oracle(model, data, [name])[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        covariance = collect_covariance(model, data, [name])
    assert covariance.matrices[name].dtype == torch.float32
    error = (covariance.matrices[name].double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


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
