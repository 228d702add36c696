from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from merge_algorithms.errors import UserError
from osrm import LeakPenalty, collect_covariance, freeze_lora_a, others_moments

D, R = 10, 3


class Net(nn.Module):
    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 6), second

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Quantised(nn.Module):
    """As a quantised layer looks from outside: integers, and a forward that undoes them."""

    def __init__(self, weight, bias):
        super().__init__()
        self.in_features, self.out_features = weight.shape[::-1]
        self.weight = nn.Parameter((weight * 127).round().to(torch.int8), requires_grad=False)
        self.bias = bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 127, self.bias)


def adapted(second=None, **options):
    torch.manual_seed(0)
    options = {"r": R, "lora_alpha": 8, "target_modules": ["first", "second"]} | options
    model = get_peft_model(Net(second or nn.Linear(6, 5)), LoraConfig(**options)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


@pytest.fixture
def inputs():
    """Module -> what the other tasks' tokens are there."""
    torch.manual_seed(1)
    return {"first": torch.randn(50, D).double(), "second": torch.randn(40, 6).double() + 0.5}


def moments(inputs):
    return {name: h.T @ h / len(h) for name, h in inputs.items()}


def dense(model, inputs, gamma, scale):
    """The definition: every dW formed, every token multiplied by it."""
    shares = []
    for name, h in inputs.items():
        layer = model.get_base_model().get_submodule(name)
        dw = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight = layer.base_layer.weight
        w0 = weight.T if isinstance(layer.base_layer, Conv1D) else weight
        shares.append((h @ dw.T).square().sum(1).mean() / (h @ w0.T).square().sum(1).mean())
    return gamma * sum(shares) / len(shares)


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 8 / 3), ({"use_rslora": True}, 8 / 3**0.5), ({"lora_alpha": 3}, 1.0)],
)
def test_value_and_gradients_are_those_of_the_dense_definition(options, scale, inputs):
    model = adapted(**options)
    penalty = LeakPenalty(model, moments(inputs), gamma=0.7)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    mine, expected = penalty(), dense(model, inputs, 0.7, scale)
    assert mine.dtype == torch.float64
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=0)
    found = torch.autograd.grad(mine, parameters)
    for gradient, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_conv1d_layers(inputs):
    model = adapted(Conv1D(5, 6))
    penalty = LeakPenalty(model, moments(inputs), gamma=1.0)
    torch.testing.assert_close(penalty(), dense(model, inputs, 1.0, 8 / 3), rtol=1e-10, atol=0)


def test_a_quantised_base_is_asked_for_the_weight_it_computes_with(inputs):
    model = adapted()
    layer = model.get_base_model().second
    weight = (layer.base_layer.weight * 127).round() / 127
    plain = LeakPenalty(model, moments(inputs), gamma=1.0)()
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
    expected = LeakPenalty(model, moments(inputs), gamma=1.0)()
    layer.base_layer = Quantised(weight, layer.base_layer.bias.float())
    found = LeakPenalty(model, moments(inputs), gamma=1.0)()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert not torch.isclose(found, plain, rtol=1e-5)


def test_it_follows_the_scale_and_freezing(inputs):
    model = adapted()
    penalty = LeakPenalty(model, moments(inputs), gamma=1.0)
    before = penalty()
    for name in inputs:
        model.get_base_model().get_submodule(name).scaling["default"] *= 3
    torch.testing.assert_close(penalty(), 9 * before)
    freeze_lora_a(model)
    penalty().backward()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert parameter.grad is None
        elif "lora_B" in name:
            assert parameter.grad.any()


def test_its_gradient_is_added_for_the_optimiser_that_steps_and_where_the_loss_has_one(inputs):
    model = adapted(target_modules=["first"])
    penalty = LeakPenalty(model, moments(inputs), gamma=0.7)
    a, b = (p for name, p in model.named_parameters() if "lora_" in name)
    penalty.add_gradient()
    assert a.grad is b.grad is None
    loss, both = model(inputs["first"]).square().mean(), torch.autograd.grad(penalty(), [a, b])
    of_loss = torch.autograd.grad(loss, [a, b], retain_graph=True)
    loss.backward()
    for held in (b, a):  # each once, though both are announced
        with torch.no_grad():
            penalty.add_gradient(torch.optim.SGD([held, inputs["second"]]), scale=3.0)
    for factor, *parts in zip((a, b), of_loss, both, strict=True):
        torch.testing.assert_close(factor.grad, parts[0] + 3 * parts[1])


def test_half_precision_factors_under_autocast_are_computed_in_float32(inputs):
    model = adapted().bfloat16()
    penalty = LeakPenalty(model, moments(inputs), gamma=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = penalty()
    assert found.dtype == torch.float32
    wide = dense(model.double(), inputs, 1.0, 8 / 3)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=0)


def test_training_with_it_leaks_less(inputs):
    def leak(gamma):
        model = adapted(target_modules=["first"]).float()
        h, y = torch.randn(64, D), torch.randn(64, 5)
        penalty = LeakPenalty(model, moments(inputs), gamma=gamma)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(40):
            loss = (model(h) - y).square().mean() + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return penalty().item() / gamma

    assert leak(10.0) < 0.2 * leak(1e-6)


def test_the_moments_of_the_others_are_what_it_takes(make_model, texts, batches):
    base = make_model("bert")
    covariances = {
        task: collect_covariance(base, batches(texts(12, seed=i)), ["query", "value"])
        for i, task in enumerate("abc")
    }
    others = others_moments(covariances, "a", {"b": 3.0})
    name = "encoder.layer.0.attention.self.query"
    b, c = (covariances[task].matrix(name) for task in "bc")
    torch.testing.assert_close(others[name], (3 * b + c) / 4)
    assert others[name] is others[name.replace("query", "value")]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"]))
    penalty = LeakPenalty(model, others, gamma=0.1)
    assert penalty().item() == 0, "B is zero at the start"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"gamma": 0.0}, "gamma is 0.0: give a number above 0"),
        ({"gamma": float("inf")}, "gamma is inf"),
        ({"adapter_name": "other"}, "adapter 'other'"),
        ({"others": {}}, "no second moment for module 'first'"),
        ({"others": {"first": torch.ones(D, 3)}}, "which reads 10 features"),
        ({"others": {"first": torch.ones(3, D)}}, "shape .3, 10.: expected .d_in, d_in."),
        ({"others": {"first": torch.zeros(D, D)}}, "gives no output on the other tasks' inputs"),
    ],
)
def test_bad_input(case, message):
    model = adapted(target_modules=["first"])
    with pytest.raises(UserError, match=message):
        LeakPenalty(model, **({"others": {"first": torch.eye(D)}, "gamma": 1.0} | case))


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_an_adapter_that_is_more_than_its_factors_is_refused(option):
    model = adapted(target_modules=["first"], **{option: True})
    with pytest.raises(UserError, match=rf"\({option}\) at first.*without {option}"):
        LeakPenalty(model, {"first": torch.eye(D)}, gamma=1.0)
