"""causal_lm tasks through the commands: what holds for any task holds for them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cli import main
from benchmarks.language import LanguageEvaluator
from benchmarks.suites import load_suite
from merge_algorithms import Adapter, UserError, merge
from osrm import Covariance
from trainers.backbone import ModelRef, load_tokenizer
from trainers.data import TaskData
from trainers.settings import RowSettings, TrainSettings
from trainers.tasks import Task

Run = Callable[..., str]
TASKS = ("math", "medicine", "finance")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_qa_suite: Callable[..., Path],
) -> Path:
    """suite.yaml, covariances and OSRM-initialised adapters of three tasks, from commands."""
    folder = tmp_path_factory.mktemp(request.param)
    suite = make_qa_suite(request.param)
    (folder / "suite").symlink_to(suite)
    for task in TASKS:
        command = ["covariance", "--suite", str(suite), "--task", task]
        assert main([*command, "-o", str(folder / f"{task}.safetensors")]) == 0
    covariances = [str(folder / f"{task}.safetensors") for task in TASKS]
    for task in TASKS:
        command = ["train", "--suite", str(suite), "--task", task, "--covariances", *covariances]
        command += ["--subspace.init", "osrm"]
        assert main([*command, "-o", str(folder / task)]) == 0
    return folder


def suite_of(trained: Path) -> Path:
    return (trained / "suite").resolve()


def scores(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(path.read_text())
    return found


def test_training_learns_and_records(trained: Path) -> None:
    info = json.loads((trained / "math" / "osrm.json").read_text())
    assert info["validation"]["perplexity"] < 62  # of 64 words
    described = info["tasks"]["math"]
    assert (described["kind"], described["loss"]) == ("causal_lm", "all")
    assert described["truncated"]["train"] == {"rows": 0, "tokens": 0, "of_rows": 40}
    assert info["diagnostics"]["leaked_before"] < 0.1  # of 1 per direction


def test_covariances_and_adapters_name_the_same_modules(trained: Path) -> None:
    covariance = Covariance.load(trained / "math.safetensors")
    assert set(covariance.modules) == set(Adapter.load(trained / "math").updates)


def test_every_kind_of_merge_is_scored(trained: Path, osrm: Run, tmp_path: Path) -> None:
    suite, adapters = suite_of(trained), [str(trained / task) for task in TASKS]
    osrm("eval", *adapters, "--suite", suite, "-o", tmp_path / "alone.json")
    alone = scores(tmp_path / "alone.json")
    assert list(alone) == list(TASKS)
    assert alone["math"]["perplexity"] == pytest.approx(math.exp(-alone["math"]["log_likelihood"]))
    covariances = [str(trained / f"{task}.safetensors") for task in TASKS]
    merges = {
        "lora_sum": [],
        "ties": [],
        "regmean": ["--covariances", *covariances],
        "orthogonal_mc_dropout": ["--samples", "2"],
    }
    for method, flags in merges.items():
        output = tmp_path / f"{method}.json"
        osrm("eval", *adapters, "--suite", suite, "--merge", method, *flags, "-o", output)
        assert all(1 < scores(output)[task]["perplexity"] < 90 for task in TASKS)


def test_adapters_of_plain_peft_are_scored_and_tuned_like_ours(
    trained: Path, osrm: Run, refused: Run, tmp_path: Path
) -> None:
    """They have neither head.safetensors nor osrm.json; their names say the task."""
    suite, plain = suite_of(trained), []
    for task in TASKS:
        folder = tmp_path / f"run-{task}"
        folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_bytes((trained / task / name).read_bytes())
        plain.append(f"{task}={folder}")
    found = {}
    for name, adapters in {"ours": [trained / task for task in TASKS], "plain": plain}.items():
        for merge_ in ([], ["--merge", "ties"]):
            output = tmp_path / f"{name}{len(merge_)}.json"
            osrm("eval", *adapters, "--suite", suite, *merge_, "-o", output)
            found[name, len(merge_)] = scores(output)
    assert found["plain", 0] == found["ours", 0]
    assert found["plain", 2] == found["ours", 2]

    misspelt = ["eval", f"maths={tmp_path / 'run-math'}", *plain[1:], "--suite", suite]
    error = refused(*misspelt)
    assert "adapter 'maths' is for no task of suite 'toyqa': did you mean 'math'?" in error
    osrm(*misspelt, "--tasks", *TASKS[1:], "-o", tmp_path / "named.json")
    assert scores(tmp_path / "named.json") == {t: found["plain", 0][t] for t in TASKS[1:]}

    bundle = tmp_path / "bundle"
    osrm("merge", *plain, "--method", "emr", "-o", bundle)
    osrm("eval", bundle, "--suite", suite, "--tasks", *TASKS, "-o", tmp_path / "emr.json")
    osrm("eval", *plain, "--suite", suite, "--merge", "emr", "-o", tmp_path / "runtime.json")
    found = {name: scores(tmp_path / f"{name}.json") for name in ("emr", "runtime")}
    for task in TASKS:
        assert found["emr"][task] == pytest.approx(found["runtime"][task], rel=1e-4)

    merged = tmp_path / "merged"
    tuned = ["--tune.suite", suite, "--tune.coefficients", 0.5]
    osrm("merge", *plain, "--method", "ties", *tuned, "-o", merged)
    command = ["eval", merged, "--suite", suite]
    assert "with --tasks" in refused(*command)
    osrm(*command, "--tasks", "math", "finance", "-o", tmp_path / "two.json")
    assert list(scores(tmp_path / "two.json")) == ["math", "finance"]


def test_rows_that_were_cut_are_said_with_their_perplexity(
    trained: Path, osrm: Run, tmp_path: Path
) -> None:
    """Plain PEFT does not record at which length it trained, so the preset's cuts the rows."""
    plain, suite = tmp_path / "math", suite_of(trained)
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (plain / name).write_bytes((trained / "math" / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(Adapter.load(plain).base)
    special = sum(token is not None for token in (tokenizer.bos_token, tokenizer.eos_token))
    command = ["eval", plain, "--suite", suite]
    assert "were cut" not in osrm(*command)
    data = TaskData(
        load_suite(str(suite)).tasks["math"],
        tokenizer,
        TrainSettings(max_length=24),
        RowSettings(test=10),
    )
    lengths = [sum(len(text.split()) for text in row.texts) + special for row in data.rows("test")]
    long = [length for length in lengths if length > 8]
    said = osrm(*command, "--train.max_length", 8)
    cut = f"{len(long)} of 10 test rows were cut to 8 tokens ({sum(long) - 8 * len(long)} tokens"
    assert f"math: {cut} lost): raise --train.max_length\n" in said
    # Beside one that records its length, whose rows are cut to that.
    said = osrm("eval", plain, trained / "medicine", "--suite", suite, "--train.max_length", 8)
    assert f"math: {cut} lost): raise --train.max_length\n" in said
    assert "medicine: " not in said
    info = json.loads((trained / "math" / "osrm.json").read_text())
    info["tasks"]["math"]["max_length"] = 8
    (plain / "osrm.json").write_text(json.dumps(info))
    assert f"math: {cut} lost): as in its training\n" in osrm(*command)
    (plain / "osrm.json").unlink()

    short = suite.with_name("short.yaml")
    short.write_text(suite.read_text().replace("max_length: 24", "max_length: 8"))
    tuned = ["--tune.suite", short, "--tune.coefficients", 0.5, "--tune.test"]
    said = osrm("merge", plain, *tuned, "-o", tmp_path / "merged")
    assert f"math: {cut} lost): raise train.max_length of the suite\n" in said
    assert "of 6 validation rows were cut to 8 tokens" in said


def test_the_sum_is_exact_loads_in_peft_and_generates(
    trained: Path, osrm: Run, tmp_path: Path
) -> None:
    adapters = [Adapter.load(trained / task) for task in TASKS]
    osrm("merge", *(trained / t for t in TASKS), "--method", "lora_sum", "-o", tmp_path / "sum")
    base = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sum").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    text = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=3)
    assert text.shape[1] > inputs["input_ids"].shape[1]
    dense = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad(), merge(adapters, "lora_sum").apply_to(dense):
        expected = dense(**inputs).logits
        found = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_language_model_fine_tuned_whole_becomes_an_adapter(
    trained: Path, osrm: Run, tmp_path: Path
) -> None:
    """In a subspace as wide as the inputs everything is kept, so its scores are the model's."""
    original = Adapter.load(trained / "math")
    base = original.base
    model = AutoModelForCausalLM.from_pretrained(base)
    with merge([original], "lora_sum").apply_to(model):
        model.save_pretrained(tmp_path / "tuned")
    rank = max(update.shape[1] for update in original.updates.values())
    covariances = [trained / f"{task}.safetensors" for task in TASKS]
    said = osrm("convert", tmp_path / "tuned", "--base", base, "--task", "math", "--rank", rank,
                "--covariances", *covariances, "-o", tmp_path / "made")  # fmt: skip
    assert "kept of the update's energy: mean 100%" in said
    found = {}
    for name, adapter in {"ours": trained / "math", "made": tmp_path / "made"}.items():
        output = tmp_path / f"{name}.json"
        osrm("eval", adapter, "--suite", suite_of(trained), "-o", output)
        found[name] = scores(output)["math"]["perplexity"]
    assert found["made"] == pytest.approx(found["ours"], rel=1e-4)


def test_stock_peft_stacks_our_adapters(trained: Path) -> None:
    info = json.loads((trained / "math" / "osrm.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(info["model"])
    model = PeftModel.from_pretrained(base, trained / "math", adapter_name="math")
    model.load_adapter(trained / "finance", adapter_name="finance")
    assert set(model.peft_config) == {"math", "finance"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--subspace.init", "osrm", "--subspace.constraint", "project", "--subspace.k", "8"],
        [
            *("--subspace.init", "osrm", "--subspace.constraint", "freeze"),
            *("--subspace.leak_penalty", "0.1"),
        ],
        ["--subspace.init", "contrastive", "--subspace.scale", "matched"],
        ["--subspace.init", "wiener", "--subspace.leak_penalty", "0.1"],
    ],
    ids=lambda flags: "-".join(flags[1::2]),
)
def test_every_way_to_confine_a_with_packed_rows(
    trained: Path, osrm: Run, tmp_path: Path, flags: list[str]
) -> None:
    suite = suite_of(trained)
    packed = suite.with_name("packed.yaml")
    packed.write_text(
        suite.read_text().replace("group: question", "group: question, packing: true")
    )
    covariances = [trained / f"{task}.safetensors" for task in TASKS]
    command = ["train", "--suite", packed, "--task", "math", "--covariances", *covariances]
    osrm(*command, *flags, "-o", tmp_path / "math")
    info = json.loads((tmp_path / "math" / "osrm.json").read_text())
    assert info["validation"]["perplexity"] < 64
    diagnostics = info["diagnostics"]
    if "freeze" in flags:
        assert diagnostics["leaked_after"] == pytest.approx(diagnostics["leaked_before"])


def test_the_bench_runs_a_suite_of_language_models(
    make_qa_suite: Callable[..., Path], osrm: Run, tmp_path: Path
) -> None:
    suite = make_qa_suite("gpt2")
    command = ["bench", "--suite", suite, "--inits", "osrm", "--merges", "ties"]
    osrm(*command, "--tasks", "math", "finance", "--runs-dir", tmp_path)
    (report,) = tmp_path.glob("*/report.html")
    said = osrm("compare", report.parent, "osrm/ties", "--baseline", "osrm/individual")
    assert "average" in said


def test_language_models_and_classifiers_are_not_scored_together(
    make_qa_suite: Callable[..., Path], trained: Path, refused: Run, tmp_path: Path
) -> None:
    path = make_qa_suite("gpt2")
    tree = yaml.safe_load(path.read_text())
    tree["tasks"]["finance"] = {"text": ["question"], "label": "answer"}
    mixed = path.with_name("mixed.yaml")
    mixed.write_text(yaml.safe_dump(tree))
    error = refused("eval", *(trained / task for task in TASKS), "--suite", mixed)
    assert "take them apart with --tasks" in error
    runs = tmp_path / "runs"
    error = refused("bench", "--suite", mixed, "--preset", "smoke", "--runs-dir", runs)
    assert "take them apart with --tasks" in error
    assert not list(runs.glob("*/adapters/*"))


def test_adapters_of_language_models_have_no_head_for_other_tasks(
    make_qa_suite: Callable[..., Path], trained: Path, refused: Run
) -> None:
    path = make_qa_suite("gpt2")
    tree = yaml.safe_load(path.read_text())
    for name in TASKS:
        tree["tasks"][name] = {"text": ["question"], "label": "answer"}
    other = path.with_name("classes.yaml")
    other.write_text(yaml.safe_dump(tree))
    error = refused("eval", trained / TASKS[0], "--suite", other)
    assert "has no head, as one of a causal_lm, but the task is a classification" in error


def test_joint_training_of_language_models_is_refused_before_training(
    make_qa_suite: Callable[..., Path], refused: Run, tmp_path: Path
) -> None:
    arms = tmp_path / "arms.yaml"
    arms.write_text("arms: {lora: {subspace: {init: lora}}, together: {joint: true}}")
    command = ["bench", "--suite", make_qa_suite("gpt2"), "--arms", arms, "--runs-dir", tmp_path]
    assert "arm 'together'" in refused(*command)
    assert not list(tmp_path.glob("*/adapters/*"))


def test_a_filter_on_what_b_writes_is_refused_for_language_models_before_training(
    refused: Run, make_qa_suite: Callable[..., Path], tmp_path: Path
) -> None:
    command = ["bench", "--suite", make_qa_suite(), "--preset", "smoke", "--runs-dir", tmp_path]
    said = refused(*command, "--inits", "wiener", "--subspace.output_mu", 0.15)
    assert "is a causal_lm, and the filter on what B writes is for tasks with heads" in said
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_adapters_of_different_bases_are_refused(
    trained: Path, refused: Run, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in (trained / "finance").iterdir():
        if file.is_file():
            (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/other"
    (other / "adapter_config.json").write_text(json.dumps(config))
    info = json.loads((other / "osrm.json").read_text())
    (other / "osrm.json").write_text(json.dumps(info | {"model_fingerprint": "another"}))
    error = refused("merge", trained / "math", other, "--method", "lora_sum", "-o", tmp_path / "m")
    assert "org/other" in error


def test_a_base_with_another_tokenizer_is_refused(
    trained: Path, refused: Run, tmp_path: Path
) -> None:
    info = json.loads((trained / "math" / "osrm.json").read_text())
    changed = tmp_path / "changed"
    AutoModelForCausalLM.from_pretrained(info["model"]).save_pretrained(changed)
    tokenizer = AutoTokenizer.from_pretrained(info["model"])
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(changed)
    command = ["eval", trained / "math", "--suite", suite_of(trained), "--model", changed]
    assert "name the base model it was trained on" in refused(*command)
    # In code nobody compares fingerprints of models first.
    folder = str(suite_of(trained).parent / "data" / "math")
    task = Task("math", ("question",), {"dir": folder}, "answer", "causal_lm")
    rows, train = RowSettings(test=4), TrainSettings(max_length=24)
    data = TaskData(task, load_tokenizer(str(changed)), train, rows)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        LanguageEvaluator(
            ModelRef("changed", str(changed)), {"math": data}, [Adapter.load(trained / "math")]
        )


@pytest.mark.parametrize("flaw", ["answer", "length"])
def test_bad_data_is_refused_before_training(
    make_qa_suite: Callable[..., Path], refused: Run, tmp_path: Path, flaw: str
) -> None:
    rows = [{"question": f"w{i} w1", "answer": "" if i == 4 else "w2"} for i in range(30)]
    suite = make_qa_suite("gpt2", math={"train": rows} if flaw == "answer" else {})
    command = ["train", "--suite", suite, "--task", "math", "--subspace.init", "lora"]
    if flaw == "length":
        command += ["--train.max_length", "200"]
    error = refused(*command, "-o", tmp_path / "adapter")
    expected = {"answer": "without an answer, the first is row 5", "length": "at most 64 tokens"}
    assert expected[flaw] in error
    assert not (tmp_path / "adapter").exists()
