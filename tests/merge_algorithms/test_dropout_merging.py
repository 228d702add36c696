"""Monte Carlo dropout merging: the static form, and adapters attached at run time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from merge_algorithms import Adapter, LowRank, UserError, attach, merge
from merge_algorithms.registry import methods


@pytest.fixture
def three(random_adapter):
    return [random_adapter(f"t{t}", seed=t) for t in range(3)]


def single(count: int, width: int = 400) -> list[Adapter]:
    """Adapters of one module whose update by adapter t is t + 1 everywhere."""
    return [
        Adapter(f"t{t}", {"m": LowRank(torch.full((width, 1), t + 1.0), torch.ones(1, 1))})
        for t in range(count)
    ]


def run(adapters, method, calls=1, **options) -> torch.Tensor:
    """What attach adds to a module whose own output is zero: (calls, width)."""
    model = nn.ModuleDict({"m": nn.Linear(1, adapters[0].updates["m"].shape[0], bias=False)})
    nn.init.zeros_(model["m"].weight)
    with attach(model, adapters, method, **options), torch.no_grad():
        return torch.stack([model["m"](torch.ones(1)) for _ in range(calls)])


# The static form


def test_static_rows_belong_to_one_adapter_each():
    rows = merge(single(4), "orthogonal_mc_dropout", [1, 1, 1, 2]).updates["m"].rows(0, 400)
    owners = [int((rows == scaled).sum()) for scaled in (4, 8, 12, 4 * 4 * 2)]
    assert sum(owners) == 400
    assert all(60 < owner < 140 for owner in owners)


def test_static_rates_below_full_use_leave_rows_empty():
    rates = [0.5, 0.75, 0.9]
    rows = merge(single(3), "orthogonal_mc_dropout", drop_rates=rates).updates["m"].rows(0, 400)
    shares = [
        float(torch.isclose(rows, torch.tensor((t + 1) / (1 - p))).float().mean())
        for t, p in enumerate(rates)
    ]
    assert shares == pytest.approx([0.5, 0.25, 0.1], abs=0.08)
    assert float((rows == 0).float().mean()) == pytest.approx(0.15, abs=0.08)


def test_static_mean_over_seeds_is_task_arithmetic():
    adapters = single(3, width=50)
    draws = [
        merge(adapters, "orthogonal_mc_dropout", seed=s).updates["m"].rows(0, 50)
        for s in range(200)
    ]
    # One entry is 3 w_t with probability 1/3: mean 6, deviation below 2.5 over 10,000 draws.
    assert float(torch.stack(draws).mean()) == pytest.approx(6.0, abs=5 * 2.5 / 100)


def test_static_independent_masks_have_their_own_rates():
    found = merge(single(2), "mc_dropout", drop_rates=[0.5, 0.75]).updates["m"].rows(0, 400)
    shares = {
        x: float(torch.isclose(found, torch.tensor(x)).float().mean())
        for x in (0.0, 2.0, 8.0, 10.0)
    }
    assert shares == pytest.approx({0: 0.375, 2: 0.375, 8: 0.125, 10: 0.125}, abs=0.08)


@pytest.mark.parametrize("method", ["mc_dropout", "orthogonal_mc_dropout"])
def test_masks_do_not_depend_on_the_order_of_adapters(method):
    adapters = single(3)
    rates = [0.5, 0.8, 0.7]
    first = merge(adapters, method, drop_rates=rates)
    second = merge(adapters[::-1], method, drop_rates=rates[::-1])
    assert torch.equal(first.updates["m"].dense(), second.updates["m"].dense())


def test_each_module_has_masks_of_its_own_whatever_else_there_is():
    def masks(*modules: str) -> dict[str, list[float]]:
        adapters = [
            Adapter(a.name, dict.fromkeys(modules, a.updates["m"])) for a in single(2, width=64)
        ]
        merged = merge(adapters, "orthogonal_mc_dropout")
        return {m: u.rows(0, 64).flatten().tolist() for m, u in merged.updates.items()}

    both = masks("m", "n")
    assert both["m"] != both["n"]
    assert masks("n") == {"n": both["n"]}


@pytest.mark.parametrize("merge_or_run", ["merge", "run"])
def test_bad_drop_rates(merge_or_run):
    def attempt(rates):
        if merge_or_run == "merge":
            merge(single(2), "orthogonal_mc_dropout", drop_rates=rates)
        else:
            run(single(2), "orthogonal_mc_dropout", drop_rates=rates)

    with pytest.raises(UserError, match=r"sum \(1 - drop rate\) = 1\.3"):
        attempt([0.4, 0.3])
    with pytest.raises(UserError, match=r"sum \(1 - drop rate\) = 1\.000002:"):
        attempt([0.5, 0.499998])
    with pytest.raises(UserError, match=r"drop rate of adapter 't1' is 1\.0"):
        attempt([0.4, 1.0])
    with pytest.raises(UserError, match="3 drop rates for 2 adapters"):
        attempt([0.9, 0.9, 0.9])
    with pytest.raises(UserError, match=r"drop rates are 0\.5: give a list .* one per adapter"):
        attempt(0.5)


# At run time


def test_direct_is_the_weighted_sum():
    assert run(single(3), "direct", weights=[1, 0, 2]).unique().tolist() == [7.0]


def test_orthogonal_masks_are_disjoint_and_fresh_in_every_call():
    outputs = run(single(4), "orthogonal_mc_dropout", calls=50, masks=0)
    assert set(outputs.unique().tolist()) == {4.0, 8.0, 12.0, 16.0}
    assert not torch.equal(outputs[0], outputs[1])
    shares = [(outputs == 4.0 * (t + 1)).float().mean().item() for t in range(4)]
    assert shares == pytest.approx([0.25] * 4, abs=5 * (0.25 * 0.75 / 20_000) ** 0.5)


def test_orthogonal_masks_keep_each_adapter_at_its_own_rate():
    """Unequal rates that leave room for nobody, names in another order than the arguments."""
    rates = [0.5, 0.75, 0.9]
    adapters = [
        dataclasses.replace(adapter, name=name)
        for adapter, name in zip(single(3), "cab", strict=True)
    ]
    outputs = run(adapters, "orthogonal_mc_dropout", calls=50, masks=0, drop_rates=rates)
    values = [(t + 1) / (1 - p) for t, p in enumerate(rates)]
    close = [torch.isclose(outputs, torch.tensor(v)) for v in (*values, 0.0)]
    assert torch.stack(close).sum(0).eq(1).all()
    shares = [c.float().mean().item() for c in close]
    assert shares == pytest.approx([0.5, 0.25, 0.1, 0.15], abs=5 * (0.25 / 20_000) ** 0.5)
    turned = run(adapters[::-1], "orthogonal_mc_dropout", calls=50, masks=0, drop_rates=rates[::-1])
    assert torch.equal(turned, outputs)


def test_rates_that_miss_full_use_by_rounding_leave_no_element_to_nobody():
    """At 9e-7 below full use, one in a million of these ten million would be."""
    rates = [0.6666669] * 2 + [0.6666671]
    adapters = single(3, width=100_000)
    outputs = run(adapters, "orthogonal_mc_dropout", calls=100, masks=0, drop_rates=rates)
    assert (outputs > 0).all()


def test_independent_masks_overlap_and_have_the_right_rates():
    outputs = run(single(2), "mc_dropout", calls=50, masks=0, drop_rates=[0.5, 0.75])
    shares = {v: (outputs == v).float().mean().item() for v in (0.0, 2.0, 8.0, 10.0)}
    assert shares == pytest.approx({0.0: 0.375, 2.0: 0.375, 8.0: 0.125, 10.0: 0.125}, abs=0.02)


@pytest.mark.parametrize("method", ["direct", "mc_dropout", "orthogonal_mc_dropout"])
def test_the_mean_of_many_calls_is_the_direct_merge(method):
    outputs = run(single(3), method, calls=200, masks=0, weights=[1.0, 0.5, 2.0])
    # An element is at most 18 with probability 1/3: deviation below 9, over 80,000 draws.
    assert float(outputs.mean()) == pytest.approx(8.0, abs=5 * 9 / 80_000**0.5)


@pytest.mark.parametrize("method", ["direct", "mc_dropout", "orthogonal_mc_dropout"])
def test_modules_that_only_some_adapters_have_in_outputs_of_any_size(method):
    """Large ones are made in blocks on a CPU. Every element is a sum of some adapters' outputs."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"m": nn.Linear(64, 512), "n": nn.Linear(64, 512)})
    updates = {"m": LowRank(torch.randn(512, 4), torch.randn(4, 64))}
    adapters = [Adapter("a", updates), Adapter("b", {"n": updates["m"]})]
    for tokens in (3, 1000):
        x = torch.randn(tokens, 64)
        with torch.no_grad():
            base = model["m"](x)
            own = x @ updates["m"].dense().T * (1 if method == "direct" else 2)
            with attach(model, adapters, method):
                added = model["m"](x) - base
        nobody = torch.isclose(added, torch.zeros(()), atol=1e-3)
        assert (nobody | torch.isclose(added, own, rtol=1e-3, atol=1e-3)).all()
        expected = 0.0 if method == "direct" else 0.5
        assert float(nobody.float().mean()) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("method", ["direct", "mc_dropout", "orthogonal_mc_dropout"])
def test_a_bare_model_compiles_as_one_graph(method, three, linear_model):
    model, x = linear_model, torch.randn(5, 10)
    with torch.no_grad(), attach(model, three, method):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        first, second = compiled(x), compiled(x)
        assert torch.equal(first, second) == (method == "direct")
        if method == "direct":
            torch.testing.assert_close(first, model(x))


def test_a_model_that_was_compiled_before_is_merged_too(three, linear_model):
    x = torch.randn(5, 10)
    with torch.no_grad():
        plain = linear_model(x)
        with attach(linear_model, three, "direct"):
            merged = linear_model(x)
        torch._dynamo.reset()
        compiled = torch.compile(linear_model, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), plain)
            with attach(linear_model, three, "direct"):
                torch.testing.assert_close(compiled(x), merged)


def test_torchs_fused_encoder_layers_are_merged_too(random_adapter):
    """At inference they skip the forward passes of linear modules, unless these have hooks."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    shapes = {"layers.0.linear1": (24, 16), "layers.0.linear2": (16, 24)}
    adapters = [random_adapter(name, shapes, seed=seed) for seed, name in enumerate("ab")]
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        with merge(adapters, "lora_sum").apply_to(model):
            expected = model(x)
        with attach(model, adapters, "direct"):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks for m in model.modules())


def served(method, adapter):
    """The adapter's task, for a method that serves one task at a time."""
    options = methods(runtime=True)[method].options
    return {o.name: adapter.name for o in options if o.name == "task"}


@pytest.mark.parametrize("method", sorted(methods(runtime=True)))
def test_one_adapter_with_nothing_dropped_gives_equal_logits(method, linear_peft_case, tmp_path):
    logits = linear_peft_case.save(tmp_path / "in")()
    adapter = Adapter.load(tmp_path / "in")
    model = linear_peft_case.base()
    model.load_state_dict(adapter.heads.get("in", {}), strict=False)
    with attach(model, [adapter], method, **served(method, adapter)):
        torch.testing.assert_close(linear_peft_case.logits(model), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted(methods(runtime=True)))
def test_the_model_is_left_as_found(method, three, linear_model):
    before = {k: v.clone() for k, v in linear_model.state_dict().items()}
    x = torch.randn(5, 10)
    plain = linear_model(x)

    def assert_as_found():
        assert all(torch.equal(v, before[k]) for k, v in linear_model.state_dict().items())
        assert not any("forward" in vars(m) for m in linear_model.modules())
        assert torch.equal(linear_model(x), plain)

    options = served(method, three[0])
    with attach(linear_model, three, method, **options) as attached:
        assert attached is linear_model
        assert not torch.equal(linear_model(x), plain)
    assert_as_found()
    with pytest.raises(RuntimeError), attach(linear_model, three, method, **options):
        raise RuntimeError
    assert_as_found()
    stranger = Adapter("stranger", {"layer.7.query": three[0].updates["layer.0.query"]})
    with (
        pytest.raises(UserError, match=r"no module layer\.7\.query"),
        attach(linear_model, [stranger], method, **served(method, stranger)),
    ):
        pass
    assert_as_found()


@pytest.mark.parametrize("method", ["mc_dropout", "orthogonal_mc_dropout"])
def test_seeds_make_the_whole_sequence_reproducible(method):
    first = run(single(3), method, calls=3, masks=7)
    torch.manual_seed(123)
    assert torch.equal(run(single(3), method, calls=3, masks=7), first)
    assert not torch.equal(run(single(3), method, calls=3, masks=8), first)
    unseeded = []
    for _ in range(2):
        torch.manual_seed(5)
        unseeded.append(run(single(3), method))
    assert torch.equal(*unseeded)
    assert not torch.equal(run(single(3), method), unseeded[0])


def test_outputs_keep_the_models_dtype_and_extra_dimensions(three, linear_model):
    model = linear_model.to(torch.bfloat16)
    with attach(model, three) as attached, torch.no_grad():
        assert attached(torch.ones(2, 3, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16
        by_keyword = attached.layer[0].query(input=torch.ones(2, 10, dtype=torch.bfloat16))
        assert by_keyword.shape == (2, 12)


def test_attach_checks_what_merge_checks(three, linear_model):
    for arguments, reason in (
        ({"adapters": []}, "at least one"),
        ({"weights": [1.0]}, "1 weights for 3"),
        ({"method": "ties"}, "'ties' works on the weights only: use merge"),
        ({"method": "drct"}, "did you mean 'direct'"),
        ({"method": "direct", "drop_rates": [0.5]}, "has no options: leave out 'drop_rates'"),
    ):
        keywords = {"adapters": three} | arguments
        with pytest.raises(UserError, match=reason), attach(linear_model, **keywords):
            pass
