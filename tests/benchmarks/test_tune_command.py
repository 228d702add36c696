"""`osrm merge --tune.*`: values chosen on validation rows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import merge_record

from benchmarks.cli import main
from benchmarks.search import Objective, Trial, Values
from benchmarks.trial_log import search_key
from merge_algorithms import Adapter

Run = Callable[..., str]
TASKS = ("half", "size", "same")


def test_the_grid_chooses_what_eval_confirms(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    """Every coefficient merged, saved and evaluated by hand gives the same scores and choice."""
    grid = [0.0, 1.0, 2.5]
    search = ["--tune.suite", toy_suite, "--tune.test", "--tune.coefficients", *grid]
    said = osrm("merge", *inputs, *search, "-o", tmp_path / "m")
    assert "best of 3 trials" in said
    assert len(re.findall(r"(validation|test) mean of the headline metrics: \d", said)) == 2
    means, by_split = {}, {}
    for scale in grid:
        osrm("merge", *inputs, "--scale", scale, "-o", tmp_path / f"{scale}")
        for split in ("validation", "test"):
            file = tmp_path / f"{scale}-{split}.json"
            command = ["eval", tmp_path / f"{scale}", "--suite", toy_suite, "--split", split]
            osrm(*command, "-o", file)
            by_split[scale, split] = json.loads(file.read_text())
        found = by_split[scale, "validation"]
        headline = [found["half"]["accuracy"], found["size"]["pearson+spearman"]]
        means[scale] = sum([*headline, found["same"]["accuracy"]]) / 3
    made = merge_record(tmp_path / "m")
    assert made["coefficient"] == max(grid, key=lambda scale: means[scale])
    assert made["evaluation"]["searched"] == {"scale": grid}
    for split, scores in made["evaluation"]["scores"].items():
        for task, metrics in by_split[made["coefficient"], split].items():
            assert scores[task] == pytest.approx(metrics, abs=1e-4)
    assert made["evaluation"]["means"]["validation"] == pytest.approx(max(means.values()), abs=1e-4)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "best of 3 trials" in card
    assert f"{made['evaluation']['means']['test']:.3f}" in card


def test_data_in_another_folder(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    """The suite's own folder is not there beside a copy of its file."""
    moved = Path(shutil.copy(toy_suite, tmp_path))
    search = ["--tune.coefficients", 0.5, 1, "--tune.test", "--tune.suite"]
    osrm("merge", *inputs, *search, toy_suite, "-o", tmp_path / "a")
    folder = ["--tune.data_dir", toy_suite.parent / "data"]
    osrm("merge", *inputs, *search, moved, *folder, "-o", tmp_path / "b")
    a, b = (merge_record(tmp_path / name)["evaluation"]["scores"] for name in "ab")
    assert a == b


def test_optuna_searches_several_values(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    parameters = "{scale: [0.2, 3], density: [0.05, 0.9], combine: [mean, sum], weights: [0, 2]}"
    search = ["--method", "ties", "--tune.suite", toy_suite, "--tune.preset", "smoke",
              "--tune.parameters", parameters, "--tune.trials", 6]  # fmt: skip
    osrm("merge", *inputs, *search, "-o", tmp_path / "a")
    osrm("merge", *inputs, *search, "-o", tmp_path / "b")
    made = merge_record(tmp_path / "a")
    assert made == merge_record(tmp_path / "b")
    assert 0.2 <= made["coefficient"] <= 3
    assert 0.05 <= made["options"]["density"] <= 0.9
    assert all(0 <= weight <= 2 for weight in made["weights"])
    assert made["evaluation"]["searched"].keys() == {"scale", "density", "combine", "weights"}
    again = ["--method", "ties", "--scale", made["coefficient"], "--weights", *made["weights"]]
    for option in ("density", "combine"):
        again += [f"--{option}", made["options"][option]]
    osrm("merge", *inputs, *again, "-o", tmp_path / "c")
    a, c = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ac")
    assert a == c


def test_what_is_given_stays_while_the_rest_is_searched(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    search = ["--tune.suite", toy_suite, "--tune.tasks", "half", "size",
              "--tune.parameters.weights", "[0.5, 1.5]", "--tune.trials", 2]  # fmt: skip
    osrm("merge", *inputs, "--scale", r"{'layer\.0': 0.5}", *search, "-o", tmp_path / "m")
    made = merge_record(tmp_path / "m")
    assert set(made["coefficient"].values()) == {0.5, 1.0}
    assert set(made["evaluation"]["scores"]["validation"]) == {"half", "size"}


def test_proposals_that_cannot_be_merged_are_counted(
    osrm: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    """DELLA's window reaches out of (0, 1) for some pairs of density and epsilon."""
    search = ["--tune.parameters", "{density: [0.05, 0.95], epsilon: [0.04, 0.5]}"]
    said = osrm("merge", *inputs, "--method", "della", "--tune.suite", toy_suite, *search,
                "--tune.trials", 8, "-o", tmp_path / "m")  # fmt: skip
    scored, void = re.search(r"best of (\d)", said), re.search(r"(\d) more could not", said)
    assert scored is not None
    assert void is not None
    assert int(scored[1]) + int(void[1]) == 8
    assert merge_record(tmp_path / "m")["evaluation"]["trials"] == int(scored[1])


def interrupted_after(trials: int, monkeypatch: pytest.MonkeyPatch) -> list[Values]:
    """Ctrl-C in the trial after these; returns what has been scored, as it goes on."""
    score, scored = Objective.__call__, []

    def call(self: Objective, values: Values, *report: Any) -> Trial:
        if len(scored) == trials:
            monkeypatch.setattr(Objective, "__call__", watched)
            raise KeyboardInterrupt
        return watched(self, values, *report)

    def watched(self: Objective, values: Values, *report: Any) -> Trial:
        trial = score(self, values, *report)
        scored.append(values)
        return trial

    monkeypatch.setattr(Objective, "__call__", call)
    return scored


@pytest.mark.parametrize(
    "search",
    [
        ["--tune.coefficients", 0.25, 0.5, 1.0, 2.0],
        ["--tune.parameters", "{scale: [0.2, 3], density: [0.05, 0.9]}", "--tune.trials", 13],
    ],
    ids=["grid", "optuna"],
)
def test_a_search_that_was_stopped_goes_on(
    osrm: Run,
    inputs: list[Path],
    toy_suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    search: list[object],
) -> None:
    """With the same trials as without the stop, each scored once."""
    command = ["merge", *inputs, "--method", "ties", "--tune.suite", toy_suite, *search]
    osrm(*command, "-o", tmp_path / "straight")
    straight = merge_record(tmp_path / "straight")
    done = len(search) - 1 if search[0] == "--tune.coefficients" else 13
    before = done - 1

    scored = interrupted_after(before, monkeypatch)
    assert main([str(word) for word in [*command, "-o", tmp_path / "m"]]) == 130
    kept = tmp_path / "m.trials.json"
    said = f"stopped; {before} finished trials are kept in {kept}, run again to continue"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    assert len(scored) == before
    printed = osrm(*command, "-o", tmp_path / "m")
    assert f"best of {done} trials" in printed
    assert len(scored) == done
    assert merge_record(tmp_path / "m") == straight
    assert not kept.exists()


def test_trials_of_another_search_are_not_taken_for_this_ones(
    osrm: Run,
    refused: Run,
    inputs: list[Path],
    toy_suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["merge", *inputs, "--tune.suite", toy_suite, "--tune.coefficients", 0.5, 1.0]
    command += ["-o", tmp_path / "m"]
    scored = interrupted_after(1, monkeypatch)
    assert main([*map(str, command)]) == 130
    osrm(*command, "--weights", 1, 2, 1)
    assert scored == [{"scale": 0.5}, {"scale": 0.5}, {"scale": 1.0}]
    other = toy_suite.with_name("f1.yaml")
    content = toy_suite.read_text().replace("[accuracy, f1]", "[f1, accuracy]")
    other.write_text(content)
    command[-1] = tmp_path / "n"
    scored = interrupted_after(1, monkeypatch)
    assert main([*map(str, command)]) == 130
    command[command.index(toy_suite)] = other
    osrm(*command)
    assert len(scored) == 3, "what counts is the first metric"
    command[-1] = tmp_path / "m"
    (tmp_path / "m.trials.json").write_text("{")
    assert "m.trials.json is not valid JSON" in refused(*command, "--overwrite")


def test_an_adapter_that_no_task_decides_for_is_refused_unless_tasks_are_named(
    osrm: Run, refused: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    command = ["merge", f"hlaf={inputs[0]}", inputs[1], "--tune.suite", toy_suite]
    command += ["--tune.coefficients", 0.5, "-o", tmp_path / "m"]
    error = refused(*command)
    assert "adapter 'hlaf' is for no task of suite" in error
    assert "did you mean 'half'?" in error
    assert "name the tasks to score with --tune.tasks" in error
    osrm(*command, "--tune.tasks", "size")
    assert set(merge_record(tmp_path / "m")["evaluation"]["scores"]["validation"]) == {"size"}


def test_of_a_merge_the_tasks_that_the_suite_has_decide(
    osrm: Run, refused: Run, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    """A merge has several heads, of which a suite may have some."""
    osrm("merge", f"hlaf={inputs[0]}", inputs[1], "-o", tmp_path / "two")
    osrm("eval", tmp_path / "two", "--suite", toy_suite, "-o", tmp_path / "scores.json")
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"size"}
    error = refused("eval", tmp_path / "two", "--suite", "embedded")
    assert (
        "adapter 'two' is for no task of suite 'embedded', its heads being for hlaf, size" in error
    )


def test_a_merge_that_could_not_be_written_is_refused_before_the_search(
    refused: Run,
    inputs: list[Path],
    toy_suite: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = interrupted_after(0, monkeypatch)
    search = ["--tune.suite", toy_suite, "-o", tmp_path / "m"]
    assert "has task heads" in refused("merge", *inputs, *search, "--format", "diffusers")
    assert "cannot be a file name" in refused("merge", f"a,b={inputs[0]}", *search)
    base = shutil.copytree(tiny_model("bert"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["MyOwnModel"]}
    (base / "config.json").write_text(json.dumps(config))
    Adapter.load(inputs[0]).on_base(str(base)).save(tmp_path / "half")
    said = refused("merge", tmp_path / "half", *search, "--checkpoint", tmp_path / "c")
    assert "names the model class 'MyOwnModel'" in said
    assert {path.name for path in tmp_path.iterdir()} == {"base", "half"}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").touch()
    again = [*search, "--overwrite"]
    assert "is not an adapter directory" in refused("merge", *inputs, *again)
    assert "is not an EMR bundle" in refused("merge", *inputs, *again, "--method", "emr")
    assert not scored
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["thesis.tex"]


def test_what_a_search_is_known_by(trained: Path) -> None:
    """Everything that a score depends on, but the values."""
    adapters = [Adapter.load(trained / task) for task in TASKS]
    numbers = {"half": {"m": torch.arange(3.0)}}
    scales = [{"query": 0.8, "layer.0": 0.5}, {"layer.0": 0.5, "query": 0.8}]
    assert len({search_key(adapters, None, fixed={"scale": scale}) for scale in scales}) == 2
    key = search_key(adapters, numbers, method="ties", fixed={"density": 0.3})
    assert key == search_key(adapters, numbers, fixed={"density": 0.3}, method="ties")
    others = [
        search_key(adapters[:2], numbers, method="ties", fixed={"density": 0.3}),
        search_key(adapters, None, method="ties", fixed={"density": 0.3}),
        search_key(adapters, numbers, method="ties", fixed={"density": 0.31}),
        search_key(adapters, {"half": {"m": torch.arange(3.0) + 1}}, method="ties",
                   fixed={"density": 0.3}),
    ]  # fmt: skip
    (head,) = adapters[0].heads.values()
    next(iter(head.values())).view(-1)[0] += 1
    others.append(search_key(adapters, numbers, method="ties", fixed={"density": 0.3}))
    next(iter(adapters[1].updates.values())).a[0, 0] += 1
    others.append(search_key(adapters, numbers, method="ties", fixed={"density": 0.3}))
    assert len({key, *others}) == 1 + len(others)
