"""Merged.apply_to, Merged.save_adapter, and the checks that precede a merge."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from merge_algorithms import Adapter, EmrBundle, LowRank, UserError, attach, merge

SHAPES = {"layer.0.query": (12, 10), "layer.0.value": (8, 10), "layer.1.query": (12, 10)}


@pytest.fixture
def three(random_adapter):
    return [random_adapter(f"t{t}", seed=t) for t in range(3)]


def attached(adapters, model) -> None:
    with attach(model, adapters, "direct"):
        pass


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_identical(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_apply_adds_once_and_restores_bit_by_bit(three, linear_model, dtype, method):
    model = linear_model.to(dtype)
    before = snapshot(model)
    merged = merge(three, method).scaled(0.3)
    with merged.apply_to(model):
        for name, shape in SHAPES.items():
            weight, update = before[f"{name}.weight"], merged.updates[name].rows(0, shape[0])
            exact = (weight.double() + update.double()).to(dtype)
            actual = model.get_submodule(name).weight
            torch.testing.assert_close(
                actual, exact, rtol=1e-5 if dtype.itemsize > 2 else 1e-2, atol=1e-5
            )
            assert actual.dtype == dtype
    assert_identical(model, before)


@pytest.mark.parametrize(
    "wrap",
    [
        partial(torch.compile, backend="eager"),
        nn.DataParallel,
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
    ids=["compiled", "data parallel", "both"],
)
@torch.no_grad()
def test_wrapped_models_are_merged_as_what_they_wrap(three, linear_model, wrap):
    torch._dynamo.reset()
    wrapped, x, before = wrap(linear_model), torch.randn(5, 10), snapshot(linear_model)
    plain = wrapped(x)
    torch.testing.assert_close(plain, linear_model(x))
    with merge(three).apply_to(wrapped):
        applied = wrapped(x)
        torch.testing.assert_close(applied, linear_model(x))
    assert_identical(linear_model, before)
    with attach(wrapped, three, "direct") as yielded:
        assert yielded is wrapped
        torch.testing.assert_close(wrapped(x), applied)
    with attach(wrapped, three, "mc_dropout", masks=0, samples=3):
        sampled = wrapped(x)
    with attach(linear_model, three, "mc_dropout", masks=0, samples=3):
        torch.testing.assert_close(linear_model(x), sampled)
    assert torch.equal(wrapped(x), plain)


def test_the_original_returns_after_exceptions_and_only_once(three, linear_model):
    before = snapshot(linear_model)
    with pytest.raises(RuntimeError), merge(three).apply_to(linear_model):
        raise RuntimeError
    assert_identical(linear_model, before)
    handle = merge(three).apply_to(linear_model)
    handle.restore()
    assert_identical(linear_model, before)
    with torch.no_grad():
        linear_model.layer[0].query.weight.zero_()
    handle.restore()
    assert not linear_model.layer[0].query.weight.any()


def test_a_failure_half_way_leaves_the_model_untouched(three, linear_model):
    merged = merge(three)

    class Fails(LowRank):
        def rows(self, start, stop):
            raise MemoryError

    last = list(merged.updates)[-1]
    merged.updates[last] = Fails(merged.updates[last].b, merged.updates[last].a)
    before = snapshot(linear_model)
    with pytest.raises(MemoryError):
        merged.apply_to(linear_model)
    assert_identical(linear_model, before)


def test_scaling_composes_and_is_recorded(three, tmp_path):
    merged = merge(three, "ties", density=0.5).scaled(0.5).scaled(-3.0)
    assert set(merged.coefficients.values()) == {-1.5}
    merged.save_adapter(tmp_path / "m")
    record = Adapter.load(tmp_path / "m").info["merge"]
    assert record.pop("options") == merged.options
    assert merged.options["density"] == 0.5
    assert record == {
        "method": "ties",
        "adapters": ["t0", "t1", "t2"],
        "weights": [1.0, 1.0, 1.0],
        "coefficient": -1.5,
        "seed": 0,
    }
    with pytest.raises(UserError, match="coefficient is nan"):
        merged.scaled(float("nan"))


def test_per_adapter_options_are_recorded(three, tmp_path):
    rates = (0.5, 0.75, 0.9)
    merge(three, "orthogonal_mc_dropout", drop_rates=rates).save_adapter(tmp_path / "m")
    record = Adapter.load(tmp_path / "m").info["merge"]
    assert record["options"] == {"drop_rates": [0.5, 0.75, 0.9]}


def test_a_missing_module_is_reported_with_the_nearest(three):
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"query": nn.Linear(10, 12)})})
    with pytest.raises(UserError, match=r"no module layer\.0\.query.*encoder\.query"):
        merge(three).apply_to(model)


def test_other_shapes_and_quantised_weights_are_refused(three, linear_model):
    before = snapshot(linear_model)
    linear_model.layer[1].query = nn.Linear(10, 13)
    with pytest.raises(UserError, match=r"layer\.1\.query has a weight of shape \(13, 10\)"):
        merge(three).apply_to(linear_model)
    linear_model.layer[1].query = nn.Linear(10, 12)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        weight = nn.Parameter(torch.zeros(12, 10).to(dtype), False)
        linear_model.layer[1].query.weight = weight
        with pytest.raises(UserError, match="floating point weight matrix: load the model unquan"):
            merge(three).apply_to(linear_model)
    linear_model.layer[1].query = nn.Module()
    linear_model.layer[1].query.register_buffer("qweight", torch.zeros(12, 10, dtype=torch.int32))
    with pytest.raises(UserError, match="floating point weight matrix: load the model unquan"):
        merge(three).apply_to(linear_model)
    assert torch.equal(linear_model.layer[0].query.weight, before["layer.0.query.weight"])


def test_attention_without_a_weight_of_its_own_is_left_to_peft(tmp_path):
    """Of nn.MultiheadAttention PEFT adapts two weights, one of them inside its own layer."""
    base, x = nn.ModuleDict({"m": nn.MultiheadAttention(8, 2)}).eval(), torch.randn(5, 3, 8)
    config = LoraConfig(r=2, target_modules=["m"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(base), config)
    wrapped.save_pretrained(tmp_path / "a")
    merged = merge([Adapter.load(tmp_path / "a")])
    for use in (merged.apply_to, lambda m: enter(m, [Adapter.load(tmp_path / "a")])):
        with pytest.raises(UserError, match=r"m is a Mul.* no weight of its own.*save_adapter\(\)"):
            use(base)
    with pytest.raises(UserError, match=r"takes no run-time merge.*PEFT what save_adapter\(\) wr"):
        enter(wrapped, ["default"])
    merged.save_adapter(tmp_path / "m")
    loaded = PeftModel.from_pretrained(base, tmp_path / "m").base_model.model["m"]
    torch.testing.assert_close(loaded(x, x, x), wrapped.base_model.model["m"](x, x, x))


def test_weights_that_would_swallow_the_update_are_refused(three, linear_model):
    """Computed from other parameters, or without values: adding to them changes nothing."""
    weight_norm(linear_model.layer[1].query)
    before = snapshot(linear_model)
    with pytest.raises(UserError, match=r"layer\.1\.query computes its weight anew"):
        merge(three).apply_to(linear_model)
    assert_identical(linear_model, before)
    remove_parametrizations(linear_model.layer[1].query, "weight")
    linear_model.layer[0].value.to("meta")
    before = snapshot(linear_model)
    for use in (lambda: merge(three).apply_to(linear_model), lambda: enter(linear_model, three)):
        with pytest.raises(UserError, match=r"layer\.0\.value is on the meta device"):
            use()
    del before["layer.0.value.weight"], before["layer.0.value.bias"]
    after = linear_model.state_dict()
    assert all(torch.equal(after[key], x) for key, x in before.items())


@pytest.mark.parametrize("use", [lambda m, a: merge(a).apply_to(m), lambda m, a: enter(m, a)])
def test_models_that_peft_has_wrapped_are_refused(three, linear_model, use):
    wrapped = get_peft_model(linear_model, LoraConfig(target_modules=["query"]))
    before = snapshot(wrapped)
    with pytest.raises(UserError, match=r"is a PeftModel.*pass the bare base model"):
        use(wrapped, three)
    with pytest.raises(UserError, match=r"layer\.0\.query still carries a PEFT adapter.*unload"):
        use(wrapped.get_base_model(), three)
    assert_identical(wrapped, before)
    use(wrapped.unload(), three)


def enter(model: nn.Module, adapters: list[Adapter]) -> None:
    with attach(model, adapters):
        pass


def test_tied_weights_are_not_changed_behind_their_owner(three, linear_model):
    linear_model.layer[1].query.weight = linear_model.layer[0].query.weight
    with pytest.raises(UserError, match=r"layer\.0\.query shares its weight with layer\.1\.query"):
        merge(three).apply_to(linear_model)


def test_parameters_are_listed_once_however_many_modules_change(three, linear_model, monkeypatch):
    listed, named_parameters = [], nn.Module.named_parameters

    def watched(self, *args, **options):
        listed.append(self)
        return named_parameters(self, *args, **options)

    monkeypatch.setattr(nn.Module, "named_parameters", watched)
    merge(three).apply_to(linear_model)
    assert listed == [linear_model]


def test_truncation_is_the_best_one_and_its_loss_is_reported(three, tmp_path):
    for method in ("task_arithmetic", "ties"):
        merged = merge(three, method)
        lost = merged.save_adapter(tmp_path / method, rank=2)
        saved = Adapter.load(tmp_path / method)
        for module, update in merged.updates.items():
            dense = update.rows(0, update.shape[0]).double()
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            best = (u[:, :2] * s[:2]) @ vh[:2]
            torch.testing.assert_close(
                saved.updates[module].dense().double(), best, rtol=1e-4, atol=1e-4
            )
            assert lost[module] == pytest.approx(float((s[2:] ** 2).sum() / (s**2).sum()), rel=1e-4)


def test_bad_ranks_and_heads(three, tmp_path):
    with pytest.raises(UserError, match="rank 0"):
        merge(three).save_adapter(tmp_path / "m", rank=0)
    with pytest.raises(UserError, match=r"no head 'stbs'.*did you mean 'stsb'"):
        merge([Adapter("a", three[0].updates, {"stsb": {}})]).save_adapter(
            tmp_path / "m", head="stbs"
        )
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_do_not_belong_together(random_adapter):
    one = random_adapter("one", config={"base_model_name_or_path": "bert-a"})
    with pytest.raises(UserError, match="at least one"):
        merge([])
    with pytest.raises(UserError, match="two adapters are called 'one'"):
        merge([one, one])
    other = random_adapter("two", config={"base_model_name_or_path": "bert-b"})
    with pytest.raises(UserError, match="'one' was trained on bert-a but 'two' on bert-b"):
        merge([one, other])
    for unknown in (None, ""):
        config = {"base_model_name_or_path": unknown}
        merged = merge([random_adapter("two", config=config), one])
        assert merged.config["base_model_name_or_path"] == "bert-a"
    wide = random_adapter("wide", {"layer.0.query": (12, 11)})
    with pytest.raises(UserError, match=r"\(12, 10\) in adapter 'one' but \(12, 11\) in 'wide'"):
        merge([one, wide])
    wrapped = random_adapter("wrapped", {f"bert.{m}": s for m, s in SHAPES.items()})
    with pytest.raises(UserError, match=r"calls a module .*'wrapped' calls it bert\."):
        merge([one, wrapped])
    part = random_adapter("part", {"layer.7.query": (12, 10)})
    with pytest.raises(UserError, match=r"'small' calls a module layer\.0\.value, 'wrapped' calls"):
        merge([part, wrapped, random_adapter("small", {"layer.0.value": (8, 10)})])
    with pytest.raises(UserError, match="no update at all"):
        merge([Adapter("hollow", {})])


def test_two_names_of_one_base(random_adapter, tmp_path, monkeypatch):
    """A Hub id and a local copy look alike to nobody but the user, unless both are known better."""

    def on(name: str, base: str, **info):
        return random_adapter(name, config={"base_model_name_or_path": base}, info=info)

    hub, local = on("a", "meta-llama/X"), on("b", "/data/models/X")
    with pytest.raises(UserError, match=r"on_base\(name\), or --base"):
        merge([hub, local])
    assert merge([hub, local.on_base("meta-llama/X")]).config["base_model_name_or_path"] == hub.base
    assert local.base == "/data/models/X"

    same = [on("a", "X", model_fingerprint="f"), on("b", "/data/X", model_fingerprint="f")]
    assert merge(same).config["base_model_name_or_path"] == "X"
    assert merge([on("c", "/data/X"), *same]).config["base_model_name_or_path"] == "/data/X"
    with pytest.raises(UserError, match="'a' was trained on X but 'c' on Y"):
        merge([*same, on("c", "Y", model_fingerprint="g")])

    (tmp_path / "models" / "X").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    places = ["models/X", f"{tmp_path}/models/X/", "link/X"]
    merge([on(f"t{i}", place) for i, place in enumerate(places)])


def test_one_name_of_two_bases(random_adapter):
    def on_x(name: str, revision: str | None = None, **info):
        config = {"base_model_name_or_path": "X", "revision": revision}
        return random_adapter(name, config=config, info=info)

    a, b = on_x("a", "v1", model_fingerprint="f"), on_x("b", "v2", model_fingerprint="g")
    with pytest.raises(UserError, match=r"'a' .* X of fingerprint f but 'b' .* g: .*on_base\(name"):
        merge([a, b])
    merge([a, b.on_base("X", "f")])
    assert merge([a.on_base("Y"), b.on_base("Y")]).config["base_model_name_or_path"] == "Y"
    later = on_x("later", "v2")
    with pytest.raises(UserError, match=r"'a' .* X of revision v1 but 'later' .* revision v2: "):
        merge([a, later, on_x("c")])
    for some in ([a, on_x("c")], [on_x("c"), a]):  # one of them does not say
        assert merge(some).config["revision"] == "v1"
    local = random_adapter("d", config={"base_model_name_or_path": "/X"}, info=a.info)
    assert merge([local, a]).config["revision"] is None  # v1 is a revision of what is called X
    merge([a, on_x("the same", "v2", model_fingerprint="f")])


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_whole_modules_of_a_language_model_are_refused(peft_cases, tmp_path, task_type):
    """They are no heads of tasks: left beside the merge they would be lost without a word."""
    case = peft_cases["conv1d"]
    case.save(tmp_path / "whole", task_type=task_type, modules_to_save=["ln_f"])
    adapter = Adapter.load(tmp_path / "whole")
    for use in (merge, EmrBundle.build, lambda adapters: attached(adapters, case.base())):
        with pytest.raises(UserError, match=r"'whole' was saved with whole modules \(ln_f: mod"):
            use([adapter])
    adapter.save(tmp_path / "again")
    assert Adapter.load(tmp_path / "again").heads["again"].keys() == adapter.heads["whole"].keys()


def test_heads_with_one_name_are_refused(random_adapter):
    bundles = [random_adapter(n, heads={"stsb": {}}) for n in ("a", "b")]
    with pytest.raises(UserError, match="two adapters have a head called 'stsb'"):
        merge(bundles)


def test_modules_an_adapter_lacks_are_logged(random_adapter, caplog):
    small = random_adapter("small", {"layer.0.query": (12, 10)})
    with caplog.at_level(logging.INFO):
        merge([random_adapter("full"), small])
    assert "'small' lacks 2 of the 3 modules" in caplog.text


def test_adapters_that_share_no_module_are_told_so(random_adapter, caplog):
    pair = [
        random_adapter("older", {"language_model.model.layers.0.q": (12, 10)}),
        random_adapter("newer", {"model.language_model.layers.0.q": (12, 10)}),
    ]
    merge(pair)
    for name, its, theirs in (("older", 0, 1), ("newer", 1, 0)):
        (has,), (have,) = pair[its].updates, pair[theirs].updates
        said = f"'{name}' shares no module with the others: it has {has}, they have {have};"
        assert said in caplog.text
    caplog.clear()
    merge(pair[:1])
    merge([*pair, random_adapter("both", {m: (12, 10) for a in pair for m in a.updates})])
    assert not caplog.text


def test_weights_must_fit(three):
    with pytest.raises(UserError, match="2 weights for 3 adapters"):
        merge(three, weights=[1, 2])
    with pytest.raises(UserError, match="weight of adapter 't1' is inf"):
        merge(three, weights=[1, float("inf"), 0])
    with pytest.raises(UserError, match="sum to 0"):
        merge(three, "average", weights=[1, -1, 0])
    with pytest.raises(UserError, match="all weights are 0"):
        merge(three, weights=[0, 0, 0])


def constant(name: str, b: float, a: float) -> Adapter:
    return Adapter(name, {"layer.0.query": LowRank(torch.full((12, 1), b), torch.full((1, 10), a))})


@pytest.mark.parametrize("use", [lambda adapters, model: merge(adapters), attached])
def test_factors_whose_product_overflows_are_named(linear_model, use):
    with pytest.raises(UserError, match=r"'big' has factors of layer\.0\.query whose product"):
        use([constant("big", 1e30, 1e30)], linear_model)
    use([constant("fine", 1e30, 1e-30)], linear_model)


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "ties"])
def test_a_merge_that_overflows_is_not_written(linear_model, tmp_path, method):
    """Each update is finite; their sum, or a multiple of it, is not."""
    merged = merge([constant("t", 1e18, 1e20)], method).scaled(4.0)
    before = snapshot(linear_model)
    with pytest.raises(UserError, match=r"the merge at layer\.0\.query is beyond the range of flo"):
        merged.apply_to(linear_model)
    assert_identical(linear_model, before)
    for rank in (1, None):
        with pytest.raises(UserError, match=r"layer\.0\.query is beyond .* lower its weights"):
            merged.save_adapter(tmp_path / "m", rank)
    assert list(tmp_path.iterdir()) == []
    merge([constant("t", 1e18, 1e20)], method).scaled(0.5).apply_to(linear_model).restore()


def test_weights_that_overflow(linear_model, tmp_path):
    adapters = [constant("a", 1e18, 1e20), constant("b", 1e17, 1e20)]
    with pytest.raises(UserError, match=r"layer\.0\.query is beyond the range of float32"):
        merge(adapters, weights=[1e300, 1.0])
    merged = merge(adapters, "ties", weights=[4.0, 4.0], density=1.0, combine="sum")
    for write in (merged.apply_to, lambda _: merged.save_adapter(tmp_path / "m")):
        with pytest.raises(UserError, match=r"layer\.0\.query is beyond the range of float32"):
            write(linear_model)
    with pytest.raises(UserError, match="beyond the range of float16"):
        merge([constant("a", 1e3, 1e3)], method="average").apply_to(linear_model.half())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 256])
def test_any_number_of_adapters(random_adapter, tmp_path, count):
    adapters = [random_adapter(f"t{t}", rank=1, seed=t) for t in range(count)]
    merged = merge(adapters, "average")
    merged.save_adapter(tmp_path / "m", rank=min(8, count))
    for module, update in merged.updates.items():
        mean = sum(a.updates[module].dense().double() for a in adapters) / count
        torch.testing.assert_close(update.dense().double(), mean, rtol=1e-5, atol=1e-6)
    ties = merge(adapters, "ties", density=0.5)
    assert all(u.rows(0, u.shape[0]).isfinite().all() for u in ties.updates.values())


def test_an_output_that_exists_is_replaced_only_when_asked(three, tmp_path):
    merged = merge(three)
    merged.save_adapter(tmp_path / "m")
    before = (tmp_path / "m" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        merged.scaled(2.0).save_adapter(tmp_path / "m")
    assert (tmp_path / "m" / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="already exists"):  # before the base is looked for
        merged.save_checkpoint(tmp_path / "m", tmp_path / "no base")
    merged.scaled(2.0).save_adapter(tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "adapter_model.safetensors").read_bytes() != before
