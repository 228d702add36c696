from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from input_oracle import assert_matches, oracle, singles
from torch import nn

from osrm import collect_covariance, resolve_targets

TARGETS = {
    "bert": ["query", "key", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_fc"],
    "llama": ["q_proj", "v_proj", "gate_proj", "up_proj"],
}


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
