"""What `osrm inspect` says of the subspaces that adapters read, against dense float64 oracles."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import covariance_of, random_adapter
from torch import Tensor

from benchmarks.inspection import Inspection, inspect_adapters
from benchmarks.report.inspection import grids
from benchmarks.subspace_inspection import decompose
from merge_algorithms import Adapter, LowRank
from osrm import Covariance

D, TASKS = 12, ["red", "green", "blue"]
MODULES = [f"layer.{i}.{name}" for i in range(2) for name in ("query", "value")]
CONFIG = {"base_model_name_or_path": "base", "peft_type": "LORA"}
Run = Callable[..., str]


def make_adapter(name: str, seed: int, rank: int = 3) -> Adapter:
    return random_adapter(name, dict.fromkeys(MODULES, (8, D)), rank, seed, config=CONFIG)


@pytest.fixture(scope="module")
def samples() -> dict[str, Tensor]:
    """Task -> what each layer reads, (layers, tokens, D)."""
    numbers = torch.Generator().manual_seed(7)
    return {
        task: torch.randn(2, 40, D, generator=numbers, dtype=torch.float64)
        * torch.rand(D, generator=numbers)
        for task in TASKS
    }


@pytest.fixture(scope="module")
def covariances(samples: dict[str, Tensor]) -> dict[str, Covariance]:
    keys = [f"layer.{i}.query" for i in range(2)]
    modules = {m: m.replace("value", "query") for m in MODULES}
    return {
        task: covariance_of(dict(zip(keys, h, strict=True)), modules, torch.float64, task=task)
        for task, h in samples.items()
    }


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    return [make_adapter(task, t, rank=2 + t) for t, task in enumerate(TASKS)]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    adapters: list[Adapter],
    covariances: dict[str, Covariance],
) -> Path:
    folder = tmp_path_factory.mktemp("subspaces")
    for adapter in adapters:
        adapter.save(folder / adapter.name)
        covariances[adapter.name].save(folder / f"{adapter.name}.safetensors")
    return folder


@pytest.fixture
def content(osrm: Run, folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The JSON of all three adapters with their covariances, k = 6."""
    files = [folder / f"{task}.safetensors" for task in TASKS]
    command = ["inspect", *(folder / task for task in TASKS), "--covariances", *files]
    text = osrm(*command, "--k", 6, "--json", tmp_path / "found.json")
    assert max(map(len, text.partition("written:")[0].splitlines())) <= 80
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found | {"text": text}


def projector(rows: Tensor) -> Tensor:
    q = torch.linalg.qr(rows.double().T).Q
    return q @ q.T


def test_overlaps_are_traces_of_projectors(
    content: dict[str, Any], adapters: list[Adapter]
) -> None:
    total = torch.zeros(3, 3, dtype=torch.float64)
    for module in MODULES:
        p = [projector(adapter.updates[module].a) for adapter in adapters]
        expected = torch.tensor(
            [[float((a * b).sum()) / min(i + 2, j + 2) for j, b in enumerate(p)]
             for i, a in enumerate(p)], dtype=torch.float64
        )  # fmt: skip
        found = torch.tensor(content["modules"][module]["overlaps"], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        total += expected / len(MODULES)
    found = torch.tensor(content["overlap"], dtype=torch.float64)
    torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-9)
    assert content["overlap_by_chance"] == pytest.approx((3 + 4 + 4) / 3 / D)
    pair = next(p for p in content["pairs"] if {p["first"], p["second"]} == {"red", "blue"})
    assert pair["overlap"] == pytest.approx(float(total[0, 2]), rel=1e-6)


def test_unrelated_spans_overlap_as_much_as_chance_says() -> None:
    many = [make_adapter(f"task{t}", t, rank=2 + t % 3) for t in range(12)]
    inspection = inspect_adapters(many)
    off = inspection.overlap[~torch.eye(12, dtype=torch.bool)]
    assert float(off.mean()) == pytest.approx(inspection.overlap_chance, rel=0.05)


def test_energies_and_bottom_shares_are_those_of_the_samples(
    content: dict[str, Any], adapters: list[Adapter], samples: dict[str, Tensor]
) -> None:
    for t, adapter in enumerate(adapters):
        others = [task for task in TASKS if task != adapter.name]
        leaked, own, in_rank, in_k = [], [], [], []
        for module in MODULES:
            layer, a = int(module.split(".")[1]), adapter.updates[module].a.double()
            unit = a / a.norm()
            energy = {
                task: float((h[layer] @ unit.T).square().sum(1).mean())
                for task, h in samples.items()
            }
            leaked.append(sum(energy[task] for task in others) / 2)
            own.append(energy[adapter.name])
            found = content["modules"][module]["energies"][t]
            assert found["leaked"] == pytest.approx(leaked[-1], rel=1e-5)
            s = sum(samples[task][layer].T @ samples[task][layer] / 80 for task in others)
            bottom = torch.linalg.eigh(torch.as_tensor(s)).eigenvectors.T
            rank = len(a)
            in_rank.append(float((projector(a) * projector(bottom[:rank])).sum()) / rank)
            in_k.append(float((projector(a) * projector(bottom[:6])).sum()) / rank)
        entry = content["adapters"][adapter.name]
        assert entry["leaked_energy"] == pytest.approx(sum(leaked) / 4, rel=1e-5)
        assert entry["own_energy"] == pytest.approx(sum(own) / 4, rel=1e-5)
        assert entry["inside_bottom"]["rank"] == pytest.approx(sum(in_rank) / 4, abs=1e-4)
        assert entry["inside_bottom"]["k"] == pytest.approx(sum(in_k) / 4, abs=1e-4)
        assert entry["start"] == {"leaked": None, "drift_mean": None, "drift_max": None}


def test_spectra_of_the_inputs(content: dict[str, Any], samples: dict[str, Tensor]) -> None:
    assert content["inputs"]["rank"] == 4
    assert content["inputs"]["k"] == 6
    for task, h in samples.items():
        ranks, bottoms = [], []
        for layer in range(2):
            p = torch.linalg.svdvals(h[layer]).flip(0).square()
            p = p / p.sum()
            ranks.append(math.exp(float(-(p * p.log()).sum())))
            bottoms.append((float(p[:4].sum()), float(p[:6].sum())))
            found = content["inputs"]["modules"][task][f"layer.{layer}.value"]
            assert found["effective_rank"] == pytest.approx(ranks[-1], rel=1e-5)
        found = content["inputs"]["tasks"][task]
        assert found["effective_rank"] == pytest.approx(sum(ranks) / 2, rel=1e-5)
        assert found["bottom_rank"] == pytest.approx(sum(b[0] for b in bottoms) / 2, rel=1e-4)
        assert found["bottom_k"] == pytest.approx(sum(b[1] for b in bottoms) / 2, rel=1e-4)
    assert "bottom 6" in content["text"]


def test_the_decomposition_can_be_left_out(osrm: Run, folder: Path, tmp_path: Path) -> None:
    files = [folder / f"{task}.safetensors" for task in TASKS]
    command = ["inspect", *(folder / task for task in TASKS), "--covariances", *files]
    text = osrm(*command, "--k", "null", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["inputs"] is None
    assert found["adapters"]["red"]["inside_bottom"] is None
    assert found["adapters"]["red"]["leaked_energy"] > 0
    assert "bottom" not in text


def test_drift_from_the_adapter_before_training(osrm: Run, folder: Path, tmp_path: Path) -> None:
    """One row of A turns by 0.3 in a plane of its own; the rest stays, however it is mixed."""
    start = make_adapter("red", 0, rank=2)
    turned = {}
    for module, update in start.updates.items():
        q = torch.linalg.qr(update.a.double().T, mode="complete").Q.T
        rows = torch.stack([q[0], math.cos(0.3) * q[1] + math.sin(0.3) * q[2]])
        turned[module] = LowRank(
            update.b, (torch.tensor([[2.0, 1.0], [0.5, -3.0]]).double() @ rows)
        )
    replace(start, updates=turned).save(tmp_path / "red")
    command = ["inspect", tmp_path / "red", folder / "green", "--initial", folder / "red"]
    text = osrm(*command, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["adapters"]
    assert found["red"]["start"]["drift_mean"] == pytest.approx(0.15, abs=1e-5)
    assert found["red"]["start"]["drift_max"] == pytest.approx(0.3, abs=1e-5)
    assert found["green"]["start"]["drift_mean"] is None
    table = text.split("what A reads")[1].split("adapters")[0]
    assert f"{math.degrees(0.15):.1f}°" in table
    assert f"{math.degrees(0.3):.1f}°" in table
    assert "leaked" not in table


def test_training_records_drift_and_leaks_for_inspect(
    osrm: Run, trained: Path, tmp_path: Path
) -> None:
    tasks = ("half", "size", "same")
    files = [trained / f"{task}.safetensors" for task in tasks]
    command = ["inspect", *(trained / task for task in tasks), "--covariances", *files]
    osrm(*command, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["adapters"]
    for task in tasks:
        recorded = json.loads((trained / task / "osrm.json").read_text())["diagnostics"]
        start = found[task]["start"]
        assert start["drift_mean"] == recorded["drift_mean"] > 0
        assert start["drift_max"] == recorded["drift_max"] >= recorded["drift_mean"]
        assert start["leaked"] == recorded["leaked_before"]
        assert found[task]["leaked_energy"] == pytest.approx(recorded["leaked_after"], rel=1e-5)


def test_bad_input(refused: Run, folder: Path, tmp_path: Path) -> None:
    red, green = folder / "red", folder / "green"
    files = [folder / f"{task}.safetensors" for task in ("red", "green")]
    make_adapter("red", 0, rank=5).save(tmp_path / "red")
    few = make_adapter("red", 0, rank=2)
    del few.updates[MODULES[0]]
    few.save(tmp_path / "few")
    cases: list[tuple[list[object], str]] = [
        (["--k", 0, "--covariances", *files], "k 0 is not possible"),
        (["--k", "many"], "--k is many"),
        (["--initial", folder / "blue"], "start of 'blue', which is no adapter here"),
        (["--initial", red, f"red={green}"], "two starts of 'red'"),
        (["--initial", tmp_path / "red"], "A has shape (5, 12) before and (2, 12) after"),
        (["--initial", f"red={tmp_path / 'few'}"], f"start has the module {MODULES[0]}"),
        (["--initial", tmp_path / "nowhere"], "there is no adapter directory"),
    ]
    for arguments, expected in cases:
        assert expected in refused("inspect", red, green, *arguments), arguments


def test_wide_figures_stay_within_what_there_is(
    adapters: list[Adapter], covariances: dict[str, Covariance]
) -> None:
    """k above the width is the width; a zero A has no direction and no energy."""
    updates = dict(adapters[0].updates)
    updates[MODULES[0]] = LowRank(torch.zeros(8, 2), torch.zeros(2, D))
    odd = [replace(adapters[0], updates=updates), *adapters[1:]]
    inspection: Inspection = inspect_adapters(odd, covariances)
    found = replace(inspection, decomposed=decompose(odd, covariances, 48))
    assert found.decomposed is not None
    assert found.decomposed.k == D
    assert found.decomposed.by_adapter()[1].k == pytest.approx(1)
    assert math.isnan(found.decomposed.inside[0][MODULES[0]].k)
    assert found.as_json()["modules"][MODULES[0]]["energies"][0]["leaked"] is None
    assert any(grid.title == "what A reads" for grid in grids(found))
