"""The contract that every registered static method passes (DESIGN.md)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from formulas.case import arranged
from hypothesis import given, settings
from peft import PeftModel

from merge_algorithms import Adapter, LowRank, Merged, UserError, merge, methods

few = settings(max_examples=15, deadline=None)
positive = st.floats(0.1, 2.0)


def dense(merged: Merged) -> dict[str, torch.Tensor]:
    return {m: u.rows(0, u.shape[0]) for m, u in merged.updates.items()}


def assert_close(actual, expected, relative=1e-5) -> None:
    """Equal up to `relative` of the whole merge's Frobenius norm."""
    assert actual.keys() == expected.keys()
    norm = sum(float(x.double().square().sum()) for x in expected.values()) ** 0.5
    for module, x in expected.items():
        error = float((actual[module].double() - x.double()).norm())
        assert error <= relative * norm, f"{module}: error {error}, norm {norm}"


def run(case, adapters, weights=None, **options) -> Merged:
    """The case's method, with the statistics that it needs."""
    if case.statistics:
        options["statistics"] = case.statistics(adapters)
    return merge(adapters, case.method, weights, **options)


def exact(case) -> int | None:
    """How many adapters the method takes, if not any number."""
    return methods()[case.method].adapters


def draw_adapters(data, case, strategy, most=4, **kind) -> list[Adapter]:
    least, most = (exact(case) or 1), (exact(case) or most)
    return data.draw(strategy(least=least, most=most, **kind))


def some(case, random_adapter, count) -> list[Adapter]:
    """As many adapters, or as many as the method takes."""
    return [random_adapter(f"t{t}", seed=t) for t in range(exact(case) or count)]


def prepared(case, adapters) -> list[Adapter]:
    """Adapters that the method reproduces one by one."""
    prepare = case.prepare or (lambda update: update)
    return [
        dataclasses.replace(a, updates={m: prepare(u) for m, u in a.updates.items()})
        for a in adapters
    ]


def draw_weights(data, case, adapters) -> list[float]:
    drawn = data.draw(st.lists(positive, min_size=len(adapters), max_size=len(adapters)))
    return drawn if case.weighted else [1.0] * len(adapters)


def draw_options(data, case, adapters) -> dict[str, Any]:
    """Settings of the case; of lists, the entries of these adapters."""
    options = data.draw(st.sampled_from(case.options))
    return arranged(options, range(len(adapters)))


def test_every_registered_method_is_under_contract(cases):
    assert {case.method for case in cases} == set(methods())
    drawn = {case.method for case in cases if case.oracle is None}
    assert drawn == {name for name, method in methods().items() if method.seeded}


@few
@given(data=st.data())
def test_agrees_with_the_formula_in_float64(case, adapters_strategy, dense_updates, data):
    adapters = draw_adapters(data, case, adapters_strategy)
    weights = draw_weights(data, case, adapters)
    options = draw_options(data, case, adapters)
    merged = dense(run(case, adapters, weights, **options))
    problem = dense_updates(adapters), torch.tensor(weights, dtype=torch.float64)
    if case.statistics:
        read = case.statistics(adapters)
        options["statistics"] = {
            m: torch.stack([read[a.name][m].double() for a in adapters]) for m in merged
        }
    if case.oracle:
        assert_close(merged, case.oracle(*problem, **options))
    else:
        if case.coordinates:
            merged = case.coordinates(problem[0], {m: x.double() for m, x in merged.items()})
        for module, candidates in case.possible(*problem, **options).items():
            errors = candidates - merged[module].double()
            errors = errors.abs() if case.entrywise else errors.norm(dim=-1)
            errors = errors.min(0).values
            assert errors.max() <= 1e-5 * candidates.norm()


@few
@given(data=st.data())
def test_one_adapter_is_reproduced_at_neutral_options(case, adapters_strategy, dense_updates, data):
    adapters = prepared(case, draw_adapters(data, case, adapters_strategy, most=1))
    merged = run(case, adapters, [1.0] * len(adapters), **case.neutral)
    expected = {m: x[0] for m, x in dense_updates(adapters).items()}
    assert_close(dense(merged), expected, relative=1e-6)


@few
@given(data=st.data())
def test_order_of_adapters_does_not_matter(case, adapters_strategy, data):
    adapters = draw_adapters(data, case, adapters_strategy)
    weights = draw_weights(data, case, adapters)
    options = draw_options(data, case, adapters)
    order = data.draw(st.permutations(range(len(adapters))))
    same = arranged(options, order)
    shuffled = run(
        case,
        [adapters[i] for i in order],
        [weights[i] for i in order],
        **(case.reverse(same) if order == [1, 0] else same),
    )
    assert_close(dense(shuffled), dense(run(case, adapters, weights, **options)))


@few
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_basis_of_the_factors_does_not_matter(case, adapters_strategy, data, seed):
    adapters = draw_adapters(data, case, adapters_strategy, dtype=torch.float64)
    options = draw_options(data, case, adapters)
    numbers = torch.Generator().manual_seed(seed)

    def other_basis(u: LowRank) -> LowRank:
        g = torch.linalg.qr(torch.randn(u.rank, u.rank, generator=numbers, dtype=torch.float64))[0]
        g = g * torch.linspace(0.5, 2.0, u.rank, dtype=torch.float64)
        return LowRank(u.b @ g.inverse(), g @ u.a)

    moved = [
        dataclasses.replace(a, updates={m: other_basis(u) for m, u in a.updates.items()})
        for a in adapters
    ]
    assert_close(dense(run(case, moved, **options)), dense(run(case, adapters, **options)))


@few
@given(data=st.data(), factor=st.sampled_from([-3.0, 1e-12, 0.01, 0.5, 40.0, 1e12]))
def test_scaling_every_update_scales_the_merge(case, adapters_strategy, data, factor):
    adapters = draw_adapters(data, case, adapters_strategy)
    options = draw_options(data, case, adapters)
    bigger = [
        dataclasses.replace(a, updates={m: u.scaled(factor) for m, u in a.updates.items()})
        for a in adapters
    ]
    merged = run(case, adapters, **options)
    expected = {m: factor * x for m, x in dense(merged).items()}
    assert_close(dense(run(case, bigger, **options)), expected)
    assert_close(dense(merged.scaled(factor)), expected)


@few
@given(data=st.data())
def test_a_missing_module_is_a_zero_update(case, adapters_strategy, data):
    adapters = draw_adapters(data, case, adapters_strategy)
    options = draw_options(data, case, adapters)
    shapes = {m: u.shape for a in adapters for m, u in a.updates.items()}
    padded = [
        dataclasses.replace(
            a,
            updates={
                m: a.updates.get(m, LowRank(torch.zeros(s[0], 1), torch.zeros(1, s[1])))
                for m, s in shapes.items()
            },
        )
        for a in adapters
    ]
    assert_close(dense(run(case, padded, **options)), dense(run(case, adapters, **options)))


def test_updates_of_zero_merge_to_zero(case, random_adapter, tmp_path):
    zeros = [
        dataclasses.replace(a, updates={m: u.scaled(0.0) for m, u in a.updates.items()})
        for a in some(case, random_adapter, 3)
    ]
    merged = run(case, zeros)
    assert all(not x.any() for x in dense(merged).values())
    assert not any(merged.save_adapter(tmp_path / "out").values())


def test_what_cancels_within_its_factors_is_a_zero_update(case, random_adapter):
    """Its rounding errors must not be raised to the size of the others, nor outvote them."""
    *others, last = some(case, random_adapter, 3)
    update = last.updates["layer.0.query"]
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    noise = LowRank(
        torch.cat([update.b, -update.b @ turn], 1), torch.cat([update.a, turn.T @ update.a])
    )

    def beside_others(query: LowRank) -> Merged:
        changed = dataclasses.replace(last, updates=last.updates | {"layer.0.query": query})
        return run(case, [*others, changed])

    assert noise.dense().any()
    found, expected = beside_others(noise), beside_others(noise.scaled(0.0))
    assert found.ranks == expected.ranks
    assert_close(dense(found), dense(expected), relative=0)


@few
@given(data=st.data())
def test_rank_and_dtype_are_as_promised(case, adapters_strategy, data):
    dtype = data.draw(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    )
    adapters = draw_adapters(data, case, adapters_strategy, dtype=dtype)
    merged = run(case, adapters)
    for module, update in merged.updates.items():
        assert update.rows(0, 1).dtype == torch.promote_types(dtype, torch.float32)
        total = sum(a.updates[module].rank for a in adapters if module in a.updates)
        assert merged.ranks[module] == total
        if methods()[case.method].low_rank:
            assert isinstance(update, LowRank)
            assert update.rank <= total


@few
@given(data=st.data())
def test_rows_are_rows_of_the_whole(case, adapters_strategy, data):
    merged = run(case, draw_adapters(data, case, adapters_strategy))
    for update in merged.updates.values():
        d_out = update.shape[0]
        start = data.draw(st.integers(0, d_out - 1))
        stop = data.draw(st.integers(start, d_out))
        whole = update.rows(0, d_out)
        assert whole.shape == update.shape
        torch.testing.assert_close(update.rows(start, stop), whole[start:stop])


def test_the_seed_decides_all_randomness(case, random_adapter):
    adapters = some(case, random_adapter, 3)
    options = arranged(case.options[0], range(len(adapters)))
    runs = []
    for seed in range(6):
        torch.manual_seed(seed)
        first = dense(run(case, adapters, seed=seed, **options))
        torch.manual_seed(99)
        second = dense(run(case, adapters, seed=seed, **options))
        assert all(torch.equal(first[m], second[m]) for m in first)
        runs.append(torch.cat([x.flatten() for x in first.values()]))
    differ = any(not torch.equal(runs[0], run) for run in runs[1:])
    assert differ == (case.oracle is None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_and_autocast_change_nothing(case, random_adapter, dtype):
    adapters = some(case, random_adapter, 3)
    expected = dense(run(case, adapters))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            merged = dense(run(case, adapters))
        finally:
            torch.set_default_dtype(torch.float32)
    for module, x in expected.items():
        assert torch.equal(merged[module], x)


def test_inputs_are_left_alone(case, random_adapter):
    adapters = some(case, random_adapter, 3)
    before = [(u.a.clone(), u.b.clone()) for a in adapters for u in a.updates.values()]
    run(case, adapters).scaled(2.0).updates["layer.0.query"].rows(0, 4)
    after = [(u.a, u.b) for a in adapters for u in a.updates.values()]
    for (a0, b0), (a1, b1) in zip(before, after, strict=True):
        assert torch.equal(a0, a1)
        assert torch.equal(b0, b1)


def test_one_adapter_from_peft_gives_equal_logits(case, peft_case, tmp_path):
    logits = peft_case.save(tmp_path / "in")()
    adapter = Adapter.load(tmp_path / "in")
    if case.prepare:
        (adapter,) = prepared(case, [adapter])
        adapter.save(tmp_path / "prepared")
        logits = peft_case.logits(
            PeftModel.from_pretrained(peft_case.base(), tmp_path / "prepared")
        )
    others = [
        dataclasses.replace(adapter, name=f"in{t}", heads={}) for t in range(1, exact(case) or 1)
    ]
    merged = run(case, [adapter, *others], **case.neutral)
    lost = merged.save_adapter(tmp_path / "out")
    assert max(lost.values()) < 1e-9
    reloaded = PeftModel.from_pretrained(peft_case.base(), tmp_path / "out")
    torch.testing.assert_close(peft_case.logits(reloaded), logits, rtol=1e-4, atol=1e-5)
    model = peft_case.base()
    head = adapter.heads.get("in", {})
    assert bool(head) == (peft_case.lora["task_type"] == "SEQ_CLS")
    assert not model.load_state_dict(head, strict=False).unexpected_keys
    merged.apply_to(model)
    torch.testing.assert_close(peft_case.logits(model), logits, rtol=1e-4, atol=1e-5)


def test_merged_round_trip_through_stock_peft(case, peft_cases, tmp_path):
    peft_case = peft_cases["plain"]
    for t in range(exact(case) or 3):
        peft_case.save(tmp_path / f"t{t}", seed=t, r=t + 2)
    adapters = [Adapter.load(tmp_path / f"t{t}") for t in range(exact(case) or 3)]
    merged = run(case, adapters)
    model = peft_case.base()
    with merged.scaled(0.7).apply_to(model):
        expected = peft_case.logits(model)
    rank = None if methods()[case.method].low_rank else 32
    lost = merged.scaled(0.7).save_adapter(tmp_path / "out", rank=rank)
    assert max(lost.values()) < 1e-9
    reloaded = PeftModel.from_pretrained(peft_case.base(), tmp_path / "out")
    torch.testing.assert_close(peft_case.logits(reloaded), expected, rtol=1e-4, atol=1e-5)
    again = dense(merge([Adapter.load(tmp_path / "out")]))
    assert_close(again, dense(merged.scaled(0.7)))


def test_bad_options_raise_before_anything_is_written(case, random_adapter, tmp_path):
    adapters = some(case, random_adapter, 2)
    bad = [
        *case.bad,
        {"densty": 0.3},
        {"weights": [1.0]},
        {"weights": [0.0, 0.0]},
        {"weights": [1.0, float("nan")]},
        {"weights": ["a", 1]},
        {"weights": [10**400, 1]},
        {"weights": 1.0},
        {"weights": "12"},
        *([] if case.weighted else [{"weights": [1.0, 0.5]}]),
    ]
    for options in bad:
        with pytest.raises(UserError) as error:
            run(case, adapters, **options).save_adapter(tmp_path / "out")
        assert "\n" not in str(error.value)
    assert list(Path(tmp_path).iterdir()) == []


def test_non_finite_factors_are_refused(case, random_adapter):
    broken = random_adapter("broken")
    broken.updates["layer.1.query"].a[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"'broken'.*layer\.1\.query"):
        run(case, [random_adapter("fine"), broken])
