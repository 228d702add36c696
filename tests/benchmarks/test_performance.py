"""The performance scripts at tiny size: they run, and what they compare computes the same."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.performance import (
    covariance,
    growth,
    measuring,
    mergekit_end_to_end,
    merging,
    peers,
    subspace,
    training,
)
from benchmarks.performance.measuring import Cost
from benchmarks.performance.problems import LLAMA_3_8B, ROBERTA_LARGE, Problem
from benchmarks.suites import load_suite
from merge_algorithms import UserError, merge, methods
from trainers.backbone import load_backbone

TINY = replace(ROBERTA_LARGE.tiny(), tasks=3)


def in_process(prepare, problem, *arguments, repeats=1, threads=1):
    """As `measure`, without a process, a warm-up and a clock."""
    prepare(problem, *arguments)()
    return Cost(0.5, 12.0)


def dense(update):
    return update.rows(0, update.shape[0]) if hasattr(update, "rows") else update


def assert_equal(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for module, update in ours.items():
        torch.testing.assert_close(
            dense(update), dense(theirs[module]).float(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("comparison", merging.COMPARISONS[:3], ids=lambda c: c.label)
def test_peers_compute_the_same(comparison):
    ours = peers.ours(TINY, comparison.method, TINY.rank if comparison.truncated else None)()
    for peer in comparison.peers:
        assert_equal(ours, peer.prepare(TINY, *peer.arguments)(), 1e-4)


def test_pefts_ties_is_the_variant_of_that_name():
    merged = merge(TINY.adapters(), "ties", density=peers.DENSITY, variant="peft")
    peer = peers.peft(TINY, "ties_svd")()
    for module, update in merged.updates.items():
        u, s, vh = torch.linalg.svd(dense(update))
        best = (u[:, : TINY.rank] * s[: TINY.rank]) @ vh[: TINY.rank]
        torch.testing.assert_close(dense(peer[module]), best, rtol=1e-3, atol=1e-4)


def test_work_is_repeatable():
    for work in (peers.peft(TINY, "svd"), peers.ours(TINY, "ties")):
        assert_equal(work(), work(), 1e-6)


def test_tables_have_a_row_for_every_method_and_peer():
    names = list(methods())
    table = list(merging.every_method(TINY, names, in_process))
    assert len(table) == 2 + len(names)
    assert all("| 0.500 | 12 |" in row for row in table[2:])
    assert any(row.startswith("| slerp (2 adapters) | low rank |") for row in table)
    table = list(merging.against_peers(TINY, names, in_process))
    rows = sum(1 + len(comparison.peers) for comparison in merging.COMPARISONS)
    assert len(table) == 2 + rows
    knots = next(row for row in table if "float64" in row)
    assert "2 of 4 modules measured | 1.0 | 12 | 2.0 |" in knots


def test_a_method_of_a_table_can_be_chosen(monkeypatch, capsys):
    monkeypatch.setattr(merging, "measure", in_process)
    merging.compare(parts=["llama-3-8b"], only=["average"], small=True)
    printed = capsys.readouterr().out
    assert "2 x [256 x 256, 64 x 256], T = 8, r = 16; 2 threads" in printed
    assert printed.count("\n|") == 3
    with pytest.raises(UserError, match=r"'averge'.*did you mean 'average'"):
        merging.compare(only=["averge"])


def test_memory_is_measured_beyond_the_inputs():
    problem = Problem("wide", ((4096, 4096),), layers=4, tasks=4, rank=32)
    cost = measuring.measure(peers.ours, problem, "task_arithmetic", threads=1)
    result = 4 * 4 * 32 * (4096 + 4096) * 4 / 1e6  # as large as the inputs
    assert result - 1 < cost.extra < 2 * result
    assert 0 < cost.seconds < 5


def test_growth_is_tabulated_fitted_and_plotted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        growth,
        "measure",
        lambda prepare, problem, *_, **__: Cost(2e-6 * problem.shapes[0][0] ** 2, 3.0),
    )
    growth.grow(output=tmp_path / "plots", small=True)
    printed = capsys.readouterr().out
    assert "| growth | T^0.00 | - | T^0.00 | - |" in printed
    assert "| growth | d^2.00 | - | d^2.00 | - |" in printed
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"growth.svg", "growth.png"}


def test_an_exponent_is_that_of_the_larger_half():
    points = [(1, 7.0), (2, 7.0), (4, 64.0), (8, 512.0)]
    assert growth.exponent(points) == pytest.approx(3)
    assert math.isnan(growth.exponent(points, least=100))


def test_statistics_fit_and_layers_do_not_share_their_tensors():
    for needs in ("covariance", "fisher"):
        found = replace(LLAMA_3_8B.tiny(), shapes=((6, 4), (3, 4))).statistics(needs, 1)["task0"]
        assert found["layers.0.linear1"].shape == ((4, 4) if needs == "covariance" else (3, 4))
        assert found["layers.0.linear0"] is not found["layers.1.linear0"]


def test_from_directories_to_a_directory_as_mergekit_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mergekit_end_to_end, "TASKS", 2)
    mergekit_end_to_end.end_to_end(
        model="tiny", method="ties", dtype="float32", threads=1, folder=tmp_path
    )
    printed = capsys.readouterr().out
    assert printed.count("\n|") == 5
    errors = printed.split("included: mergekit ")[1].strip().split(", osrm ")
    assert all(float(error) < 1e-5 for error in errors)
    assert list(tmp_path.iterdir()) == []


def cells(printed):
    """What stands between the bars of a printed table, by row."""
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def test_collecting_costs_more_than_the_pass_alone_and_a_sketch_leaks_no_less(
    tiny_model, monkeypatch, capsys
):
    model = load_backbone(str(tiny_model("bert")))
    numbers = torch.Generator().manual_seed(0)
    tasks = {
        task: [
            {
                "input_ids": torch.randint(4, 64, (8, 12), generator=numbers),
                "attention_mask": torch.ones(8, 12).long(),
            }
        ]
        for task in "ab"
    }
    plain, collecting = covariance.time_both(model, tasks["a"], ["query"], rounds=1)
    assert len(plain) == len(collecting) == 1
    assert min(plain + collecting) > 0
    monkeypatch.setattr(covariance, "minilm", lambda batches, preset: (model, tasks["a"]))
    covariance.compare(models=["minilm"], rounds=1)
    (row,) = cells(capsys.readouterr().out)
    assert row[:2] == ["minilm", "96"]
    assert row[5] == f"{row[4]} .. {row[4]}"

    monkeypatch.setattr(covariance, "resolve_model", str)
    monkeypatch.setattr(covariance, "load_backbone", lambda path, dtype: model)
    monkeypatch.setattr(covariance, "task_batches", lambda model, preset: tasks)
    covariance.compare(sketches=[4])
    exact, sketch = ([float(x) for x in row[1:]] for row in cells(capsys.readouterr().out))
    assert 0 < exact[0] == exact[1] <= sketch[0]


def test_every_solver_finds_the_least_energy(monkeypatch, capsys):
    monkeypatch.setattr(subspace, "_apart", subspace.solve)
    subspace.compare(width=100, rank=4)
    rows = cells(capsys.readouterr().out)
    assert [row[1] for row in rows] == ["torch.linalg.eigh", "eigh", "cholesky"] * 3
    assert all(float(row[4]) == pytest.approx(1, abs=0.02) for row in rows)
    subspace.compare(width=20, rank=2, keys=2)
    assert cells(capsys.readouterr().out)[0][0] == "1"


def test_both_trainings_run_and_their_times_are_tabulated(toy_suite, monkeypatch, capsys):
    monkeypatch.setattr(training, "MAX_LENGTH", 24)
    monkeypatch.setattr(
        training, "load_suite", lambda _, tasks: load_suite(str(toy_suite), None, None, tasks)
    )
    monkeypatch.setattr(training, "resolve_model", str)
    quiet = SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
    monkeypatch.setattr(training, "logging", quiet)
    training.compare(tasks=["half"], rows=40, rounds=1)
    half, total = cells(capsys.readouterr().out)
    assert half[:2] == ["half", "1"]
    assert total[1:] == half[1:]
    ours, peer, ratio = map(float, half[2:])
    assert ratio == pytest.approx(ours / peer, rel=0.01, abs=0.01)


def test_ratios_of_throughputs_are_those_of_whole_rounds():
    timings = [
        training.Timing(*x) for x in (("a", 1, 60, 2, 3), ("b", 1, 20, 2, 7), ("a", 2, 60, 1, 2))
    ]
    table = training.as_table(timings)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["a", "b", "a", "all", "all"]
    assert columns[2] == ["30.0", "10.0", "60.0", "20.0", "60.0"]
    assert columns[4] == ["1.50", "3.50", "2.00", "2.50", "2.00"]
    assert table.caption.startswith("ratio over all tasks: median 2.25 (2.00..2.50) of 2 rounds")
