"""EMR bundles: every task of one directory is what the run-time method serves."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from formulas.emr import emr
from safetensors.torch import load_file, save_file

from merge_algorithms import Adapter, EmrBundle, LowRank, UserError, attach, merge

NAMES = ["sms", "bbc", "trec"]


@pytest.fixture
def adapters(random_adapter) -> list[Adapter]:
    return [
        random_adapter(
            name, rank=t + 1, seed=t, heads={name: {"score.weight": torch.full((2,), t)}}
        )
        for t, name in enumerate(NAMES)
    ]


@pytest.mark.parametrize("rescale", ["sums", "means"])
def test_a_bundle_holds_every_task(adapters, rescale, tmp_path, linear_model):
    weights = [1.0, 0.5, 2.0]
    EmrBundle.build(adapters, weights, rescale).save(tmp_path / "bundle")
    bundle = EmrBundle.load(tmp_path / "bundle")
    dense = {
        m: torch.stack([a.updates[m].dense().double() for a in adapters])
        for m in adapters[0].updates
    }
    x = torch.randn(5, 10)
    for index, name in enumerate(NAMES):
        merged = bundle.merged(name)
        expected = emr(dense, torch.tensor(weights, dtype=torch.float64), index, rescale)
        for module, update in merged.updates.items():
            found = update.rows(0, update.shape[0])
            torch.testing.assert_close(found.double(), expected[module], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(update.rows(3, 5), found[3:5])
        assert list(merged.heads) == [name]
        assert torch.equal(merged.heads[name]["score.weight"], torch.full((2,), index))
        with attach(linear_model, adapters, "emr", weights, task=name, rescale=rescale):
            served = linear_model(x)
        with merged.apply_to(linear_model):
            torch.testing.assert_close(linear_model(x), served, rtol=1e-4, atol=1e-5)


def test_an_entry_costs_four_bytes_and_a_bit_for_every_task(random_adapter, tmp_path):
    shape = {"m": (128, 256)}
    adapters = [random_adapter(f"t{t}", shape, seed=t) for t in range(16)]
    EmrBundle.build(adapters).save(tmp_path / "bundle")
    size = (tmp_path / "bundle" / "emr.safetensors").stat().st_size
    assert size <= 128 * 256 * (4 + 16 / 8) + 1000


def test_layouts_and_base_come_along(peft_cases, tmp_path):
    case = peft_cases["conv1d"]
    for seed, name in enumerate(NAMES):
        case.save(tmp_path / name, seed=seed)
    adapters = [Adapter.load(tmp_path / name) for name in NAMES]
    EmrBundle.build(adapters).save(tmp_path / "bundle")
    merged = EmrBundle.load(tmp_path / "bundle").merged("bbc")
    assert merged.config["fan_in_fan_out"]
    model, other = case.base(), case.base()
    with merged.apply_to(model), attach(other, adapters, "emr", task="bbc"):
        torch.testing.assert_close(case.logits(model), case.logits(other), rtol=1e-4, atol=1e-5)


def test_a_task_without_update_gets_none(random_adapter):
    zero = Adapter("zero", {"m": LowRank(torch.zeros(4, 1), torch.ones(1, 5))})
    bundle = EmrBundle.build([zero, random_adapter("a", {"m": (4, 5)})])
    assert not bundle.merged("zero").updates["m"].rows(0, 4).any()


def test_one_task_can_be_saved_as_an_adapter(adapters, tmp_path):
    """With its own head and what is known of it; the record has the real weights."""
    adapters[1] = replace(adapters[1], info={"tasks": {"bbc": {"labels": ["x", "y"]}}})
    EmrBundle.build(adapters, [1.0, 0.5, 2.0], "means").save(tmp_path / "bundle")
    merged = EmrBundle.load(tmp_path / "bundle").merged("bbc")
    merged.save_adapter(tmp_path / "short")
    rank = sum(adapter.updates["layer.0.query"].rank for adapter in adapters)
    assert Adapter.load(tmp_path / "short").updates["layer.0.query"].rank == rank
    lost = merged.save_adapter(tmp_path / "out", rank=1000)
    assert max(lost.values()) < 1e-9
    saved = Adapter.load(tmp_path / "out")
    assert list(saved.heads) == ["bbc"]
    assert saved.head_info("bbc") == {"labels": ["x", "y"]}
    assert saved.info["merge"]["weights"] == [1.0, 0.5, 2.0]
    assert saved.info["merge"]["options"] == {"task": "bbc", "rescale": "means"}
    for module, update in merged.updates.items():
        whole = update.rows(0, update.shape[0])
        torch.testing.assert_close(saved.updates[module].dense(), whole, rtol=1e-4, atol=1e-5)


def test_a_scaled_bundle_is_scaled_for_every_task(adapters, tmp_path):
    whole = EmrBundle.build(adapters)
    whole.scaled({"value": 0.5}).scaled(2.0).save(tmp_path / "bundle")
    loaded = EmrBundle.load(tmp_path / "bundle")
    for name in NAMES:
        expected = whole.merged(name).scaled({"value": 1.0, "": 2.0}).updates
        for module, update in loaded.merged(name).updates.items():
            rows = expected[module].rows(0, update.shape[0])
            torch.testing.assert_close(update.rows(0, update.shape[0]), rows)
    record = json.loads((tmp_path / "bundle" / "osrm.json").read_text())["merge"]
    assert record["coefficient"]["layer.0.value"] == 1.0
    assert record["coefficient"]["layer.0.query"] == 2.0
    assert loaded.unified.info([])["merge"] == record


def test_a_bundle_of_merges_keeps_the_heads_with_their_adapters(adapters, tmp_path):
    """A merge has the heads of several tasks, which share its model."""
    pair = merge(adapters[:2])
    pair.save_adapter(tmp_path / "pair")
    EmrBundle.build([Adapter.load(tmp_path / "pair"), adapters[2]]).save(tmp_path / "bundle")
    bundle = EmrBundle.load(tmp_path / "bundle")
    assert list(bundle.rescalers) == ["pair", "trec"]
    assert set(bundle.merged("pair").heads) == {"sms", "bbc"}
    assert bundle.owners == {"bbc": "pair", "sms": "pair", "trec": "trec"}
    assert set(bundle.heads().heads) == set(NAMES)


def test_the_card_says_what_it_is_and_its_code_runs(peft_cases, tmp_path, monkeypatch):
    case = peft_cases["conv1d"]
    case.base().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(NAMES):
        case.save(tmp_path / name, seed=seed)
    base = str(tmp_path / "base")
    adapters = [Adapter.load(tmp_path / name).on_base(base) for name in NAMES]
    EmrBundle.build(adapters).save(tmp_path / "bundle")
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "library_name: osrm" in card
    assert "merged into a bundle with a model for each" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    seen = []
    code = code.replace("...", "seen.append(case.logits(model))")
    exec(code, {"case": case, "seen": seen})
    for name, found in zip(NAMES, seen, strict=True):
        with attach(model := case.base(), adapters, "emr", task=name):
            torch.testing.assert_close(found, case.logits(model), rtol=1e-4, atol=1e-5)


def damaged(path: Path, **changes: object) -> None:
    info = json.loads((path / "osrm.json").read_text())
    info["emr"] |= changes
    (path / "osrm.json").write_text(json.dumps(info))


def test_a_bundle_of_the_hub_is_no_adapter(adapters, tmp_path, monkeypatch):
    EmrBundle.build(adapters).save(tmp_path / "bundle")

    def fetch(repo_id, allow_patterns, revision):
        assert "emr.safetensors" not in allow_patterns, "large, and no file of an adapter"
        fetched = tmp_path / "fetched"
        fetched.mkdir()
        shutil.copy(tmp_path / "bundle" / "osrm.json", fetched)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match=r"someone/merged on .* is an EMR bundle.*`osrm eval`"):
        Adapter.load("someone/merged")


def test_bad_bundles_are_refused(adapters, tmp_path):
    path = tmp_path / "bundle"
    bundle = EmrBundle.build(adapters)
    bundle.save(path)
    with pytest.raises(UserError, match="did you mean 'trec'"):
        bundle.merged("trek")
    with pytest.raises(UserError, match="rescale='median'"):
        EmrBundle.build(adapters, rescale="median")
    with pytest.raises(UserError, match="already exists"):
        bundle.save(path)
    bundle.save(path, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(UserError, match="not an EMR bundle"):
        bundle.save(tmp_path / "other", overwrite=True)
    with pytest.raises(UserError, match="not an EMR bundle"):
        EmrBundle.load(tmp_path / "other")
    with pytest.raises(UserError, match=r"is an EMR bundle.*is no adapter: score it with `osrm ev"):
        Adapter.load(path)
    with pytest.raises(UserError, match=r"layer\.\d.\w+ is beyond the range of float32"):
        bundle.scaled(1e39).save(tmp_path / "large")
    rescalers = [[name, 1.0] for name in NAMES]
    for change, reason in (
        ({"rescalers": rescalers[:2]}, r"osrm\.json is damaged"),
        ({"rescalers": {"sms": None}}, r"osrm\.json is damaged"),
        ({"rescalers": rescalers, "owners": {"sms": "x"}}, r"osrm\.json is damaged"),
    ):
        damaged(path, **change)
        with pytest.raises(UserError, match=reason):
            EmrBundle.load(path)
    bundle.save(path, overwrite=True)
    tensors = load_file(path / "emr.safetensors")
    tensors = {key: t[:2] if "masks" in key else t for key, t in tensors.items()}
    save_file(tensors, path / "emr.safetensors")
    with pytest.raises(UserError, match="no masks of shape"):
        EmrBundle.load(path)
    whole = (path / "emr.safetensors").read_bytes()
    (path / "emr.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="safetensors"):
        EmrBundle.load(path)
