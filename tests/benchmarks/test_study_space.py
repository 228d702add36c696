"""What a study chooses from, by suite and model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from transformers import BertConfig, ViTConfig

from benchmarks.arms import NAME
from benchmarks.study_space import Space
from benchmarks.suites import Suite, load_suite
from trainers.backbone import ModelRef

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def suite() -> Suite:
    return load_suite("embedded", "smoke")


@pytest.fixture
def bert(tmp_path: Path) -> ModelRef:
    BertConfig(vocab_size=20, intermediate_size=24, **SIZES).save_pretrained(tmp_path)
    return ModelRef("bert", str(tmp_path))


def test_modules_are_those_of_the_suite_or_of_peft(suite: Suite, bert: ModelRef) -> None:
    space = Space(suite, bert)
    assert space.targets == {"suite": ["outputs"], "peft": ["query", "value"]}
    references = dict(space.references())
    assert {values["modules"] for values in references.values()} == {"suite", "peft"}
    study = optuna.create_study(directions=["maximize", "maximize"])
    for values in references.values():
        study.enqueue_trial(values)
    arms = [space.propose(study.ask()) for _ in references]
    assert all(re.fullmatch(NAME, arm.name) for arm in arms)
    assert len({arm.name for arm in arms}) == len(arms)
    assert [arm.adapter.targets == ["query", "value"] for arm in arms] == [
        name.endswith("at PEFT's modules") for name in references
    ]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_is_the_same_at_every_rank(suite: Suite, bert: ModelRef, rslora: bool) -> None:
    suite = replace(suite, adapter=replace(suite.adapter, rank=2, alpha=4, rslora=rslora))
    space = Space(suite, bert)
    assert len(space.ranks) > 1
    for rank in space.ranks:
        adapter = space.arm({"init": "lora"}, rank).adapter
        scale = adapter.alpha / (rank**0.5 if rslora else rank)
        assert scale == pytest.approx(4 / (2**0.5 if rslora else 2))


def test_modules_are_no_choice_where_both_are_the_same(suite: Suite, bert: ModelRef) -> None:
    suite = replace(suite, adapter=replace(suite.adapter, targets=["query", "value"]))
    space = Space(suite, bert)
    assert list(space.targets) == ["suite"]
    assert {values["modules"] for _, values in space.references()} == {"suite"}


def test_modules_are_no_choice_for_models_that_peft_has_none_for(
    suite: Suite, tmp_path: Path
) -> None:
    ViTConfig(image_size=4, patch_size=2, intermediate_size=24, **SIZES).save_pretrained(tmp_path)
    assert list(Space(suite, ModelRef("vit", str(tmp_path))).targets) == ["suite"]
