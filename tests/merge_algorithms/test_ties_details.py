"""TIES beyond the contract: exact thresholds, ties between entries, the majority, memory."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from merge_algorithms import Adapter, LowRank, merge, tiles, trim
from merge_algorithms.threshold import top_threshold


def entries(*values: float) -> LowRank:
    """An update whose entries are exactly these."""
    return LowRank(torch.ones(1, 1), torch.tensor([values]))


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40
    ),
    data=st.data(),
)
def test_threshold_separates_the_largest_from_the_rest(values, data):
    """Against a sort; with repeated, denormal and huge values, and ulps apart."""
    neighbour = torch.nextafter(torch.tensor(values[0]), torch.tensor(0.0)).item()
    values = [*values, neighbour, values[-1]]
    keep = data.draw(st.integers(1, len(values)))
    threshold = top_threshold([entries(*values[::2]), entries(*values[1::2])], keep)
    smallest = sorted(map(abs, values), reverse=True)[keep - 1]
    kept = [abs(x) > threshold for x in values]
    assert kept == [abs(x) >= smallest and x != 0 for x in values] or keep >= len(values)


def test_entries_equal_to_the_smallest_kept_one_stay():
    merged = merge([Adapter("a", {"m": entries(5, -3, 3, 3, 1, 0.5)})], "ties", density=0.5)
    assert merged.updates["m"].rows(0, 1).tolist() == [[5, -3, 3, 3, 0, 0]]


def test_at_least_one_entry_stays():
    merged = merge([Adapter("a", {"m": entries(1, 2, -7)})], "ties", density=0.01)
    assert merged.updates["m"].rows(0, 1).tolist() == [[0, 0, -7]]


def test_the_share_means_the_number_that_was_written():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    merged = merge([Adapter("a", {"m": entries(*range(1, 101))})], "ties", density=0.29)
    assert int(merged.updates["m"].rows(0, 1).count_nonzero()) == 29


def test_float64_entries_are_compared_in_float32():
    """3 + 2^-30 is 3 in float32, so it stays with 3; 3 - 2^-22 is the next smaller float32."""
    near = [3.0, 3 + 2**-30, 3 - 2**-22, 3 - 2**-22 + 2**-30]
    exact = torch.tensor([near], dtype=torch.float64)
    update = LowRank(torch.ones(1, 1, dtype=torch.float64), exact)
    merged = merge([Adapter("a", {"m": update})], "ties", density=0.25)
    assert merged.updates["m"].rows(0, 1).tolist() == [[near[0], near[1], 0, 0]]


def test_scope_decides_what_the_share_refers_to():
    adapter = Adapter("a", {"big": entries(10, 9, 8, 7), "small": entries(1, 2, 3, 4)})
    for scope, big, small in (
        ("global", [10, 9, 8, 7], [0, 0, 0, 0]),
        ("tensor", [10, 9, 0, 0], [0, 0, 3, 4]),
    ):
        merged = merge([adapter], "ties", density=0.5, scope=scope)
        assert merged.updates["big"].rows(0, 1).tolist() == [big]
        assert merged.updates["small"].rows(0, 1).tolist() == [small]


@pytest.mark.parametrize(("elsewhere", "expected"), [(1.0, 2.0), (-1.0, -2.0)])
def test_a_tied_sign_follows_the_majority_of_the_whole_model(elsewhere, expected):
    one = Adapter("one", {"m": entries(2.0, 4.0), "n": entries(elsewhere, elsewhere)})
    two = Adapter("two", {"m": entries(-2.0, -4.0), "n": entries(elsewhere, elsewhere)})
    merged = merge([one, two], "ties", density=1.0)
    assert merged.updates["m"].rows(0, 1).tolist() == [[expected, 2 * expected]]


def test_weights_vote_and_count():
    adapters = [Adapter("a", {"m": entries(3.0)}), Adapter("b", {"m": entries(-2.0)})]

    def result(weights, combine):
        return (
            merge(adapters, "ties", weights, density=1.0, combine=combine)
            .updates["m"]
            .rows(0, 1)
            .item()
        )

    assert result([1, 1], "mean") == 3.0
    assert result([1, 2], "mean") == -4.0
    assert result([1, 2], "weighted") == -2.0
    assert result([0, 1], "mean") == -2.0
    both = [*adapters, Adapter("c", {"m": entries(5.0)})]
    assert merge(both, "ties", [1, 1, 3], density=1.0).updates["m"].rows(0, 1).item() == 9.0
    assert (
        merge(both, "ties", [1, 1, 3], density=1.0, combine="sum").updates["m"].rows(0, 1).item()
        == 18.0
    )
    weighted = merge(both, "ties", [1, 1, 3], density=1.0, combine="weighted")
    assert weighted.updates["m"].rows(0, 1).item() == 18.0 / 4.0


def test_tile_size_changes_nothing(random_adapter, monkeypatch):
    adapters = [random_adapter(f"t{t}", {"m": (60, 33), "n": (7, 50)}, seed=t) for t in range(3)]
    whole = {m: u.rows(0, u.shape[0]) for m, u in merge(adapters, "ties").updates.items()}
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * 33 * 5)
    for module, update in merge(adapters, "ties").updates.items():
        torch.testing.assert_close(update.rows(0, update.shape[0]), whole[module])


def test_no_more_than_one_tile_per_task_is_ever_evaluated(
    random_adapter, linear_model, monkeypatch
):
    adapters = [random_adapter(f"t{t}", seed=t) for t in range(3)]
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * 10 * 3 * 2)
    heights = []
    rows = tiles.Stack.rows

    def watched(self, start, stop):
        heights.append(stop - start)
        return rows(self, start, stop)

    merged = merge(adapters, "ties")
    monkeypatch.setattr(tiles.Stack, "rows", watched)
    with merged.apply_to(linear_model):
        assert max(heights) == 2


def test_scaling_does_not_search_again(random_adapter, linear_model, monkeypatch):
    merged = merge([random_adapter(f"t{t}", seed=t) for t in range(3)], "ties")

    def fail(*_):
        raise AssertionError("thresholds are found once, in merge()")

    monkeypatch.setattr(trim, "top_threshold", fail)
    for coefficient in (0.1, 1.0):
        with merged.scaled(coefficient).apply_to(linear_model):
            pass
