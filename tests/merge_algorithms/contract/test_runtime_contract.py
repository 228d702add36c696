"""The contract that every registered run-time method passes."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from formulas.case import arranged
from hypothesis import given, settings
from torch import Tensor, nn

from merge_algorithms import Adapter, UserError, attach, methods

few = settings(max_examples=15, deadline=None)


def options_of(case, adapters, index=-1) -> dict[str, Any]:
    """Settings of the case; of lists, the entries of these adapters."""
    return case.required(adapters) | arranged(case.options[index], range(len(adapters)))


def model_of(adapters, dtype=torch.float64) -> nn.ModuleDict:
    """Plain linear layers, no weights of their own, for the adapters' modules."""
    shapes = {m: u.shape for a in adapters for m, u in a.updates.items()}
    model = nn.ModuleDict()
    for module, (d_out, d_in) in shapes.items():
        parent = model
        *path, last = module.split(".")
        for part in path:
            if part not in parent:
                parent[part] = nn.ModuleDict()
            parent = parent[part]
        parent[last] = nn.Linear(d_in, d_out, bias=False).to(dtype)
        nn.init.zeros_(parent[last].weight)
    return model


def outputs(adapters, case, model, x, **arguments) -> dict[str, Tensor]:
    """What each module computes of x[module] in one call, by module."""
    arguments = case.required(adapters) | {"masks": 3} | arguments
    with attach(model, adapters, case.method, **arguments):
        return {m: model.get_submodule(m)(x[m]) for m in x}


def inputs(adapters, dtype=torch.float64, tokens=7) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    widths = {m: u.shape[1] for a in adapters for m, u in a.updates.items()}
    return {
        m: torch.randn(tokens, width, generator=draw, dtype=torch.float64).to(dtype)
        for m, width in sorted(widths.items())
    }


@pytest.fixture
def three(random_adapter) -> list[Adapter]:
    """In another order than their names'."""
    return [random_adapter(name, seed=t) for t, name in enumerate("cab")]


def test_every_registered_method_is_under_contract(runtime_cases):
    assert {case.method for case in runtime_cases} == set(methods(runtime=True))


@few
@given(data=st.data())
def test_every_element_is_what_the_formula_allows(
    runtime_case, adapters_strategy, dense_updates, data
):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    adapters = data.draw(adapters_strategy(dtype=dtype))
    order = data.draw(st.permutations(range(len(adapters))))
    index = data.draw(st.integers(0, len(runtime_case.options) - 1))
    options = options_of(runtime_case, adapters, index)
    w = [0.5 + t for t in range(len(adapters))]
    default = [1 - 1 / len(adapters)] * len(adapters)
    kept = 1 - torch.tensor(options.get("drop_rates", default), dtype=torch.float64)
    x, model = inputs(adapters), model_of(adapters)
    model.requires_grad_(False)
    found = outputs(adapters, runtime_case, model, x, weights=w, **options)
    problem = dense_updates(adapters), torch.tensor(w, dtype=torch.float64)
    known = runtime_case.oracle(*problem, **options) if runtime_case.oracle else {}
    for module, dense in problem[0].items():
        if known:
            possible = (x[module] @ known[module].T)[None]
        else:
            terms = torch.einsum("t,toi,ni->tno", problem[1], dense, x[module])
            possible = runtime_case.possible(terms, kept)
        errors = (possible - found[module]).abs().min(0).values
        assert errors.max() <= 1e-5 * possible.abs().max()
    shuffled = arranged(options, order)
    turned = [adapters[i] for i in order]
    again = outputs(turned, runtime_case, model, x, weights=[w[i] for i in order], **shuffled)
    for module, y in found.items():
        torch.testing.assert_close(again[module], y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


def test_the_seed_decides_all_randomness(runtime_case, three):
    x, model = inputs(three), model_of(three)

    def run(masks: int | str) -> Tensor:
        options = runtime_case.required(three)
        with attach(model, three, runtime_case.method, masks=masks, **options):
            return torch.cat([model.get_submodule(m)(x[m]).flatten() for m in x])

    assert torch.equal(run(1), run(1))
    seeded = methods(runtime=True)[runtime_case.method].seeded
    assert torch.equal(run(1), run(2)) != seeded
    state = torch.get_rng_state()
    run("fresh")
    assert torch.equal(torch.get_rng_state(), state) != seeded


@pytest.mark.parametrize("factors", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_masks_and_precision_do_not_depend_on_the_surroundings(
    runtime_case, random_adapter, factors, default, autocast
):
    adapters = [random_adapter(f"t{t}", seed=t, dtype=factors) for t in range(3)]
    x, model = inputs(adapters, torch.float32), model_of(adapters, torch.float32)
    options = options_of(runtime_case, adapters)
    expected = outputs(adapters, runtime_case, model, x, **options)
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = outputs(adapters, runtime_case, model, x, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    for module, y in found.items():
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert torch.equal(y, expected[module].to(y.dtype))


def test_half_precision_models_round_the_sum_once(runtime_case, three):
    x, model = inputs(three, torch.bfloat16), model_of(three, torch.bfloat16)
    for module in x:
        nn.init.normal_(model.get_submodule(module).weight)
    added = outputs(
        three, runtime_case, model_of(three, torch.float32), {m: v.float() for m, v in x.items()}
    )
    found = outputs(three, runtime_case, model, x)
    for module, y in found.items():
        own = nn.functional.linear(x[module], model.get_submodule(module).weight)
        assert torch.equal(y, (own.float() + added[module]).bfloat16())


def test_gradients_flow_through_the_added_outputs(runtime_case, random_adapter):
    """With the masks held by the seed the module is a linear map: gradcheck in float64."""
    adapters = [random_adapter(f"t{t}", seed=t, dtype=torch.float64) for t in range(3)]
    model, options = model_of(adapters), options_of(runtime_case, adapters)
    name = "layer.0.query"
    nn.init.normal_(model.get_submodule(name).weight)
    x = inputs(adapters, tokens=2)[name].requires_grad_()
    weight = model.get_submodule(name).weight

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return outputs(adapters, runtime_case, model, {name: x}, **options)[name]

    assert torch.autograd.gradcheck(call, (x, weight))


def test_one_adapter_is_reproduced(runtime_case, three, dense_updates):
    x, model = inputs(three[:1]), model_of(three[:1])
    found = outputs(three[:1], runtime_case, model, x)
    for module, dense in dense_updates(three[:1]).items():
        torch.testing.assert_close(found[module], x[module] @ dense[0].T, rtol=1e-5, atol=1e-5)


def test_bad_options_raise_before_the_model_is_touched(runtime_case, three):
    adapters, model = three[:2], model_of(three)
    required = runtime_case.required(adapters)
    bad = [*runtime_case.bad, {"drp_rates": [0.5]}, {"weights": ["a", 1]}, {"weights": 2.0}]
    bad.append({"weights": [0.0, 0.0]})
    for options in bad:
        with (
            pytest.raises(UserError) as error,
            attach(model, adapters, runtime_case.method, **required | options),
        ):
            pass
        assert "\n" not in str(error.value)
    assert not any("forward" in vars(m) for m in model.modules())


def test_non_finite_factors_are_refused(runtime_case, random_adapter, three):
    broken = random_adapter("broken")
    broken.updates["layer.1.query"].a[0, 0] = float("nan")
    with (
        pytest.raises(UserError, match=r"'broken'.*layer\.1\.query"),
        attach(
            model_of(three), [*three, broken], runtime_case.method, **runtime_case.required(three)
        ),
    ):
        pass
