"""EMR bundles: every task of one directory is what the run-time method serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formulas.emr import emr

from merge_algorithms import Adapter, LowRank, UserError, attach
from merge_algorithms.emr import EmrBundle

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
    lost = merged.save_adapter(tmp_path / "out")
    assert max(lost.values()) < 1e-9
    saved = Adapter.load(tmp_path / "out")
    assert list(saved.heads) == ["bbc"]
    assert saved.head_info("bbc") == {"labels": ["x", "y"]}
    assert saved.info["merge"]["weights"] == [1.0, 0.5, 2.0]
    assert saved.info["merge"]["options"] == {"task": "bbc", "rescale": "means"}
    for module, update in merged.updates.items():
        whole = update.rows(0, update.shape[0])
        torch.testing.assert_close(saved.updates[module].dense(), whole, rtol=1e-4, atol=1e-5)


def damaged(path: Path, **changes: object) -> None:
    info = json.loads((path / "emr.json").read_text()) | changes
    (path / "emr.json").write_text(json.dumps(info))


def test_bad_bundles_are_refused(adapters, tmp_path):
    path = tmp_path / "bundle"
    bundle = EmrBundle.build(adapters)
    bundle.save(path)
    with pytest.raises(UserError, match="did you mean 'trec'"):
        bundle.merged("trek")
    with pytest.raises(UserError, match="already exists"):
        bundle.save(path)
    bundle.save(path, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(UserError, match="not an EMR bundle"):
        bundle.save(tmp_path / "other", overwrite=True)
    with pytest.raises(UserError, match="not an EMR bundle"):
        EmrBundle.load(tmp_path / "other")
    damaged(path, weights=[1.0])
    with pytest.raises(UserError, match=r"emr\.json is damaged"):
        EmrBundle.load(path)
    damaged(path, rescalers=[["sms", 1.0]], weights=[1.0])
    with pytest.raises(UserError, match="no masks of shape"):
        EmrBundle.load(path)
    damaged(path, rescalers={"sms": None})
    with pytest.raises(UserError, match=r"emr\.json is damaged"):
        EmrBundle.load(path)
    whole = (path / "emr.safetensors").read_bytes()
    (path / "emr.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="safetensors"):
        EmrBundle.load(path)
