from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from merge_algorithms import Adapter
from merge_algorithms.adapter import LowRank
from merge_algorithms.errors import UserError
from osrm import convert_adapter, convert_checkpoint, subspace_state

D, OUT, K = 12, 7, 5
MODULES = ["0.query", "0.value", "1.query", "1.value"]


@pytest.fixture
def state(random_covariance):
    tasks = {name: random_covariance(name, d=D, seed=i) for i, name in enumerate("abc")}
    return subspace_state(tasks, "a", rank=3, k=K, scale="matched")


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    updates = {m: LowRank(torch.randn(OUT, 4), torch.randn(4, D)) for m in MODULES}
    return Adapter("a", updates, {"a": {"w": torch.ones(2)}}, {"base_model_name_or_path": "base"})


def nearest(dw, rows):
    """argmin over B of ||dW - B A||, by least squares; and the share of energy it keeps."""
    a, dw = rows.double(), dw.double()
    b = torch.linalg.lstsq(a.T, dw.T).solution.T
    return b @ a, float((b @ a).square().sum() / dw.square().sum())


def test_every_update_becomes_the_nearest_one_in_the_subspace(adapter, state):
    converted = convert_adapter(adapter, state)
    assert set(converted.adapter.updates) == set(MODULES)
    assert converted.adapter.heads is adapter.heads
    assert converted.adapter.config == adapter.config
    for module, update in converted.adapter.updates.items():
        assert torch.equal(update.a, state[module])
        expected, kept = nearest(adapter.updates[module].dense(), state[module])
        torch.testing.assert_close(update.dense().double(), expected, rtol=1e-5, atol=1e-5)
        assert converted.kept[module] == pytest.approx(kept, rel=1e-5)
        assert 0 < kept < 1


def test_converting_again_changes_nothing_and_keeps_everything(adapter, state):
    once = convert_adapter(adapter, state).adapter
    again = convert_adapter(once, state)
    for module, update in again.adapter.updates.items():
        torch.testing.assert_close(update.dense(), once.updates[module].dense())
        assert again.kept[module] == pytest.approx(1, abs=1e-6)


def test_an_update_that_is_zero_stays_zero(adapter, state):
    zero = {m: u.scaled(0) for m, u in adapter.updates.items()}
    converted = convert_adapter(Adapter("a", zero), state)
    assert set(converted.kept.values()) == {1.0}
    assert not any(u.b.any() for u in converted.adapter.updates.values())


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_the_converted_update_with_the_scale_applied_once(
    rslora, make_model, texts, batches, tmp_path
):
    """alpha / r is 4 here: an update scaled twice would be four times too large."""
    base = make_model("bert").eval()
    batch = batches(texts(3, seed=1))[0]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["query"], use_rslora=rslora)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "trained")
    trained = Adapter.load(tmp_path / "trained")
    everything = {m: torch.linalg.qr(torch.randn(32, 32)).Q for m in trained.updates}
    for scale in (1.0, 3.0):
        state = {module: scale * rows for module, rows in everything.items()}
        converted = convert_adapter(trained, state)
        converted.adapter.save(tmp_path / f"converted{scale}")
        with torch.no_grad():
            before = model(**batch).last_hidden_state
            loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path / f"converted{scale}")
            after = loaded.eval()(**batch).last_hidden_state
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


@pytest.fixture
def checkpoints(adapter):
    """Weights before and after fine-tuning; the tuned ones under a prefix, with a new head."""
    base = {f"{m}.weight": torch.randn(OUT, D) for m in MODULES}
    tuned = {
        f"bert.{key}": w + adapter.updates[key.removesuffix(".weight")].dense()
        for key, w in base.items()
    }
    return base, tuned | {"classifier.weight": torch.randn(2, OUT)}


def assert_is_conversion_of(converted, adapter, state, tolerance=1e-4):
    expected = convert_adapter(adapter, state)
    for module, update in converted.adapter.updates.items():
        torch.testing.assert_close(
            update.dense(), expected.adapter.updates[module].dense(), rtol=0, atol=tolerance
        )
        assert converted.kept[module] == pytest.approx(expected.kept[module], rel=1e-3)


def test_a_fine_tuned_model_gives_what_its_update_would(adapter, state, checkpoints):
    converted = convert_checkpoint(*checkpoints, state, name="a", base_model="base")
    assert converted.adapter.name == "a"
    assert converted.adapter.config["base_model_name_or_path"] == "base"
    assert_is_conversion_of(converted, adapter, state)


def test_outputs_on_the_own_inputs_are_compared(adapter, state, checkpoints):
    """Oracle: every token through both updates, formed."""
    h = {m: torch.randn(30, D).double() * torch.linspace(0.1, 2, D) for m in MODULES}
    own = {m: (x.T @ x / 30).float() for m, x in h.items()}
    converted = convert_adapter(adapter, state, own)
    for module, inputs in h.items():
        new, old = (
            (inputs @ each.updates[module].dense().double().T).square().sum()
            for each in (converted.adapter, adapter)
        )
        assert converted.output_kept[module] == pytest.approx(float(new / old), rel=1e-5)
    whole = convert_checkpoint(*checkpoints, state, name="a", own=own)
    assert whole.output_kept == pytest.approx(converted.output_kept, rel=1e-3)
    nothing = Adapter("a", {m: u.scaled(0) for m, u in adapter.updates.items()})
    assert set(convert_adapter(nothing, state, own).output_kept.values()) == {1.0}
    assert convert_adapter(adapter, state).output_kept == {}


def test_files_shards_and_directories_are_read(adapter, state, checkpoints, tmp_path):
    base, tuned = checkpoints
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    shards = {f"model-{i}.safetensors": dict([item]) for i, item in enumerate(tuned.items())}
    weight_map = {key: file for file, part in shards.items() for key in part}
    for file, part in shards.items():
        save_file(part, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source in (tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        converted = convert_checkpoint(source, str(tmp_path), state, name="a")
        assert_is_conversion_of(converted, adapter, state)


def test_a_single_file_beats_an_index_of_shards(adapter, state, checkpoints, tmp_path):
    """Transformers loads it, too; these shards are not there any more."""
    base, tuned = checkpoints
    save_file(tuned, tmp_path / "model.safetensors")
    weight_map = dict.fromkeys(tuned, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_is_conversion_of(convert_checkpoint(base, tmp_path, state, name="a"), adapter, state)


def test_weights_stored_transposed(adapter, state, checkpoints):
    base, tuned = ({k: w.T.contiguous() for k, w in part.items()} for part in checkpoints)
    converted = convert_checkpoint(base, tuned, state, name="a", fan_in_fan_out=True)
    assert_is_conversion_of(converted, adapter, state)
    assert converted.adapter.config["fan_in_fan_out"]


def test_a_half_precision_base_is_subtracted_as_it_is(adapter, state, checkpoints):
    base, _ = checkpoints
    narrow = {key: w.bfloat16() for key, w in base.items()}
    tuned = {
        key: w.float() + adapter.updates[key.removesuffix(".weight")].dense()
        for key, w in narrow.items()
    }
    converted = convert_checkpoint(narrow, tuned, state, name="a")
    assert_is_conversion_of(converted, adapter, state)


KEY = "1.value.weight"


def test_a_full_name_beats_one_with_a_prefix(adapter, state, checkpoints):
    base, tuned = checkpoints
    ambiguous = tuned | {key: tuned[f"bert.{key}"] for key in base}
    assert_is_conversion_of(convert_checkpoint(base, ambiguous, state, name="a"), adapter, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, t: ({k: w for k, w in b.items() if k != KEY}, t), "base checkpoint has no"),
        (lambda b, t: (b, t | {f"x.{KEY}": t[f"bert.{KEY}"]}), "has 2 weights for 1.value"),
        (lambda b, t: (b, {k: w.bfloat16() for k, w in t.items()}), "0.query in bfloat16, whose"),
        (lambda b, t: (b, {k: w.half() for k, w in t.items()}), "0.query in float16, whose"),
        (lambda b, t: (b | {KEY: torch.ones(3, D)}, t), r"\(3, 12\) in the base .* \(7, 12\)"),
        (lambda b, t: (b, t | {f"bert.{KEY}": torch.full((OUT, D), torch.nan)}), "diverged"),
        (lambda b, t: (b, b), "equals the base in every module"),
        (
            lambda b, t: ({k: w.T for k, w in b.items()}, {k: w.T for k, w in t.items()}),
            "which reads 7 features",
        ),
        (lambda b, t: ("nowhere/at all", t), "base checkpoint nowhere/at all cannot be read"),
    ],
)
def test_checkpoints_that_do_not_fit(change, message, state, checkpoints):
    base, tuned = change(*checkpoints)
    with pytest.raises(UserError, match=message):
        convert_checkpoint(base, tuned, state, name="a")


def test_files_that_are_no_checkpoints(state, checkpoints, tmp_path):
    _, tuned = checkpoints
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 40)
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text("[]")
    for source in (tmp_path / "broken.safetensors", tmp_path, index.parent):
        with pytest.raises(UserError, match="cannot be read"):
            convert_checkpoint(source, tuned, state, name="a")
    index.write_text(json.dumps({"weight_map": {KEY: "model-1.safetensors"}}))
    with pytest.raises(UserError, match=r"cannot be read: \S+ lacks model-1\.safetensors: copy"):
        convert_checkpoint(index.parent, tuned, state, name="a")


def test_adapters_and_states_that_do_not_fit(adapter, state):
    del state["1.value"]
    with pytest.raises(UserError, match=r"no subspace for module '1\.value'"):
        convert_adapter(adapter, state)
    rows = torch.ones(2, D)
    with pytest.raises(UserError, match=r"no second moment for module '0\.query'"):
        convert_adapter(adapter, dict.fromkeys(MODULES, torch.eye(D)[:2]), {})
    with pytest.raises(UserError, match=r"rows of the subspace state for 0\.query are not indep"):
        convert_adapter(adapter, dict.fromkeys(MODULES, rows))
