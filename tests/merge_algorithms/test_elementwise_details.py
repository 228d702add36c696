"""The elementwise family beyond the contract: edges, what stays of a row, many adapters."""

from __future__ import annotations

import pytest
import torch
from formulas import elementwise
from torch import Tensor

from merge_algorithms import Adapter, LowRank, UserError, merge, threshold, tiles
from merge_algorithms.threshold import top_threshold

DETERMINISTIC = ("ties", "magnitude_prune", "breadcrumbs", "breadcrumbs_ties")
FAMILY = (*DETERMINISTIC, "dare_linear", "dare_ties", "della", "della_linear")


def entries(*rows: list[float]) -> LowRank:
    """An update whose entries are exactly these."""
    return LowRank(torch.eye(len(rows)), torch.tensor(rows))


def result(update: LowRank, method: str, **options) -> list[list[float]]:
    merged = merge([Adapter("a", {"m": update})], method, **options).updates["m"]
    return merged.rows(0, merged.shape[0]).tolist()


def test_breadcrumbs_keep_the_middle_of_every_row():
    update = entries([10, -9, 8, 7, 6], [1, 2, -3, 4, 5])
    assert result(update, "breadcrumbs", density=0.4, gamma=0.2) == [
        [0, -9, 8, 0, 0],
        [0, 0, -3, 4, 0],
    ]
    assert result(update, "breadcrumbs", density=0.4, gamma=0.2, variant="mergekit") == [
        [0, 0, 8, 7, 6],
        [0, 0, 0, 0, 5],
    ]


def test_at_least_one_entry_of_a_row_stays():
    assert result(entries([1, 3, -2]), "breadcrumbs") == [[0, 3, 0]]
    assert result(entries([4]), "breadcrumbs", gamma=0.0) == [[4]]


def test_breadcrumbs_drop_nothing_at_gamma_0():
    """mergekit's slice keeps nothing at all there."""
    update = entries([1, 3, -2, 5])
    for variant in ("authors", "mergekit"):
        kept = result(update, "breadcrumbs", density=0.5, gamma=0.0, variant=variant)
        assert kept == [[0, 3, 0, 5]]


@pytest.mark.parametrize(
    "method", ["magnitude_prune", "breadcrumbs", "dare_linear", "della_linear"]
)
def test_linear_members_add_up_what_the_adapters_leave_alone(method, random_adapter):
    a, b = (random_adapter(name, seed=i) for i, name in enumerate("ab"))
    both = merge([a, b], method, [2.0, -1.0]).updates
    parts = [merge([one], method).updates for one in (a, b)]
    for module, update in both.items():
        x, y = (part[module].rows(0, update.shape[0]) for part in parts)
        torch.testing.assert_close(update.rows(0, update.shape[0]), 2 * x - y)


@pytest.mark.parametrize("method", FAMILY)
def test_256_adapters(method, random_adapter):
    adapters = [random_adapter(f"t{t}", {"m": (5, 6)}, rank=1 + t % 3, seed=t) for t in range(256)]
    merged = merge(adapters, method).updates["m"].rows(0, 5)
    assert merged.isfinite().all()
    if method in DETERMINISTIC:
        dense = {"m": torch.stack([a.updates["m"].dense().double() for a in adapters])}
        expected = getattr(elementwise, method)(dense, torch.ones(256, dtype=torch.float64))["m"]
        torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "remedy"),
    [
        ("dare_ties", {"density": 0.0}, "outside"),
        ("della", {"density": 0.9, "epsilon": 0.2}, "from 0 to 0.1"),
        ("della_linear", {"density": 1.0}, "from 0 to 0"),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.2}, "from 0 to 0.1"),
        ("ties", {"variant": "merge-kit"}, "did you mean 'mergekit'"),
    ],
)
def test_out_of_range_says_what_to_do(method, options, remedy, random_adapter):
    with pytest.raises(UserError, match=remedy):
        merge([random_adapter("a")], method, **options)


def updates(count: int = 3, size: tuple[int, int] = (70, 90)) -> list[LowRank]:
    draw = torch.Generator().manual_seed(1)
    return [
        LowRank(
            torch.randn(size[0], 4, generator=draw) * torch.rand(size[0], 1, generator=draw),
            torch.randn(4, size[1], generator=draw),
        )
        for _ in range(count)
    ]


def kept_by(found: list[LowRank], keep: int) -> int:
    limit = top_threshold(found, keep)
    return sum(int((update.dense().abs() > limit).sum()) for update in found)


@pytest.mark.parametrize("keep", [1, 2, 17, 3780, 9449, 18_898, 18_899, 18_900])
def test_the_threshold_is_exact_whatever_the_sample(keep, monkeypatch):
    """With a bracket that fits, one that is far too narrow, and a sample that is all wrong."""
    found = updates()
    assert kept_by(found, keep) == keep
    monkeypatch.setattr(threshold, "_MARGIN", 1e-9)
    assert kept_by(found, keep) == keep

    def misleading(updates, count) -> Tensor:
        return torch.linspace(1e-3, 1e-4, count)

    monkeypatch.setattr(threshold, "_sample", misleading)
    assert kept_by(found, keep) == keep


def test_the_sample_is_the_same_to_the_bit_whatever_the_tile(monkeypatch):
    whole = threshold._sample(updates(), 2000)
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    assert torch.equal(threshold._sample(updates(), 2000), whole)


def test_zeros_are_never_kept():
    """An adapter that touches one module of three: the others' zeros do not count as entries."""
    one, two, three = updates()
    silent = [LowRank(two.b * 0, two.a), LowRank(three.b[:, :0], three.a[:0])]
    assert kept_by([one, *silent], 9000) == one.b.shape[0] * one.a.shape[1]
    assert kept_by([one, *silent], 5000) == 5000
    assert top_threshold(silent, 10) == 0.0


def test_equal_magnitudes_stay_together_in_a_large_adapter():
    constant = LowRank(torch.ones(90, 1), torch.ones(1, 90))
    assert kept_by([constant, *updates()], 12_000) >= 12_000
    assert kept_by([constant], 5) == 8100
