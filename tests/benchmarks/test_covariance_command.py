"""`osrm covariance`: its numbers, its sketches, and pooling of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from benchmarks.suites import load_suite
from merge_algorithms import Adapter
from osrm import Covariance
from trainers.backbone import load_backbone, load_tokenizer
from trainers.data import TaskData

Run = Callable[..., str]


@pytest.fixture
def collect(osrm: Run, toy_suite: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(name: str, task: str, *options: object) -> Path:
        path = tmp_path / f"{name}.safetensors"
        said = osrm("covariance", "--suite", toy_suite, "--task", task, *options, "-o", path)
        assert "the sums take at most" in said
        assert f"of task '{task}'" in said
        return path

    return run


def test_the_numbers_are_those_asked_for(collect: Callable[..., Path], tmp_path: Path) -> None:
    plain = Covariance.load(collect("plain", "half"))
    wide = Covariance.load(collect("wide", "half", "--dtype", "float64"))
    spilled = collect("spilled", "half", "--spill", "true", "--spill-directory", tmp_path)
    assert spilled.read_bytes() == collect("memory", "half", "--spill", "false").read_bytes()
    for key, matrix in plain.matrices.items():
        assert matrix.dtype == torch.float32
        assert wide.matrices[key].dtype == torch.float64
        torch.testing.assert_close(wide.matrices[key].float(), matrix, rtol=1e-4, atol=1e-6)


def test_a_sketch_is_trained_against_like_any_other(
    osrm: Run, collect: Callable[..., Path], toy_suite: Path, tmp_path: Path
) -> None:
    sketch = collect("sketch", "size", "--sketch", 8)
    exact = collect("exact", "size")
    assert sketch.stat().st_size < 0.5 * exact.stat().st_size
    osrm("train", "--suite", toy_suite, "--task", "half", "--covariances", sketch,
         "--train.epochs", 1, "-o", tmp_path / "half")  # fmt: skip
    assert (tmp_path / "half" / "adapter_model.safetensors").exists()


def test_inputs_of_the_tuned_model(
    osrm: Run, refused: Run, collect: Callable[..., Path], toy_suite: Path, tmp_path: Path
) -> None:
    osrm("train", "--suite", toy_suite, "--task", "half", "--subspace.init", "lora",
         "--train.learning_rate", 0.1, "-o", tmp_path / "half")  # fmt: skip
    found = Covariance.load(collect("tuned", "half", "--tuned", tmp_path / "half"))
    suite = load_suite(str(toy_suite), "smoke")
    model = PeftModel.from_pretrained(load_backbone(suite.model), str(tmp_path / "half"))
    data = TaskData(suite.tasks["half"], load_tokenizer(suite.model), suite.train, suite.rows)
    seen: dict[str, list[Tensor]] = {key: [] for key in found.matrices}
    real = torch.empty(0)

    def keep(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: seen[key].append(inputs[0][real])

    for key in found.matrices:
        module = model.base_model.model.get_submodule(key)
        module.register_forward_pre_hook(keep(key))
    with torch.no_grad():
        for batch in data.covariance_dataloader():
            del batch["labels"]
            real = batch["attention_mask"].bool()
            model(**batch)
    for key, inputs in seen.items():
        h = torch.cat(inputs).double()
        torch.testing.assert_close(
            found.matrices[key].double(), h.T @ h / len(h), rtol=1e-4, atol=1e-5
        )
    assert found.meta["tuned"] == "half"
    plain = Covariance.load(collect("plain", "half"))
    last = max(found.matrices)
    assert not torch.allclose(plain.matrices[last], found.matrices[last], rtol=1e-2, atol=1e-2)

    command = ["covariance", "--suite", toy_suite, "--task", "half"]
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "half", other)
    info = json.loads((other / "osrm.json").read_text())
    (other / "osrm.json").write_text(json.dumps(info | {"model_fingerprint": "another"}))
    message = refused(*command, "--tuned", other, "-o", tmp_path / "none.safetensors")
    assert "was trained on a model with fingerprint another" in message


def test_rows_are_as_long_as_the_tuned_adapter_was_trained_with(
    osrm: Run, refused: Run, collect: Callable[..., Path], toy_suite: Path, tmp_path: Path
) -> None:
    command = ["--suite", toy_suite, "--task", "half", "-o"]
    osrm("train", *command, tmp_path / "short", "--train.max_length", 5, "--train.epochs", 1,
         "--subspace.init", "lora")  # fmt: skip
    tuned = ["--tuned", tmp_path / "short"]
    found = Covariance.load(collect("tuned", "half", *tuned))
    short = Covariance.load(collect("short", "half", "--train.max_length", 5))
    assert found.tokens == short.tokens < Covariance.load(collect("plain", "half")).tokens
    out = tmp_path / "out.safetensors"
    message = refused("covariance", *command, out, *tuned, "--train.max_length", 12)
    assert "max_length is 12, but the adapter of task 'half' was trained with 5" in message


def test_inputs_of_a_tuned_classifier_of_plain_peft(
    osrm: Run, collect: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its modules are called bert.encoder.., those of the backbone encoder..; RegMean reads it."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), num_labels=2)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, init_lora_weights=False, target_modules=["key", "value"]
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    found = collect("tuned", "half", "--tuned", f"half={tmp_path / 'peft'}")
    adapter = Adapter.load(tmp_path / "peft")
    names = {f"bert.{name}" for name in Covariance.load(found).modules}
    assert names == set(adapter.updates), "not the suite's"
    backbone = replace(
        adapter,
        updates={name.removeprefix("bert."): update for name, update in adapter.updates.items()},
        heads={},
    )
    backbone.save(tmp_path / "backbone")
    expected = Covariance.load(collect("same", "half", "--tuned", tmp_path / "backbone"))
    for key, matrix in Covariance.load(found).matrices.items():
        assert torch.equal(matrix, expected.matrices[key])
    osrm("merge", f"half={tmp_path / 'peft'}", "--method", "regmean", "--covariances", found,
         "-o", tmp_path / "merged")  # fmt: skip
    merged = Adapter.load(tmp_path / "merged")
    for name, update in adapter.updates.items():
        torch.testing.assert_close(merged.updates[name].dense(), update.dense(), atol=1e-4, rtol=0)


def test_pooling_adds_up_shards_and_tasks(
    osrm: Run, refused: Run, collect: Callable[..., Path], tmp_path: Path
) -> None:
    half, size = (collect(task, task) for task in ("half", "size"))
    both = tmp_path / "both.safetensors"
    assert "--task" in refused("covariance", "--pool", half, size, "-o", both)
    assert "would count twice" in refused("covariance", "--pool", half, half, "-o", both)
    assert not both.exists()
    said = osrm("covariance", "--pool", half, size, "--task", "earlier", "-o", both)
    parts, found = [Covariance.load(path) for path in (half, size)], Covariance.load(both)
    assert f"{sum(part.tokens for part in parts)} tokens of task 'earlier'" in said
    expected = parts[0] + parts[1]
    assert found.fingerprint == expected.fingerprint
    assert found.meta["model_fingerprint"] == parts[0].meta["model_fingerprint"]
    assert "already exists" in refused("covariance", "--pool", half, size, "-o", both)

    shards = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, shard in enumerate(shards):
        parts[i].meta.update(task="half", data_fingerprint=str(i))
        parts[i].save(shard)
    osrm("covariance", "--pool", *shards, "-o", both, "--overwrite")
    assert Covariance.load(both).meta["task"] == "half"


def test_commands_that_lack_something_say_so(
    osrm: Run, refused: Run, toy_suite: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    command = ["covariance", "--suite", toy_suite, "-o", out]
    assert "which task? Give --task" in refused(*command)
    half = trained / "half.safetensors"
    assert "leave it out" in refused(*command, "--pool", half, "--tuned", trained / "half")
    assert "--sketch has no effect" in refused(*command, "--pool", half, "--sketch", 8)
    assert "--spill-directory has no effect" in refused(
        *command, "--pool", half, "--spill-directory", tmp_path
    )
    for flag, value in (
        ("--model", "minilm"),
        ("--adapter.targets", "[key]"),
        ("--train.max_length", 12),
        ("--rows.covariance", 8),
    ):
        said = refused(*command, "--pool", half, flag, value)
        assert f"--pool collects nothing, so {flag} has no effect: leave it out" in said
    assert "is no file: give a file" in refused(*command, "--pool", tmp_path)
    tuned = tmp_path / "tuned.safetensors"
    osrm("covariance", "--suite", toy_suite, "--task", "size", "--tuned", trained / "size",
         "-o", tuned)  # fmt: skip
    assert "different models" in refused(*command, "--pool", half, tuned, "--task", "both")
    assert "choose at least 1" in refused(*command, "--task", "half", "--sketch", 0)
    assert "float32" in refused(*command, "--task", "half", "--dtype", "float16")
    assert "does not exist" in refused(*command, "--pool", tmp_path / "a.safetensors")
    assert "does not exist" in refused(
        *command, "--task", "half", "--spill-directory", tmp_path / "nowhere"
    )
    assert not out.exists()
