"""Aligned heads through the commands: scored, chosen, saved, and what cannot be aligned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from files import merge_record
from torch import Tensor

from benchmarks.alignment import MUS, HeadAligner
from benchmarks.cli import main
from benchmarks.commands.scoring import base_model, load_evaluator
from benchmarks.evaluate import Evaluator, evaluate_fusion
from benchmarks.fusion import Fusion
from benchmarks.results import Results
from benchmarks.suites import load_suite
from merge_algorithms import Adapter, UserError, merge
from trainers.alignment import align_layer
from trainers.backbone import token_states

Run = Callable[..., str]
TASKS = ("half", "size")
MERGES = ("task_arithmetic", "task_arithmetic_aligned", "regmean_aligned")
HEADLINE = {"half": "accuracy", "size": "pearson+spearman", "same": "accuracy"}


@pytest.fixture(scope="module")
def command(toy_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A bench of two tasks, ready to run."""
    runs = tmp_path_factory.mktemp("runs")
    settings = ["--train.epochs", "4", "--train.learning_rate", "0.02", "--inits", "lora"]
    settings += ["--coefficients", "2", "4"]  # so far away that the heads no longer fit
    suite = ["--suite", str(toy_suite), "--tasks", *TASKS, "--runs-dir", str(runs)]
    return ["bench", *suite, *settings, "--merges", *MERGES]


@pytest.fixture(scope="module")
def run_dir(command: list[str]) -> Path:
    assert main(command) == 0
    return Path(command[command.index("--runs-dir") + 1]) / "toy-smoke"


@pytest.fixture(scope="module")
def adapters(trained: Path) -> list[Adapter]:
    return [Adapter.load(trained / task) for task in HEADLINE]


@pytest.fixture
def evaluator(adapters: list[Adapter], toy_suite: Path) -> Evaluator:
    return load_evaluator(load_suite(str(toy_suite)), base_model(None, adapters), adapters)


def pooled(evaluator: Evaluator, task: str) -> Tensor:
    """(n, d) mean token states of the training rows, one by one."""
    found = []
    data = evaluator.data[task]
    with torch.no_grad():
        for feature in sorted(data._features("train"), key=lambda f: -len(f["input_ids"])):
            inputs = {
                name: torch.tensor([value]).to(evaluator.device)
                for name, value in feature.items()
                if name != "labels"
            }
            found.append(token_states(evaluator.backbone, inputs).mean(dim=1).cpu())
    return torch.cat(found)


def test_a_bench_scores_aligned_heads_at_every_coefficient(run_dir: Path) -> None:
    results = Results.load(run_dir)
    assert tuple(results.merges()) == MERGES
    scores = {
        (row.merge, row.coefficient, row.task): row.score
        for row in results.scores
        if row.split == "validation" and row.metric == HEADLINE.get(row.task)
    }
    for (merge_name, coefficient, task), score in scores.items():
        if merge_name == "task_arithmetic":  # the head as it was is a candidate
            assert scores["task_arithmetic_aligned", coefficient, task] >= score - 1e-6
    curve = results.curve("lora", "task_arithmetic_aligned")
    assert curve != results.curve("lora", "task_arithmetic")
    info = next(m for m in results.arms[0].merges if m.method == "task_arithmetic_aligned")
    assert info.coefficient == max(curve, key=lambda c: curve[c].mean)


@pytest.mark.parametrize("method", ["task_arithmetic", "regmean"])
def test_the_saved_bundle_has_the_aligned_heads(
    method: str, run_dir: Path, toy_suite: Path, tmp_path: Path, osrm: Run
) -> None:
    results = Results.load(run_dir)
    (arm,) = results.arms
    info = next(m for m in arm.merges if m.method == f"{method}_aligned")
    assert info.path is not None
    bundle = Adapter.load(run_dir / info.path)
    made = merge_record(run_dir / info.path)
    assert made["method"] == method
    chosen = made["evaluation"]["aligned_heads"]
    assert chosen.keys() == set(TASKS)
    assert set(chosen.values()) <= {None, *MUS}
    assert any(chosen.values()), "nothing to compare"
    own = {task: Adapter.load(run_dir / arm.adapters[task]) for task in TASKS}
    suite = load_suite(str(toy_suite), tasks=list(TASKS))
    evaluator = load_evaluator(suite, base_model(None, [bundle]), list(own.values()))
    for task, mu in chosen.items():
        trained = own[task].heads[task]
        expected = dict(trained)
        if mu is not None:
            with merge([own[task]]).apply_to(evaluator.backbone):
                alone = pooled(evaluator, task)
            with merge([bundle]).apply_to(evaluator.backbone):
                merged = pooled(evaluator, task)
            weight, bias = trained["out.weight"], trained["out.bias"]
            new_weight, new_bias = align_layer(merged, alone, weight, bias, mu)
            assert new_bias is not None
            expected |= {"out.weight": new_weight, "out.bias": new_bias}
        assert bundle.heads[task].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(bundle.heads[task][name], tensor, rtol=1e-3, atol=1e-4)
    osrm("eval", run_dir / info.path, "--suite", toy_suite, "-o", tmp_path / "scores.json")
    found = json.loads((tmp_path / "scores.json").read_text())
    for task in TASKS:
        tested = results.score("lora", f"{method}_aligned", task).mean
        assert found[task][HEADLINE[task]] == pytest.approx(tested, abs=1e-4)
    card = (run_dir / info.path / "README.md").read_text()
    assert "aligned with the merged features" in card
    assert "Kept as trained" not in card


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (["--head.hidden", "true"], {"dense.weight", "dense.bias"}),
        (["--head.bias", "false", "--head.pooling", "last"], {"out.weight"}),
    ],
)
def test_the_first_layer_of_a_head_is_aligned(
    settings: list[str],
    changed: set[str],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rising = iter(range(1000))
    monkeypatch.setattr(HeadAligner, "_score", lambda *_: next(rising))  # the last mu is taken
    again = [*command[: command.index("--merges")], *settings, "--merges", MERGES[1]]
    assert main([*again, "--runs-dir", str(tmp_path)]) == 0
    (arm,) = Results.load(tmp_path / "toy-smoke").arms
    path = tmp_path / "toy-smoke" / str(arm.merges[0].path)
    assert set(merge_record(path)["evaluation"]["aligned_heads"].values()) == {MUS[-1]}
    for task, head in Adapter.load(path).heads.items():
        trained = Adapter.load(tmp_path / "toy-smoke" / arm.adapters[task]).heads[task]
        assert head.keys() == trained.keys()
        assert {n for n in head if not torch.equal(head[n], trained[n])} == changed
        assert all(head[n].dtype == trained[n].dtype for n in head)


def test_reports_and_comparisons_name_it(run_dir: Path, osrm: Run) -> None:
    page = (run_dir / "report.html").read_text()
    assert "task_arithmetic (aligned heads)" in page
    sides = ["lora/task_arithmetic_aligned", "--baseline", "lora/task_arithmetic"]
    assert "task_arithmetic_aligned" in osrm("compare", run_dir, *sides)


def test_other_merges_keep_their_stages_and_a_rerun_builds_nothing(
    run_dir: Path, command: list[str], stages: Callable[[], list[str]]
) -> None:
    before = Results.load(run_dir).scores
    assert main(command) == 0
    lines = stages()
    assert lines
    assert all("(reused)" in line for line in lines)
    assert Results.load(run_dir).scores == before
    plain, aligned = (
        json.loads(next((run_dir / "curves").glob(f"*/{name}-*/stage.json")).read_text())
        for name in MERGES[:2]
    )
    assert set(aligned) - set(plain) == {"aligned"}


def test_own_features_are_computed_once_and_progress_counts_every_row(
    evaluator: Evaluator, adapters: list[Adapter]
) -> None:
    fusion = Fusion(adapters, "ties_aligned")
    trained = {task: dict(evaluator.modules[task].state_dict()) for task in HEADLINE}
    trained = {task: {n: t.clone() for n, t in head.items()} for task, head in trained.items()}
    totals = []
    for coefficient in (1.0, 0.5, 1.0):
        told: list[tuple[int, int]] = []

        def report(done: int, total: int, told: list[tuple[int, int]] = told) -> None:
            told.append((done, total))

        evaluate_fusion(evaluator, fusion, coefficient, "test", report=report)
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert told[-1][0] == told[-1][1]
        totals.append(told[-1][1])
    rows = 3 * (64 + 16 + 24)  # training, validation, test
    assert totals == [rows + 3 * 64, rows, 3 * 24]
    for task, head in trained.items():
        for name, tensor in evaluator.modules[task].state_dict().items():
            assert torch.equal(tensor, head[name]), "the evaluator's heads are as they were"


def test_one_adapter_alone_moves_nothing_so_its_head_stays(
    evaluator: Evaluator, adapters: list[Adapter], toy_suite: Path
) -> None:
    suite = load_suite(str(toy_suite), tasks=["half"])
    alone = load_evaluator(suite, base_model(None, adapters), adapters)
    found = alone.aligner.align(Fusion(adapters[:1], "task_arithmetic_aligned"), 1.0)
    assert found.mus == {"half": None}
    assert found.heads["half"] is adapters[0].heads["half"]


def test_ties_go_to_the_least_change(
    evaluator: Evaluator, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    fusion = Fusion(adapters, "task_arithmetic_aligned")
    scores = iter([0.5, 0.6, 0.7, 0.7, 0.6] + [0.7] * 5 + [-1.0, float("-inf"), 0.1, 0.2, 0.3])
    monkeypatch.setattr(HeadAligner, "_score", lambda *_: next(scores))
    mus = evaluator.aligner.align(fusion, 1.0).mus
    assert mus == {"half": 1.0, "size": None, "same": 0.01}


def test_merge_writes_heads_aligned_at_the_chosen_scale(
    osrm: Run, trained: Path, toy_suite: Path, tmp_path: Path
) -> None:
    search = ["--tune.suite", toy_suite, "--tune.test"]
    search += ["--tune.coefficients", "0.1", "0.2"]  # so little that the heads no longer fit
    inputs = [trained / task for task in HEADLINE]
    said = osrm("merge", *inputs, *search, "--tune.heads", "true", "-o", tmp_path / "aligned")
    osrm("merge", *inputs, *search, "-o", tmp_path / "plain")
    assert "heads aligned" in said
    aligned, plain = (Adapter.load(tmp_path / name) for name in ("aligned", "plain"))
    for module, update in plain.updates.items():
        assert torch.equal(aligned.updates[module].dense(), update.dense())
    made, before = (merge_record(tmp_path / name) for name in ("aligned", "plain"))
    assert made["coefficient"] == before["coefficient"]
    assert "aligned_heads" not in before["evaluation"]
    means = [found["evaluation"]["means"]["validation"] for found in (made, before)]
    assert means[0] >= means[1] - 1e-6
    mus = made["evaluation"]["aligned_heads"]
    assert any(mus.values())
    for task, mu in mus.items():
        same = torch.equal(aligned.heads[task]["out.weight"], plain.heads[task]["out.weight"])
        assert same == (mu is None)
    for split in ("validation", "test"):
        file = tmp_path / f"{split}.json"
        osrm("eval", tmp_path / "aligned", "--suite", toy_suite, "--split", split, "-o", file)
        for task, metrics in json.loads(file.read_text()).items():
            assert made["evaluation"]["scores"][split][task] == pytest.approx(metrics, abs=1e-4)


# What cannot be aligned


@pytest.mark.parametrize("method", ["emr_runtime_aligned", "orthogonal_mc_dropout_runtime_aligned"])
def test_a_run_time_merge_is_refused(
    method: str, refused: Run, toy_suite: Path, tmp_path: Path
) -> None:
    said = refused("bench", "--suite", toy_suite, "--runs-dir", tmp_path, "--merges", method)
    assert f"--merges {method}: a run-time merge is not in the weights" in said
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_run_time_fusion_is_refused(evaluator: Evaluator, adapters: list[Adapter]) -> None:
    with pytest.raises(UserError, match="'mc_dropout' works at run time"):
        evaluator.aligner.align(Fusion(adapters, "mc_dropout_runtime"), 1.0)


def test_unknown_methods_get_the_nearest_name(refused: Run, toy_suite: Path) -> None:
    said = refused("bench", "--suite", toy_suite, "--merges", "regmaen_aligned")
    assert "did you mean 'regmean'" in said


def test_language_models_have_no_head(
    refused: Run, make_qa_suite: Callable[..., Path], tmp_path: Path
) -> None:
    suite = make_qa_suite()
    for begin in (["bench"], ["experiment", "lora-summation"]):
        command = [*begin, "--suite", suite, "--runs-dir", tmp_path]
        said = refused(*command, "--merges", "lora_sum", "task_arithmetic_aligned")
        assert "a causal_lm has no head, so no heads are aligned" in said


def test_a_bundle_of_emr_is_refused(
    refused: Run, trained: Path, toy_suite: Path, tmp_path: Path
) -> None:
    command = ["merge", trained / "half", trained / "size", "--method", "emr"]
    said = refused(
        *command, "--tune.suite", toy_suite, "--tune.heads", "true", "-o", tmp_path / "m"
    )
    assert "emr works at run time" in said


def test_without_a_search_there_are_no_rows_to_align_on(
    refused: Run, trained: Path, tmp_path: Path
) -> None:
    said = refused("merge", trained / "half", "--tune.heads", "true", "-o", tmp_path / "m")
    assert "--tune.heads is about a search on validation rows" in said
