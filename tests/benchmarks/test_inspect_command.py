"""`osrm inspect` on adapters and covariance files on disk, with good and with bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from factories import covariance_of, random_adapter

from benchmarks.cli import main
from benchmarks.inspection import inspect_adapters
from benchmarks.report.names import layer_and_kind, natural_order, without_prefix
from merge_algorithms import Adapter, LowRank, UserError
from merge_algorithms.similarity import cosines, rms_cosine, sign_conflicts
from osrm import Covariance, interference_matrix, leaked_own_ratio

MODULES = {
    f"encoder.layer.{i}.attention.{name}": (8 + 2 * (name == "value"), 12)
    for i in range(3)
    for name in ("query", "value")
}
CONFIG = {"base_model_name_or_path": "base", "peft_type": "LORA"}
Run = Callable[..., str]


def make_adapter(name: str, seed: int, rank: int = 3, modules: Sequence[str] = ()) -> Adapter:
    shapes = {module: MODULES[module] for module in modules or MODULES}
    return random_adapter(name, shapes, rank, seed, config=CONFIG)


def make_covariance(task: str, seed: int) -> Covariance:
    numbers = torch.Generator().manual_seed(seed)
    inputs, keys = {}, {}
    for i in range(3):
        key = f"encoder.layer.{i}.attention.query"
        inputs[key] = torch.randn(40, 12, generator=numbers) * torch.rand(12, generator=numbers)
        keys |= {key: key, key.replace("query", "value"): key}
    return covariance_of(inputs, keys, task=task)


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    few = [module for module in MODULES if "layer.0" not in module]
    return [
        make_adapter("red", 0),
        make_adapter("<b>$x$</b>", 1, rank=2),
        make_adapter("blue", 2, rank=4, modules=few),
    ]


@pytest.fixture(scope="module")
def covariances(adapters: list[Adapter]) -> dict[str, Covariance]:
    return {a.name: make_covariance(a.name, 10 + t) for t, a in enumerate(adapters)}


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    adapters: list[Adapter],
    covariances: dict[str, Covariance],
) -> Path:
    """Adapters 0, 1, 2 and their covariances; the second is called half a page's markup."""
    folder = tmp_path_factory.mktemp("inspected")
    for t, (adapter, covariance) in enumerate(zip(adapters, covariances.values(), strict=True)):
        adapter.save(folder / str(t))
        covariance.save(folder / f"{t}.safetensors")
    return folder


@pytest.fixture
def osrm(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object, status: int = 0) -> str:
        found = main(["inspect", *map(str, arguments)])
        captured = capsys.readouterr()
        assert found == status, captured.err
        assert "Traceback" not in captured.err
        return captured.err if status else captured.out

    return run


def named(folder: Path, adapters: Sequence[Adapter], suffix: str = "") -> list[str]:
    return [f"{a.name}={folder / str(t)}{suffix}" for t, a in enumerate(adapters)]


def row(text: str, *start: str) -> list[str]:
    """The cells after a row's first ones; of the last such row, where there are several."""
    pattern = r"^" + r"\s+".join(map(re.escape, start)) + r"\s(.*)$"
    found = re.findall(pattern, text, re.MULTILINE)
    assert found, f"no row {start} in\n{text}"
    return str(found[-1]).split()


def test_tables_hold_the_diagnostics(osrm: Run, folder: Path, adapters: list[Adapter]) -> None:
    text = osrm(*named(folder, adapters))
    assert max(map(len, text.splitlines())) <= 80
    found, conflicts = cosines(adapters), sign_conflicts(adapters)
    rms = rms_cosine(found)
    assert row(text, "red", "<b>$x$</b>")[0] == f"{float(rms[0, 1]):.4f}"
    assert row(text, "red", "blue")[0] == f"{float(rms[0, 2]):.4f}"
    values = torch.stack([matrix[0, 1] for matrix in found.values()])
    shown = [f"{float(x):.3f}" for x in (values.min(), values.mean(), values.max())]
    assert row(text, "red", "<b>$x$</b>")[1:-1] == shown
    cells = row(text, "0.attention.query")  # blue lacks it: one pair is left
    only = f"{float(found['encoder.layer.0.attention.query'][0, 1]):.3f}"
    assert cells[1:4] == [only] * 3
    share = conflicts.by_module()["encoder.layer.0.attention.query"]
    assert cells[4] == f"{100 * share:.1f}%"
    assert cells[5] == "5/5"
    assert row(text, "1.attention.query")[5] == "8/8"  # 3 + 2 + 4 columns, but 8 rows
    assert row(text, "blue")[:3] == ["4", "4", "4"]
    assert row(text, "blue")[-1] == f"{100 * float(conflicts.by_adapter()[2]):.1f}%"
    assert "interference" not in text
    assert "6 modules of encoder.layer" in text


def test_covariances_add_the_interference(
    osrm: Run,
    folder: Path,
    adapters: list[Adapter],
    covariances: dict[str, Covariance],
    tmp_path: Path,
) -> None:
    files = [folder / f"{t}.safetensors" for t in range(3)]
    text = osrm(
        *named(folder, adapters), "--covariances", *files, "--json", tmp_path / "found.json"
    )
    content = json.loads((tmp_path / "found.json").read_text())
    expected = interference_matrix(adapters, covariances)
    torch.testing.assert_close(
        torch.tensor(content["interference"], dtype=torch.float64), expected, rtol=1e-5, atol=0
    )
    ratio = leaked_own_ratio(adapters[2], covariances, "blue")
    assert content["adapters"]["blue"]["leaked_own_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert row(text, "blue")[-1] == f"{ratio:.3g}"
    assert f"{float(expected[0, 1]):.3g}" in text


def test_further_covariances_count_as_other_tasks(
    osrm: Run, folder: Path, adapters: list[Adapter], covariances: dict[str, Covariance]
) -> None:
    files = [folder / f"{t}.safetensors" for t in range(3)]
    text = osrm(f"red={folder / '0'}", "--covariances", *files)
    ratio = leaked_own_ratio(adapters[0], covariances, "red")
    assert row(text, "red")[-1] == f"{ratio:.3g}"


def test_the_json_has_every_number(
    osrm: Run, folder: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    osrm(*named(folder, adapters), "--json", path, "--rank", 2)
    content = json.loads(path.read_text())
    assert list(content["adapters"]) == [adapter.name for adapter in adapters]
    assert content["rank_kept"] == 2
    assert content["interference"] is None
    module = content["modules"]["encoder.layer.0.attention.value"]
    assert module["cosines"][2] == [None, None, None]  # a zero update has no direction
    assert module["norms"][2] == 0
    dense = adapters[0].updates["encoder.layer.0.attention.value"].dense()
    assert module["norms"][0] == pytest.approx(float(dense.norm()), rel=1e-5)
    assert [use["available"] for use in module["ranks"]] == [3, 2, 0]
    assert module["sum"]["available"] == 5
    total = sum(float(u.dense().square().sum()) for u in adapters[0].updates.values())
    assert content["adapters"]["red"]["norm"] == pytest.approx(math.sqrt(total), rel=1e-5)
    assert len(content["pairs"]) == 3
    rms = [pair["rms"] for pair in content["pairs"]]
    assert rms == sorted(rms, reverse=True)


def test_the_page_is_self_contained(
    osrm: Run, folder: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    files = [folder / f"{t}.safetensors" for t in range(3)]
    pages = []
    for name in ("a.html", "b.html"):
        said = osrm(*named(folder, adapters), "--covariances", *files, "-o", tmp_path / name)
        assert f"written: {tmp_path / name}" in said
        pages.append((tmp_path / name).read_text())
    html = pages[0]
    assert pages[1] == html
    for outside in ("http://", "https://", "src=", "@import", "<link", "<script", "<image"):
        assert outside not in html
    assert html.count("<svg") == 5  # cosines, overlap, interference, by layer: updates and A
    assert "<b>$x$" not in html
    assert html.count("&lt;b&gt;$x$&lt;/b&gt;") > 3
    assert {"cosine of the pairs", "norm of the updates"} <= set(re.findall(r">([^<>]+)<", html))
    assert len(re.findall(r'\bid="([^"]+)"', html)) == len(set(re.findall(r'\bid="([^"]+)"', html)))


def test_one_adapter_alone(osrm: Run, folder: Path, tmp_path: Path) -> None:
    text = osrm(folder / "2", "-o", tmp_path / "one.html")
    assert row(text, "2")[:3] == ["4", "4", "4"]
    assert "pairs" not in text
    assert "signs" not in text
    html = (tmp_path / "one.html").read_text()
    assert html.count("<svg") == 1
    assert "1 LoRA adapter before a merge" in html


def test_many_adapters(osrm: Run, tmp_path: Path) -> None:
    modules = list(MODULES)[:2]
    many = [make_adapter(f"task{t}", t, rank=1, modules=modules) for t in range(30)]
    for adapter in many:
        adapter.save(tmp_path / adapter.name)
    paths = [tmp_path / adapter.name for adapter in many]
    text = osrm(*paths, "-o", tmp_path / "page.html", "--json", tmp_path / "page.json")
    assert "pairs, the most alike first (30 of 435)" in text
    assert len(json.loads((tmp_path / "page.json").read_text())["pairs"]) == 435
    html = (tmp_path / "page.html").read_text()
    assert "data:image/png;base64" in html  # the heat map of 900 cells is one picture
    assert len(html) < 400_000


def test_large_models_are_judged_by_a_sample_of_rows(adapters: list[Adapter]) -> None:
    from benchmarks.report.inspection import grids

    sampled = inspect_adapters(adapters, entries=600)
    assert 0 < sampled.conflicts.share < 1
    assert "of the rows; --exact counts all" in grids(sampled)[0].how
    assert "--exact" not in grids(inspect_adapters(adapters, entries=None))[0].how


def test_bad_input(osrm: Run, folder: Path, adapters: list[Adapter], tmp_path: Path) -> None:
    make_adapter("red", 5).save(tmp_path / "again")
    Adapter("odd", {m: LowRank(torch.ones(3, 1), torch.ones(1, 3)) for m in MODULES}).save(
        tmp_path / "odd"
    )
    make_covariance("red", 3).save(tmp_path / "again.safetensors")
    (tmp_path / "there.html").write_text("mine")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((folder / "0.safetensors").read_bytes()[:500])
    red, green = f"red={folder / '0'}", f"green={folder / '1'}"
    first = folder / "0.safetensors"
    cases: list[tuple[list[object], str]] = [
        ([], "adapters"),
        ([tmp_path / "nowhere"], "there is no adapter directory"),
        ([red, f"red={tmp_path / 'again'}"], "two adapters are called 'red'"),
        ([red, tmp_path / "odd"], "only adapters of one base model"),
        ([red, green, "--covariances", first], "no covariance of task 'green'"),
        ([red, "--covariances", first], "'red' is the only task with a covariance"),
        ([red, "--covariances", first, tmp_path / "again.safetensors"], "second covariance"),
        ([red, "--covariances", truncated], "truncated.safetensors"),
        ([red, "--covariances", folder / "0"], "is no file"),
        ([red, "--rank", 0], "rank 0 is not possible"),
        ([red, "-o", tmp_path / "there.html"], "already exists"),
        ([red, "-o", tmp_path, "--overwrite"], "is a directory"),
        ([red, "-o", tmp_path / "x", "--json", tmp_path / "x"], "give two files"),
        ([red, "--covariance", first], "did you mean '--covariances'"),
    ]
    for arguments, expected in cases:
        assert expected in osrm(*arguments, status=2), arguments
    assert (tmp_path / "there.html").read_text() == "mine"
    assert not (tmp_path / "x").exists()
    osrm(red, "-o", tmp_path / "there.html", "--overwrite")
    assert "<svg" in (tmp_path / "there.html").read_text()


def test_a_covariance_of_another_model_is_refused(osrm: Run, tmp_path: Path) -> None:
    adapter = dataclasses.replace(make_adapter("red", 0), info={"model_fingerprint": "aaa"})
    adapter.save(tmp_path / "red")
    for task in ("red", "green"):
        covariance = make_covariance(task, 1)
        covariance.meta["model_fingerprint"] = "bbb"
        covariance.save(tmp_path / f"{task}.safetensors")
    files = [tmp_path / "red.safetensors", tmp_path / "green.safetensors"]
    error = osrm(tmp_path / "red", "--covariances", *files, status=2)
    assert "fingerprint bbb, but the model of 'red' has aaa" in error


def test_covariances_collected_in_different_ways_are_not_compared(
    osrm: Run, folder: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    tuned = make_covariance("red", 10)
    tuned.meta["tuned"] = "red"
    tuned.save(tmp_path / "tuned.safetensors")
    files = [tmp_path / "tuned.safetensors", *(folder / f"{t}.safetensors" for t in (1, 2))]
    error = osrm(*named(folder, adapters), "--covariances", *files, status=2)
    assert "the covariance of 'red' was collected with its adapter in the model" in error


def test_adapters_are_checked_before_anything_is_computed(adapters: list[Adapter]) -> None:
    with pytest.raises(UserError, match="no adapter"):
        inspect_adapters([])
    broken = make_adapter("broken", 1)
    broken.updates["encoder.layer.1.attention.value"].a[0, 0] = math.nan
    with pytest.raises(UserError, match=r"'broken'.*layer\.1\.attention\.value"):
        inspect_adapters([adapters[0], broken])


def test_names_are_shortened() -> None:
    prefix, short = without_prefix(["a.b.0.q", "a.b.1.q"])
    assert (prefix, short) == ("a.b", {"a.b.0.q": "0.q", "a.b.1.q": "1.q"})
    assert without_prefix(["a.b.q"]) == ("a.b", {"a.b.q": "q"})
    assert without_prefix(["q", "v"]) == ("", {"q": "q", "v": "v"})
    assert layer_and_kind("model.layers.10.self_attn.q_proj") == (
        10,
        "model.layers.*.self_attn.q_proj",
    )
    assert layer_and_kind("block.2.layer.0.q") == (2, "block.*.layer.0.q")
    assert layer_and_kind("h12.q") == (0, "h12.q")
    names = ["h.10.q", "h.2.v", "h.2.q", "head", "h.x"]
    assert sorted(names, key=natural_order) == ["h.x", "h.2.q", "h.2.v", "h.10.q", "head"]
