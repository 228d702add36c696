"""SLERP: what its formula leaves open."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from merge_algorithms import Adapter, LowRank, UserError, merge


def dense(merged):
    return {m: u.rows(0, u.shape[0]) for m, u in merged.updates.items()}


def test_slerp_keeps_the_norm_and_turns_evenly(random_adapter):
    a, b = (random_adapter(n, seed=seed) for seed, n in enumerate("ab"))

    def flat(merged):
        return torch.cat([x.flatten() for x in dense(merged).values()])

    first, second = flat(merge([a])), flat(merge([b]))
    b = Adapter("b", {m: u.scaled(float(first.norm() / second.norm()))
                      for m, u in b.updates.items()})  # fmt: skip
    steps = [flat(merge([a, b], "slerp", t=t / 4)) for t in range(5)]
    for x in steps:
        torch.testing.assert_close(x.norm(), first.norm())
    cosines = [float(x @ y / x.norm() / y.norm()) for x, y in pairwise(steps)]
    assert max(cosines) - min(cosines) < 1e-5


@pytest.mark.parametrize("factor", [1.0, -1.0, 2.0, 0.0])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_slerp_is_linear_where_there_is_no_direction_to_turn_in(random_adapter, factor, scope):
    a = random_adapter("a")
    b = Adapter("b", {m: u.scaled(factor) for m, u in a.updates.items()})
    merged = dense(merge([a, b], "slerp", t=0.25, scope=scope))
    for module, x in dense(merge([a])).items():
        torch.testing.assert_close(merged[module], (0.75 + 0.25 * factor) * x)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_slerp_with_an_update_that_cancels_to_rounding(random_adapter, scope):
    """Its squared norm, computed from factors that are not zero, may come out below 0."""
    for seed in range(8):
        a = random_adapter("a", seed=seed)
        cancelled = {
            m: LowRank(torch.cat([u.b, -u.b], 1), torch.cat([u.a, u.a]))
            for m, u in a.updates.items()
        }
        merged = dense(merge([a, Adapter("b", cancelled)], "slerp", t=0.25, scope=scope))
        for module, x in dense(merge([a])).items():
            torch.testing.assert_close(merged[module], 0.75 * x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_takes_two_adapters(random_adapter, count):
    adapters = [random_adapter(f"t{t}", seed=t) for t in range(count)]
    with pytest.raises(UserError, match=f"exactly 2 adapters but there are {count}"):
        merge(adapters, "slerp")
