"""The whole study through the command line, as small as it can be."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cli import main

TINY = [
    *("--diffusion.channels", "[16,16]", "--diffusion.steps", "2", "--diffusion.batch_size", "4"),
    *("--diffusion.adapter_steps", "1", "--diffusion.sampling_steps", "2"),
    *("--diffusion.pictures", "4", "--diffusion.judge_pictures", "1", "--diffusion.rank", "2"),
    *("--diffusion.base_pictures", "1", "--diffusion.style_pictures", "1"),
    *("--objects", "5", "--styles", "bold", "framed"),
    *("--seeds", "0", "--rates", "0.5", "--dropouts", "0", "0.9", "--draws", "1", "2"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path) -> tuple[Path, list[str]]:
    """A finished run and the command that made it."""
    runs = tmp_path_factory.mktemp("runs")
    command = ["experiment", "orthogonal-dropout", "--suite", str(toy_suite)]
    command += ["--runs-dir", str(runs), *TINY]
    assert main(command) == 0
    return runs / "orthogonal-dropout-toy-smoke", command


def read(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_pictures_are_judged_for_every_pair_and_way(study: tuple[Path, list[str]]) -> None:
    rows = [row for row in read(study[0]) if row["part"] == "images"]
    both = [row for row in rows if row["metric"] == "both"]
    ways = {(row["init"], row["method"], row["samples"]) for row in both if row["style"]}
    methods = [("direct", "1"), ("mc_dropout", "1"), ("orthogonal_mc_dropout", "1")]
    methods.append(("orthogonal_mc_dropout", "2"))
    expected = {(init, *way) for init in ("lora", "osrm") for way in methods}
    assert ways == expected | {("", "real renderings", "")}
    assert len(both) == 2 * len(ways) + 2 * 3
    for row in rows:
        value = float(row["value"])
        assert value >= 0
        assert value <= 1 or row["metric"] == "frechet distance"


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (["text", "images", "redundancy"], "orthogonal-dropout-toy-smoke"),
        (["redundancy"], "orthogonal-dropout-toy-smoke-redundancy"),
    ],
)
def test_processes_side_by_side_build_the_same(
    parts: list[str],
    name: str,
    study: tuple[Path, list[str]],
    tmp_path: Path,
    stages: Callable[[], list[str]],
) -> None:
    folder, command = study
    command = [*command, "--workers", "2", "--runs-dir", str(tmp_path), "--parts", *parts]
    assert main(command) == 0
    lines = stages()
    assert len(set(lines)) == len(lines)
    assert lines[-1].startswith(f"[{len(lines)}/{len(lines)}]")
    assert not any("(reused)" in line for line in lines)
    rows = read(folder)
    expected = [row for part in parts for row in rows if row["part"] == part]
    assert read(tmp_path / name) == expected


def test_texts_are_scored_under_every_merge(study: tuple[Path, list[str]]) -> None:
    rows = [row for row in read(study[0]) if row["part"] == "text"]
    assert {row["task"] for row in rows} == {"half", "size", "same", "average"}
    found = {(row["method"], row["samples"]) for row in rows}
    static = {(m, "") for m in ("task_arithmetic", "ties", "mc_dropout", "orthogonal_mc_dropout")}
    drawn = {(m, k) for m in ("mc_dropout", "orthogonal_mc_dropout") for k in ("1", "2")}
    assert found == static | drawn | {("direct", "1"), ("individual", "")}
    assert {row["coefficient"] for row in rows if row["method"] != "individual"} <= {"0.5", "1.0"}
    value = {
        (row["init"], row["task"], row["method"]): float(row["value"])
        for row in rows
        if row["method"] in ("direct", "task_arithmetic")
    }
    for (init, task, method), score in value.items():
        if method == "direct":
            other = value[init, task, "task_arithmetic"]
            assert score == pytest.approx(other, abs=1e-4)


def test_single_adapters_are_thinned(study: tuple[Path, list[str]]) -> None:
    rows = [row for row in read(study[0]) if row["part"] == "redundancy"]
    assert {row["task"] for row in rows} == {"half", "size", "same", "average", "glyph 5"}
    assert {(row["dropout"], row["drop_rate"]) for row in rows} == {
        (dropout, rate) for dropout in ("0.0", "0.9") for rate in ("0.0", "0.5")
    }


def test_the_page_stands_alone_and_says_what_was_found(study: tuple[Path, list[str]]) -> None:
    page = (study[0] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"<script|https?://(?!www\.w3\.org)", page)
    assert "Strict orthogonality and composition, lora adapters" in page
    assert "osrm adapters against plain LoRA" in page
    assert "Redundancy on pictures" in page
    assert page.count("data:image/png;base64,") == 2 * (4 + 1)
    assert page.count("<svg") == 6
    results = json.loads((study[0] / "results.json").read_text(encoding="utf-8"))
    assert results["facts"].keys() == {"judge of objects", "judge of styles"}
    assert len(results["rows"]) == len(read(study[0]))


def test_a_second_run_computes_nothing_anew(
    study: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = study
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("stage.json")}
    assert main([*command, "--parts", "images", "--name", folder.name]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("stage.json")} == before
    told = capsys.readouterr().err
    done, total = re.findall(r"\[(\d+)/(\d+)\]", told)[-1]
    assert done == total
    assert told.count("(reused)") == int(total)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rates", "0.5", "1.0"], r"--rates 1\.0 is not possible: give numbers in \[0, 1\)"),
        (["--dropouts", "-0.5"], r"--dropouts -0\.5 is not possible"),
        (["--draws", "0"], "--draws 0: average at least 1 draw"),
        (["--styles", "bolt"], "bolt"),
        (["--parts", "text", "text"], "--parts text text: name at least one, each once"),
        (["--parts", "sdxl", "--sdxl", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--diffusion.pictures", "1"], r"--diffusion\.pictures 1: give at least 2"),
        (["--diffusion.rank", "0"], r"--diffusion\.rank 0: give at least 1"),
        (["--name", ".."], r"--name '\.\.' is no name of a directory: give one without '/'"),
        (["--adapter.rank", "500"], "rank 500 is larger than 32"),
        (["--adapter.targets", "[q_proj]"], "matches no linear layer"),
        (["--diffusion.channels", "[8,16]"], "multiples of 16"),
    ],
)
def test_what_cannot_be_is_refused(
    refused: Callable[..., str], toy_suite: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    command = ["experiment", "orthogonal-dropout", "--suite", toy_suite, "--runs-dir", tmp_path]
    assert re.search(reason, refused(*command, *arguments))
    assert not any(tmp_path.iterdir())


def test_help_says_whose_the_seeds_and_draws_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["experiment", "orthogonal-dropout", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "those of the suite and its preset are not used" in said
    assert "pictures take 1 and the largest of these, but at most 4" in said


def test_quick_in_a_config_file_is_quick(
    capsys: pytest.CaptureFixture[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "quick.yaml"
    file.write_text("quick: true\n")
    command = ["experiment", "orthogonal-dropout"]
    printed = []
    for quick in ([f"--config={file}"], ["--quick"]):
        with pytest.raises(SystemExit):
            main([*command, *quick, "--print_config"])
        printed.append(capsys.readouterr().out)
    assert "preset: quick" in printed[0]
    assert printed[0] == printed[1]
    assert "--quick is the preset quick" in refused(*command, "--config", file, "--preset", "full")


def test_without_diffusers_only_texts_can_be_studied(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = refused("experiment", "orthogonal-dropout", "--parts", "images")
    assert "install osrm-merge[diffusion], or run --parts text" in told
