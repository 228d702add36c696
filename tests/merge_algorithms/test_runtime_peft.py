"""attach() over models that hold PEFT LoRA layers: linear, Conv1D, convolutions, diffusers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from merge_algorithms import Adapter, LowRank, UserError, attach, mixture

METHODS = ["direct", "mc_dropout", "orthogonal_mc_dropout"]
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "Conv1D": lambda: Conv1D(5, 6),
    "conv1d": lambda: nn.Conv1d(6, 5, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "conv3d": lambda: nn.Conv3d(6, 5, (1, 2, 1)),
}
INPUTS = {
    "linear": (3, 4, 6),
    "Conv1D": (3, 4, 6),
    "conv1d": (3, 6, 7),
    "conv2d": (2, 6, 8, 9),
    "conv3d": (2, 6, 3, 4, 3),
}


def loaded(base: nn.Module, names: str = "ab", seed: int = 0, **config) -> nn.Module:
    """The base with adapters injected under these names, random factors, the first one active."""
    config = {"target_modules": ["m"], "lora_alpha": 6, **config}
    for rank, name in enumerate(names, 2):
        inject_adapter_in_model(LoraConfig(r=rank, **config), base, adapter_name=name)
    torch.manual_seed(seed)
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return base.eval()


def one_layer(kind: str, names: str = "ab", **config) -> nn.Module:
    torch.manual_seed(1)
    return loaded(nn.ModuleDict({"m": LAYERS[kind]()}), names, **config)


def terms(model: nn.Module, x: Tensor, names: str) -> tuple[Tensor, Tensor]:
    """The base's output, and every adapter's alone (T, ...), as stock PEFT computes them."""
    layer, outputs = model["m"], []
    base = layer.base_layer(x)
    for name in names:
        layer.set_adapter(name)
        outputs.append(layer(x) - base)
    layer.set_adapter(names[0])
    return base, torch.stack(outputs)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes)).eval()


def state_of(model: nn.Module) -> list[object]:
    """Everything that attach could leave changed, beside the tensors."""
    return [
        (
            name,
            list(vars(m)),
            m.training,
            len(m._forward_hooks) + len(m._forward_pre_hooks),
            getattr(m, "active_adapters", None),
            getattr(m, "_disable_adapters", None),
            dict(getattr(m, "lora_variant", {})),
            [p.requires_grad for p in m.parameters(recurse=False)],
        )
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rates", [None, [0.5, 0.75, 0.9]])
def test_every_element_belongs_to_one_adapter(kind, grad, rates):
    model, x, w = one_layer(kind, "abc"), torch.randn(INPUTS[kind]), [1.0, 0.5, 2.0]
    with torch.no_grad():
        base, outputs = terms(model, x, "abc")
    kept = 1 - torch.tensor(rates or [2 / 3] * 3)
    shape = [3] + [1] * x.ndim
    possible = outputs * (torch.tensor(w) / kept).view(shape)
    with torch.set_grad_enabled(grad), attach(model, ["a", "b", "c"], weights=w, drop_rates=rates):
        added = (model["m"](x) - base).detach()
    if rates:
        possible = torch.cat([possible, torch.zeros_like(possible[:1])])
    close = torch.isclose(possible, added, rtol=1e-4, atol=1e-4)
    assert close.any(0).all()
    assert close.flatten(1).any(1).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_direct_is_what_peft_adds(kind):
    model, x = one_layer(kind, "abc"), torch.randn(INPUTS[kind])
    with torch.no_grad():
        base, outputs = terms(model, x, "abc")
        with attach(model, ["a", "b", "c"], "direct", weights=[1, 0.5, 2]):
            found = model["m"](x)
        expected = base + outputs[0] + 0.5 * outputs[1] + 2 * outputs[2]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with attach(model, ["b"], drop_rates=[0.0]):
            found = model["m"](x)
        torch.testing.assert_close(found, base + outputs[1], rtol=1e-5, atol=1e-5)


def test_mica_is_plain_lora_that_keeps_its_variant():
    model, x = one_layer("linear", init_lora_weights="mica"), torch.randn(3, 6)
    assert {type(v).__name__ for v in model["m"].lora_variant.values()} == {"MiCALinearVariant"}
    base, outputs = terms(model, x, "ab")
    before = state_of(model)
    with attach(model, ["a", "b"], "direct"):
        torch.testing.assert_close(model["m"](x), base + outputs.sum(0))
    with attach(model, ["b"], drop_rates=[0.0]):
        torch.testing.assert_close(model["m"](x), base + outputs[1])
    assert state_of(model) == before
    model["m"].set_adapter("b")
    assert torch.equal(model["m"](x), base + outputs[1])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_adapters_on_the_bare_model(method):
    """The masks depend on the seed and the modules' names, not on who holds the factors."""
    bare = llama()
    model = loaded(copy.deepcopy(bare), target_modules=["q_proj", "down_proj"])
    layers = {key: m for key, m in model.named_modules() if isinstance(m, LoraLayer)}
    adapters = [
        Adapter(
            name,
            {
                key: LowRank(m.lora_B[name].weight * m.scaling[name], m.lora_A[name].weight)
                for key, m in layers.items()
            },
        )
        for name in "ab"
    ]
    ids = torch.arange(20).view(2, 10)
    outputs = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with attach(model, ["a", "b"], method, masks=7):
                outputs.append(model(ids).logits.detach())
            with attach(bare, adapters, method, masks=7):
                outputs.append(bare(ids).logits.detach())
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


def test_adapters_with_different_targets_keep_their_shares():
    base = nn.ModuleDict({"m": nn.Linear(6, 400), "n": nn.Linear(6, 400)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["m", "n"]), base, adapter_name="a")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["n"]), base, adapter_name="b")
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    x = torch.randn(50, 6)
    shares = {}
    with torch.no_grad(), attach(base, ["b", "a"], drop_rates=[0.9, 0.6]):
        for key in "mn":
            changed = base[key](x) != base[key].base_layer(x)
            shares[key] = float(changed.float().mean())
    assert shares == pytest.approx({"m": 0.4, "n": 0.5}, abs=0.03)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_change_nothing(monkeypatch, kind, method, block):
    """Large outputs are made piece by piece unless gradients are recorded; any size divides."""
    monkeypatch.setattr(mixture, "BLOCK", block)
    monkeypatch.setattr(mixture, "SMALL", 0)
    model, x = one_layer(kind, "abc"), torch.randn(INPUTS[kind])
    outputs = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), attach(model, ["a", "b", "c"], method, masks=3):
            outputs += [model["m"](y).detach() for y in (x, x[:1])]
    torch.testing.assert_close(outputs[:2], outputs[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("gpu", [False, True])
def test_dtypes(monkeypatch, kind, dtype, gpu):
    monkeypatch.setattr(mixture, "_on_gpu", lambda tensor: gpu)
    model, x = one_layer(kind).to(dtype), torch.randn(INPUTS[kind]).to(dtype)
    for method in METHODS:
        with torch.no_grad(), attach(model, ["a", "b"], method, masks=2):
            found = model["m"](x)
        assert found.dtype == dtype
        wide = copy.deepcopy(model).float()
        with torch.no_grad(), attach(wide, ["a", "b"], method, masks=2):
            expected = wide["m"](x.float())
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("active", ["a", ["b", "c"]])
def test_the_model_is_left_as_found(method, active):
    model = loaded(llama(), "abc", target_modules=["q_proj", "v_proj"])
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter(active)
    ids = torch.arange(20).view(2, 10)
    tensors = {key: t.clone() for key, t in model.state_dict().items()}
    before, plain = state_of(model), model(ids).logits
    samples = 1 if method == "direct" else 2
    with attach(model, ["a", "b"], method, samples=samples) as attached:
        assert attached is model
        assert not torch.equal(model(ids).logits, plain)
    assert state_of(model) == before
    with pytest.raises(RuntimeError), attach(model, ["a", "b"], method, samples=samples):
        model(ids.float())  # no indices
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, plain)
    assert all(torch.equal(t, tensors[key]) for key, t in model.state_dict().items())


def test_only_the_named_adapters_act():
    model, x = one_layer("linear", "abc"), torch.randn(3, 6)
    base, outputs = terms(model, x, "abc")
    model["m"].enable_adapters(False)
    with attach(model, ["b"], "direct"):
        torch.testing.assert_close(model["m"](x), base + outputs[1])
    assert torch.equal(model["m"](x), base)
    other = nn.ModuleDict({"m": nn.Linear(6, 6), "n": nn.Linear(6, 6)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["m"]), other, adapter_name="a")
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["n"], init_lora_weights=False), other, adapter_name="b"
    )
    other["n"].set_adapter("b")
    with attach(other, ["a"], "direct"):
        assert torch.equal(other["n"](x), other["n"].base_layer(x))
    assert not torch.equal(other["n"](x), other["n"].base_layer(x))


def test_scales_of_the_layers_are_read_in_every_call():
    """As diffusers changes them with the `scale` of a call."""
    model, x = one_layer("linear"), torch.randn(3, 6)
    base, outputs = terms(model, x, "ab")
    with attach(model, ["a", "b"], "direct"):
        model["m"].scale_layer(0.25)
        torch.testing.assert_close(model["m"](x), base + 0.25 * outputs.sum(0))
        model["m"].unscale_layer(0.25)
    torch.testing.assert_close(model["m"](x), base + outputs[0])


@pytest.mark.parametrize(("kind", "shape"), [("linear", (2, 6)), ("conv2d", (1, 6, 3, 3))])
@pytest.mark.parametrize("method", ["mc_dropout", "orthogonal_mc_dropout"])
@pytest.mark.parametrize("gpu", [False, True])
def test_gradients_reach_inputs_and_factors(monkeypatch, kind, shape, method, gpu):
    monkeypatch.setattr(mixture, "_on_gpu", lambda tensor: gpu)
    model = one_layer(kind).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]

    def call(*inputs: Tensor) -> Tensor:
        with attach(model, ["a", "b"], method, masks=1, drop_rates=[0.5, 0.6]):
            return model["m"](x)

    assert torch.autograd.gradcheck(call, (x, *factors))


def test_fresh_masks_are_drawn_again_by_activation_checkpointing():
    model, x = one_layer("linear"), torch.randn(40, 6, requires_grad=True)
    with attach(model, ["a", "b"]):
        torch.manual_seed(3)
        (expected,) = torch.autograd.grad(model["m"](x).square().sum(), x)
        torch.manual_seed(3)
        y = checkpoint(model["m"], x, use_reentrant=False)
        (found,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(found, expected)


def test_peft_dropout_acts_in_training_as_without():
    model = one_layer("linear", lora_dropout=0.5).train()
    x = torch.ones(200, 6)
    with attach(model, ["a", "b"], "direct"):
        assert len(model["m"](x).unique(dim=0)) > 10
        model.eval()
        # Up to rounding: how a product of matrices is summed up may depend on the row.
        outputs = model["m"](x)
        torch.testing.assert_close(outputs, outputs[:1].expand_as(outputs))


@pytest.mark.parametrize("masks", ["fresh", 3])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize(
    ("method", "rates"),
    [("orthogonal_mc_dropout", None), ("mc_dropout", None), ("mc_dropout", [0.5, 0.5, 0.5])],
)
def test_compiles_without_graph_breaks(kind, masks, method, rates):
    model, x = one_layer(kind, "abc"), torch.randn(INPUTS[kind])
    with torch.no_grad():
        with attach(model, ["a", "b", "c"], method, masks=masks, drop_rates=rates):
            torch._dynamo.reset()
            compiled = torch.compile(model["m"], fullgraph=True, backend="aot_eager")
            found = [compiled(x) for _ in range(3)]
        with attach(model, ["a", "b", "c"], method, masks=masks, drop_rates=rates):
            expected = [model["m"](x) for _ in range(3)]
    assert not torch.equal(found[0], found[1])
    if masks == 3:
        torch.testing.assert_close(found, expected)


def test_generation_with_a_cache_is_the_same_as_without():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    ids = torch.arange(8).view(2, 4)

    def generate(method: str, **options) -> Tensor:
        cache = options.pop("use_cache", True)
        with attach(model, ["a", "b"], method, **options):
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=5,
                do_sample=False,
                use_cache=cache,
                pad_token_id=0,
            )

    assert torch.equal(generate("direct"), generate("direct", use_cache=False))
    first = generate("orthogonal_mc_dropout", masks=1, samples=3)
    assert first.shape == (2, 9)
    assert torch.equal(generate("orthogonal_mc_dropout", masks=1, samples=3), first)
    assert not torch.equal(generate("orthogonal_mc_dropout", masks=2), generate("direct"))


def refused(reason: str, model: nn.Module, names, **options) -> None:
    before = state_of(model)
    with pytest.raises(UserError, match=reason) as error, attach(model, names, **options):
        pass
    assert "\n" not in str(error.value)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop_rates": [0.4, 0.3]}, r"sum \(1 - drop rate\) = 1\.3"),
        ({"drop_rates": [1.0, 0.5]}, r"drop rate of adapter 'a' is 1\.0: give one in \[0, 1\)"),
        ({"drop_rates": [0.5, -0.1]}, r"drop rate of adapter 'b' is -0\.1"),
        ({"drop_rates": [0.5]}, "1 drop rates for 2 adapters"),
        ({"drop_rates": [0.5, 1 - 1e-9]}, "so near 1"),
        ({"samples": 0}, "0 samples are not possible"),
        ({"samples": 2.0}, r"2\.0 samples are not possible"),
        ({"method": "direct", "samples": 4}, "draws no masks"),
        ({"masks": "fixed"}, "give 'fresh' or a seed"),
        ({"masks": True}, "give 'fresh' or a seed"),
        ({"weights": [1.0]}, "1 weights for 2"),
    ],
)
def test_bad_options(options, reason):
    refused(reason, one_layer("linear"), ["a", "b"], **options)


def test_bad_adapters():
    model = one_layer("linear")
    refused("no adapter 'c'.*(a|b)", model, ["a", "c"])
    refused("two adapters are called 'a'", model, ["a", "a"])
    refused("give a list of names", model, "a")
    refused("some of the adapters are names", model, ["a", Adapter("b", {})])
    refused("holds no LoRA layer", nn.Linear(2, 2), ["a"])
    with torch.no_grad():
        model["m"].lora_A["b"].weight[0, 0] = float("nan")
    refused("adapter 'b' has NaN", model, ["a", "b"])
    model = one_layer("linear")
    model["m"].merge(adapter_names=["b"])
    refused("adapter 'b' is merged into the weights of m", model, ["a"])
    elsewhere = nn.ModuleDict({"m": nn.Linear(6, 6), "n": nn.Linear(6, 6)})
    for name, target in (("a", "m"), ("b", "n")):
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        inject_adapter_in_model(config, elsewhere, adapter_name=name)
    elsewhere["n"].merge(adapter_names=["b"])
    refused("adapter 'b' is merged into the weights of n", elsewhere, ["a"])
    for config, reason in (
        ({"use_dora": True}, "not plain LoRA but DoraLinear"),
        ({"lora_bias": True}, "a bias of its own"),
    ):
        refused(reason, one_layer("linear", **config), ["a", "b"])
    refused("method works on linear", one_layer("conv2d"), ["a", "b"], method="emr", task="a")
    embedding = nn.ModuleDict({"m": nn.Embedding(5, 4)})
    refused("PEFT's Embedding, which takes no run-time", loaded(embedding), ["a", "b"])


@pytest.mark.parametrize(
    ("trained", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, r"'b' was saved with whole modules \(lm_head:"),
        ({"trainable_token_indices": [3, 5]}, "embed_tokens has token embeddings of its own"),
    ],
)
def test_what_a_language_model_has_beside_its_factors_is_refused(trained, reason):
    model = get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "a"
    )
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **trained))
    refused(reason, model, ["a", "b"])
    with attach(model, ["a"], "direct"):
        pass


def test_contexts_do_not_nest():
    model, x = one_layer("linear"), torch.randn(3, 6)
    plain = model["m"](x)
    with attach(model, ["a"], "direct"):
        alone = model["m"](x)
        with pytest.raises(UserError, match="do not nest"), attach(model, ["b"]):
            pass
        with pytest.raises(UserError, match="attached at run time"):
            model["m"].merge()
        assert torch.equal(model["m"](x), alone)
    assert torch.equal(model["m"](x), plain)
    both = nn.ModuleDict({"x": one_layer("linear", "ab"), "y": one_layer("linear", "cd")})
    with (
        attach(both, ["a"], "direct"),
        pytest.raises(
            UserError, match=r"x\.m has adapters attached already, and merges do not nest"
        ),
    ):
        attach(both, ["c"], "direct").__enter__()
    bare = nn.ModuleDict({"m": nn.Linear(6, 5)})
    adapter = Adapter("a", {"m": LowRank(torch.ones(5, 1), torch.ones(1, 6))})
    with attach(bare, [adapter]), pytest.raises(UserError, match="m has adapters attached"):
        attach(bare, [adapter]).__enter__()


def test_methods_of_others_run_on_linear_layers():
    model, x = one_layer("linear"), torch.randn(3, 6)
    base, outputs = terms(model, x, "ab")
    with attach(model, ["a"], "emr", task="a"):
        torch.testing.assert_close(model["m"](x), base + outputs[0])
