from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from merge_algorithms import Adapter, LowRank, UserError, merge
from osrm import Fisher, collect_fisher, resolve_targets

TARGETS = {
    "bert": ["query", "key", "intermediate.dense", "pooler.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}
CLASSIFIERS = {
    "bert": transformers.BertForSequenceClassification,
    "gpt2": transformers.GPT2ForSequenceClassification,
    "llama": transformers.LlamaForSequenceClassification,
}


def classifier(kind, make_model, outputs) -> nn.Module:
    torch.manual_seed(1)
    config = make_model(kind).config
    config.num_labels, config.pad_token_id = outputs, 0
    torch.manual_seed(2)
    model = CLASSIFIERS[kind](config).eval().requires_grad_(False)
    nn.init.normal_(head(model).weight, std=0.5)
    return model


def head(model) -> nn.Linear:
    return model.classifier if hasattr(model, "classifier") else model.score


def brute_force(model, rows, names):
    """Every example alone, every class alone, autograd on the weights themselves, in float64."""
    model = model.double()
    weights = {}
    for name in names:
        module = model.get_submodule(name)
        weight = getattr(module, "base_layer", module).weight
        weights[name] = weight.requires_grad_()
    sums = dict.fromkeys(names, 0)
    for row in rows:
        logits = model(input_ids=torch.tensor([row])).logits[0]
        if len(logits) == 1:
            # Gaussian of variance 1: E_y (d log p / dW)^2 = E (y - m)^2 (dm / dW)^2.
            terms = [(1.0, logits[0])]
        else:
            probabilities = logits.detach().softmax(0).tolist()
            terms = list(zip(probabilities, logits.log_softmax(0), strict=True))
        for probability, value in terms:
            grads = torch.autograd.grad(value, list(weights.values()), retain_graph=True)
            for name, grad in zip(names, grads, strict=True):
                sums[name] = sums[name] + probability * grad**2
    model.float().requires_grad_(False)
    conv1d = transformers.pytorch_utils.Conv1D
    return {
        name: (x.T if isinstance(model.get_submodule(name), conv1d) else x) / len(rows)
        for name, x in sums.items()
    }


def assert_matches(fisher, expected):
    assert set(fisher.diagonals) == set(expected)
    for name, x in expected.items():
        assert fisher.diagonals[name].dtype == torch.float32
        torch.testing.assert_close(
            fisher.diagonals[name].double(), x, rtol=1e-4, atol=1e-6 * float(x.max())
        )


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("outputs", "size", "length"), [(1, 3, None), (2, 1, None), (4, 5, 12)])
def test_equals_brute_force_whatever_the_batches(
    kind, outputs, size, length, make_model, texts, batches
):
    model, rows = classifier(kind, make_model, outputs), texts(7, seed=1)
    names = resolve_targets(model, TARGETS[kind])
    fisher = collect_fisher(model, batches(rows, size, length), TARGETS[kind])
    assert fisher.examples == 7
    assert list(fisher.diagonals) == names
    assert_matches(fisher, brute_force(model, rows, names))


def test_drawn_classes_agree_in_the_mean_and_by_seed(make_model, texts, batches):
    model, rows = classifier("bert", make_model, 5), batches(texts(6, seed=3), 6)
    exact = collect_fisher(model, rows, ["query"]).diagonals
    drawn = collect_fisher(model, rows, ["query"], draws=400, seed=1).diagonals
    for name, x in exact.items():
        assert float((drawn[name] - x).norm() / x.norm()) < 0.15
    few = [
        collect_fisher(model, rows, ["query"], draws=2, seed=seed).diagonals for seed in (1, 1, 2)
    ]
    name = next(iter(exact))
    assert torch.equal(few[0][name], few[1][name])
    assert not torch.equal(few[0][name], few[2][name])


def test_certain_predictions_have_no_information(make_model, texts, batches):
    """p = (1, 0, 0) to the last bit: no 0 / 0 on the way."""
    model = classifier("bert", make_model, 3)
    head(model).bias = nn.Parameter(torch.tensor([5000.0, 0.0, -5000.0]))
    fisher = collect_fisher(model, batches(texts(3, seed=1)), ["query"])
    assert all(not x.any() for x in fisher.diagonals.values())


def test_an_active_adapter_and_a_merged_one_are_the_same(make_model, texts, batches):
    model, rows = classifier("bert", make_model, 3), texts(5, seed=2)
    plain = collect_fisher(model, batches(rows), ["query"]).diagonals
    draw = torch.Generator().manual_seed(0)
    names = resolve_targets(model, ["query"])
    factors = {
        name: LowRank(torch.randn(32, 4, generator=draw), torch.randn(4, 32, generator=draw))
        for name in names
    }
    with merge([Adapter("a", factors)]).apply_to(model):
        merged = collect_fisher(model, batches(rows), ["query"]).diagonals
    wrapped = get_peft_model(
        model,
        LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=4, target_modules=names, lora_dropout=0.5),
    )
    for name, update in factors.items():
        layer = wrapped.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data = update.a.clone()
        layer.lora_B["default"].weight.data = update.b.clone()
    wrapped.train()
    active = collect_fisher(wrapped, batches(rows), ["query"])
    assert wrapped.training
    assert_matches(active, {name: x.double() for name, x in merged.items()})
    assert not torch.allclose(plain[names[0]], merged[names[0]], rtol=0.1, atol=0)


class Written(nn.Module):
    """A model that calls one layer twice and writes into what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.out, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.twice(x)
        y.relu_()
        y = self.twice(y)
        y += 1
        self.unused(x)
        return self.out(y.tanh())


def test_layers_that_run_twice_are_written_into_or_lead_nowhere():
    torch.manual_seed(3)
    model = Written().requires_grad_(False)
    data = [{"x": torch.randn(3, 4)}, {"x": torch.randn(2, 4)}]
    fisher = collect_fisher(model, data, ["twice", "unused"], predict=lambda batch: model(**batch))
    model.twice.weight.requires_grad_()
    expected = 0
    rows = torch.cat([batch["x"] for batch in data])
    for row in rows:
        logits = model(row[None])[0]
        for p, value in zip(logits.softmax(0), logits.log_softmax(0), strict=True):
            (gradient,) = torch.autograd.grad(value, model.twice.weight, retain_graph=True)
            expected = expected + p.detach() * gradient.detach() ** 2 / len(rows)
    torch.testing.assert_close(fisher.diagonals["twice"], expected)
    assert not fisher.diagonals["unused"].any()


def test_the_model_is_left_as_it_was(make_model, texts, batches):
    model = classifier("bert", make_model, 2).train()
    model.bert.pooler.eval()
    rows = batches(texts(4, seed=1))
    rows[0]["labels"] = torch.zeros(4, dtype=torch.long)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.inference_mode():
        fisher = collect_fisher(model, rows, ["query"], meta={"task": "a"})
    assert fisher.meta == {"task": "a"}
    assert model.training
    assert not model.bert.pooler.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_that_is_offloaded_whole(make_model, texts, batches):
    model, data = classifier("bert", make_model, 2), batches(texts(4, seed=1))
    expected = collect_fisher(model, data, ["query"])
    found = collect_fisher(cpu_offload(model, execution_device="cpu"), data, ["query"])
    torch.testing.assert_close(found.diagonals, expected.diagonals)


def test_bad_input(make_model, texts, batches):
    model, rows = classifier("bert", make_model, 2), batches(texts(4, seed=1))
    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4), nn.Unflatten(0, (2, 3)))
    cases = [
        ("the data is empty", model, [], ["query"], {}),
        ("matches no linear layer", model, rows, ["qeury"], {}),
        ("batch 0 is a list", model, [[1]], ["query"], {}),
        ("draws is 0", model, rows, ["query"], {"draws": 0}),
        (r"shape \(4, \d, 2\): expected \(n, outputs\)", model, rows, ["query"],
         {"predict": lambda batch: model.bert(**batch).last_hidden_state[..., :2]}),
        ("do not depend on the target modules", model, rows, ["query"],
         {"predict": lambda batch: model(**batch).logits.detach()}),
        ("logits of batch 0 have a NaN", model, rows, ["query"],
         {"predict": lambda batch: model(**batch).logits * math.nan}),
        ("cannot tell which row is whose", flat, [{"input": torch.randn(2, 3, 4)}], ["1"],
         {"predict": lambda batch: flat(**batch).sum(1)}),
    ]  # fmt: skip
    for message, module, data, targets, options in cases:
        with pytest.raises(UserError, match=message):
            collect_fisher(module, data, targets, **options)
    written = Written()
    with pytest.raises(UserError, match="unused never ran"):
        collect_fisher(
            written,
            [{"x": torch.randn(3, 4)}],
            ["twice", "unused"],
            predict=lambda batch: written.out(written.twice(batch["x"])),
        )


def test_save_and_load_round_trip(tmp_path):
    fisher = Fisher({"b": torch.rand(3, 2), "a": torch.rand(2, 4).T}, 7, {"task": "x"})
    fisher.save(tmp_path / "a.safetensors")
    loaded = Fisher.load(tmp_path / "a.safetensors")
    assert (loaded.examples, loaded.meta) == (7, {"task": "x"})
    assert all(torch.equal(loaded.by_module()[m], x) for m, x in fisher.by_module().items())
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "osrm-covariance"}, "not a fisher file"),
        ({"version": 2}, "fisher format version 2, this release reads version 1"),
        ({"examples": 0}, "over no example"),
        ({"examples": "many"}, "not a usable fisher file"),
        ({"meta": 3}, "not a usable fisher file"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(change, message, tmp_path):
    path = tmp_path / "fisher.safetensors"
    Fisher({"a": torch.rand(3, 2)}, 7).save(path)
    header = {"format": "osrm-fisher", "version": 1, "examples": 7, "meta": {}} | change
    save_file(load_file(path), path, {"osrm": json.dumps(header)})
    with pytest.raises(UserError, match=message) as caught:
        Fisher.load(path)
    assert str(path) in str(caught.value)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        Fisher.load(path)


@pytest.mark.parametrize(
    ("diagonals", "message"),
    [
        ({}, "holds no module"),
        ({"a": torch.ones(3)}, r"a has shape \(3,\)"),
        ({"a": -torch.ones(3, 2)}, "a is not finite or negative"),
        ({"a": torch.full((3, 2), math.nan)}, "a is not finite or negative"),
    ],
)
def test_values_that_cannot_be_fisher_information(diagonals, message):
    with pytest.raises(UserError, match=message):
        Fisher(diagonals, 7)
