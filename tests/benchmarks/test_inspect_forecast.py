"""`osrm inspect --relation`: what a fitted relation expects of summing the adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import covariance_of, random_adapter

from benchmarks.cli import main
from benchmarks.experiments.lora_summation.relation import Relation
from benchmarks.experiments.lora_summation.statistics import Fit, fit
from merge_algorithms import Adapter
from osrm import Covariance

MODULES = ("layer.0.q", "layer.1.q")
X, Y = np.array([0.0, 0.1, 0.2, 0.3, 0.9]), np.array([-2.0, 1.0, 0.5, 3.0, 7.0])
STUDENT = 3.182446  # 97.5 % quantile with 3 degrees of freedom, from a table


def line_through(x: np.ndarray, y: np.ndarray) -> Fit:
    line = fit(x.tolist(), y.tolist())
    assert line is not None
    return line


def adapter(name: str, seed: int) -> Adapter:
    config = {"base_model_name_or_path": "base", "peft_type": "LORA"}
    return random_adapter(name, dict.fromkeys(MODULES, (6, 5)), 2, seed, config=config)


def covariance(task: str, seed: int) -> Covariance:
    numbers = torch.Generator().manual_seed(seed)
    return covariance_of({m: torch.randn(30, 5, generator=numbers) for m in MODULES}, task=task)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("red", "blue", "green")):
        adapter(name, seed).save(tmp_path / name)
        covariance(name, seed).save(tmp_path / f"{name}.safetensors")
    line = line_through(X, Y)
    Relation("other-model", ("law", "art"), {"all": {"rms_cosine": line}}).save(
        tmp_path / "relation.json"
    )
    return tmp_path


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_every_pair_and_all_get_the_line_and_its_margin(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["red", "blue", "green"]
    page, numbers = folder / "page.html", folder / "numbers.json"
    status, text, _ = inspect(
        capsys,
        *(folder / name for name in names),
        *("--relation", folder / "relation.json", "-o", page, "--json", numbers),
    )
    assert status == 0
    content = json.loads(numbers.read_text())
    assert content["forecast"]["measured_on"] == {"model": "other-model", "tasks": ["law", "art"]}
    found = {tuple(each["combination"]): each for each in content["forecast"]["predictions"]}
    dense = {name: Adapter.load(folder / name).updates for name in names}

    slope, intercept = np.polyfit(X, Y, 1)
    deviation = np.sqrt(np.sum((Y - intercept - slope * X) ** 2) / (len(X) - 2))
    for first, second in (("red", "blue"), ("red", "green"), ("blue", "green")):
        squared = []
        for module in MODULES:
            a, b = (dense[name][module].dense().double() for name in (first, second))
            squared.append(float((a * b).sum() / (a.norm() * b.norm())) ** 2)
        x = np.sqrt(np.mean(squared))
        leverage = 1 + 1 / len(X) + (x - X.mean()) ** 2 / np.sum((X - X.mean()) ** 2)
        each = found[first, second]
        assert each["value"] == pytest.approx(x, rel=1e-5)
        assert each["expected"] == pytest.approx(intercept + slope * x, rel=1e-5)
        margin = STUDENT * deviation * np.sqrt(leverage)
        assert each["margin"] == pytest.approx(margin, rel=0.01)  # the quantile is an expansion
        ranks = [np.argsort(np.argsort(values)) for values in (X, Y)]
        assert each["spearman"] == pytest.approx(np.corrcoef(ranks)[0, 1])
        assert 0 < each["p"] <= 1
    assert tuple(names) in found

    for shown in (text, page.read_text()):
        assert "An extrapolation, no measurement." in " ".join(shown.split())
        assert "other-model" in shown
        assert "red + blue" in shown


@pytest.mark.parametrize("covariances", [False, True])
def test_what_is_not_known_is_not_forecast(
    folder: Path, capsys: pytest.CaptureFixture[str], covariances: bool
) -> None:
    line = line_through(X, Y)
    relation = folder / "interference.json"
    Relation("m", ("law", "art"), {"all": {"interference": line}}).save(relation)
    files = [folder / f"{name}.safetensors" for name in ("red", "blue")]
    status, text, message = inspect(
        capsys,
        *(folder / name for name in ("red", "blue")),
        *("--relation", relation),
        *(["--covariances", *files] if covariances else []),
    )
    if covariances:
        assert status == 0
        assert "forecast of the sum's perplexity" in text
    else:
        assert status != 0
        assert "--covariances" in message


def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, message = inspect(
        capsys, folder / "red", folder / "blue", "--relation", folder / "none.json"
    )
    assert status != 0
    assert "relation.json of osrm experiment lora-summation" in message
    status, _, message = inspect(capsys, folder / "red", "--relation", folder / "relation.json")
    assert status != 0
    assert "at least two adapters" in message
