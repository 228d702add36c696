"""`osrm train`: weights of the other tasks, tasks that arrive later, and bad covariances."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from osrm import Covariance, with_prefix_of

Run = Callable[..., str]


@pytest.fixture
def covariances(trained: Path) -> dict[str, Covariance]:
    return {t: Covariance.load(trained / f"{t}.safetensors") for t in ("half", "size", "same")}


@pytest.fixture
def train(osrm: Run, toy_suite: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train with A frozen, so that the adapter shows where it started; returns its directory."""

    def run(name: str, task: str, *options: object) -> Path:
        out = tmp_path / name
        osrm("train", "--suite", toy_suite, "--task", task, "--subspace.constraint", "freeze",
             *options, "-o", out)  # fmt: skip
        return out

    return run


def assert_starts_at_the_bottom_of(moments: dict[str, Tensor], adapter: Path) -> None:
    """A spans the eigenvectors of the four smallest eigenvalues, by an eigensolver."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    for module, moment in moments.items():
        a = tensors[f"base_model.model.{module}.lora_A.weight"].double()
        v = torch.linalg.eigh(moment.double()).eigenvectors[:, :4]
        torch.testing.assert_close(a.T @ a, v @ v.T, atol=1e-4, rtol=0)


def test_weights_decide_how_much_other_tasks_count(
    train: Callable[..., Path], trained: Path, covariances: dict[str, Covariance]
) -> None:
    files = [trained / "size.safetensors", trained / "same.safetensors"]
    out = train("out", "half", "--covariances", *files,
                "--subspace.init", "osrm", "--subspace.weights", "{size: 3, half: 9}")  # fmt: skip
    size, same = covariances["size"], covariances["same"]
    weighted = {m: (3 * size.matrix(m) + same.matrix(m)) / 4 for m in size.modules}
    assert_starts_at_the_bottom_of(weighted, out)
    info = json.loads((out / "osrm.json").read_text())
    assert info["subspace"]["weights"] == {"size": 3.0, "half": 9.0}


def test_weights_hold_for_the_leak_penalty(
    osrm: Run, trained: Path, toy_suite: Path, tmp_path: Path
) -> None:
    """A task of weight 0 might as well not be there."""
    size, same = trained / "size.safetensors", trained / "same.safetensors"
    cases: dict[str, list[object]] = {
        "alone": [size],
        "weighted": [size, same, "--subspace.weights", "{same: 0}"],
        "alike": [size, same],
    }
    found = {}
    for name, options in cases.items():
        osrm("train", "--suite", toy_suite, "--task", "half", "--subspace.init", "lora",
             "--subspace.leak_penalty", 5, "--covariances", *options,
             "-o", tmp_path / name)  # fmt: skip
        found[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert found["weighted"] == found["alone"]
    assert found["weighted"] != found["alike"]


def test_a_task_that_arrives_later_reads_the_stored_sum_of_the_earlier_ones(
    osrm: Run,
    train: Callable[..., Path],
    trained: Path,
    covariances: dict[str, Covariance],
    tmp_path: Path,
) -> None:
    earlier = tmp_path / "earlier.safetensors"
    files = [trained / "half.safetensors", trained / "size.safetensors"]
    osrm("covariance", "--pool", *files, "--task", "earlier", "-o", earlier)
    out = train("same", "same", "--covariances", earlier, "--subspace.init", "osrm")
    half, size = covariances["half"], covariances["size"]
    assert_starts_at_the_bottom_of((half + size).by_module(), out)
    info = json.loads((out / "osrm.json").read_text())
    assert set(info["covariances"]) == {"earlier", "same"}
    assert info["covariances"]["earlier"] == Covariance.load(earlier).fingerprint

    # The next one: what there was, and the one that has arrived meanwhile.
    later = tmp_path / "later.safetensors"
    osrm("covariance", "--pool", earlier, trained / "same.safetensors", "--task", "later",
         "-o", later)  # fmt: skip
    together = half + size + covariances["same"]
    for module, matrix in Covariance.load(later).by_module().items():
        torch.testing.assert_close(matrix, together.matrix(module), rtol=1e-5, atol=1e-7)


def test_bad_input(osrm: Run, refused: Run, trained: Path, toy_suite: Path, tmp_path: Path) -> None:
    size, own = trained / "size.safetensors", trained / "half.safetensors"
    command = ["train", "--suite", toy_suite, "--task", "half", "-o", tmp_path / "out"]
    command += ["--subspace.init", "osrm"]
    collect = ["covariance", "--suite", toy_suite, "--task", "size"]
    made = {
        "padded": ["--padded"],
        "few": ["--rows.covariance", 2],
        "tuned": ["--tuned", trained / "size"],
        "value": ["--adapter.targets", "[value]"],
    }
    for name, options in made.items():
        osrm(*collect, *options, "-o", tmp_path / f"{name}.safetensors")
    newer = tmp_path / "newer.safetensors"
    save_file(load_file(size), newer, {"osrm": '{"format": "osrm-covariance", "version": 9}'})
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(size.read_bytes()[:-100])
    project = ["--subspace.constraint", "project"]
    weights = "--subspace.weights"
    cases: list[tuple[list[object], str]] = [
        ([own], "needs the covariances of other tasks than 'half'"),
        ([tmp_path / "value.safetensors"], "different modules"),
        ([tmp_path / "few.safetensors", "--adapter.rank", 32], "fewer than the rank 32"),
        ([newer], "format version 9, this release reads version 1 or 2"),
        ([truncated], "not a complete safetensors file"),
        ([size, *project, "--subspace.k", 3], "k is 3, below the rank 4"),
        ([size, *project, "--subspace.k", 33], "reads 32 features, fewer than the 33 rows"),
        ([size, "--subspace.constraint", "filter"], "'osrm' cannot go with constraint 'filter'"),
        ([size, *project, "--subspace.init", "wiener"], "cannot go with constraint 'project'"),
        ([size, "--subspace.init", "wiener", "--subspace.rho", 0], "rho is 0"),
        ([size, "--subspace.init", "wiener", "--subspace.mu", 0], "mu is 0"),
        ([size, "--subspace.k", 12], "k has no effect with init 'osrm' and constraint 'init'"),
        ([size, "--subspace.init", "wiener", "--subspace.scale", "matched"], "scale has no effect"),
        ([size, "--subspace.init", "lora", "--subspace.constraint", "freeze"], "has no effect"),
        ([tmp_path / "tuned.safetensors"], "was collected with --tuned"),
        ([size, "--subspace.init", "lora", "--subspace.leak_penalty", -1], "gamma is -1"),
        ([own, "--subspace.init", "wiener"], "needs the covariances of other tasks than 'half'"),
        ([size, "--adapter.rank", 33], "reads 32 features, fewer than the 33 rows"),
        ([size, weights, "{siez: 2}"], "weight for 'siez', which is no other task; did you mean"),
        ([size, weights, "{size: 0}"], "weights of all other tasks are 0"),
        ([size, weights, "{size: much}"], "--subspace.weights is much: expected a number"),
        ([size, weights, "[1, 2]"], "--subspace.weights is [1, 2]: expected a mapping"),
        ([tmp_path / "padded.safetensors", "--subspace.init", "official", weights, "{size: 2}"],
         "mode 'official' stacks the other tasks' means: leave the weights out"),
    ]  # fmt: skip
    for arguments, expected in cases:
        said = refused(*command, "--covariances", *arguments)
        assert expected in said, (arguments, said)
    assert not (tmp_path / "out").exists()


def test_covariances_of_other_modules_are_refused_before_the_training(
    refused: Run,
    toy_suite: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain LoRA reads them for its diagnostics only, but hours of training hang on it."""
    monkeypatch.setattr("lightning.Trainer.fit", lambda *_: pytest.fail("it trained first"))
    command = ["train", "--suite", toy_suite, "--task", "half", "--subspace.init", "lora",
               "--adapter.targets", "[key]", "-o", tmp_path / "out", "--covariances"]  # fmt: skip
    half, size = trained / "half.safetensors", trained / "size.safetensors"
    error = refused(*command, half, size)
    assert "has no module 'encoder.layer.0.attention.self.key'" in error
    assert "different modules" in refused(*command, size)
    assert not (tmp_path / "out").exists()


def test_covariances_of_a_classifier_are_of_the_same_modules(
    train: Callable[..., Path], trained: Path, covariances: dict[str, Covariance], tmp_path: Path
) -> None:
    """Collected in code on a model with a head, they say bert.encoder.. for encoder.."""
    renamed = with_prefix_of(covariances, [f"bert.{m}" for m in covariances["size"].modules])
    assert all(m.startswith("bert.") for c in renamed.values() for m in c.modules)
    back = with_prefix_of(renamed, covariances["size"].modules)
    assert [c.modules for c in back.values()] == [c.modules for c in covariances.values()]
    files = []
    for task in ("size", "same"):
        files.append(tmp_path / f"{task}.safetensors")
        renamed[task].save(files[-1])
    osrm = ["--subspace.init", "osrm"]
    out = train("out", "half", "--covariances", *files, *osrm)
    both = {m: (covariances["size"].matrix(m) + covariances["same"].matrix(m)) / 2
            for m in covariances["size"].modules}  # fmt: skip
    assert_starts_at_the_bottom_of(both, out)
