"""`osrm merge --method emr`: a bundle with a model for each task, which `osrm eval` scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from files import merge_record

from merge_algorithms import Adapter, EmrBundle

Run = Callable[..., str]
TASKS = ("half", "size", "same")


def scores(osrm: Run, file: Path, *arguments: object) -> dict[str, Any]:
    osrm("eval", *arguments, "-o", file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_bundle_scores_as_the_run_time_merge_does(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    said = osrm("merge", *inputs, "--method", "emr", "--rescale", "means", "--weights", 1, 0.5, 2,
                "--scale", 0.7, "-o", tmp_path / "bundle")  # fmt: skip
    assert "emr of half, size, same, a model for each; " in said
    size = sum(file.stat().st_size for file in (tmp_path / "bundle").rglob("*.*"))
    found = re.search(r"; ([\d.]+) MB, the adapters' factors are ([\d.]+) MB", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(size / 1e6, abs=0.051)
    assert sorted(p.name for p in (tmp_path / "bundle").iterdir()) == [
        "README.md", "emr.safetensors", "heads", "osrm.json"
    ]  # fmt: skip
    suite = ["--suite", toy_suite]
    alone = scores(osrm, tmp_path / "a.json", tmp_path / "bundle", *suite)
    at_run_time = ["--merge", "emr", "--rescale", "means", "--weights", 1, 0.5, 2]
    expected = scores(
        osrm, tmp_path / "b.json", *inputs, *suite, *at_run_time, "--coefficient", 0.7
    )
    assert list(alone) == list(expected) == list(TASKS)
    for task in TASKS:
        assert alone[task] == pytest.approx(expected[task], abs=1e-4)
    few = scores(
        osrm, tmp_path / "c.json", tmp_path / "bundle", *suite, "--tasks", "size",
        "--split", "validation",
    )  # fmt: skip
    assert list(few) == ["size"]


def test_one_tasks_model_is_an_adapter_like_others(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    osrm("merge", *inputs, "--method", "emr", "-o", tmp_path / "bundle")
    osrm("merge", *inputs, "--method", "emr", "--task", "size", "-o", tmp_path / "size")
    assert list(Adapter.load(tmp_path / "size").heads) == ["size"]
    suite = ["--suite", toy_suite]
    whole = scores(osrm, tmp_path / "a.json", tmp_path / "bundle", *suite)
    alone = scores(osrm, tmp_path / "b.json", tmp_path / "size", *suite)
    assert alone["size"] == pytest.approx(whole["size"], abs=1e-4)


def test_a_search_finds_the_bundles_scale(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    grid = ["--tune.suite", toy_suite, "--tune.coefficients", 0.5, 1, "--tune.tasks", "size"]
    osrm("merge", *inputs, "--method", "emr", *grid, "-o", tmp_path / "bundle")
    merged = EmrBundle.load(tmp_path / "bundle").unified
    made = merged.info([])["merge"]
    assert made["evaluation"]["searched"] == {"scale": [0.5, 1.0]}
    split = ["--suite", toy_suite, "--split", "validation", "--tasks", "size"]
    found = scores(osrm, tmp_path / "a.json", tmp_path / "bundle", *split)
    best = made["evaluation"]["scores"]["validation"]["size"]
    assert found["size"] == pytest.approx(best, abs=1e-4)
    assert "best of 2 trials" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_search_for_one_tasks_model_asks_that_task(
    osrm: Run, refused: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    """The other tasks, which the written model does not serve, decide nothing."""
    search = ["merge", *inputs, "--method", "emr", "--task", "size", "--tune.suite", toy_suite,
              "--tune.coefficients", 0.5, 1, "-o", tmp_path / "size"]  # fmt: skip
    said = refused(*search, "--tune.tasks", "size", "half")
    assert "--tune.tasks names 'half', but --task size writes a model of size alone" in said
    osrm(*search)
    made = merge_record(tmp_path / "size")
    assert list(made["evaluation"]["scores"]["validation"]) == ["size"]
    split = ["--suite", toy_suite, "--split", "validation"]
    found = scores(osrm, tmp_path / "a.json", tmp_path / "size", *split)
    best = made["evaluation"]["scores"]["validation"]["size"]
    assert found["size"] == pytest.approx(best, abs=1e-4)


def test_a_bundle_is_scored_alone(
    osrm: Run, refused: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    osrm("merge", *inputs, "--method", "emr", "-o", bundle)
    suite = ["--suite", toy_suite]
    for more in ([inputs[0]], ["--merge", "ties"]):
        assert "score it alone" in refused("eval", bundle, *more, *suite)
    assert "without --merge" in refused("eval", bundle, *suite, "--coefficient", 0.5)
    assert "is an EMR bundle" in refused("merge", bundle, inputs[0], "-o", tmp_path / "m")
    again = ["merge", *inputs, "--method", "emr", "-o"]
    assert "already exists" in refused(*again, bundle)
    osrm(*again, bundle, "--overwrite")
    assert "not an EMR bundle" in refused(*again, inputs[0], "--overwrite")


def test_a_bundle_of_the_hub(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id is scored as its directory is."""
    bundle = tmp_path / "bundle"
    osrm("merge", *inputs, "--method", "emr", "-o", bundle)

    def fetch(repo_id: str, allow_patterns: list[str], revision: str | None) -> str:
        assert repo_id == "team/bundle"
        assert {"emr.safetensors", "osrm.json", "heads/*.safetensors"} <= set(allow_patterns)
        return str(bundle)

    suite = ["--suite", toy_suite]
    expected = scores(osrm, tmp_path / "a.json", bundle, *suite)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert scores(osrm, tmp_path / "b.json", "team/bundle", *suite) == expected


def test_two_names_of_one_base(
    osrm: Run,
    refused: Run,
    inputs: list[Path],
    toy_suite: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Known by osrm.json to be one model, or said to be."""
    adapters = [Adapter.load(path) for path in inputs[:2]]
    fingerprint = adapters[0].base_fingerprint
    adapters[1] = adapters[1].on_base("organisation/model", fingerprint)
    for adapter in adapters:
        adapter.save(tmp_path / adapter.name)
    both = [tmp_path / adapter.name for adapter in adapters]
    osrm("merge", *both, "-o", tmp_path / "known")
    for path in both:
        info = json.loads((path / "osrm.json").read_text())
        del info["model_fingerprint"]
        (path / "osrm.json").write_text(json.dumps(info))
    said = refused("merge", *both, "-o", tmp_path / "out")
    assert "if these are one model" in said
    assert "--base" in said
    osrm("merge", *both, "--base", "organisation/model", "-o", tmp_path / "out")
    assert Adapter.load(tmp_path / "out").base == "organisation/model"
    evaluate = ["eval", *both, "--suite", toy_suite, "--merge", "average"]
    assert "osrm eval: --model" in refused(*evaluate)
    osrm(*evaluate, "--model", tiny_model("bert"))


def test_one_name_of_two_bases(
    osrm: Run, refused: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    """Until --base or --model says that they are one; of a wrong base it does not."""
    half, size = (Adapter.load(path) for path in inputs[:2])
    assert half.base is not None
    size.on_base(half.base, "another").save(tmp_path / "size")
    both = [inputs[0], tmp_path / "size"]
    assert "one of fingerprint another" in refused("merge", *both, "-o", tmp_path / "out")
    osrm("merge", *both, "--base", half.base, "-o", tmp_path / "out")
    evaluate = ["eval", *both, "--suite", toy_suite, "--merge", "average", "--model", half.base]
    osrm(*evaluate)
    half.on_base("elsewhere", "another").save(tmp_path / "half")
    evaluate[1] = tmp_path / "half"
    assert "with fingerprint another" in refused(*evaluate)
