"""attach() makes the same in the steps of a GPU, which a CPU can take too."""

from __future__ import annotations

import pytest
import torch
from test_runtime_peft import INPUTS, LAYERS, METHODS, one_layer, terms
from torch import Tensor

from merge_algorithms import attach, mixture


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("rates", [None, [0.8, 0.7, 0.9]])
@pytest.mark.parametrize("method", METHODS)
def test_the_steps_of_a_gpu_give_the_same(monkeypatch, method, rates, recorded):
    model, x = one_layer("linear", "abc"), torch.randn(30_000, 6)
    options = {} if method == "direct" else {"drop_rates": rates, "masks": 5}

    def outputs() -> Tensor:
        with torch.set_grad_enabled(recorded), attach(model, ["a", "b", "c"], method, **options):
            return model["m"](x).detach()

    expected = outputs()
    monkeypatch.setattr(mixture, "_on_gpu", lambda tensor: True)
    torch.testing.assert_close(outputs(), expected)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("names", ["ab", "abcdefgh"])
def test_a_gpu_makes_the_masks_of_several_passes_at_once(monkeypatch, kind, names):
    """Every element is a sum of some adapters' outputs; in compiled code too."""
    model, x = one_layer(kind, names), torch.randn(INPUTS[kind])
    monkeypatch.setattr(mixture, "_on_gpu", lambda tensor: True)
    with torch.no_grad():
        base, outputs = terms(model, x, names)
        sums = torch.zeros_like(base)[None]
        for output in outputs * len(names):
            sums = torch.cat([sums, sums + output])
        with attach(model, list(names), "mc_dropout"):
            torch._dynamo.reset()
            compiled = torch.compile(model["m"], fullgraph=True, backend="aot_eager")
            for found in (model["m"](x), compiled(x)):
                assert torch.isclose(sums, found - base, rtol=1e-4, atol=1e-4).any(0).all()
                assert not torch.allclose(found, base)


@pytest.mark.parametrize("names", ["abcdef", "abcdefgh"])
def test_masks_made_at_once_are_those_made_one_by_one(monkeypatch, names):
    model, x = one_layer("linear", names), torch.randn(800, 6)
    found = []
    for gpu in (False, True):
        monkeypatch.setattr(mixture, "_on_gpu", lambda tensor, gpu=gpu: gpu)
        with torch.no_grad(), attach(model, list(names), "mc_dropout", masks=1):
            found.append(model["m"](x))
    torch.testing.assert_close(*found)
