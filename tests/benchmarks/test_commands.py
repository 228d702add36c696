"""The command line on files on disk: every stage alone, with good and with bad input."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from benchmarks.cli import main, normalise
from benchmarks.commands.scoring import base_model, load_evaluator
from benchmarks.suites import load_suite
from merge_algorithms import Adapter
from osrm import Covariance

Run = Callable[..., str]


def test_a_published_covariance_says_what_it_is(trained: Path, toy_suite: Path) -> None:
    covariance = Covariance.load(trained / "half.safetensors")
    assert covariance.meta["task"] == "half"
    assert set(covariance.meta) >= {"model", "model_fingerprint", "data_fingerprint"}
    assert covariance.tokens > 100


def test_training_with_other_peoples_covariances(trained: Path) -> None:
    info = json.loads((trained / "half" / "osrm.json").read_text())
    assert info["subspace"]["init"] == "osrm"
    assert set(info["covariances"]) == {"half", "size", "same"}
    assert info["diagnostics"]["leaked_before"] < info["diagnostics"]["leaked_after"]


def test_merge_then_evaluate_the_bundle(
    osrm: Run, trained: Path, toy_suite: Path, tmp_path: Path
) -> None:
    adapters = [trained / task for task in ("half", "size", "same")]
    merged = tmp_path / "merged"
    scores = tmp_path / "scores.json"
    said = osrm("merge", *adapters, "--method", "ties", "--density", "0.2", "-o", merged)
    assert "ties of half, size, same" in said
    assert (merged / "adapter_config.json").exists()
    assert sorted(p.stem for p in (merged / "heads").iterdir()) == ["half", "same", "size"]
    osrm("eval", merged, "--suite", toy_suite, "-o", scores)
    assert set(json.loads(scores.read_text())) == {"half", "size", "same"}


def test_a_merged_bundle_scores_as_the_merge_made_on_the_fly(
    osrm: Run, trained: Path, toy_suite: Path, tmp_path: Path
) -> None:
    adapters = [trained / task for task in ("half", "size", "same")]
    osrm("merge", *adapters, "--scale", "0.7", "-o", tmp_path / "merged")
    osrm("eval", tmp_path / "merged", "--suite", toy_suite, "-o", tmp_path / "a.json")
    on_the_fly = ["--merge", "task_arithmetic", "--coefficient", "0.7"]
    osrm("eval", *adapters, "--suite", toy_suite, *on_the_fly, "-o", tmp_path / "b.json")
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for task in a:
        assert a[task] == pytest.approx(b[task], abs=1e-4)


def test_pairs_in_another_order_than_in_training_are_refused(
    refused: Run, toy_suite: Path, trained: Path
) -> None:
    suite = toy_suite.with_name("turned.yaml")
    text = toy_suite.read_text(encoding="utf-8")
    suite.write_text(text.replace("[text, other]", "[other, text]"), encoding="utf-8")
    said = refused("eval", trained / "same", "--suite", suite)
    assert "trained on the columns text, other in this order, but the data has other, text" in said


def test_texts_longer_than_the_model_reads_are_refused_whatever_its_tokenizer_says(
    refused: Run, trained: Path, toy_suite: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(load_suite(str(toy_suite)).model, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    adapter = shutil.copytree(trained / "half", tmp_path / "half")
    info = json.loads((adapter / "osrm.json").read_text())
    del info["tasks"]["half"]["max_length"], info["model_fingerprint"]
    (adapter / "osrm.json").write_text(json.dumps(info))
    options = ["--suite", toy_suite, "--model", model, "--train.max_length", 100]
    out = ["--task", "half", "-o", tmp_path / "out"]
    said = "train.max_length is 100, but the model reads at most 64 tokens: use a smaller one"
    for command in (
        ["covariance", *out],
        ["train", "--subspace.init", "lora", *out],
        ["eval", adapter],
        ["bench", "--runs-dir", tmp_path / "runs"],
    ):
        assert said in refused(*command, *options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()


def test_evaluation_alone_and_at_run_time(
    osrm: Run, trained: Path, toy_suite: Path, tmp_path: Path
) -> None:
    adapters = [trained / task for task in ("half", "size")]
    alone = osrm("eval", trained / "half", "--suite", toy_suite)
    assert "accuracy" in alone
    assert "pearson" not in alone
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        file = tmp_path / f"{number}.json"
        said = osrm("eval", *adapters, "--suite", toy_suite, "--merge", "orthogonal_mc_dropout",
                    "--samples", 3, "--seed", seed, "-o", file)  # fmt: skip
        assert "size" in said
        drawn.append(json.loads(file.read_text()))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.fixture(scope="module")
def plain_peft(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]
) -> dict[str, Path]:
    """Two classifiers that plain PEFT saved, heads in modules_to_save."""
    folder = tmp_path_factory.mktemp("peft")
    made = {}
    for seed, name in enumerate(("half", "same")):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), num_labels=2)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=4, init_lora_weights=False, target_modules=["query"]
        )
        model = get_peft_model(base, config)
        made[name] = folder / name
        model.save_pretrained(made[name])
    return made


def test_adapters_of_plain_peft_merge_and_load_back(
    osrm: Run,
    plain_peft: dict[str, Path],
    tiny_model: Callable[[str], Path],
    toy_suite: Path,
    tmp_path: Path,
) -> None:
    merged = tmp_path / "merged"
    osrm("merge", *plain_peft.values(), "--weights", 1, 0, "--head", "half", "-o", merged)
    ids = {"input_ids": torch.randint(4, 64, (3, 7), generator=torch.manual_seed(0))}
    logits = []
    for path in (plain_peft["half"], merged):
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), num_labels=2)
        model = PeftModel.from_pretrained(base, path).eval()
        with torch.no_grad():
            logits.append(model(**ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)

    bundle = tmp_path / "bundle"
    osrm("merge", *plain_peft.values(), "-o", bundle)
    printed = osrm("eval", bundle, "--suite", toy_suite)
    assert "half" in printed
    assert "same" in printed


def test_heads_of_plain_peft_leave_nothing_behind(
    tiny_model: Callable[[str], Path], toy_suite: Path, osrm: Run, tmp_path: Path
) -> None:
    """One has a pooler of its own, the other has not; one is in half precision."""
    models = {}
    for seed, (name, whole) in enumerate({"half": ["pooler", "classifier"], "same": None}.items()):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), num_labels=2)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, target_modules=["query"], modules_to_save=whole
        )
        models[name] = get_peft_model(base, config).eval()
        for key, parameter in models[name].named_parameters():
            if "modules_to_save" in key:
                parameter.data = torch.randn(parameter.shape).half().float()
        models[name].save_pretrained(tmp_path / name)
    file = tmp_path / "same" / "adapter_model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)

    adapters = [Adapter.load(tmp_path / name) for name in models]
    suite = load_suite(str(toy_suite))
    suite = replace(suite, tasks={name: suite.tasks[name] for name in models})
    evaluator = load_evaluator(suite, base_model(None, adapters), adapters)
    for name in (*models, *models):
        batch = next(iter(evaluator.data[name].test_dataloader()))
        inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
        with torch.inference_mode():
            found = evaluator.logits(name, batch)
            torch.testing.assert_close(found, models[name](**inputs).logits)

    merged = tmp_path / "merged"
    weights = ["--weights", 0, 1]
    osrm("merge", *(tmp_path / name for name in models), *weights, "--head", "same", "-o", merged)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert"), num_labels=2)
    loaded = PeftModel.from_pretrained(base, merged).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs).logits, found)


def test_heads_of_plain_peft_cannot_be_aligned(
    refused: Run, plain_peft: dict[str, Path], toy_suite: Path, tmp_path: Path
) -> None:
    search = ["--tune.suite", toy_suite, "--tune.heads", "true"]
    said = refused("merge", *plain_peft.values(), *search, "-o", tmp_path / "merged")
    assert "the head of task 'half' lies in the modules_to_save of a plain PEFT" in said
    assert list(tmp_path.iterdir()) == []


def test_bad_commands(refused: Run, toy_suite: Path, trained: Path, tmp_path: Path) -> None:
    suite = ["--suite", toy_suite]
    out = ["-o", tmp_path / "out"]
    half, size = trained / "half", trained / "size"
    odd = tmp_path / "odd.yaml"
    odd.write_text("methodd: ties\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    project = ["--subspace.constraint", "project"]
    cases = {
        ("bnech",): "did you mean 'bench'",
        ("bench", "--trian.epochs", 3): "'--train.epochs'",
        ("bench", "--suite", "embeded"): "did you mean 'embedded'",
        ("bench", *suite, "--preset", "smok"): "did you mean 'smoke'",
        ("bench", *suite, "--tasks", "hlaf", "size"): "did you mean 'half'",
        ("bench", *suite, "--tasks", "half"): "at least 2",
        ("bench", *suite, *project, "--subspace.k", 3): "k 3 is not between the rank 4",
        ("bench", *suite, *project, "--subspace.k", 33): "k 33 is not between",
        ("bench", *suite, "--adapter.rank", 33): "rank 33 is larger than 32",
        ("bench", *suite, "--seeds", 0, 0): "seeds that are finite and different",
        ("bench", *suite, "--samples", 0): "at least 1",
        ("bench", *suite, "--inits", "lora", "lora"): "names one twice",
        ("bench", *suite, "--name", ""): "--name '' is no name of a directory",
        ("bench", *suite, "--name", "a/"): "give one without '/', or leave it out",
        ("bench", *suite, "--study", "modes", "--name", ""): "--name '' is no name of a directory",
        ("train", *suite, "--task", "half", *out, "--subspace.init", "lora",
         "--trainer.strategy", "foo"): "Lightning refuses",
        ("train", *suite, "--task", "half", *out, "--subspace.init", "lora",
         "--trainer.accelerator", "cpu", "--trainer.devices", 2): "--trainer.devices 1",
        ("train", *suite, "--task", "half", "--subspace.init", "official", *out,
         "--covariances", trained / "size.safetensors"): "--padded",
        ("train", *suite, "--task", "half", "-o", trained, "--overwrite",
         "--subspace.init", "lora"): "is not an adapter",
        ("eval", half, f"half={size}", *suite): "two adapters have a head for task 'half'",
        ("eval", half, *suite, "--train.max_length", 12): "was trained with 24",
        ("eval", f"size={half}", *suite): "labels high, low but the task is a regression: evaluate",
        ("eval", f"half={size}", *suite): "trained on a regression but the data has high, low",
        ("eval", half, *suite, "--scale", 0.5): "it is --coefficient here",
        ("eval", half, *suite, "--method", "ties"): "it is --merge here",
        ("merge", half, size, *out, "--coefficient", 0.5): "it is --scale here",
        ("merge", half, size, *out, "--merge", "ties"): "it is --method here",
        ("bench", *suite, "--merge", "ties"): "did you mean '--merges'",
        ("bench", *suite, "--merges", "tise"): "did you mean 'ties'",
        ("train", *suite, "--trainer.gradient_clip_val=1"): "it is --train.max_grad_norm here",
        ("bench", *suite, "--train.epochs", "three"): "train.epochs",
        ("bench", *suite, "--data-dir", "/nowhere"): "/nowhere",
        ("train", *suite, "--task", "half", *out): "--covariances",
        ("train", *suite, "--task", "half", *out, "--subspace.init", "lora",
         "--adapter.targets", "[qeury]"): "did you mean 'query'",
        ("train", *suite, "--task", "half", *out, "--subspace.init", "lora",
         "--adapter.rank", 64): "rank 64 is larger than 32",
        ("covariance", *suite, "--task", "half", "-o", trained / "half.safetensors"): "exists",
        ("merge", half, size, "--method", "tise", *out): "did you mean 'ties'",
        ("merge", half, size, "--method", "ties", "--density", 1.5, *out): "density",
        ("merge", half, size, "--density", 0.5, *out): "has no options: leave out 'density'",
        ("merge", half, half, *out): "two adapters are called 'half'",
        ("merge", half, empty, *out): "not a PEFT adapter (it is empty)",
        ("merge", half, size, "--weights", 1, *out): "weight",
        ("merge", half, size, "-o", half): "exists",
        ("eval", half, *suite, "--tasks", "size"): "no adapter has a head for task 'size'",
        ("eval", half, size, *suite, "--merge", "ties", "--samples", 4): "--samples",
        ("eval", half, size, *suite, "--merge", "orthogonal_mc_dropout",
         "--samples", 0): "--samples",
        ("eval", half, "--suite", "embedded"): "no task of suite",
        ("assets", "pull", "minlm"): "did you mean 'minilm'",
        ("merge", *out): "adapters is missing",
        ("eval", half, *suite, size): f"unknown argument '{size}': adapters go before the flags",
        ("bench", *suite, "half"): "unknown argument 'half': known: ",
        ("merge", half, *out, "--config", tmp_path / "no.yaml"): "--config cannot be read",
        ("merge", half, *out, "--config", odd): "no argument 'methodd'",
        ("merge", half, "-o", odd / "out"): "is a file: choose another output path",
        ("train", *suite, "--task", "half", "-o", odd / "out"): "is a file",
        ("covariance", *suite, "--task", "half", "-o", odd / "out"): "is a file",
        ("covariance", *suite, "--task", "half", "-o", trained, "--overwrite"): "is a directory",
        ("eval", half, *suite, "-o", odd): "already exists",
        ("eval", half, *suite, "-o", trained, "--overwrite"): "is a directory",
        ("fisher", half, *suite, "-o", odd / "out"): "is a file",
    }  # fmt: skip
    for command, expected in cases.items():
        assert expected in refused(*command), command
    assert not (tmp_path / "out").exists()


def test_covariances_that_do_not_fit(
    refused: Run,
    trained: Path,
    toy_suite: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    other = tmp_path / "other.safetensors"
    command = ["covariance", "--suite", toy_suite, "--task", "size", "-o", other]
    assert main([*map(str, command), "--model", str(tiny_model("roberta"))]) == 0
    train = ["train", "--suite", toy_suite, "--task", "half", "-o", tmp_path / "out"]
    assert "model" in refused(*train, "--covariances", other)
    twice = [trained / "size.safetensors"] * 2
    assert "second covariance of 'size'" in refused(*train, "--covariances", *twice)
    other.write_bytes(other.read_bytes()[:1000])
    assert "other.safetensors" in refused(*train, "--covariances", other)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_that_native_code_reports_as_an_error_is_still_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ValueError("could not determine the shape") from error

    monkeypatch.setattr("benchmarks.commands.assets.run", run)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["assets", "list"]) == 130
    # Only benches and experiments have stages that the next run could continue.
    assert capsys.readouterr().err == "osrm: stopped\n"
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("command", [["bench"], ["experiment", "orthogonal-dropout"]])
def test_ctrl_c_in_a_run_says_that_it_can_be_continued(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(f"benchmarks.commands.{command[0]}.run", run)
    assert main(command) == 130
    said = capsys.readouterr().err
    assert said == "osrm: stopped; finished stages are kept, run again to continue\n"


def test_ctrl_c_that_hits_a_destructor_is_still_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Garbage:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def run(*arguments: object) -> None:
        Garbage()
        time.sleep(60)

    monkeypatch.setattr("benchmarks.commands.assets.run", run)
    started = time.monotonic()
    assert main(["assets", "list"]) == 130
    assert time.monotonic() - started < 10
    assert capsys.readouterr().err == "osrm: stopped\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device: check the path, its permissions and the space left",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has .."),
            "CUDA out of memory: free the GPU's memory, or take a smaller --train.batch_size",
        ),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    expected: str,
) -> None:
    def run(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("benchmarks.commands.assets.run", run)
    assert main(["assets", "list"]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "covariance", "train", "merge", "eval", "fisher", "inspect", "assets"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert len(said) > 300
        assert "<class" not in said


def test_print_config_shows_the_values_of_the_suite(
    capsys: pytest.CaptureFixture[str], toy_suite: Path, tmp_path: Path, osrm: Run
) -> None:
    with pytest.raises(SystemExit):
        main(["covariance", "--suite", str(toy_suite), "--task", "half", "-o", "x.safetensors",
              "--print_config"])  # fmt: skip
    config = capsys.readouterr().out
    assert "max_length: 24" in config
    file = tmp_path / "config.yaml"
    file.write_text(config.replace("x.safetensors", str(tmp_path / "from_config.safetensors")))
    osrm("covariance", "--config", file)
    assert (tmp_path / "from_config.safetensors").exists()


def test_several_config_files_are_read_in_their_order(
    capsys: pytest.CaptureFixture[str], toy_suite: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"suite: {toy_suite}\npreset: full\n")
    second.write_text("preset: smoke\n")
    with pytest.raises(SystemExit):
        main(["bench", "--config", str(first), f"--config={second}", "--print_config"])
    config = capsys.readouterr().out
    assert f"suite: {toy_suite}" in config
    assert "preset: smoke" in config
    assert "max_length: 24" in config
    assert "- half" in config


@pytest.mark.parametrize(
    ("order", "preset", "rows"),
    [(["flag", "file"], "smoke", "64"), (["file", "flag"], "full", "6000")],
)
def test_a_file_and_a_flag_are_read_in_their_order(
    order: list[str],
    preset: str,
    rows: str,
    capsys: pytest.CaptureFixture[str],
    toy_suite: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("preset: smoke\n")
    given = {"flag": ["--preset", "full"], "file": ["--config", str(file)]}
    command = ["bench", "--suite", str(toy_suite), *given[order[0]], *given[order[1]]]
    with pytest.raises(SystemExit):
        main([*command, "--print_config"])
    config = capsys.readouterr().out
    assert f"\npreset: {preset}\n" in config
    assert f"\nrows:\n  train: {rows}\n" in config


def test_dashes_and_underscores_in_flags_are_alike() -> None:
    assert normalise(["--data_dir", "a_b", "--train.max-length=3", "--print_config", "-o"]) == [
        "--data-dir", "a_b", "--train.max_length=3", "--print_config", "-o"
    ]  # fmt: skip
