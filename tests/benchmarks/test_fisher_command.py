"""`osrm fisher` on adapters of osrm and of plain PEFT, and the merge that reads its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

from benchmarks.cli import main
from merge_algorithms import Adapter, merge
from osrm import Fisher

Run = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path) -> Path:
    """Adapters of a classification and a regression, and their Fisher files."""
    folder = tmp_path_factory.mktemp("fisher")
    for task in ("half", "size"):
        train = ["train", "--suite", str(toy_suite), "--task", task, "--subspace.init", "lora"]
        assert main([*train, "-o", str(folder / task)]) == 0
        fisher = ["fisher", str(folder / task), "--suite", str(toy_suite), "--examples", "20"]
        assert main([*fisher, "-o", str(folder / f"{task}.safetensors")]) == 0
    return folder


def test_the_file_fits_the_adapter_and_says_what_it_is(trained: Path) -> None:
    for task in ("half", "size"):
        adapter, fisher = Adapter.load(trained / task), Fisher.load(trained / f"{task}.safetensors")
        assert fisher.examples == 20
        assert fisher.meta["task"] == task
        assert fisher.meta["model_fingerprint"] == adapter.info["model_fingerprint"]
        assert fisher.meta["tuned_fingerprint"] == adapter.fingerprint
        model = {"model", "model_fingerprint"}
        assert set(fisher.meta) == {"task", "data_fingerprint", "tuned_fingerprint"} | model
        shapes = {m: tuple(x.shape) for m, x in fisher.diagonals.items()}
        assert shapes == {m: u.shape for m, u in adapter.updates.items()}
        assert all(x.any() for x in fisher.diagonals.values())


def test_merging_reads_the_files(trained: Path, tmp_path: Path) -> None:
    adapters = [trained / task for task in ("half", "size")]
    files = [trained / f"{task}.safetensors" for task in ("half", "size")]
    command = ["merge", *adapters, "--method", "fisher", "--normalize", "true"]
    command += ["--fishers", *files, "--rank", 32, "-o", tmp_path / "merged"]
    assert main([str(argument) for argument in command]) == 0
    loaded = [Adapter.load(path) for path in adapters]
    statistics = {
        adapter.name: Fisher.load(file).by_module()
        for adapter, file in zip(loaded, files, strict=True)
    }
    expected = merge(loaded, "fisher", statistics=statistics, normalize=True)
    for module, update in Adapter.load(tmp_path / "merged").updates.items():
        d_out = update.shape[0]
        torch.testing.assert_close(
            update.dense(), expected.updates[module].rows(0, d_out), rtol=1e-4, atol=1e-6
        )


def test_a_file_of_an_earlier_training_is_refused(
    refused: Run, trained: Path, tmp_path: Path
) -> None:
    half = Adapter.load(trained / "half")
    updates = {module: update.scaled(2) for module, update in half.updates.items()}
    replace(half, updates=updates).save(tmp_path / "half")
    files = [trained / f"{task}.safetensors" for task in ("half", "size")]
    merging = ["merge", tmp_path / "half", trained / "size", "--method", "fisher", "--fishers"]
    said = refused(*merging, *files, "-o", tmp_path / "out")
    assert "the fisher of 'half' was collected with another adapter" in said
    assert "collect it with osrm fisher and that adapter" in said
    old = Fisher.load(files[0])
    unknown = {key: text for key, text in old.meta.items() if key != "tuned_fingerprint"}
    replace(old, meta=unknown).save(tmp_path / "old.safetensors")
    command = [*merging, tmp_path / "old.safetensors", files[1], "-o", tmp_path / "out"]
    assert main([str(argument) for argument in command]) == 0


def test_adapters_with_different_modules(
    refused: Run, trained: Path, toy_suite: Path, tmp_path: Path
) -> None:
    """An update is zero where an adapter has none; the information is collected there as well."""
    tasks = {"half": "query", "size": "value"}
    for task, part in tasks.items():
        whole = Adapter.load(trained / task)
        own = {module: update for module, update in whole.updates.items() if part in module}
        replace(whole, updates=own).save(tmp_path / task)

    def collect(*arguments: str) -> None:
        for task in tasks:
            command = ["fisher", str(tmp_path / task), "--suite", str(toy_suite), "--examples", "9"]
            command += ["-o", str(tmp_path / f"{task}.safetensors"), "--overwrite", *arguments]
            assert main(command) == 0

    merging = [
        "merge",
        *(tmp_path / task for task in tasks),
        "--method",
        "fisher",
        "--fishers",
        *(tmp_path / f"{task}.safetensors" for task in tasks),
        "-o",
        tmp_path / "m",
    ]
    collect()
    assert "(`osrm fisher` with --targets)" in refused(*merging)
    collect("--targets", "query", "value")
    assert main([str(argument) for argument in merging]) == 0
    parts = {module.rpartition(".")[2] for module in Adapter.load(tmp_path / "m").updates}
    assert parts == {"query", "value"}


def test_a_classifier_of_plain_peft(
    tiny_model: Callable[[str], Path], toy_suite: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), num_labels=2)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, init_lora_weights=False, target_modules=["query"]
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    command = ["fisher", f"same={tmp_path / 'adapter'}", "--suite", str(toy_suite)]
    command += ["--draws", "1", "-o", str(tmp_path / "same.safetensors")]
    assert main(command) == 0
    fisher = Fisher.load(tmp_path / "same.safetensors")
    assert fisher.examples == 100  # more than the suite's smoke preset trains on
    assert set(fisher.diagonals) == set(Adapter.load(tmp_path / "adapter").updates)
    first = (tmp_path / "same.safetensors").read_bytes()
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "same.safetensors").read_bytes() == first


def test_bad_commands(
    refused: Run,
    trained: Path,
    toy_suite: Path,
    make_qa_suite: Callable[..., Path],
    tmp_path: Path,
) -> None:
    language = make_qa_suite("gpt2")
    suite, out = ["--suite", toy_suite], ["-o", tmp_path / "out"]
    half = trained / "half"
    bundle = trained / "bundle"
    pair = [str(half), str(trained / "size"), "-o", str(bundle)]
    assert main(["merge", *pair]) == 0
    headless = tmp_path / "headless"
    shutil.copytree(half, headless)
    (headless / "head.safetensors").unlink()
    merging = ["merge", half, trained / "size", "--method", "fisher", *out]
    file = trained / "half.safetensors"
    cases = {
        ("fisher", half, *suite): "output",
        ("fisher", half, *suite, "-o", file): "already exists",
        ("fisher", half, *suite, *out, "--examples", 0): "take at least 1 row",
        ("fisher", half, *suite, *out, "--train.max_length", 12): "was trained with 24",
        ("fisher", half, *suite, *out, "--draws", 0): "draw at least 1 class",
        ("fisher", half, *suite, *out, "--targets", "qeury"): "did you mean 'query'",
        ("fisher", half, *suite, *out, "--task", "hlaf"): "did you mean 'half'",
        ("fisher", half, *suite, *out, "--task", "size"): "no adapter has a head for task 'size'",
        ("fisher", bundle, *suite, *out): "several tasks (half, size): name one with --task",
        ("fisher", headless, *suite, *out): "has no head, without which it is for no task of suite",
        ("fisher", half, "--suite", "embedded", *out): "no task of suite",
        ("fisher", f"math={half}", "--suite", language, *out): "task 'math' of suite 'toyqa' is a"
        " causal_lm, and osrm fisher supports no language models",
        ("fisher", half, "--suite", language, "--task", "math", *out): "no language models",
        ("fisher", tmp_path, *suite, *out): "not a PEFT adapter",
        tuple(merging): "`osrm fisher` collects a task's fisher file",
        (*merging, "--fishers", file): "needs the fisher of adapter 'size'",
        (*merging, "--fishers", half / "adapter_model.safetensors"): "not a fisher file",
    }
    for command, expected in cases.items():
        assert expected in refused(*command), command
    error = refused("fisher", f"hlaf={half}", *suite, *out)
    assert error.endswith("choose another suite, or say the adapter's task as TASK=PATH")
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fisher", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "training rows that it is the mean over" in said
    assert "osrm merge --method fisher reads one" in said
