"""Random masks: their statistics, and that a row of one does not depend on who asks, or when."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_algorithms import Adapter, LowRank, merge, tiles

SEEDED = ("dare_linear", "dare_ties", "della", "della_linear")


def of_ones(name: str, shape: tuple[int, int]) -> Adapter:
    """An adapter that a merge turns into its mask: every entry is 1."""
    return Adapter(name, {"m": LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1]))})


def mask(name: str, shape: tuple[int, int], seed: int = 0, density: float = 0.3) -> Tensor:
    merged = merge([of_ones(name, shape)], "dare_linear", seed=seed, density=density)
    return merged.updates["m"].rows(0, shape[0])


def whole(merged) -> Tensor:
    return merged.updates["m"].rows(0, merged.updates["m"].shape[0])


def ramp(rows: int, width: int) -> LowRank:
    """Magnitudes 1 .. width in every row, every second one negative."""
    values = torch.arange(1.0, width + 1) * (-1) ** torch.arange(width)
    return LowRank(torch.ones(rows, 1), values[None])


def test_the_mean_over_seeds_is_the_dense_merge(random_adapter):
    """DARE's entries have variance x^2 (1 / p - 1): z scores of their means are standard normal."""
    adapters = [random_adapter(f"t{t}", {"m": (16, 12)}, seed=t) for t in range(3)]
    weights, p, count = [1.0, -0.5, 2.0], 0.25, 600
    dense = torch.stack([a.updates["m"].dense().double() for a in adapters])
    dense *= torch.tensor(weights)[:, None, None]
    drawn = torch.zeros(16, 12, dtype=torch.float64)
    for seed in range(count):
        drawn += whole(merge(adapters, "dare_linear", weights, seed=seed, density=p))
    variance = (dense**2 * (1 / p - 1)).sum(0) / count
    z = (drawn / count - dense.sum(0)) / variance.sqrt()
    assert z.abs().max() < 4.5
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / z.numel())


def test_della_keeps_by_rank_and_its_mean_is_the_dense_merge():
    """A row's entries of rank 1 .. n are kept with probabilities from 0.2 to 0.8."""
    width, rows = 16, 20_000
    update = ramp(rows, width)
    found = whole(merge([Adapter("a", {"m": update})], "della_linear", density=0.5, epsilon=0.3))
    kept = (found != 0).double().mean(0)
    p = 0.2 + 0.6 * torch.arange(width, dtype=torch.float64) / (width - 1)
    error = (p * (1 - p) / rows).sqrt()
    assert ((kept - p).abs() < 4.5 * error).all()
    relative = found.double().mean(0) / update.a[0] - 1
    assert (relative.abs() < 4.5 * error / p).all()


@pytest.mark.parametrize("density", [2**-16, 0.003, 0.1, 0.5, 0.9, 1.0])
def test_the_share_that_is_kept(density):
    found = mask("a", (1000, 1003), density=density)
    share = float((found != 0).double().mean())
    assert abs(share - density) < 5 * math.sqrt(density / found.numel()) + 2**-17
    kept = found[found != 0]
    assert (kept - 1 / density).abs().max() <= 1e-2 / density


def test_masks_of_rows_columns_adapters_modules_and_seeds_are_independent():
    """Correlations of +-1 patterns, in standard errors."""
    shape = (300, 301)
    base = mask("a", shape, density=0.5) - 1
    others = [
        base.roll(1, 0),
        base.roll(1, 1),
        base.roll(4, 1),
        mask("b", shape, density=0.5) - 1,
        mask("a", shape, seed=1, density=0.5) - 1,
    ]
    twice = {k: LowRank(torch.ones(300, 1), torch.ones(1, 301)) for k in ("m", "n")}
    pair = merge([Adapter("a", twice)], "dare_linear", density=0.5).updates
    assert torch.equal(pair["m"].rows(0, 300) - 1, base)
    others.append(pair["n"].rows(0, 300) - 1)
    for other in others:
        assert abs(float((base * other).mean())) * math.sqrt(base.numel()) < 4.5


@pytest.mark.parametrize("method", SEEDED)
@pytest.mark.parametrize("variant", ["authors", "mergekit"])
def test_rows_do_not_depend_on_the_tile_or_the_order(method, variant, random_adapter, monkeypatch):
    adapters = [random_adapter(f"t{t}", {"m": (37, 21)}, seed=t) for t in range(3)]
    expected = whole(merge(adapters, method, seed=5, variant=variant))
    for size in (1, 4 * 21 * 3 * 5):
        monkeypatch.setattr(tiles, "TILE_BYTES", size)
        update = merge(adapters, method, seed=5, variant=variant).updates["m"]
        torch.testing.assert_close(update.rows(0, 37), expected)
        for start, stop in ((30, 37), (3, 4), (0, 11), (3, 4)):
            torch.testing.assert_close(update.rows(start, stop), expected[start:stop])


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_a_mask_belongs_to_the_adapter_of_that_name(method, random_adapter):
    """Whatever the order, and whoever else is merged."""
    a, b = (random_adapter(name, {"m": (20, 20)}, seed=i) for i, name in enumerate("ab"))
    alone = whole(merge([a], method, density=0.5))
    for adapters, weights in (([a, b], [1, 0]), ([b, a], [0, 1])):
        torch.testing.assert_close(whole(merge(adapters, method, weights, density=0.5)), alone)
    renamed = Adapter("c", a.updates)
    assert not torch.equal(whole(merge([renamed], method, density=0.5)), alone)


@pytest.mark.parametrize("method", SEEDED)
def test_mergekit_matches_the_sum_of_magnitudes(method, random_adapter):
    """Mask, then scale each task's tensor to the L1 norm it had."""
    adapters = [random_adapter(f"t{t}", {"m": (9, 14)}, seed=t) for t in range(3)]
    weights = torch.tensor([1.0, 0.5, 2.0])
    linear = {"dare_ties": "dare_linear", "della": "della_linear"}.get(method, method)
    masked = []
    for adapter in adapters:
        kept = whole(merge([adapter], linear, density=0.6)) != 0
        dense = adapter.updates["m"].dense()
        part = dense * kept
        masked.append(part * (dense.abs().sum() / part.abs().sum()))
    products = weights[:, None, None] * torch.stack(masked)
    agree = torch.ones_like(products)
    if method != linear:
        agree = (products.sign() == torch.where(products.sum(0) >= 0, 1, -1)).float()
    expected = (products * agree).sum(0)
    if method == "della":
        shares = (weights[:, None, None] * agree).sum(0)
        expected = expected / torch.where(shares == 0, 1, shares)
    found = whole(merge(adapters, method, weights.tolist(), density=0.6, variant="mergekit"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
@pytest.mark.parametrize(("total", "rescaled"), [(2e-7, True), (9e-8, False), (0.0, False)])
def test_mergekit_leaves_vanishing_updates_as_the_mask_left_them(method, total, rescaled):
    """Below 1e-7 its sums of magnitudes are not matched."""
    shape = (8, 8)
    update = LowRank(torch.full((8, 1), total / 64), torch.ones(1, 8))
    options = {"density": 0.8, "variant": "mergekit"}
    found = whole(merge([Adapter("t", {"m": update})], method, **options))
    kept = whole(merge([of_ones("t", shape)], method, density=0.8)) != 0
    share = float(kept.float().mean())
    assert 0.5 < share < 1
    expected = total / 64 * kept / (share if rescaled else 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("method", SEEDED)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3)])
def test_tiny_tensors(method, shape, random_adapter):
    adapters = [random_adapter(f"t{t}", {"m": shape}, rank=1, seed=t) for t in range(2)]
    assert whole(merge(adapters, method)).isfinite().all()
    zero = Adapter("zero", {"m": LowRank(torch.zeros(shape[0], 1), torch.ones(1, shape[1]))})
    for variant in ("authors", "mergekit"):
        assert not whole(merge([zero], method, variant=variant)).any()
