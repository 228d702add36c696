"""The model card beside a merge: what the Hub reads, what people read, and code that runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForSequenceClassification

from merge_algorithms import Adapter, Merged, merge, methods
from merge_algorithms.card import adapter_card, model_card

BASE = "some-org/some-base"
HOSTILE = 'a|b `c` "d": <img src=x>\n---\ne: [f'


@pytest.fixture
def merged(random_adapter: Callable[..., Adapter]) -> Merged:
    config = {"base_model_name_or_path": BASE, "task_type": "CAUSAL_LM"}
    adapters = [random_adapter(name, seed=i, config=config) for i, name in enumerate("xyz")]
    return merge(adapters, "ties", weights=[1, 0.5, 2], density=0.4)


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The front matter as a mapping, and the Markdown below it."""
    text = (path / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def rows(body: str) -> list[list[str]]:
    """The cells of every table row."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in body.splitlines()
        if line.startswith("|")
    ]


def test_the_hub_reads_what_it_is(merged: Merged, tmp_path: Path) -> None:
    merged.save_adapter(tmp_path / "m")
    data = ModelCard.load(tmp_path / "m" / "README.md").data
    assert data.base_model == BASE
    assert data.library_name == "peft"
    assert data.tags == ["merge", "lora", "osrm", "ties"]
    assert data.to_dict()["base_model_relation"] == "adapter"


def test_it_says_how_the_merge_was_made(merged: Merged, tmp_path: Path) -> None:
    merged.scaled(0.3).save_adapter(tmp_path / "m")
    _, body = read(tmp_path / "m")
    facts = {row[0]: row[1] for row in rows(body) if len(row) == 2}
    method = methods()["ties"]
    assert method.summary in facts["method"]
    assert "(https://arxiv.org/abs/2306.01708)" in facts["paper"]
    recorded = json.loads((tmp_path / "m" / "osrm.json").read_text())["merge"]
    for option, value in recorded["options"].items():
        assert f"`{option} = {json.dumps(value)}`" in facts["options"]
    assert facts["scale"] == "0.3"
    assert [facts[f"`{name}`"] for name in "xyz"] == ["1", "0.5", "2"]
    assert "seed" not in facts
    assert f"torch {torch.__version__}" in facts["versions"]


def test_coefficients_by_module(merged: Merged, tmp_path: Path) -> None:
    merged.scaled({r"\.0\.": 0.5, "query": 2}).save_adapter(tmp_path / "m")
    table = rows(read(tmp_path / "m")[1])
    assert ["0.5", "`layer.0.query`, `layer.0.value`"] in table
    assert ["2", "`layer.1.query`"] in table


def test_what_truncation_lost_is_said(merged: Merged, tmp_path: Path) -> None:
    lost = merged.save_adapter(tmp_path / "low", rank=1)
    worst = max(lost, key=lambda module: lost[module])
    _, body = read(tmp_path / "low")
    mean = sum(lost.values()) / len(lost)
    assert f"lost {mean:.2%} of their energy" in body
    assert f"{lost[worst]:.2%}, at `{worst}`" in body
    merged.save_adapter(tmp_path / "full", rank=12)
    assert "Truncation" not in read(tmp_path / "full")[1]


def test_known_scores_are_a_table(merged: Merged, tmp_path: Path) -> None:
    scores = {
        "validation": {"x": {"accuracy": 0.5, "f1": None}, "y": {"pearson": 0.25}},
        "test": {"x": {"accuracy": 0.75}},
    }
    evaluation = {"scores": scores, "suite": "mine", "trials": 7, "means": {"validation": 0.375}}
    replace(merged, evaluation=evaluation).save_adapter(tmp_path / "m", rank=1)
    _, body = read(tmp_path / "m")
    table = rows(body)
    assert ["task", "metric", "validation", "test"] in table
    assert ["x", "accuracy", "0.500", "0.750"] in table
    assert ["x", "f1", "", ""] in table
    assert ["y", "pearson", "0.250", ""] in table
    assert ["all", "mean of the headline metrics", "0.375", ""] in table
    assert "best of 7 trials" in body
    assert "`mine`" in body
    assert "before the truncation" in body
    info = json.loads((tmp_path / "m" / "osrm.json").read_text())
    assert info["merge"]["evaluation"] == evaluation


def test_a_local_base_is_not_given_to_the_hub(
    random_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    for i, base in enumerate((str(tmp_path), None, "no hub id at all", "x" * 300)):
        config = {"base_model_name_or_path": base}
        merge([random_adapter("x", config=config)]).save_adapter(tmp_path / str(i))
        front, body = read(tmp_path / str(i))
        assert set(front) == {"library_name", "tags"}
        assert (base or "an unnamed model") in body


def test_names_can_break_neither_yaml_nor_tables(
    random_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    adapters = [
        random_adapter(name, seed=i, config={"base_model_name_or_path": HOSTILE})
        for i, name in enumerate((HOSTILE, "b"))
    ]
    path = tmp_path / "x|<b>*y*"
    merge(adapters, "average").save_adapter(path)
    front, body = read(path)
    assert front["tags"][-1] == "average"
    assert {len(row) for row in rows(body)} == {2}
    assert "\n# x\\|&lt;b&gt;\\*y\\*\n" in body
    prose, code, _ = body.split("```")
    assert "<img" not in re.sub(r"`[^`\n]*`", "", prose)
    compile(code.removeprefix("python\n"), "card", "exec")


@pytest.mark.parametrize(
    "method", [*methods().values(), *methods(runtime=True).values()], ids=lambda m: m.name
)
def test_every_method_has_one(method: Any) -> None:
    record = {
        "method": method.name,
        "options": {o.name: None if o.required else o.default for o in method.options},
        "adapters": ["x", "y"],
        "weights": [1.0, 1.0],
        "coefficient": 1.0,
        "seed": 3,
    }
    body = model_card(record, "m", "peft", {}, {}, {})
    facts = {row[0]: row[1] for row in rows(body) if len(row) == 2}
    assert f"`{method.name}`" in facts["method"]
    shown = methods().get(method.name, method)
    assert facts.get("seed") == ("3" if shown.seeded else None)
    assert ("statistics" in facts) == bool(shown.needs)


def code(path: Path) -> str:
    """The code of the card, with the place of the directory put in."""
    (found,) = re.findall(r"```python\n(.*?)```", read(path)[1], re.DOTALL)
    return found.replace(json.dumps(path.name), json.dumps(str(path)))


def test_the_code_loads_the_adapter_with_its_head(
    peft_cases: dict[str, Any], tmp_path: Path
) -> None:
    """Three labels: the card has to say so, or the head does not fit."""
    case = peft_cases["classifier"]
    case.base().save_pretrained(tmp_path / "base")
    adapters = []
    for seed, name in enumerate("xy"):
        case.save(tmp_path / name, seed=seed)
        adapter = Adapter.load(tmp_path / name)
        adapter.config["base_model_name_or_path"] = str(tmp_path / "base")
        adapters.append(adapter)
    merged = merge(adapters)
    merged.save_adapter(tmp_path / "m", head="y")
    scope: dict[str, Any] = {}
    exec(code(tmp_path / "m"), scope)
    expected = case.base()
    merged.apply_to(expected)
    expected.classifier.load_state_dict(
        {key.removeprefix("classifier."): t for key, t in merged.heads["y"].items()}
    )
    torch.testing.assert_close(
        case.logits(scope["model"]), case.logits(expected), rtol=1e-4, atol=1e-5
    )
    merged.save_adapter(tmp_path / "bundle")
    exec(code(tmp_path / "bundle"), scope)
    assert "the heads of `x`, `y`, in heads/, one file per task" in read(tmp_path / "bundle")[1]


def test_the_code_loads_the_checkpoint(
    random_adapter: Callable[..., Adapter], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=3,
        )
    )
    base.save_pretrained(tmp_path / "base")
    module = "bert.encoder.layer.0.attention.self.query"
    config = {
        "base_model_name_or_path": BASE,
        "auto_mapping": {
            "base_model_class": "BertForSequenceClassification",
            "parent_library": "transformers.models.bert.modeling_bert",
        },
    }
    merged = merge([random_adapter("x", {module: (32, 32)}, config=config)])
    merged.save_checkpoint(tmp_path / "m", tmp_path / "base")
    front, _ = read(tmp_path / "m")
    assert front["base_model_relation"] == "merge"
    assert front["library_name"] == "transformers"
    scope: dict[str, Any] = {}
    exec(code(tmp_path / "m"), scope)
    merged.apply_to(base)
    torch.testing.assert_close(
        scope["model"].get_submodule(module).weight, base.get_submodule(module).weight
    )


def test_a_trained_adapter_says_what_is_known_of_it(
    peft_cases: dict[str, Any], tmp_path: Path
) -> None:
    """With code that loads it; nothing that a file says can break out of its cell."""
    case = peft_cases["plain"]
    base = tmp_path / "base"
    case.base().save_pretrained(base)
    logits = case.save(tmp_path / "trec")
    info = {
        "task": "trec",
        "tasks": {"trec": {"kind": "classification", "labels": ["num", HOSTILE], "text": ["q"]}},
        "train": {"epochs": 2, "lr": 4e-4},
        "subspace": {"init": "osrm", "constraint": "init"},
        "seed": 3,
        "validation": {"accuracy": 0.91234, "f1": math.nan},
        "diagnostics": {"leaked_before": 0.0012},
        "versions": {"torch": "2.13"},
    }
    (tmp_path / "trec" / "osrm.json").write_text(json.dumps(info))
    adapter = Adapter.load(tmp_path / "trec").on_base(str(base))
    (tmp_path / "trec" / "README.md").write_text(adapter_card(adapter), encoding="utf-8")
    metadata, body = read(tmp_path / "trec")
    assert metadata == {"library_name": "peft", "tags": ["lora", "osrm"]}
    facts = dict(row for row in rows(body) if len(row) == 2)
    assert facts["task"] == "`trec`, classification"
    assert "<img" not in re.sub(r"`[^`\n]*`", "", body)
    assert facts["rank"] == "4, alpha 6"
    assert facts["modules"] == "`query`, `value`"
    assert "`epochs = 2`" in facts["train"]
    assert facts["seed"] == "3"
    assert facts["versions"] == "torch 2.13"
    assert facts["`accuracy`"] == "0.9123"
    assert facts["`leaked_before`"] == "0.0012"
    found: dict[str, Any] = {}
    exec(code(tmp_path / "trec"), found)
    torch.testing.assert_close(case.logits(found["model"]), logits(), rtol=1e-4, atol=1e-5)


def test_a_card_of_an_adapter_of_which_little_is_known(
    random_adapter: Callable[..., Adapter],
) -> None:
    config = {"base_model_name_or_path": BASE, "r": 3, "lora_alpha": 3}
    text = adapter_card(random_adapter("style", config=config))
    assert f"base_model: {BASE}\nbase_model_relation: adapter\n" in text
    assert "Scores" not in text
    assert "The task" not in text
