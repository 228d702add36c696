from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from merge_algorithms.errors import UserError
from osrm import collect_covariance, freeze_lora_a, resolve_targets

TARGETS = {
    "bert": ["query", "key", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_fc"],
    "llama": ["q_proj", "v_proj", "gate_proj", "up_proj"],
    "t5": ["q", "k", "v"],
}


def oracle(model, samples, names):
    """C = H^T H / n per module in float64: every sample runs alone, so there is no padding."""
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


@pytest.fixture
def adapted(make_model):
    """A classifier whose adapter and head copy both change the outputs, A frozen."""
    base = make_model("bert", transformers.BertForSequenceClassification)
    config = LoraConfig(
        r=4, target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.5
    )
    model = get_peft_model(base, config)
    freeze_lora_a(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_()
    return model


def test_peft_model_gives_the_covariance_of_its_base(adapted, make_model, texts, batches):
    data = batches(texts(6, seed=11), 3)
    base = make_model("bert", transformers.BertForSequenceClassification)
    targets = ["query", "classifier", "attention.output.dense"]
    expected = collect_covariance(base, data, targets)
    for model in (adapted, adapted.get_base_model()):
        covariance = collect_covariance(model, data, targets)
        assert covariance.modules == expected.modules
        for key, matrix in expected.matrices.items():
            assert torch.equal(covariance.matrices[key], matrix)


def snapshot(model: PeftModel) -> SimpleNamespace:
    return SimpleNamespace(
        training={name: module.training for name, module in model.named_modules()},
        gradients={name: p.requires_grad for name, p in model.named_parameters()},
        values={name: value.clone() for name, value in model.state_dict().items()},
        hooks=sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after.training == before.training
    assert after.gradients == before.gradients
    assert after.hooks == before.hooks
    for name, value in before.values.items():
        assert torch.equal(after.values[name], value), name


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_afterwards(fails, adapted, texts, batches):
    data = batches(texts(4, seed=12), 2)
    adapted.train()
    adapted.get_base_model().bert.embeddings.eval()
    before, precision = snapshot(adapted), torch.get_float32_matmul_precision()
    module = adapted.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    assert not all(before.gradients.values())
    if fails:
        with pytest.raises(ValueError, match="input_ids"):
            collect_covariance(adapted, [*data, {}], ["query"])
    else:
        collect_covariance(adapted, data, ["query"])
    assert_unchanged(adapted, before)
    assert not module.disable_adapters
    assert torch.get_float32_matmul_precision() == precision


def test_adapters_that_were_off_stay_off(adapted, texts, batches):
    with adapted.disable_adapter():
        collect_covariance(adapted, batches(texts(2, seed=1)), ["query"])
        module = adapted.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        assert module.disable_adapters


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


def test_it_runs_inside_inference_mode(make_model, texts, batches):
    model, data = make_model("bert"), batches(texts(4, seed=14), 2)
    expected = collect_covariance(model, data, ["query", "value"])
    with torch.inference_mode():
        covariance = collect_covariance(model, data, ["query", "value"])
    assert covariance.modules == expected.modules
    assert all(torch.equal(covariance.matrices[k], m) for k, m in expected.matrices.items())


def test_two_runs_are_bit_identical_and_meta_is_kept(make_model, texts, batches):
    data = batches(texts(6, seed=15), 3)
    first, second = (
        collect_covariance(
            make_model("bert", hidden_dropout_prob=0.5).train(),
            data,
            ["query"],
            meta={"task": "a"},
            progress=True,
        )
        for _ in range(2)
    )
    assert first.meta == {"task": "a"}
    for key, matrix in first.matrices.items():
        assert torch.equal(matrix, second.matrices[key])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qeury"], "did you mean 'query'"),
        (["query", "nothing_like_it"], "known: .*dense.*key.*query.*value"),
        (["LayerNorm"], "matches no linear layer"),
        ("query", "give a list"),
        ([], "give a list"),
    ],
)
def test_targets_that_match_nothing_list_the_candidates(targets, message, make_model):
    with pytest.raises(UserError, match=message):
        resolve_targets(make_model("bert"), targets)


def test_targets_match_by_full_name_or_by_last_parts_only(make_model):
    model = make_model("bert")
    full = "encoder.layer.1.attention.self.value"
    assert resolve_targets(model, [full]) == [full]
    with pytest.raises(UserError, match="matches no linear layer"):
        resolve_targets(model, ["elf.value"])


def test_non_finite_inputs_name_the_module_and_the_batch(make_model, texts, batches):
    model = make_model("bert")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = float("nan")
    data = batches([[2, 3, 1], [4, 5, 1], [6, 7, 1]], 1)
    with pytest.raises(UserError, match=r"layer\.0\.attention\.self\.query .* in batch 2"):
        collect_covariance(model, data, ["query"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data is empty"),
        ([(torch.ones(1, 2).long(),)], "batch 0 is a tuple"),
        (
            [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3)}],
            "no real token",
        ),
    ],
)
def test_data_that_cannot_be_used(data, message, make_model):
    with pytest.raises(UserError, match=message):
        collect_covariance(make_model("bert"), data, ["query"])


class Mixer(nn.Module):
    """Reads inputs whose shape has nothing to do with the mask."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, attention_mask):
        return self.layer(x)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 0], [1, 1, 1]]), "cannot tell which positions are padding"),
        (torch.ones(2, 1, 5, 5), r"shape \(2, 1, 5, 5\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    batch = {"x": torch.ones(2, 5, 4), "attention_mask": mask}
    with pytest.raises(UserError, match=message):
        collect_covariance(Mixer(), [batch], ["layer"])


@pytest.mark.parametrize("flat", ["all positions", "padding dropped"])
def test_flattened_inputs_are_masked(flat):
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    real = x[mask.bool()]
    batch = {"x": x.flatten(0, 1) if flat == "all positions" else real, "attention_mask": mask}
    covariance = collect_covariance(Mixer(), [batch], ["layer"])
    torch.testing.assert_close(covariance.matrices["layer"], real.T @ real / 5)


def test_a_module_that_never_runs_is_named():
    batch = {"x": torch.ones(1, 2, 4), "attention_mask": torch.ones(1, 2)}
    with pytest.raises(UserError, match="unused read no real token"):
        collect_covariance(Mixer(), [batch], ["layer", "unused"])
