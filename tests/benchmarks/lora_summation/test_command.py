"""The whole study through the command line, on models and data of a few words."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from files import write_rows
from transformers import AutoModelForCausalLM

from benchmarks.cli import main
from benchmarks.experiments.lora_summation.relation import Relation
from merge_algorithms import Adapter, merge

SMALL = ["--merges", "lora_sum", "task_arithmetic", "orthogonal_mc_dropout_runtime"]


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory, make_qa_suite: Callable[..., Path]
) -> tuple[Path, list[str]]:
    """A finished run and the command that made it."""
    runs = tmp_path_factory.mktemp("runs")
    suite = make_qa_suite("gpt2")
    command = ["experiment", "lora-summation", "--suite", str(suite), "--runs-dir", str(runs)]
    command += [*SMALL, "--seeds", "0", "1", "--parts", "3", "--subsets", "1"]
    command += ["--rows.train", "24", "--train.epochs", "1", "--trainer.precision", "32-true"]
    assert main(command) == 0
    return runs / "lora-summation-toyqa-smoke", command


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_runs_in_the_precision_that_is_fastest_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for amx, precision in ((True, "bf16-mixed"), (False, "32-true")):
        found = {"amx_bf16": amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=found: f, raising=False)
        with pytest.raises(SystemExit):
            main(["experiment", "lora-summation", "--print_config"])
        assert f"\n  precision: {precision}\n" in capsys.readouterr().out


def test_the_table_is_tidy_and_complete(study: tuple[Path, list[str]]) -> None:
    found = read(study[0] / "results.csv")
    combinations = {row["combination"] for row in found}
    assert combinations == {
        "math+medicine",
        "math+finance",
        "medicine+finance",
        "math+medicine+finance",
    }
    methods = ["base", "individual", "joint", *SMALL[1:]]
    tasks = 3 * (1 + 2) + 1 * (1 + 3)
    assert len(found) == 2 * 2 * len(methods) * tasks
    joint = [row for row in found if row["method"] == "joint"]
    assert {float(row["change"]) for row in joint} == {0.0}
    for row in found:
        assert 1 < float(row["perplexity"]) < 100
        assert 0 < float(row["perplexity_stderr"]) < 20
        assert 0 < float(row["rms_cosine"]) < 1
        assert float(row["interference"]) > 0
    assert {row["coefficient"] for row in found if row["method"] == "task_arithmetic"} <= {
        "0.5",
        "1.0",
    }


def test_processes_side_by_side_build_the_same(
    study: tuple[Path, list[str]], tmp_path: Path, stages: Callable[[], list[str]]
) -> None:
    folder, command = study
    assert main([*command, "--workers", "2", "--runs-dir", str(tmp_path)]) == 0
    lines = stages()
    assert len(set(lines)) == len(lines)
    assert lines[-1].startswith(f"[{len(lines)}/{len(lines)}]")
    assert not any("(reused)" in line for line in lines)
    table = (tmp_path / folder.name / "results.csv").read_text()
    assert table == (folder / "results.csv").read_text()


def test_the_numbers_are_those_of_the_files(study: tuple[Path, list[str]]) -> None:
    """The sum's perplexity on the union, from the adapters on disk, and its change."""
    folder = study[0]
    paths = {t: next(folder.glob(f"adapters/lora-init-seed0/{t}-*")) for t in ("math", "finance")}
    adapters = [Adapter.load(path, name=task) for task, path in paths.items()]
    base = json.loads((paths["math"] / "osrm.json").read_text())["model"]
    content = json.loads((folder / "results.json").read_text())
    wanted = {"seed": 0, "init": "lora", "combination": ["math", "finance"], "task": "union"}
    measured = {row["method"]: row for row in content["rows"] if wanted.items() <= row.items()}
    stage = next(folder.glob("scores/lora-init-seed0/math-finance/lora_sum-*/scores.json"))
    rows = json.loads(stage.read_text())["rows"]
    nll = sum(sum(rows[task]["nll"]) for task in rows)
    tokens = sum(sum(rows[task]["tokens"]) for task in rows)
    assert measured["lora_sum"]["perplexity"] == pytest.approx(math.exp(nll / tokens))
    ratio = measured["lora_sum"]["perplexity"] / measured["joint"]["perplexity"]
    assert measured["lora_sum"]["change"] == pytest.approx(100 * (ratio - 1), abs=1e-9)
    # The stage's rows are those of the merged model: the longest row of math comes first.
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    data = folder_of_data(base, study[1])
    texts = [(r["question"] + " " + r["answer"]).split() for r in data]
    longest = max(len(text) for text in texts)
    assert rows["math"]["tokens"][0] <= longest + 1
    with torch.no_grad(), merge(adapters, "lora_sum").apply_to(model):
        found = []
        for text in texts:
            ids = torch.tensor([[2, *(int(word[1:]) + 4 for word in text), 3]])
            logs = model(ids).logits[0, :-1].double().log_softmax(-1)
            found.append(-float(logs.gather(1, ids[0, 1:, None]).sum()))
    for value in rows["math"]["nll"]:
        assert min(abs(value - other) for other in found) < 1e-3


def folder_of_data(base: str, command: list[str]) -> list[dict[str, str]]:
    suite = Path(command[command.index("--suite") + 1])
    lines = (suite.parent / "data" / "math" / "test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_joint_training_has_the_budget_of_all(study: tuple[Path, list[str]]) -> None:
    logs = {
        name: read(next(study[0].glob(f"adapters/{name}-*")) / "logs" / "metrics.csv")
        for name in ("lora-init-seed0/math", "joint-seed0/math-finance")
    }
    steps = {
        name: max(int(row["step"]) for row in rows if row["step"]) for name, rows in logs.items()
    }
    joint = next(study[0].glob("adapters/joint-seed0/math-finance-*"))
    info = json.loads((joint / "osrm.json").read_text())
    assert info["tasks"]["math-finance"]["truncated"]["train"]["of_rows"] == 48
    assert steps["joint-seed0/math-finance"] >= 2 * steps["lora-init-seed0/math"] - 1


def test_a_second_run_reuses_everything(
    study: tuple[Path, list[str]], stages: Callable[[], list[str]]
) -> None:
    folder, command = study
    before = (folder / "results.csv").read_bytes()
    assert main(command) == 0
    lines = stages()
    assert len(lines) > 50
    assert all("(reused)" in line for line in lines if line.rstrip().endswith(")"))
    assert lines[-1].startswith(f"[{len(lines)}/{len(lines)}]")
    assert (folder / "results.csv").read_bytes() == before


def test_report_relation_and_higher_orders(study: tuple[Path, list[str]]) -> None:
    folder = study[0]
    page = (folder / "report.html").read_text()
    for text in ("the paper, GPT-2 Small", "-9.10 %", "+27.56 %", "RMS cosine", "Spearman"):
        assert text in page
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org", "")
    relation = Relation.load(folder / "relation.json")
    assert relation.fits["all"]["rms_cosine"].points == 2 * 2 * 4
    assert relation.fits["osrm"]["interference"].points == 2 * 4
    higher = read(folder / "higher_order.csv")
    assert {row["subset"].count("+") + 1 for row in higher} == {2, 3}
    assert {row["method"] for row in higher} == {"lora_sum", "average"}


def test_a_llama_with_truncation_and_answers_only(
    make_qa_suite: Callable[..., Path], tmp_path: Path
) -> None:
    suite = make_qa_suite("llama")
    text = suite.read_text().replace("group: question", "group: question, loss: answer")
    suite.write_text(text.replace("max_length: 24", "max_length: 10"))
    command = ["experiment", "lora-summation", "--suite", str(suite), "--runs-dir", str(tmp_path)]
    command += ["--merges", "lora_sum", "--inits", "lora", "--tasks", "math", "finance"]
    assert main([*command, "--name", "short"]) == 0
    content = json.loads((tmp_path / "short" / "results.json").read_text())
    cut = content["truncated"]["math"]["train"]
    assert cut["rows"] > 0
    assert cut["of_rows"] == 40
    assert "rows lose" in (tmp_path / "short" / "report.html").read_text()


Run = Callable[..., str]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--merges", "ties"], "leaves out lora_sum"),
        (["--merges", "lora_sum", "lora_sum"], "each once"),
        (["--merges", "lora_sum", "tise"], "did you mean 'ties'"),
        (["--merges", "lora_sum", "fisher"], "no Fisher information"),
        (["--tasks", "math"], "a sum needs at least 2"),
        (["--parts", "2"], "--parts 2"),
        (["--subsets", "0"], "--subsets 0"),
        (["--name", "a/b"], "--name 'a/b' is no name of a directory"),
        (["--quick"], "unknown argument '--quick'"),
        (["--adapter.targets", "[q_proj]"], "matches no linear layer"),
        (["--subspace.mu", "1"], "--subspace.mu has no effect with --inits lora osrm"),
    ],
)
def test_what_cannot_be_is_refused(
    make_qa_suite: Callable[..., Path], refused: Run, tmp_path: Path, flags: list[str], message: str
) -> None:
    suite = make_qa_suite("gpt2")
    command = ["experiment", "lora-summation", "--suite", suite, "--runs-dir", tmp_path / "runs"]
    assert message in refused(*command, *flags)


def test_no_task_may_be_called_as_all_are_together(
    make_qa_suite: Callable[..., Path], refused: Run, tmp_path: Path
) -> None:
    suite = make_qa_suite("gpt2")
    suite.write_text(suite.read_text().replace("  medicine:", "  union:"))
    command = ["experiment", "lora-summation", "--suite", suite, "--runs-dir", tmp_path / "runs"]
    assert "task 'union' of suite 'toyqa'" in refused(*command)
    assert not (tmp_path / "runs").exists()


def test_parts_need_rows(make_qa_suite: Callable[..., Path], refused: Run, tmp_path: Path) -> None:
    rows = [{"question": f"w{i} w1", "answer": "w2"} for i in range(12)]
    suite = make_qa_suite("gpt2", math={"train": rows})
    command = ["experiment", "lora-summation", "--suite", suite, "--runs-dir", tmp_path]
    assert "too few for 9 parts: use fewer with --parts" in refused(*command, "--parts", "26")
    assert not list(tmp_path.rglob("adapters"))


def test_suites_without_language_models_are_refused(
    toy_suite: Path, refused: Run, tmp_path: Path
) -> None:
    error = refused("experiment", "lora-summation", "--suite", toy_suite, "--runs-dir", tmp_path)
    assert "is no causal_lm: choose a suite of language modelling tasks" in error


def test_experiments_are_found_by_name(refused: Run, osrm: Run) -> None:
    assert "did you mean 'lora-summation'" in refused("experiment", "lora-sumation", "--quick")
    assert "experiment is missing" in refused("experiment")


def hub(path: str, name: str | None = None) -> dict[str, Dataset]:
    """Data sets of the Hub with the columns of the real ones, and words of the toy model."""
    rows = [
        {"question": f"w{i} w{i % 7}", "answer": f"w{i % 5}", "options": {"A": "w1"}}
        for i in range(40)
    ]
    assert (path, name) in {
        ("openai/gsm8k", "main"),
        ("GBaker/MedQA-USMLE-4-options", None),
        ("LLukas22/fiqa", None),
    }
    return {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:10])}


def test_the_papers_configuration_on_a_tiny_gpt2(
    tiny_language_model: Callable[[str], Path],
    osrm: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.load_dataset", hub)
    command = ["experiment", "lora-summation", "--suite", "qa-gpt2-small", "--preset", "smoke"]
    command += ["--model", str(tiny_language_model("gpt2")), "--runs-dir", str(tmp_path)]
    osrm(*command, "--merges", "lora_sum", "--inits", "lora")
    content = json.loads((tmp_path / "lora-summation-qa-gpt2-small-smoke/results.json").read_text())
    assert content["settings"]["adapter"]["targets"] == ["c_attn"]
    assert content["settings"]["adapter"]["alpha"] == 64
    assert {tuple(row["combination"]) for row in content["rows"]} >= {("math", "medicine")}


def test_a_folder_of_files_chooses_their_suite_in_a_config_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["experiment", "lora-summation"]
    for folder, suite in ((str(tmp_path), "qa-files"), ("null", "qa")):
        file = tmp_path / "config.yaml"
        file.write_text(f"data_dir: {folder}\n")
        with pytest.raises(SystemExit):
            main([*command, "--config", str(file), "--print_config"])
        assert f"\nsuite: {suite}\n" in capsys.readouterr().out


def test_files_of_ones_own(
    tiny_language_model: Callable[[str], Path], osrm: Run, tmp_path: Path
) -> None:
    rows = [{"question": f"w{i}", "answer": f"w{i % 5}", "context": "w9 w8"} for i in range(30)]
    for task in ("qa_math", "qa_medicine", "qa_finance"):
        for split, some in (("train", rows), ("validation", rows[:8])):
            write_rows(tmp_path / task / f"{split}.jsonl", some)
    command = ["experiment", "lora-summation", "--data-dir", str(tmp_path), "--preset", "smoke"]
    command += ["--model", str(tiny_language_model("gpt2")), "--adapter.targets", "[c_attn]"]
    command += ["--runs-dir", str(tmp_path / "runs"), "--merges", "lora_sum", "--inits", "lora"]
    osrm(*command, "--tasks", "qa_math", "qa_finance")
    page = (tmp_path / "runs/lora-summation-qa-files-smoke/report.html").read_text()
    assert "+4.54 %" in page  # the paper's figure for math and finance
