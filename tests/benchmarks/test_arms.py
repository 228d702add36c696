"""Arms files: what they say, what they refuse, and a bench of several arms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.arms import ArmSettings, arms_of_inits, load_arms, save_arms
from benchmarks.cli import main
from benchmarks.predictions import load_predictions
from benchmarks.results import Results
from benchmarks.suites import load_suite
from merge_algorithms import Adapter
from trainers.backbone import load_tokenizer
from trainers.data import TaskData
from trainers.jobs import effective
from trainers.settings import AdapterSettings, SubspaceSettings

ARMS = """
arms:
  plain: {}
  same: {subspace: {init: lora}}
  penalised: {subspace: {leak_penalty: 30}}
  wide: {adapter: {rank: 8, alpha: 16}, train: {learning_rate: 1e-3}, subspace: {init: osrm}}
  short: {train: {max_length: 16}}
  together: {joint: true}
"""
SEPARATE = ["plain", "same", "penalised", "wide", "short"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path) -> Path:
    folder = tmp_path_factory.mktemp("arms")
    (folder / "arms.yaml").write_text(ARMS, encoding="utf-8")
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(folder)]
    command += ["--arms", str(folder / "arms.yaml"), "--merges", "task_arithmetic"]
    assert main(command) == 0
    return folder / "toy-smoke"


def test_every_arm_is_trained_as_it_says(run_dir: Path) -> None:
    results = Results.load(run_dir)
    assert results.arm_names() == [*SEPARATE, "together"]
    for arm in results.arms[:-1]:
        info = json.loads((run_dir / arm.adapters["half"] / "osrm.json").read_text())
        adapter = Adapter.load(run_dir / arm.adapters["half"])
        rank = {"wide": 8}.get(arm.name, 4)
        assert {len(update.a) for update in adapter.updates.values()} == {rank}
        assert info["train"]["learning_rate"] == {"wide": 1e-3}.get(arm.name, 3e-3)
        assert info["train"]["max_length"] == {"short": 16}.get(arm.name, 24)
        assert info["subspace"]["leak_penalty"] == {"penalised": 30}.get(arm.name, 0)
        assert arm.init == {"wide": "osrm"}.get(arm.name, "lora")


def test_arms_with_the_same_training_share_their_adapters(run_dir: Path) -> None:
    plain, same, *others, _ = Results.load(run_dir).arms
    assert plain.adapters == same.adapters
    for arm in others:
        assert not set(arm.adapters.values()) & set(plain.adapters.values())
    assert len(list((run_dir / "covariances").iterdir())) == 6, "of two lengths"


def test_the_report_shows_every_arm(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "arms.wide.adapter.rank" in page
    for name in (*SEPARATE, "together"):
        assert f">{name}</th>" in page
    for side in ("penalised/task_arithmetic", "wide/individual", "together/joint"):
        assert f'<tr><th scope="row">{side}</th>' in page, "a difference from the first arm"


def test_arms_are_compared_where_they_saw_the_same_rows(
    run_dir: Path, osrm: Callable[..., str], refused: Callable[..., str]
) -> None:
    text = osrm("compare", run_dir, "--resamples", 200)
    for name in ("same", "penalised", "wide", "together"):
        assert f"\n{name} /" in text
    assert "\nshort" not in text
    assert "+0.000" in next(line for line in text.splitlines() if line.startswith("same "))
    message = refused("compare", run_dir, "short/task_arithmetic")
    assert "not scored on the same test rows" in message


def test_the_joint_adapter_is_scored_like_a_merge(run_dir: Path) -> None:
    results = Results.load(run_dir)
    joint = results.arms[-1]
    (info,) = joint.merges
    assert (info.method, info.coefficient) == ("joint", 1.0)
    assert info.path is not None
    assert set(Adapter.load(run_dir / info.path).heads) == {"half", "size", "same"}
    rows = [row for row in results.scores if row.arm == "together"]
    assert {row.merge for row in rows} == {"joint"}
    assert {row.split for row in rows} == {"validation", "test"}
    assert results.score("together", "joint", "average").n == 1
    assert results.best_merge("together") == "joint"
    assert "joint" not in {row.merge for row in results.scores if row.arm != "together"}


def test_test_predictions_give_the_test_scores(run_dir: Path, toy_suite: Path) -> None:
    results = Results.load(run_dir)
    suite = load_suite(str(toy_suite))
    tokenizer = load_tokenizer(Path(suite.model))
    for arm in results.arms[:-1]:
        assert arm.predictions is not None
        (info,) = arm.merges
        assert info.predictions is not None
        for file, merge, setting, coefficient in (
            (arm.predictions, "individual", "chosen", 1.0),
            (info.predictions, info.method, "chosen", info.coefficient),
            (info.predictions, info.method, "untuned", 1.0),
        ):
            predictions = load_predictions(run_dir / file, setting)
            assert list(predictions) == ["half", "size", "same"]
            accuracy = (predictions["half"].labels == predictions["half"].values).mean()
            (score,) = (
                row.score
                for row in results.scores
                if (row.arm, row.merge, row.task, row.split, row.metric, row.coefficient)
                == (arm.name, merge, "half", "test", "accuracy", coefficient)
            )
            assert accuracy == pytest.approx(score)
            train = replace(suite.train, max_length={"short": 16}.get(arm.name, 24))
            for name, task in suite.tasks.items():
                data = TaskData(task, tokenizer, train, suite.rows)
                assert predictions[name].groups.tolist() == data.groups("test")


def test_the_progress_bar_counts_shared_stages_once(
    run_dir: Path, toy_suite: Path, stages: Callable[[], list[str]]
) -> None:
    command = ["bench", "--suite", str(toy_suite), "--runs-dir", str(run_dir.parent)]
    command += ["--arms", str(run_dir.parent / "arms.yaml"), "--merges", "task_arithmetic"]
    assert main(command) == 0
    lines = stages()
    assert lines[-1].startswith(f"[{len(lines)}/{len(lines)}]")
    assert all("(reused)" in line for line in lines)


def test_a_saved_file_is_read_back(toy_suite: Path, tmp_path: Path) -> None:
    suite = load_suite(str(toy_suite))
    subspace = SubspaceSettings("contrastive", "project", k=8, scale="matched", leak_penalty=3.0)
    arms = [
        *arms_of_inits(["lora", "osrm"], SubspaceSettings(), suite),
        ArmSettings(
            "contrastive0.05+project8",
            replace(suite.adapter, rank=8, alpha=16.0),
            replace(suite.train, learning_rate=0.5e-3),
            subspace,
        ),
        replace(arms_of_inits(["lora"], SubspaceSettings(), suite)[0], name="all", joint=True),
    ]
    save_arms(tmp_path / "arms.yaml", arms, suite)
    loaded = load_arms(tmp_path / "arms.yaml", suite)
    assert [arm.name for arm in loaded] == [arm.name for arm in arms]
    assert [arm.joint for arm in loaded] == [False, False, False, True]
    for saved, arm in zip(arms, loaded, strict=True):
        assert (arm.adapter, arm.train) == (saved.adapter, saved.train)
        assert effective(arm.subspace) == effective(saved.subspace)


def test_a_saved_file_means_the_same_with_other_flags(toy_suite: Path, tmp_path: Path) -> None:
    suite = load_suite(str(toy_suite))
    (arm,) = arms_of_inits(["osrm"], SubspaceSettings(), suite)
    save_arms(tmp_path / "arms.yaml", [arm], suite)
    flags = replace(
        suite,
        adapter=AdapterSettings(rank=2, alpha=1, targets=["outputs"], rslora=True),
        train=replace(suite.train, learning_rate=1e-5, epochs=9),
    )
    (loaded,) = load_arms(tmp_path / "arms.yaml", flags)
    assert loaded.adapter == arm.adapter
    assert loaded.train == replace(flags.train, learning_rate=arm.train.learning_rate)


def test_inits_are_the_short_form(toy_suite: Path) -> None:
    suite = load_suite(str(toy_suite))
    given = SubspaceSettings(constraint="freeze", leak_penalty=3.0)
    lora, contrastive = arms_of_inits(["lora", "contrastive"], given, suite)
    assert (lora.name, lora.subspace) == ("lora", SubspaceSettings("lora"))
    assert contrastive.subspace == replace(given, init="contrastive")
    assert (lora.adapter, lora.train) == (suite.adapter, suite.train)


def test_a_bench_filters_what_b_writes_behind_a_filter(toy_suite: Path, tmp_path: Path) -> None:
    suite = load_suite(str(toy_suite))
    path = tmp_path / "arms.yaml"
    path.write_text(
        "arms:\n  both: {subspace: {init: wiener}}\n"
        "  one: {subspace: {init: wiener, output_mu: 0}}\n  plain: {}\n",
        encoding="utf-8",
    )

    def strictness(arms: list[ArmSettings]) -> dict[str, float]:
        return {arm.name: arm.subspace.nu for arm in arms}

    arms = load_arms(path, suite)
    assert strictness(arms) == {"both": 0.15, "one": 0, "plain": 0}
    save_arms(path, arms, suite)
    assert strictness(load_arms(path, suite)) == strictness(arms)
    given = SubspaceSettings()
    assert strictness(arms_of_inits(["lora", "osrm", "wiener"], given, suite)) == {
        "lora": 0,
        "osrm": 0,
        "wiener": 0.15,
    }
    save_arms(path, arms_of_inits(["wiener"], replace(given, output_mu=0), suite), suite)
    assert strictness(load_arms(path, suite)) == {"wiener": 0}, "said, as it is not the default"
    path.write_text("arms: {wiener: {subspace: {init: wiener}}}\n", encoding="utf-8")
    language = load_suite("qa")
    assert strictness(load_arms(path, language)) == {"wiener": 0}
    assert strictness(arms_of_inits(["wiener"], given, language)) == {"wiener": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no arms"),
        ("arms: {}\n", "has no arms"),
        ("arms: [lora]\n", "expected a mapping"),
        ("arms: {a: }\n", "None at 'arms.a': expected a mapping"),
        ("arms: {a: {subspce: {}}}\n", "unknown key 'arms.a.subspce': did you mean 'subspace'"),
        ("arms: {a: {subspace: {init: osmr}}}\n", "did you mean 'osrm'"),
        ("arms: {a: {adapter: {rank: big}}}\n", "'big' at 'arms.a.adapter.rank'"),
        (
            "arms: {a: {subspace: {k: 8}}}\n",
            "arm 'a' a subspace.k, which has no effect with init 'lora'",
        ),
        ("arms: {a: {subspace: {k: 48}}}\n", "arm 'a' a subspace.k, which has no effect"),
        ("arms: {a: {subspace: {init: wiener, energy: 0.1}}}\n", "a subspace.energy, which has no"),
        (f"arms: {'many ' * 999}\n", "many ma...any many"),
        ("arms: {a/b: {}}\n", "calls an arm 'a/b'"),
        (
            "arms: {a: {joint: true, subspace: {leak_penalty: 3}}}\n",
            "arm 'a' a subspace, but joint",
        ),
        ("arms: {a: {adapter: {rank: 400}}}\n", "rank 400 is larger than 32"),
        (
            "arms: {a: {subspace: {init: osrm, constraint: project, k: 2}}}\n",
            "k 2 is not between the rank 4",
        ),
        ("arms: {a: {}, b: {train: {epochs: 0}}}\n", "train.epochs is 0: use at least 1"),
        ("arms: {a: {}, b: {train: {warmup: 5}}}\n", "train.warmup is 5.0"),
        ("arms: {a: {}, b: {subspace: {leak_penalty: -1}}}\n", "gamma is -1.0: give at least 0"),
        (
            "arms: {a: {}, b: {subspace: {init: osrm, weights: {sise: 2}}}}\n",
            "a weight for 'sise', which is no task; did you mean 'size'",
        ),
        (
            "arms: {a: {}, b: {subspace: {init: osrm, weights: {half: -1}}}}\n",
            "the weight of task 'half' is -1.0: give a number of at least 0",
        ),
        (
            "arms: {a: {}, b: {subspace: {init: osrm, weights: {half: 0, size: 0}}}}\n",
            "the weights of all tasks other than 'same' are 0",
        ),
        (
            "arms: {a: {}, b: {subspace: {init: osrm, constraint: project, energy: 1.5}}}\n",
            "the energy budget is 1.5: give a share between 0 and 1",
        ),
        (
            "arms: {a: {}, b: {subspace: {init: contrastive, rho: 0}}}\n",
            "rho is 0.0: give a number above 0",
        ),
        ("arms: {\n", "cannot be read as YAML"),
        (
            "arms:\n  a: {subspace: {init: osrm}}\n  b: {}\n  a: {}\n",
            "arms.yaml has key 'a' a second time in line 4: keep one",
        ),
    ],
)
def test_a_bad_file_is_refused(
    text: str, message: str, toy_suite: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "arms.yaml").write_text(text, encoding="utf-8")
    found = refused(
        "bench", "--suite", toy_suite, "--runs-dir", tmp_path, "--arms", tmp_path / "arms.yaml"
    )
    assert message in found
    assert not (tmp_path / "toy-smoke").exists()


def test_arms_and_inits_exclude_each_other(
    toy_suite: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "arms.yaml").write_text("arms: {a: {}}\n", encoding="utf-8")
    command = ["bench", "--suite", toy_suite, "--arms", tmp_path / "arms.yaml"]
    assert "leave out --inits" in refused(*command, "--inits", "lora")
    assert "leave out --inits" in refused(*command, "--subspace.k", "12")
    assert "gone.yaml cannot be read" in refused(
        "bench", "--suite", toy_suite, "--arms", tmp_path / "gone.yaml"
    )


def test_what_has_no_effect_on_any_arm_is_refused(
    toy_suite: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    command = ["bench", "--suite", toy_suite, "--runs-dir", tmp_path, "--inits"]
    said = refused(*command, "lora", "wiener", "--subspace.constraint", "init", "--subspace.k", 12)
    assert "--subspace.k has no effect with --inits lora wiener" in said
    said = refused(*command, "lora", "--subspace.leak_penalty", 30)
    assert "--subspace.leak_penalty has no effect with --inits lora" in said
    assert list(tmp_path.iterdir()) == []
