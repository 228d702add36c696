from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from merge_algorithms.errors import UserError
from osrm import collect_covariance, freeze_lora_a, resolve_targets


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


def test_data_parallel_gives_the_names_of_what_it_wraps(adapted, texts, batches):
    data = batches(texts(6, seed=11), 3)
    expected = collect_covariance(adapted, data, ["query"])
    assert collect_covariance(nn.DataParallel(adapted), data, ["query"]).modules == expected.modules


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
    before = snapshot(adapted)
    module = adapted.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    assert not all(before.gradients.values())
    if fails:
        with pytest.raises(ValueError, match="input_ids"):
            collect_covariance(adapted, [*data, {}], ["query"])
    else:
        collect_covariance(adapted, data, ["query"])
    assert_unchanged(adapted, before)
    assert not module.disable_adapters


def test_the_hooks_on_a_decoder_are_removed(make_model, texts, batches):
    model = make_model("t5", transformers.T5ForSequenceClassification)
    before = snapshot(model)
    collect_covariance(model, batches(texts(2, seed=1)), ["q"])
    assert_unchanged(model, before)


def tf32() -> bool:
    cuda = torch.backends.cuda.matmul
    return cuda.fp32_precision == "tf32" if hasattr(cuda, "fp32_precision") else cuda.allow_tf32


def test_products_have_full_precision_and_the_setting_comes_back(make_model, texts, batches):
    seen = []
    model = make_model("bert")
    x = torch.ones(2, 2)
    model.register_forward_hook(lambda *_: seen.append(((x @ x).dtype, tf32())))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            collect_covariance(model, batches(texts(2, seed=1)), ["query"])
        assert tf32()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert seen == [(torch.float32, False)]


def test_adapters_that_were_off_stay_off(adapted, texts, batches):
    with adapted.disable_adapter():
        collect_covariance(adapted, batches(texts(2, seed=1)), ["query"])
        module = adapted.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
        assert module.disable_adapters


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_that_was_compiled_and_has_run(wrapped, make_model, texts, batches):
    model, data = make_model("bert"), batches(texts(4, seed=3))
    expected = collect_covariance(model, data, ["query"])
    compiled = torch.compile(model, backend="eager") if wrapped else model
    if not wrapped:
        model.compile(backend="eager")
    compiled(**data[0])
    found = collect_covariance(compiled, data, ["query"])
    assert found.fingerprint == expected.fingerprint


def test_a_model_that_is_offloaded_whole(make_model, texts, batches):
    """Its parameters are on the meta device between two calls."""
    model, data = make_model("llama"), batches(texts(4, seed=3))
    expected = collect_covariance(model, data, ["q_proj"])
    offloaded = cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in offloaded.parameters())
    assert collect_covariance(offloaded, data, ["q_proj"]).fingerprint == expected.fingerprint


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


def test_a_module_that_never_runs_is_named():
    batch = {"x": torch.ones(1, 2, 4), "attention_mask": torch.ones(1, 2)}
    with pytest.raises(UserError, match="unused read no real token"):
        collect_covariance(Mixer(), [batch], ["layer", "unused"])


def test_adapters_that_are_merged_are_refused_and_stay_merged(adapted, texts, batches):
    """PEFT would take them out of the weights, which rounds these."""
    adapted.bfloat16().merge_adapter()
    before = snapshot(adapted)
    with pytest.raises(UserError, match=r"'default' is merged into the weights of .*query: call"):
        collect_covariance(adapted, batches(texts(4, seed=1), 2), ["query"])
    assert_unchanged(adapted, before)


def test_layers_that_are_called_with_a_keyword():
    class Keyword(Mixer):
        def forward(self, x, attention_mask=None):
            return self.layer(input=x)

    batch = {"x": torch.randn(2, 3, 4), "attention_mask": torch.ones(2, 3)}
    covariance = collect_covariance(Keyword(), [batch], ["layer"])
    rows = batch["x"].flatten(0, 1)
    torch.testing.assert_close(covariance.matrix("layer"), rows.T @ rows / len(rows))
