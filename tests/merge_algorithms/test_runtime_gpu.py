"""attach() makes the same in the steps of a GPU, which a CPU can take too."""

from __future__ import annotations

import pytest
import torch
from test_runtime_peft import INPUTS, LAYERS, METHODS, one_layer, terms
from torch import Tensor

from merge_algorithms import attach, mixture


def compared(words: mixture.Words, limit: int, like: Tensor, bits: int, *more: int) -> Tensor:
    """Words.below() as it is on a CPU: words that are drawn and compared, pass by pass."""
    half = 1 << (bits - 1)
    found = [words.now(like, bits) < limit - half for _ in range(more[0] if more else 1)]
    return torch.stack(found) if more else found[0]


@pytest.fixture
def one_by_one(monkeypatch) -> None:
    """A CPU that draws every pass's words, as `compared` does."""
    monkeypatch.setattr(mixture, "_digits", lambda limits, bits: (1, 1))
    monkeypatch.setattr(mixture.Words, "below", compared)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("rates", [None, [0.8, 0.7, 0.9]])
@pytest.mark.parametrize("names", ["ab", "abc"])
@pytest.mark.parametrize("method", METHODS)
def test_the_steps_of_a_gpu_give_the_same(monkeypatch, method, names, rates, recorded):
    model, x = one_layer("linear", names), torch.randn(30_000, 6)
    rates = rates and rates[: len(names)]
    options = {} if method == "direct" else {"drop_rates": rates, "masks": 5}

    def outputs() -> Tensor:
        with torch.set_grad_enabled(recorded), attach(model, list(names), method, **options):
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


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("names", ["abcdef", "abcdefgh"])
def test_masks_made_at_once_are_those_made_one_by_one(monkeypatch, names):
    model, x = one_layer("linear", names), torch.randn(800, 6)
    found = []
    for gpu in (False, True):
        monkeypatch.setattr(mixture, "_on_gpu", lambda tensor, gpu=gpu: gpu)
        with torch.no_grad(), attach(model, list(names), "mc_dropout", masks=1):
            found.append(model["m"](x))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("limit", "bits"), [(1 << 7, 8), (13_000, 16), (1 << 20, 32)])
@pytest.mark.parametrize("seeded", [False, True])
def test_masks_without_words_have_the_probability_of_the_limit(limit, bits, seeded):
    """Chi-square of 10^6 draws per mask, and masks of one call independent of each other."""
    words = mixture.Words(
        (lambda device: torch.Generator(device).manual_seed(3)) if seeded else None
    )
    torch.manual_seed(4)
    masks = words.below(limit, torch.empty(1000, 1000), bits, 2).flatten(1).double()
    chance = limit / 2**bits
    variance = chance * (1 - chance) / masks.shape[1]
    assert ((masks.mean(1) - chance) ** 2 / variance < 15).all()  # p = .0001
    both = (masks[0] * masks[1]).mean()
    assert (both - chance**2) ** 2 / (chance**2 * (1 - chance**2) / masks.shape[1]) < 15


def test_two_adapters_share_every_element_in_the_steps_of_a_gpu(monkeypatch):
    """Without a seed too: each element is one adapter's output, of both about as often."""
    model, x = one_layer("linear", "ab"), torch.randn(20_000, 6)
    monkeypatch.setattr(mixture, "_on_gpu", lambda tensor: True)
    with torch.no_grad():
        base, outputs = terms(model, x, "ab")
        with attach(model, ["a", "b"], "orthogonal_mc_dropout", drop_rates=[0.3, 0.7]):
            added = model["m"](x) - base
    owned = [
        torch.isclose(added, output / keep, rtol=1e-3, atol=1e-3)
        for output, keep in zip(outputs, (0.7, 0.3), strict=True)
    ]
    assert (owned[0] | owned[1]).all()
    share = (owned[0] & ~owned[1]).double().mean()
    assert abs(share - 0.7) < 0.02
