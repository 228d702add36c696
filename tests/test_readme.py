"""What README shows works: its Python runs, its commands parse, its suite file loads."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torchmetrics import PearsonCorrCoef, SpearmanCorrCoef
from transformers import AutoModelForSequenceClassification, TrainingArguments

from benchmarks.cli import build_parser, main, normalise
from benchmarks.commands.methods import methods_table
from benchmarks.suites import Suite, load_suite
from merge_algorithms import Adapter, UserError, merge
from osrm import leaked_energy, lora_a
from trainers.backbone import load_backbone, load_tokenizer
from trainers.data import TaskData
from trainers.tasks import Task

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SUITES = (Path(__file__).parents[1] / "docs" / "suites.md").read_text(encoding="utf-8")


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    lines = "\n".join(_blocks("bash")).splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.startswith("osrm ")]


@pytest.fixture
def loaders(toy_suite: Path) -> dict[str, Any]:
    suite = load_suite(str(toy_suite))
    tokenizer = load_tokenizer(suite.model)
    names = {"sentiment": "half", "topic": "size", "spam": "same"}
    return {
        name: TaskData(
            suite.tasks[task], tokenizer, suite.train, suite.rows
        ).covariance_dataloader()
        for name, task in names.items()
    }


def test_python_that_plugs_into_peft_code(
    tiny_model: Callable[[str], Path], loaders: dict[str, Any]
) -> None:
    plug_in, *_ = _blocks("python")
    lines = [line for line in plug_in.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 20
    base_model = load_backbone(str(tiny_model("bert")))
    scope: dict[str, Any] = {"base_model": base_model, "loaders": loaders}
    exec(plug_in, scope)
    others = [c for task, c in scope["covariances"].items() if task != "sentiment"]
    for module, a in lora_a(scope["model"]).items():
        cov = sum(c.matrix(module) for c in others) / len(others)
        best = torch.linalg.eigvalsh(cov.double())[:8].mean()
        assert leaked_energy(a, cov) == pytest.approx(float(best), rel=1e-3, abs=1e-6)


class Anybodys(L.LightningModule):
    """Knows nothing of this project."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.model(**inputs).last_hidden_state.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_callback_for_anybodys_lightning_module(
    tiny_model: Callable[[str], Path],
    loaders: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plug_in, callback, *_ = _blocks("python")
    assert len([line for line in callback.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)  # Lightning's default logger writes where it is
    scope: dict[str, Any] = {"base_model": load_backbone(str(tiny_model("bert")))}
    scope["loaders"] = loaders
    exec(plug_in, scope)
    scope |= {"lightning_module": Anybodys(scope["model"]), "train_loader": loaders["sentiment"]}
    exec(callback, scope)
    for module, a in lora_a(scope["model"]).items():
        torch.testing.assert_close(a, scope["state"][module])
    moved = [p for name, p in scope["model"].named_parameters() if "lora_B" in name]
    assert moved
    assert all(p.any() for p in moved)


def test_callback_for_transformers_trainer(
    tiny_model: Callable[[str], Path], loaders: dict[str, Any], tmp_path: Path
) -> None:
    plug_in, _, confined, *_ = _blocks("python")
    assert len([line for line in confined.splitlines() if line]) <= 15
    path = str(tiny_model("bert"))
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    row = {"input_ids": torch.arange(4, 12), "attention_mask": torch.ones(8).long(), "labels": 1}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True
    )
    scope = {"base_model": base, "loaders": loaders, "arguments": arguments, "dataset": [row] * 8}
    exec(plug_in, scope)
    before = lora_a(scope["model"])
    exec(confined, scope)
    for module, a in lora_a(scope["model"]).items():
        started = before[module] @ scope["callback"].filters[module]
        assert 0 < float((a - started).norm()) < float((a - before[module]).norm())


def test_python_that_merges(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    _, _, _, merging, *_ = _blocks("python")
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
        model = get_peft_model(load_backbone(str(tiny_model("bert"))), config)
        paths.append(tmp_path / f"task{seed}")
        model.save_pretrained(str(paths[-1]))
    base_model = load_backbone(str(tiny_model("bert")))
    before = {name: tensor.clone() for name, tensor in base_model.state_dict().items()}
    scope = {"adapter_paths": paths, "output_path": tmp_path / "out", "base_model": base_model}
    exec(merging, scope)
    after = base_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(base_model, tmp_path / "out")
    merged = merge([Adapter.load(path) for path in paths], "ties", density=0.2).scaled(0.7)
    for module, update in merged.updates.items():
        u, s, vh = torch.linalg.svd(update.rows(0, update.shape[0]))
        best = (u[:, :8] * s[:8]) @ vh[:8]  # TIES is dense; as many ranks as came in are kept
        found = loaded.base_model.model.get_submodule(module).get_delta_weight("default")
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)


def test_python_that_predicts(
    tiny_model: Callable[[str], Path], toy_suite: Path, tmp_path: Path
) -> None:
    """The scores of `osrm eval` are those of what it shows, row by row."""
    adapter = str(tmp_path / "stsb")
    train = ["train", "--suite", str(toy_suite), "--task", "size", "--subspace.init", "lora"]
    assert main([*train, "--train.epochs", "3", "-o", adapter]) == 0
    suite = load_suite(str(toy_suite))
    path = str(tiny_model("bert"))
    rows = TaskData(suite.tasks["size"], load_tokenizer(path), suite.train, suite.rows).rows("test")
    block = _blocks("python")[4].replace('"stsb"', '"size"')
    scope: dict[str, Any] = {"base_path": path, "adapter_path": adapter}
    exec(block, scope | {"texts": [row.texts[0] for row in rows]}, found := dict(scope))
    logits = found["logits"][:, 0]
    assert main(["eval", adapter, "--suite", str(toy_suite), "-o", f"{adapter}.json"]) == 0
    scored = json.loads(Path(f"{adapter}.json").read_text())["size"]["pearson+spearman"]
    labels = torch.tensor([float(row.label) for row in rows])
    pearson, spearman = PearsonCorrCoef()(logits, labels), SpearmanCorrCoef()(logits, labels)
    assert float(pearson + spearman) / 2 == pytest.approx(scored, abs=1e-4)
    with pytest.raises(UserError, match=r"no head of task 'half'.*name one of size"):
        found["TaskHead"].load(adapter, "half")


def test_python_for_a_loop_of_ones_own(
    tiny_model: Callable[[str], Path], loaders: dict[str, Any]
) -> None:
    scope: dict[str, Any] = {"base_model": load_backbone(str(tiny_model("bert")))}
    scope["loaders"] = loaders
    exec(_blocks("python")[0], scope)
    scope["loader"] = loaders["sentiment"]
    scope["loss_of"] = lambda model, batch: Anybodys(model).training_step(batch, 0)
    exec(_blocks("python")[5], scope)
    for module, a in lora_a(scope["model"]).items():
        torch.testing.assert_close(a, scope["state"][module])
    assert all(p.any() for n, p in scope["model"].named_parameters() if "lora_B" in n)


def test_the_page_on_suites_names_every_key_and_its_files_load(tmp_path: Path) -> None:
    keys = {field.name for kind in (Task, Suite) for field in fields(kind)} - {"preset"}
    assert [key for key in sorted(keys) if f"`{key}`" not in SUITES] == []
    for number, text in enumerate(_blocks("yaml", SUITES)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        assert load_suite(str(file)).tasks


def test_table_of_methods_is_the_registry() -> None:
    assert methods_table() in README


@pytest.mark.parametrize("command", _commands())
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (suite,) = _blocks("yaml")
    (tmp_path / "mine.yaml").write_text(suite)
    (tmp_path / "glue_files").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = normalise(shlex.split(command)[1:])
    config = build_parser(arguments).parse_args(arguments)
    assert config.subcommand == arguments[0]
    assert set(load_suite("mine.yaml").tasks) == {"urgency", "duplicate"}
