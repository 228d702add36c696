from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from merge_algorithms.errors import UserError
from osrm import (
    collect_covariance,
    initialize_lora_osrm_weights,
    leaked_energy,
    lora_a,
    subspace_state,
)


def adapted(model, adapter_name="default", **options):
    options = {"r": 4, "target_modules": ["query", "value"]} | options
    return get_peft_model(model, LoraConfig(**options), adapter_name=adapter_name)


@pytest.fixture
def covariances(make_model, texts, batches):
    """Three tasks over different words, of the tiny BERT that the adapters go on."""
    model = make_model("bert")
    return {
        name: collect_covariance(
            model,
            batches(texts(30, seed=i), 8),
            ["query", "value"],
            meta={"model": "tiny", "task": name},
        )
        for i, name in enumerate(["sst2", "mnli", "cola"])
    }


def test_initialisation_leaks_little_and_leaves_the_outputs_alone(
    make_model, covariances, texts, batches
):
    base = make_model("bert").eval()
    batch = batches(texts(3, seed=20))[0]
    before = base(**batch).last_hidden_state
    model = adapted(base).eval()
    plain = lora_a(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()  # B that somebody has trained already
    state = subspace_state(covariances, "sst2", rank=4, k=6)
    initialize_lora_osrm_weights(model, state)
    torch.testing.assert_close(model(**batch).last_hidden_state, before, atol=0, rtol=0)
    started = lora_a(model)
    assert set(started) == set(plain) == set(state)
    for module, a in started.items():
        assert torch.equal(a, state[module][:4])
        others = (covariances["mnli"].matrix(module) + covariances["cola"].matrix(module)) / 2
        assert leaked_energy(a, others) < 0.1 * leaked_energy(plain[module], others)


def test_other_adapters_ranks_per_module_and_dtypes(make_model, covariances):
    model = adapted(make_model("bert"), rank_pattern={"layer.1.attention.self.value": 6})
    model.add_adapter("second", LoraConfig(r=2, target_modules=["value"]))
    model.get_submodule(
        "base_model.model.encoder.layer.1.attention.self.value.lora_A.second"
    ).bfloat16()
    untouched = lora_a(model)
    state = subspace_state(covariances, "mnli", rank=6)
    initialize_lora_osrm_weights(model, state, adapter_name="second")
    assert all(torch.equal(a, untouched[name]) for name, a in lora_a(model).items())
    second = lora_a(model, "second")
    assert set(second) == {f"encoder.layer.{i}.attention.self.value" for i in (0, 1)}
    name = "encoder.layer.1.attention.self.value"
    assert torch.equal(second[name], state[name][:2].bfloat16())
    initialize_lora_osrm_weights(model, state)
    for name, a in lora_a(model).items():
        rank = 6 if name == "encoder.layer.1.attention.self.value" else 4
        assert torch.equal(a, state[name][:rank])


def test_a_mixed_model_has_the_names_of_its_base(make_model, covariances):
    config = LoraConfig(r=4, target_modules=["query"])
    model = get_peft_model(make_model("bert"), config, mixed=True)
    state = subspace_state(covariances, "sst2", rank=4)
    initialize_lora_osrm_weights(model, state)
    assert all(torch.equal(a, state[name]) for name, a in lora_a(model).items())


def test_a_lora_bias_is_zeroed_too(make_model, covariances):
    model = adapted(make_model("bert"), lora_bias=True)
    biases = [p for name, p in model.named_parameters() if "lora_B" in name and "bias" in name]
    assert biases
    with torch.no_grad():
        for bias in biases:
            bias.fill_(1)
    initialize_lora_osrm_weights(model, subspace_state(covariances, "sst2", rank=4))
    assert all(not bias.any() for bias in biases)


def test_conv1d_layers(make_model, texts, batches):
    base, module = make_model("gpt2"), "h.1.attn.c_attn"
    covariances = {
        name: collect_covariance(base, batches(texts(20, seed=i)), ["c_attn"])
        for i, name in enumerate("ab")
    }
    model = adapted(base, target_modules=["c_attn"], fan_in_fan_out=True)
    plain = leaked_energy(lora_a(model)[module], covariances["b"].matrix(module))
    initialize_lora_osrm_weights(model, subspace_state(covariances, "a", rank=4))
    assert leaked_energy(lora_a(model)[module], covariances["b"].matrix(module)) < 0.1 * plain


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("adapter", "adapter 'defualt'; did you mean 'default'"),
        ("no adapter", "known: none"),
        ("module", r"no subspace for module 'encoder.layer.1.attention.self.value', did you mean"),
        ("width", "which reads 32 features: it was computed for another model"),
        ("rows", "has 2 rows for .*, whose rank is 4"),
        ("pissa", "init_lora_weights='pissa', which changes the base weights"),
        ("mica", "init_lora_weights='mica', which fixes B"),
        ("convolution", "is a Conv2d at conv"),
        ("dora", r"uses DoRA \(use_dora\) at encoder.*without use_dora"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    case, message, make_model, covariances
):
    base = make_model("bert")
    options = {name: {"init_lora_weights": name} for name in ("pissa", "mica")}
    options["dora"] = {"use_dora": True}
    model = adapted(base, **options.get(case, {}))
    state = subspace_state(covariances, "sst2", rank=4)
    last = "encoder.layer.1.attention.self.value"
    adapter_name = "defualt" if case == "adapter" else "default"
    if case == "no adapter":
        model = make_model("bert")
    elif case == "module":
        del state[last]
    elif case == "width":
        state[last] = state[last][:, :30]
    elif case == "rows":
        state[last] = state[last][:2]
    elif case == "convolution":
        convolution = torch.nn.Sequential()
        convolution.add_module("conv", torch.nn.Conv2d(3, 3, 2))
        model = adapted(convolution, target_modules=["conv"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        initialize_lora_osrm_weights(model, state, adapter_name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
