"""Adapter.load and Adapter.save: what is read, what is written, what is refused and how."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from merge_algorithms import Adapter, LowRank, UserError, merge


@pytest.fixture
def saved(peft_cases, tmp_path) -> Path:
    """A classification adapter that plain PEFT saved."""
    peft_cases["classifier"].save(tmp_path / "plain")
    return tmp_path / "plain"


def edit_config(directory: Path, **changes) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_what_plain_peft_saved(saved):
    adapter = Adapter.load(saved)
    assert adapter.name == "plain"
    assert adapter.info == {}
    assert adapter.config["task_type"] == "SEQ_CLS"
    assert list(adapter.heads) == ["plain"]
    assert set(adapter.heads["plain"]) == {"classifier.weight", "classifier.bias"}
    assert sorted(adapter.updates) == [
        f"bert.encoder.layer.{layer}.attention.self.{part}"
        for layer in (0, 1)
        for part in ("query", "value")
    ]
    tensors = load_file(saved / "adapter_model.safetensors")
    prefix = "base_model.model.bert.encoder.layer.1.attention.self.value"
    b, a = tensors[f"{prefix}.lora_B.weight"], tensors[f"{prefix}.lora_A.weight"]
    update = adapter.updates["bert.encoder.layer.1.attention.self.value"]
    assert update.rank == 4
    torch.testing.assert_close(update.dense(), 6 / 4 * b @ a)


def test_names_with_and_without_the_default_adapter_are_read(saved):
    def rename(tensors):
        for key in list(tensors):
            if ".lora_" in key:
                tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    before = Adapter.load(saved)
    edit_tensors(saved, rename)
    after = Adapter.load(saved)
    assert after.updates.keys() == before.updates.keys()
    for module, update in before.updates.items():
        assert torch.equal(after.updates[module].dense(), update.dense())


def test_half_precision_factors_are_widened(saved):
    def halve(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(torch.bfloat16)

    edit_tensors(saved, halve)
    assert {u.a.dtype for u in Adapter.load(saved).updates.values()} == {torch.float32}


def test_what_velora_adds_for_the_backward_pass_is_no_part_of_the_update(peft_cases, tmp_path):
    case = peft_cases["plain"]
    logits = case.save(tmp_path / "velora", velora_config={"num_groups": 4})
    model = case.base()
    with merge([Adapter.load(tmp_path / "velora")]).apply_to(model):
        torch.testing.assert_close(case.logits(model), logits())


@pytest.mark.parametrize("key", ["name", "task", "directory"])
def test_the_name_is_given_or_the_task_or_the_directory(saved, key):
    if key != "directory":
        (saved / "osrm.json").write_text('{"task": "stsb", "seed": 3}')
    adapter = Adapter.load(saved, name="mine" if key == "name" else None)
    expected = {"name": "mine", "task": "stsb", "directory": "plain"}[key]
    assert adapter.name == expected
    assert list(adapter.heads) == [expected]


@pytest.mark.parametrize("info", [{"task": ["a"]}, {"task": "a", "tasks": ["a"]}, {"peft": ["a"]}])
def test_damaged_info_is_refused(saved, info):
    (saved / "osrm.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"osrm\.json is damaged"):
        Adapter.load(saved)


def test_own_head_and_info_round_trip(random_adapter, tmp_path):
    head = {"dense.weight": torch.randn(4, 8), "out.bias": torch.randn(2)}
    head |= {"tied.weight": head["dense.weight"], "turned.weight": head["dense.weight"].T}
    adapter = random_adapter("stsb", heads={"stsb": head}, info={"task": "stsb", "seed": 1})
    adapter.save(tmp_path / "a")
    assert (tmp_path / "a" / "head.safetensors").exists()
    again = Adapter.load(tmp_path / "a")
    assert again.name == "stsb"
    assert again.info == {"task": "stsb", "seed": 1}
    assert all(torch.equal(again.heads["stsb"][k], head[k]) for k in head)
    for module, update in adapter.updates.items():
        assert torch.equal(again.updates[module].a, update.a)
        assert torch.equal(again.updates[module].b, update.b)


def test_a_bundle_keeps_every_head_and_loads_in_peft(peft_cases, tmp_path):
    case = peft_cases["classifier"]
    for t in range(2):
        case.save(tmp_path / f"t{t}", seed=t)
    merged = merge([Adapter.load(tmp_path / f"t{t}") for t in range(2)])
    merged.save_adapter(tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["task_type"] is None
    bundle = Adapter.load(tmp_path / "bundle")
    assert sorted(bundle.heads) == ["t0", "t1"]
    assert bundle.info["merge"]["adapters"] == ["t0", "t1"]
    model = case.base()
    model.load_state_dict(bundle.heads["t1"], strict=False)
    reloaded = PeftModel.from_pretrained(model, tmp_path / "bundle")

    merged.save_adapter(tmp_path / "t1_only", head="t1")
    complete = PeftModel.from_pretrained(case.base(), tmp_path / "t1_only")
    torch.testing.assert_close(case.logits(complete), case.logits(reloaded))
    assert Adapter.load(tmp_path / "t1_only").name == "t1"


def test_a_head_of_a_saved_bundle_is_a_complete_classifier(peft_cases, tmp_path):
    """PEFT's own file cannot say of several heads what it says of one."""
    case = peft_cases["classifier"]
    for t in range(2):
        case.save(tmp_path / f"t{t}", seed=t)
    merged = merge([Adapter.load(tmp_path / f"t{t}") for t in range(2)])
    merged.save_adapter(tmp_path / "direct", head="t1")
    merged.save_adapter(tmp_path / "bundle")
    bundle = Adapter.load(tmp_path / "bundle")
    assert bundle.config["modules_to_save"] == ["classifier", "score"]
    assert bundle.info.keys() == {"merge"}
    bundle.save(tmp_path / "again")
    merge([Adapter.load(tmp_path / "again")]).save_adapter(tmp_path / "later", head="t1")
    found = {}
    for name in ("direct", "later"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["classifier"]
        assert config["task_type"] == "SEQ_CLS"
        found[name] = case.logits(PeftModel.from_pretrained(case.base(), tmp_path / name))
    torch.testing.assert_close(found["later"], found["direct"])


def test_a_head_goes_where_its_own_trainer_left_it(random_adapter, tmp_path):
    """Whatever another adapter of the merge had saved whole."""
    own = {"dense.weight": torch.randn(4, 8), "out.bias": torch.randn(2)}
    pooler = {"pooler.dense.weight": torch.randn(4, 4)}
    plain = {"heads": {"b": pooler}, "config": {"modules_to_save": ["pooler"]}}
    merged = merge([random_adapter("stsb", heads={"stsb": own}), random_adapter("b", **plain)])
    for task, head, whole in (("stsb", own, None), ("b", pooler, ["pooler"])):
        merged.save_adapter(tmp_path / task, head=task)
        assert (tmp_path / task / "head.safetensors").exists() == (whole is None)
        loaded = Adapter.load(tmp_path / task)
        assert loaded.config["modules_to_save"] == whole
        assert all(torch.equal(loaded.heads[task][key], head[key]) for key in head)
        said = (tmp_path / task / "README.md").read_text()
        assert ("in head.safetensors" in said) == (whole is None)


def test_what_is_known_of_each_head_travels_with_it(random_adapter, saved, tmp_path):
    def trained(task: str, seed: int) -> Adapter:
        info = {"task": task, "tasks": {task: {"kind": f"about {task}"}}}
        heads = {task: {"out.bias": torch.full((2,), float(seed))}}
        return random_adapter(task, seed=seed, heads=heads, info=info)

    trained("stsb", 1).save(tmp_path / "stsb")
    renamed = Adapter.load(tmp_path / "stsb", name="mine")
    assert renamed.head_info("mine") == {"kind": "about stsb"}
    plain = random_adapter("plain", seed=3, heads={"plain": {"classifier.bias": torch.ones(2)}})
    assert plain.head_info("plain") is None

    merge([renamed, trained("trec", 2), plain]).save_adapter(tmp_path / "bundle")
    bundle = Adapter.load(tmp_path / "bundle")
    described = {head: bundle.head_info(head) for head in bundle.heads}
    assert described == {
        "mine": {"kind": "about stsb"},
        "trec": {"kind": "about trec"},
        "plain": None,
    }
    merge([renamed, plain]).save_adapter(tmp_path / "two")
    two = Adapter.load(tmp_path / "two")
    assert two.head_info("mine") == {"kind": "about stsb"}
    assert two.head_info("plain") is None


def test_similar_module_names_of_different_rank_load_in_peft(tmp_path):
    """'block' ends 'net.block' as well: patterns must not confuse the two."""
    draw = torch.Generator().manual_seed(0)
    names = ("block", "other")
    model = torch.nn.ModuleDict({name: torch.nn.Linear(6, 6) for name in names})
    model["net"] = torch.nn.ModuleDict({name: torch.nn.Linear(6, 6) for name in names})
    ranks = {"block": 1, "net.block": 3, "net.other": 3}
    updates = {
        m: LowRank(torch.randn(6, r, generator=draw), torch.randn(r, 6, generator=draw))
        for m, r in ranks.items()
    }
    Adapter("a", updates).save(tmp_path / "a")
    layers = PeftModel.from_pretrained(model, tmp_path / "a").base_model.model
    for module, update in updates.items():
        torch.testing.assert_close(
            layers.get_submodule(module).get_delta_weight("default"), update.dense()
        )
    again = Adapter.load(tmp_path / "a")
    assert {m: u.rank for m, u in again.updates.items()} == ranks


def test_hub_ids_are_fetched_only_if_no_such_path_exists(saved, monkeypatch):
    asked = []

    def fetch(repo_id, allow_patterns, revision):
        asked.append((repo_id, allow_patterns))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Adapter.load(saved).name == "plain"
    assert not asked
    assert Adapter.load("someone/their-lora").name == "their-lora"
    assert asked[0][0] == "someone/their-lora"
    assert not any("bin" in pattern for pattern in asked[0][1])


def test_below_a_local_folder_there_is_no_hub(tmp_path, monkeypatch):
    """A mistyped path is not asked for; that a Hub id is not either is said."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    with pytest.raises(UserError, match=r"not looked up on .* there is a folder someone here"):
        Adapter.load("someone/their-lora")


def test_a_hub_repository_without_an_adapter_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match=r"someone/their-lora on the Hugging Face Hub: .*empty"):
        Adapter.load("someone/their-lora")


@pytest.mark.parametrize(
    "error",
    [
        OSError("long trace about a connection"),
        # As a proxy that refuses: of the HTTP client, which huggingface_hub lets through.
        HfHubHTTPError.__mro__[1]("403 Forbidden"),
    ],
)
def test_a_failed_download_is_one_sentence(monkeypatch, error):
    def fail(repo_id, allow_patterns, revision):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"no local directory someone/their-lora.*network"):
        Adapter.load("someone/their-lora")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*base weights"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"peft_type": "IA3"}, "IA3.*only LoRA"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"r": 5}, "rank 4.*says 5"),
        ({"rank_pattern": ["query"]}, r"rank_pattern=\['query'\]"),
        ({"alpha_pattern": {"query": "8"}}, "alpha_pattern=.*positive numbers"),
        ({"alpha_pattern": {"query": 0}}, "alpha_pattern=.*positive numbers"),
        ({"rank_pattern": {"[query": 4}}, r"'\[query' in rank_pattern.*no regular expression"),
    ],
)
def test_what_factors_cannot_describe_is_refused(saved, changes, reason):
    edit_config(saved, **changes)
    with pytest.raises(UserError, match=reason):
        Adapter.load(saved)


# Settings that leave the meaning of the factors alone, or are refused for some values only.
HARMLESS = [
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
]


def test_every_setting_of_the_installed_peft_is_harmless_or_refused(saved):
    settings = {field.name for field in dataclasses.fields(LoraConfig)}
    for name in settings - set(HARMLESS):
        edit_config(saved, **{name: [1]})
        with pytest.raises(UserError, match=name):
            Adapter.load(saved)
        edit_config(saved, **{name: None})
    assert Adapter.load(saved)


def test_paths_without_an_adapter(tmp_path, saved):
    with pytest.raises(UserError, match="no adapter directory"):
        Adapter.load(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it is empty"):
        Adapter.load(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        Adapter.load(tmp_path / "empty")
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Adapter.load(saved)
    (saved / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        Adapter.load(saved)


def test_pickles_are_named_and_not_loaded(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin.*never loaded.*safe_serialization"):
        Adapter.load(saved)
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="no weights"):
        Adapter.load(saved)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_truncated_files(saved, keep):
    path = saved / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        Adapter.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensors_are_named(saved, value):
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    edit_tensors(saved, lambda tensors: tensors[key][3].fill_(value))
    with pytest.raises(UserError, match=f"NaN or infinite values in {key}"):
        Adapter.load(saved)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_float8_are_widened(saved, dtype):
    def rounded(tensors):
        tensors.update({key: tensor.to(dtype).float() for key, tensor in tensors.items()})

    edit_tensors(saved, rounded)
    expected = Adapter.load(saved).updates
    edit_tensors(
        saved, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()})
    )
    for module, update in Adapter.load(saved).updates.items():
        assert update.a.dtype == torch.float32
        assert torch.equal(update.dense(), expected[module].dense())


def test_factors_in_integers_are_refused(saved):
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    edit_tensors(saved, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    with pytest.raises(UserError, match=r"lora_B of \S+query in torch.int8, which are no numbers"):
        Adapter.load(saved)


def test_incomplete_or_foreign_tensors(saved):
    prefix = "base_model.model.bert.encoder.layer.0.attention.self.query"
    edit_tensors(saved, lambda tensors: tensors.pop(f"{prefix}.lora_A.weight"))
    with pytest.raises(UserError, match=r"lora_B of .*query but no lora_A"):
        Adapter.load(saved)
    a, b = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
    edit_tensors(
        saved, lambda tensors: tensors.update({a: torch.ones(0, 32), b: torch.ones(32, 0)})
    )
    with pytest.raises(UserError, match=r"empty factors, \(32, 0\) and \(0, 32\), for .*query"):
        Adapter.load(saved)
    edit_tensors(saved, lambda tensors: tensors.update({f"{prefix}.weight": torch.ones(2, 2)}))
    with pytest.raises(UserError, match="neither a LoRA factor nor part"):
        Adapter.load(saved)
    save_file(
        {"base_model.model.classifier.bias": torch.ones(3)}, saved / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="no LoRA factors"):
        Adapter.load(saved)


def test_two_heads_for_one_name_are_refused(saved):
    save_file({"out.bias": torch.ones(2)}, saved / "head.safetensors")
    with pytest.raises(UserError, match="two heads"):
        Adapter.load(saved)


def test_saving_overwrites_adapters_only_and_only_when_asked(random_adapter, tmp_path):
    adapter = random_adapter("a")
    adapter.save(tmp_path / "a")
    with pytest.raises(UserError, match="already exists"):
        adapter.save(tmp_path / "a")
    random_adapter("b", seed=5).save(tmp_path / "a", overwrite=True)
    a = Adapter.load(tmp_path / "a").updates["layer.0.query"].a
    assert not torch.equal(a, adapter.updates["layer.0.query"].a)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not an adapter directory"):
        adapter.save(tmp_path / "home", overwrite=True)
    with pytest.raises(UserError, match="not an adapter directory"):
        adapter.save(tmp_path / "home" / "thesis.tex", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "home"]


def test_nothing_is_written_for_what_cannot_be_saved(random_adapter, tmp_path):
    broken = random_adapter("broken")
    broken.updates["layer.0.query"].b[0, 0] = float("nan")
    escaping = random_adapter("b", heads={"../../x": {}, "y": {}})
    empty = Adapter("empty", {"m": LowRank(torch.ones(4, 0), torch.ones(0, 4))})
    for adapter in (broken, escaping, empty, Adapter("none", {})):
        with pytest.raises(UserError):
            adapter.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_factors_that_do_not_multiply():
    with pytest.raises(UserError, match=r"\(4, 2\) and \(3, 5\)"):
        LowRank(torch.ones(4, 2), torch.ones(3, 5))
