from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from merge_algorithms.errors import UserError
from osrm import freeze_lora_a, initialize_lora_osrm_weights, lora_a, project_lora_a

R, K, D = 4, 7, 32


@pytest.fixture
def model(make_model):
    return get_peft_model(make_model("bert"), LoraConfig(r=R, target_modules=["query", "value"]))


@pytest.fixture
def bases(model):
    return {name: torch.linalg.qr(torch.randn(D, K)).Q.T.contiguous() for name in lora_a(model)}


def steps(model, batch, after_step=lambda: None, count=4):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    for _ in range(count):
        model(**batch).last_hidden_state[:, 0, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def outside(a, v):
    return float((a - a @ v.T @ v).norm() / a.norm())


def test_frozen_a_stays_while_b_trains(model, bases, texts, batches):
    initialize_lora_osrm_weights(model, bases)
    freeze_lora_a(model)
    steps(model, batches(texts(3, seed=1))[0])
    for name, a in lora_a(model).items():
        assert torch.equal(a, bases[name][:R])
    b = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.requires_grad and p.any() for p in b)


def test_projected_a_trains_inside_its_subspace(model, bases, texts, batches):
    batch = batches(texts(3, seed=1))[0]
    initialize_lora_osrm_weights(model, bases)
    steps(model, batch, lambda: project_lora_a(model, bases))
    for name, a in lora_a(model).items():
        assert outside(a, bases[name]) < 1e-6
        assert not torch.allclose(a, bases[name][:R], atol=1e-2), "A must be able to move"
    steps(model, batch)
    assert all(outside(a, bases[name]) > 1e-2 for name, a in lora_a(model).items())


def test_projection_is_the_nearest_point_and_repeating_it_changes_nothing(model, bases):
    before = lora_a(model)
    project_lora_a(model, bases)
    once = lora_a(model)
    project_lora_a(model, bases)
    for name, a in lora_a(model).items():
        coefficients = torch.linalg.lstsq(bases[name].T.double(), before[name].T.double()).solution
        nearest = (bases[name].T.double() @ coefficients).T
        torch.testing.assert_close(once[name].double(), nearest, atol=1e-6, rtol=0)
        torch.testing.assert_close(a, once[name], atol=1e-6, rtol=0)


def test_projection_has_full_precision_under_autocast(model, bases):
    before = lora_a(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        project_lora_a(model, bases)
    for name, a in lora_a(model).items():
        torch.testing.assert_close(a, before[name] @ bases[name].T @ bases[name], atol=1e-6, rtol=0)


def test_only_the_named_adapter_is_touched(model, bases):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query", "value"]))
    model.set_adapter("second")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    first = lora_a(model)
    project_lora_a(model, bases, "second")
    freeze_lora_a(model, "second")
    assert all(torch.equal(a, first[name]) for name, a in lora_a(model).items())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 4
    assert all("lora_A.second" in name for name in frozen)


def test_bases_that_do_not_fit_change_nothing(model, bases):
    before = lora_a(model)
    last = list(bases)[-1]
    for wrong, message in [
        ({name: v for name, v in bases.items() if name != last}, "no subspace for module"),
        (bases | {last: bases[last][:, :-1]}, "another model"),
    ]:
        with pytest.raises(UserError, match=message):
            project_lora_a(model, wrong)
    with pytest.raises(UserError, match="adapter 'other'"):
        freeze_lora_a(model, "other")
    assert all(torch.equal(a, before[name]) for name, a in lora_a(model).items())


def test_embeddings_are_refused():
    """They have an A, but no inputs with a covariance."""
    layers = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "linear": nn.Linear(4, 4)})
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["embedding", "linear"]))
    with pytest.raises(UserError, match="on the embedding embedding: only linear layers have"):
        freeze_lora_a(model)


def test_bare_parameters_are_refused():
    """As those of a mixture's experts: no module of their own reads their inputs."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.down = nn.Parameter(torch.randn(3, 4, 4))
            self.linear = nn.Linear(4, 4)

    config = LoraConfig(r=2, target_modules=["linear"], target_parameters=["experts.down"])
    model = get_peft_model(Experts(), config)
    with pytest.raises(UserError, match=r"bare parameter experts.down \(target_parameters\)"):
        freeze_lora_a(model)
