"""Theorem 1 of arXiv 2510.03262 and what follows from it, on a million elements each."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from merge_algorithms import Adapter, LowRank, attach
from merge_algorithms.mixture import Words, word_limits

SHAPE = (1000, 1000)
RATES = {
    "two, equal": [0.5, 0.5],
    "three, equal": [2 / 3] * 3,
    "eight, equal": [7 / 8] * 8,
    "unequal, full": [0.4, 0.75, 0.87, 0.98],
    "unequal, room for nobody": [0.5, 0.75, 0.9],
    "one": [0.3],
}
CASES = pytest.mark.parametrize("rates", RATES.values(), ids=RATES)


def owners(rates: list[float], masks: int = 0) -> Tensor:
    """Who owns each element: the adapter's index, T for nobody."""
    count = len(rates)
    adapters = [
        Adapter(
            f"t{t:02}",
            {"m": LowRank(torch.full((SHAPE[1], 1), (t + 1) * (1 - p)), torch.ones(1, 1))},
        )
        for t, p in enumerate(rates)
    ]
    model = nn.ModuleDict({"m": nn.Linear(1, SHAPE[1], bias=False)})
    nn.init.zeros_(model["m"].weight)
    with attach(model, adapters, masks=masks, drop_rates=rates), torch.no_grad():
        found = model["m"](torch.ones(SHAPE[0], 1)).sub_(1)
    owned = found.round().long()
    assert torch.allclose(found, owned.float(), atol=1e-4), "an element with two owners"
    return owned.where(owned >= 0, count)


def sequential(rates: list[float], generator: torch.Generator) -> Tensor:
    """z_j ~ Bern((1 - p_j) / (1 - sum_{i<j} (1 - p_i))), m_j = z_j prod_{i<j} (1 - z_i)."""
    owned = torch.full(SHAPE, len(rates))
    free, left = torch.ones(SHAPE, dtype=torch.bool), 1.0
    for j, p in enumerate(rates):
        share = torch.full(SHAPE, min(1.0, (1 - p) / left) if left > 1e-12 else 0.0)
        z = torch.bernoulli(share.double(), generator=generator).bool()
        owned[z & free] = j
        free, left = free & ~z, left - (1 - p)
    return owned


def probabilities(rates: list[float]) -> Tensor:
    kept = [1 - p for p in rates]
    return torch.tensor([*kept, max(0.0, 1 - sum(kept))], dtype=torch.float64)


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square test; categories of probability 0 must be empty."""
    possible = expected > 1e-6
    assert not counts[~possible].any()
    statistic = ((counts - expected).square() / expected)[possible].sum()
    degrees = torch.tensor((possible.sum().item() - 1) / 2, dtype=torch.float64)
    return 1.0 if degrees == 0 else float(torch.special.gammaincc(degrees, statistic / 2))


@CASES
def test_every_mask_is_bernoulli(rates):
    """And the masks are disjoint for every element: `owners` finds exactly one owner or nobody."""
    counts = torch.bincount(owners(rates).flatten(), minlength=len(rates) + 1).double()
    expected = probabilities(rates) * counts.sum()
    assert p_value(counts, expected) > 1e-3
    for t in range(len(rates)):
        alone = torch.stack([counts[t], counts.sum() - counts[t]])
        rest = torch.stack([expected[t], counts.sum() - expected[t]])
        assert p_value(alone, rest) > 1e-3


@CASES
def test_one_word_has_the_joint_law_of_the_sequential_draws(rates):
    ours = torch.bincount(owners(rates).flatten(), minlength=len(rates) + 1).double()
    draws = sequential(rates, torch.Generator().manual_seed(1)).flatten()
    theirs = torch.bincount(draws, minlength=len(rates) + 1).double()
    both = (ours + theirs) / 2
    assert p_value(torch.cat([ours, theirs]), torch.cat([both, both])) > 1e-3


@CASES
@pytest.mark.parametrize("step", [1, 3, SHAPE[1]], ids=["next", "third", "next token"])
def test_elements_are_independent(rates, step):
    """Also those whose words were cut from one draw of 64 bits."""
    found = owners(rates).flatten()
    pairs = found[:-step] * (len(rates) + 1) + found[step:]
    law = probabilities(rates)
    counts = torch.bincount(pairs, minlength=len(law) ** 2).double()
    assert p_value(counts, torch.outer(law, law).flatten() * counts.sum()) > 1e-4


@pytest.mark.parametrize(
    "rates",
    [[0.5] * 9, [0.25] * 3, [7 / 8] * 8, [0.625] * 17, [2 / 3] * 7, [0.8] * 5, [0.5, 0.75, 0.5]],
    ids=lambda rates: f"{len(rates)} of {rates[0]:.3g}",
)
def test_independent_masks_are_bernoulli_and_independent(rates):
    """Of each other and of the next elements, also where several go by one word."""
    adapters = [
        Adapter(
            f"t{t:02}",
            {"m": LowRank(torch.full((SHAPE[1], 1), 2.0**t * (1 - p)), torch.ones(1, 1))},
        )
        for t, p in enumerate(rates)
    ]
    model = nn.ModuleDict({"m": nn.Linear(1, SHAPE[1], bias=False)})
    nn.init.zeros_(model["m"].weight)
    with attach(model, adapters, "mc_dropout", masks=5, drop_rates=rates), torch.no_grad():
        found = model["m"](torch.ones(SHAPE[0], 1)).round().long().flatten()
    masks = [found >> t & 1 for t in range(len(rates))]
    for mask, p in zip(masks, rates, strict=True):
        counts = torch.bincount(mask, minlength=2).double()
        assert p_value(counts, torch.tensor([p, 1 - p]).double() * len(mask)) > 1e-4
    for one, other in itertools.combinations_with_replacement(range(len(rates)), 2):
        for step in (0, 1, SHAPE[1]) if one != other else (1, SHAPE[1]):
            pairs = 2 * masks[one][: len(found) - step] + masks[other][step:]
            counts = torch.bincount(pairs, minlength=4).double().reshape(2, 2)
            expected = torch.outer(counts.sum(1), counts.sum(0)) / counts.sum()
            # Up to 442 tests a case; of 3 degrees of freedom where 1 is free, which is lenient.
            assert p_value(counts.flatten(), expected.flatten()) > 1e-5


SHARED = {1 / 2: 8, 3 / 4: 4, 1 / 8: 2, 5 / 8: 2, 1 / 16: 2, 1 / 3: 3, 2 / 3: 3, 1 / 5: 2, 1 / 7: 2}


@pytest.mark.parametrize(("kept", "most"), SHARED.items())
def test_masks_that_share_a_word_are_independent_over_all_words(monkeypatch, kept, most):
    """Exactly where rates are dyadic, else to within a thousandth of every joint probability."""
    drawn: list[int] = []

    def every_word(words: Words, like: Tensor, bits: int) -> Tensor:
        drawn.append(bits)
        dtype = torch.int8 if bits == 8 else torch.int16
        return torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).repeat(256 >> (bits - 8)).to(dtype)

    monkeypatch.setattr(Words, "now", every_word)
    model = nn.ModuleDict({"m": nn.Linear(1, 1 << 16, bias=False)})
    nn.init.zeros_(model["m"].weight)
    for count in itertools.count(2):
        adapters = [
            Adapter(f"t{t:02}", {"m": LowRank(torch.full((1 << 16, 1), 2.0**t), torch.ones(1, 1))})
            for t in range(count)
        ]
        drawn.clear()
        rates, weights = [1 - kept] * count, [kept] * count
        with attach(model, adapters, "mc_dropout", weights, drop_rates=rates), torch.no_grad():
            found = model["m"](torch.ones(1)).round().long()
        if len(drawn) > 1:
            break
        assert drawn
        law = torch.bincount(found, minlength=2**count).double() / len(found)
        sizes = torch.tensor([subset.bit_count() for subset in range(2**count)]).double()
        expected = kept**sizes * (1 - kept) ** (count - sizes)
        exact = drawn == [8]
        torch.testing.assert_close(law, expected, rtol=1e-12 if exact else 1e-3, atol=0.0)
    assert count == most + 1


def test_modules_and_calls_are_independent():
    rates = RATES["three, equal"]
    generators = [lambda device, s=s: torch.Generator(device).manual_seed(s) for s in (1, 2)]
    bits, limits = word_limits([0.0, *itertools.accumulate(1 - p for p in rates)])
    edges = torch.tensor([limit - 2 ** (bits - 1) for limit in limits[1:-1]])
    one, other = [Words(generator) for generator in generators]
    like = torch.empty(SHAPE)
    draws = [torch.bucketize(w.draw(like, bits), edges, right=True) for w in (one, one, other)]
    for first, second in itertools.combinations(draws, 2):
        counts = torch.bincount((first * 3 + second).flatten(), minlength=9).double()
        assert p_value(counts, torch.full((9,), counts.sum() / 9)) > 1e-3


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_words_are_uniform_whatever_their_length(bits):
    words = Words(lambda device: torch.Generator(device).manual_seed(3))
    for shape in [(1000, 1000), (7,), (1,), (0, 4), (3, 5, 7)]:
        drawn = words.draw(torch.empty(shape), bits)
        assert drawn.shape == torch.Size(shape)
    high = (words.draw(torch.empty(SHAPE), bits).long() + 2 ** (bits - 1)) >> (bits - 8)
    counts = torch.bincount(high.flatten(), minlength=256).double()
    assert p_value(counts, torch.full((256,), counts.sum() / 256)) > 1e-3


@pytest.mark.parametrize(
    ("kept", "bits"), [([0.5, 0.5], 8), ([1 / 3] * 3, 16), ([0.01, 0.99], 32), ([1e-5, 0.5], 32)]
)
def test_words_are_as_long_as_the_rates_need(kept, bits):
    edges = [0.0, *itertools.accumulate(kept)]
    found, limits = word_limits(edges)
    assert found == bits
    for (low, high), p in zip(itertools.pairwise(limits), kept, strict=True):
        assert (high - low) / 2**bits == pytest.approx(p, rel=1e-4)


@pytest.fixture
def three(random_adapter) -> list[Adapter]:
    shapes = {"layer.0.query": (12, 10)}
    return [random_adapter(f"t{t}", shapes, seed=t) for t in range(3)]


@pytest.mark.parametrize("rates", [None, [0.5, 0.8, 0.75]])
def test_outputs_of_different_adapters_are_orthogonal_for_every_token(three, linear_model, rates):
    query, x = linear_model.layer[0].query, torch.randn(500, 10)
    nn.init.zeros_(query.weight)
    nn.init.zeros_(query.bias)

    def alone(*weights: float) -> Tensor:
        with attach(linear_model, three, masks=4, weights=weights, drop_rates=rates):
            return query(x).detach()

    parts = [alone(*(float(s == t) for s in range(3))) for t in range(3)]
    for one, other in itertools.combinations(parts, 2):
        assert (one * other).count_nonzero() == 0
        assert ((one * other).sum(-1) == 0).all()
    assert torch.equal(sum(parts), alone(1, 1, 1))


@pytest.mark.parametrize("method", ["mc_dropout", "orthogonal_mc_dropout"])
@pytest.mark.parametrize("rates", [None, [0.5, 0.8, 0.75]])
def test_the_expectation_is_the_direct_merge(three, linear_model, method, rates):
    query, w = linear_model.layer[0].query, [1.0, -0.5, 2.0]
    x = torch.randn(4, 10).expand(4000, 4, 10)
    with torch.no_grad():
        with attach(linear_model, three, "direct", weights=w):
            expected = query(x[0])
        with attach(linear_model, three, method, weights=w, masks=0, drop_rates=rates):
            found = query(x)
    errors = (found.mean(0) - expected) / (found.std(0) / len(x) ** 0.5)
    # 48 means, each within 4 standard errors but for 6 in 100,000.
    assert errors.abs().max() < 4
