"""`osrm merge` grown up: statistics, coefficients, checkpoints, and the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from files import merge_record
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModel

from benchmarks.cli import main
from merge_algorithms import Adapter, merge
from osrm import Covariance, Fisher

Run = Callable[..., str]
TASKS = ("half", "size", "same")


def assert_same(path: Path, expected: Any) -> None:
    """An adapter on disk holds the updates of a merge that keeps its rank."""
    found = Adapter.load(path).updates
    assert found.keys() == expected.updates.keys()
    for module, update in expected.updates.items():
        torch.testing.assert_close(found[module].dense(), update.dense(), rtol=1e-4, atol=1e-7)


# Statistics


def test_regmean_reads_covariance_files(
    osrm: Run, trained: Path, inputs: list[Path], tmp_path: Path
) -> None:
    files = [trained / f"{task}.safetensors" for task in ("same", "half", "size")]
    osrm("merge", *inputs, "--method", "regmean", "--covariances", *files, "-o", tmp_path / "m")
    statistics = {t: Covariance.load(trained / f"{t}.safetensors").by_module() for t in TASKS}
    expected = merge([Adapter.load(p) for p in inputs], "regmean", statistics=statistics)
    assert_same(tmp_path / "m", expected)


def test_a_file_can_be_given_to_an_adapter_by_name(
    osrm: Run, trained: Path, inputs: list[Path], tmp_path: Path
) -> None:
    """The tasks' own files, under other names: only NAME=PATH can tell."""
    named = [f"n{i}={path}" for i, path in enumerate(inputs)]
    files = [f"n{i}={trained}/{task}.safetensors" for i, task in enumerate(TASKS)]
    osrm("merge", *named, "--method", "regmean", "--covariances", *files, "-o", tmp_path / "a")
    files = [trained / f"{task}.safetensors" for task in TASKS]
    osrm("merge", *inputs, "--method", "regmean", "--covariances", *files, "-o", tmp_path / "b")
    assert_same(tmp_path / "a", Adapter.load(tmp_path / "b"))
    assert merge_record(tmp_path / "a")["adapters"] == ["n0", "n1", "n2"]


def test_fisher_reads_fisher_files(
    osrm: Run, refused: Run, inputs: list[Path], tmp_path: Path
) -> None:
    statistics: dict[str, dict[str, torch.Tensor]] = {}
    adapters = [Adapter.load(path) for path in inputs]
    numbers = torch.Generator().manual_seed(0)
    for adapter in adapters:
        statistics[adapter.name] = {
            module: torch.rand(update.shape, generator=numbers)
            for module, update in adapter.updates.items()
        }
        fisher = Fisher(statistics[adapter.name], 8, {"task": adapter.name})
        fisher.save(tmp_path / f"{adapter.name}.fisher")
    files = [tmp_path / f"{adapter.name}.fisher" for adapter in adapters]
    command = ["merge", *inputs, "--method", "fisher", "--rank", 32, "-o", tmp_path / "m"]
    assert "needs the fisher of every adapter's data" in refused(*command)
    osrm(*command, "--fishers", *files)
    expected = merge(adapters, "fisher", statistics=statistics)
    expected.save_adapter(tmp_path / "expected", rank=32)
    assert_same(tmp_path / "m", Adapter.load(tmp_path / "expected"))


def test_eval_merges_with_statistics_as_merge_does(
    osrm: Run, trained: Path, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    files = ["--covariances", *(trained / f"{task}.safetensors" for task in TASKS)]
    weights = ["--weights", 1, 2, 0.5]
    osrm("merge", *inputs, "--method", "regmean", *files, *weights, "-o", tmp_path / "m")
    osrm("eval", tmp_path / "m", "--suite", toy_suite, "-o", tmp_path / "a.json")
    on_the_fly = ["--merge", "regmean", *files, *weights]
    osrm("eval", *inputs, "--suite", toy_suite, *on_the_fly, "-o", tmp_path / "b.json")
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for task in a:
        assert a[task] == pytest.approx(b[task], abs=1e-4)


# Coefficients


@pytest.mark.parametrize(
    "typed",
    [
        r'{"layer\.0\.": 0.5, "query$": 2}',
        r"{'layer\.0\.': 0.5, 'query$': 2}",
        r'{layer\.0\.: 0.5, "query$": 2}',
    ],
)
def test_a_coefficient_for_each_module(
    osrm: Run, inputs: list[Path], tmp_path: Path, typed: str
) -> None:
    osrm("merge", *inputs, "--scale", typed, "-o", tmp_path / "m")
    whole = merge([Adapter.load(path) for path in inputs])
    for module, update in Adapter.load(tmp_path / "m").updates.items():
        factor = 0.5 if "layer.0." in module else 2 if module.endswith("query") else 1
        expected = factor * whole.updates[module].dense()
        torch.testing.assert_close(update.dense(), expected, rtol=1e-5, atol=1e-8)
    assert set(merge_record(tmp_path / "m")["coefficient"].values()) == {0.5, 2.0, 1.0}


def test_everything_can_stand_in_a_file(osrm: Run, inputs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    content = {
        "adapters": list(map(str, inputs)),
        "method": "ties",
        "density": 0.3,
        "weights": [1.0, 0.5, 1.0],
        "scale": {r"layer\.1": 0.25},
        "output": str(tmp_path / "a"),
    }
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    osrm("merge", "--config", file)
    osrm("merge", *inputs, "--method", "ties", "--density", 0.3, "--weights", 1, 0.5, 1,
         "--scale", r"{'layer\.1': 0.25}", "-o", tmp_path / "b")  # fmt: skip
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_the_seed_of_random_masks(osrm: Run, inputs: list[Path], tmp_path: Path) -> None:
    adapters = [Adapter.load(path) for path in inputs]
    masked = ["--method", "mc_dropout", "--rank", 32]  # all that there are: nothing is truncated
    for seed in (0, 5):
        osrm("merge", *inputs, *masked, "--seed", seed, "-o", tmp_path / f"{seed}")
        merge(adapters, "mc_dropout", seed=seed).save_adapter(tmp_path / f"own{seed}", rank=32)
        assert_same(tmp_path / f"{seed}", Adapter.load(tmp_path / f"own{seed}"))
    first, other = (Adapter.load(tmp_path / f"{seed}").updates for seed in (0, 5))
    assert not any(torch.allclose(u.dense(), other[m].dense()) for m, u in first.items())


# Checkpoints and cards


def test_a_checkpoint_is_the_base_with_the_merge_in_it(
    osrm: Run,
    refused: Run,
    inputs: list[Path],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    both = ["--checkpoint", tmp_path / "model", "-o", tmp_path / "adapter"]
    said = osrm("merge", *inputs, "--method", "average", *both)
    assert said.count("average of half, size, same") == 2
    found = AutoModel.from_pretrained(tmp_path / "model").state_dict()
    base = AutoModel.from_pretrained(tiny_model("bert"))
    merge([Adapter.load(path) for path in inputs], "average").apply_to(base)
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(found[name], tensor)
    for path, relation in ((tmp_path / "model", "transformers"), (tmp_path / "adapter", "peft")):
        assert f"library_name: {relation}\n" in (path / "README.md").read_text()
    assert "already exists" in refused("merge", *inputs, "--checkpoint", tmp_path / "model")
    other = ["--checkpoint", tmp_path / "x", "--base", tiny_model("roberta")]
    assert "fingerprint" in refused("merge", *inputs, *other)
    shutil.copytree(inputs[0], tmp_path / "plain")
    (tmp_path / "plain" / "osrm.json").unlink()
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None})
    )
    assert "--base" in refused("merge", tmp_path / "plain", "--checkpoint", tmp_path / "x")
    osrm("merge", tmp_path / "plain", "--base", tiny_model("bert"), "--checkpoint", tmp_path / "x")


# The Hub


class FakeHub:
    """Stands in for huggingface_hub.HfApi and keeps what it is told."""

    calls: list[tuple[Any, ...]]
    stored: set[str]
    failure: Exception | None

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        if self.failure is not None:
            raise self.failure
        self.calls.append(("create", repo_id, private))
        return f"https://hub/{repo_id}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, files))
        self.stored.difference_update(
            filter_repo_objects(list(self.stored), allow_patterns=delete_patterns)
        )
        self.stored.update(files_in(folder_path))


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.calls, FakeHub.stored, FakeHub.failure = [], set(), None
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


def test_push_uploads_what_was_written(
    osrm: Run, hub: type[FakeHub], inputs: list[Path], tmp_path: Path
) -> None:
    said = osrm("merge", *inputs, "-o", tmp_path / "m", "--push-to-hub", "team/merged", "--private")
    assert "https://hub/team/merged" in said
    files = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert {"README.md", "adapter_config.json", "heads", "osrm.json"} < set(files)
    assert hub.calls == [("create", "team/merged", True), ("upload", "team/merged", files)]
    osrm("merge", *inputs, "--checkpoint", tmp_path / "c", "--push-to-hub", "team/model")
    assert hub.calls[2] == ("create", "team/model", None)
    assert "model.safetensors" in hub.calls[3][2]


def test_a_push_takes_the_place_of_an_earlier_one(
    osrm: Run, hub: type[FakeHub], inputs: list[Path], tmp_path: Path
) -> None:
    """An old adapter would be loaded on top of a checkpoint, an old head with the new merge."""
    hub.stored = {"LICENSE", "plots/scores.png"}
    push = ["--push-to-hub", "team/merged"]
    outputs = {
        "three": [*inputs, "-o"],
        "two": [*inputs[:2], "-o"],
        "one": [*inputs, "--head", "size", "-o"],
        "model": [*inputs, "--checkpoint"],
        "bundle": [*inputs, "--method", "emr", "-o"],
        "again": [*inputs, "-o"],
    }
    for name, arguments in outputs.items():
        osrm("merge", *arguments, tmp_path / name, *push)
        assert hub.stored == files_in(tmp_path / name) | {"LICENSE", "plots/scores.png"}, name


def test_a_failed_push_leaves_the_merge(
    refused: Run, hub: type[FakeHub], inputs: list[Path], tmp_path: Path
) -> None:
    hub.failure = LocalTokenNotFoundError("Token is required")
    command = ["merge", *inputs, "-o", tmp_path / "m", "--push-to-hub", "team/merged"]
    said = refused(*command)
    for part in ("is written", "Token is required", "hf auth login", "hf upload team/merged"):
        assert part in said
    assert "--private" not in said
    said = refused(*command, "--private", "--overwrite")
    assert f"`hf upload team/merged {tmp_path / 'm'} --delete 'adapter_*' --delete " in said
    assert said.endswith(" --private`")
    assert set(Adapter.load(tmp_path / "m").heads) == set(TASKS)


def test_an_unreachable_hub_is_one_sentence(
    refused: Run, inputs: list[Path], tmp_path: Path
) -> None:
    """The real client, which the tests keep offline."""
    said = refused("merge", *inputs, "-o", tmp_path / "m", "--push-to-hub", "team/merged")
    assert "uploading it to team/merged failed" in said
    assert (tmp_path / "m" / "README.md").exists()


def test_bad_merges(
    refused: Run, trained: Path, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    out = ["-o", tmp_path / "out"]
    tune = ["--method", "ties", "--tune.suite", toy_suite]
    half = trained / "half.safetensors"
    cases = {
        (): "give -o DIR, --checkpoint DIR, or both",
        ("--checkpoint", tmp_path / "out", *out): "give two directories",
        ("--checkpoint", tmp_path / "out", "--rank", 3): "--rank is about the merged adapter",
        (*out, "--rank", 0): "at least 1",
        (*out, "--head", "siez"): "did you mean 'size'",
        (*out, "--scale", "much"): "expected a number, or a mapping",
        (*out, "--scale", "nan"): "expected a number, or a mapping",
        (*out, "--scale", "{qeury: 2}"): "fits no module",
        (*out, "--scale", "{'(': 2}"): "not a regular expression",
        (*out, "--covariances", half): "reads no covariance: leave out --covariances",
        (*out, "--method", "regmean"): "`osrm covariance` collects",
        (*out, "--method", "regmean", "--covariances", half): "of adapter 'size'",
        (*out, "--method", "regmean", "--covariances", half, half): "a second covariance of 'half'",
        (*out, "--method", "regmean", "--covariances", "x.safetensors"): "does not exist",
        (*out, "--method", "regmean", "--fishers", half): "reads no fisher",
        (*out, "--method", "fisher", "--fishers", half): "not a fisher file",
        (*out, "--method", "mc_dropout_"): "did you mean 'mc_dropout'",
        (*out, "--method", "direct"): "osrm eval --merge direct",
        (*out, "--method", "emr", "--rank", 3): "--rank is about one model",
        (*out, "--method", "emr", "--head", "half"): "--head is about one model",
        (*out, "--method", "emr", "--format", "diffusers"): "--format is about one model",
        ("--checkpoint", tmp_path / "c", "--method", "emr"): "--checkpoint is about one model",
        (*out, "--method", "emr", "--task", "hlaf"): "did you mean 'half'",
        (*out, "--method", "emr", "--density", 0.5): "has no option 'density'",
        (*out, "--method", "average", "--task", "half"): "'average' has no options: leave out",
        (*out, "--private"): "--push-to-hub",
        ("--checkpoint", tmp_path / "c", "--format", "diffusers"): "--format is about",
        ("--checkpoint", tmp_path / "c", *out, "--format", "diffusers"): "has task heads",
        (*out, "--tune.trials", 5): "--tune.suite",
        (*out, *tune, "--tune.trials", 5): "say what to search with --tune.parameters",
        (*out, "--method", "mc_dropout", "--drop-rates", 0.5): "one per adapter",
        (*out, "--weights", 0.7): "multiply the whole merge by --scale 0.7",
        (*out, "--push-to-hub", "alone"): "ORGANISATION/NAME",
        (*out, "--push-to-hub", "a/b c"): "ORGANISATION/NAME",
        (*out, "--checkpoint", tmp_path / "c", "--push-to-hub", "a/b"): "one directory",
        (*out, "--tune.coefficients", 1, 2): "--tune.suite",
        (*out, "--tune.suite", "embeded"): "did you mean 'embedded'",
        (*out, *tune, "--scale", 2): "--scale is given",
        (*out, *tune, "--density", 0.5, "--tune.parameters.density", "[0.1, 0.9]"):
            "--density is given",
        (*out, *tune, "--tune.coefficients", 1, "--tune.parameters.scale", "[0, 1]"):
            "give one of them",
        (*out, *tune, "--tune.parameters.densty", "[0.1, 0.9]"): "did you mean 'density'",
        (*out, *tune, "--tune.parameters.density", "[0.9, 0.1]"): "lowest and its highest",
        (*out, *tune, "--seed", -1): "--seed is -1: a search needs one of at least 0",
        (*out, *tune, "--tune.parameters.density", "0.9"): "expected a list",
        (*out, *tune, "--tune.parameters.scale", "[0, 1]", "--tune.trials", 0): "at least 1",
        (*out, *tune, "--tune.tasks", "hlaf"): "did you mean 'half'",
        (*out, "--tune.suite", "embedded"): "is for no task of suite",
    }  # fmt: skip
    for arguments, expected in cases.items():
        assert expected in refused("merge", *inputs, *arguments), arguments
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "c").exists()


def test_only_a_head_that_is_written_needs_a_name_for_its_file(
    osrm: Run, refused: Run, inputs: list[Path], tmp_path: Path
) -> None:
    merging = ["merge", f"a,b={inputs[0]}", inputs[1]]
    one = ["--head", "size", "-o", tmp_path / "m"]
    said = refused(*merging, *one, "--checkpoint", tmp_path / "c")
    assert "head 'a,b' cannot be a file name" in said
    assert not list(tmp_path.iterdir())
    osrm(*merging, *one)
    assert list(Adapter.load(tmp_path / "m").heads) == ["size"]


def test_nothing_that_is_read_or_written_is_replaced_with_an_output(
    osrm: Run,
    refused: Run,
    inputs: list[Path],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a Trainer's directory, an adapter itself with those of earlier steps inside."""
    outer = tmp_path / "outer"
    shutil.copytree(inputs[0], outer)
    for name, source in zip(("first", "second"), inputs, strict=False):
        shutil.copytree(source, outer / name)
    shutil.copy(trained / "half.safetensors", outer)
    before = sorted(outer.rglob("*"))
    over = ["-o", outer, "--overwrite"]
    said = refused("merge", f"a={outer / 'first'}", f"b={outer / 'second'}", *over)
    assert f"{outer / 'first'} lies inside {outer}" in said
    said = refused("merge", *inputs, *over, "--checkpoint", outer / "model")
    assert f"{outer / 'model'} lies inside {outer}" in said
    files = ["--covariances", outer / "half.safetensors", trained / "size.safetensors"]
    assert "lies inside" in refused("convert", inputs[0], *files, *over)
    assert "lies inside" in refused("train", "--task", "half", *files, *over)
    assert sorted(outer.rglob("*")) == before
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "names no directory of its own" in refused("merge", *inputs, "-o", ".")


@pytest.mark.parametrize(("base", "revision"), [("team/bert", "v1"), ("bert-base-uncased", None)])
def test_a_base_of_the_hub_is_the_one_that_adapters_record(
    osrm: Run,
    inputs: list[Path],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    revision: str | None,
) -> None:
    """A revision, and a name from before the Hub had organisations."""
    asked = []

    def fetch(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        return str(tiny_model("bert"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for path in inputs:
        copy = tmp_path / path.name
        shutil.copytree(path, copy)
        (copy / "osrm.json").unlink()
        config = json.loads((copy / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": base, "revision": revision}
        (copy / "adapter_config.json").write_text(json.dumps(config))
    copies = [tmp_path / path.name for path in inputs]
    osrm("merge", *copies, "--checkpoint", tmp_path / "full")
    assert asked == [(base, revision)]
    assert AutoModel.from_pretrained(tmp_path / "full")


def test_a_merge_is_of_its_adapters_base(
    osrm: Run, refused: Run, inputs: list[Path], tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """The model may change under the name that the merge records."""
    osrm("merge", *inputs, "-o", tmp_path / "m")
    recorded = Adapter.load(inputs[0]).base_fingerprint
    assert Adapter.load(tmp_path / "m").base_fingerprint == recorded
    other = ["--base", tiny_model("roberta"), "--checkpoint", tmp_path / "c"]
    assert f"with fingerprint {recorded}" in refused("merge", tmp_path / "m", *other)


def test_a_base_that_is_named_is_recorded(
    osrm: Run, inputs: list[Path], tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    """Also where all adapters record one; what is known of it besides stays."""
    merging = ["merge", *inputs, "--overwrite", "-o", tmp_path / "m"]
    recorded = Adapter.load(inputs[0]).base_fingerprint
    asset = "sentence-transformers/all-MiniLM-L6-v2"
    for given, expected in {"org/other": "org/other", "minilm": asset}.items():
        osrm(*merging, "--base", given)
        assert Adapter.load(tmp_path / "m").base == expected
        assert Adapter.load(tmp_path / "m").base_fingerprint == recorded
    copy = shutil.copytree(tiny_model("bert"), tmp_path / "copy")
    osrm("merge", *inputs, "--base", copy, "--checkpoint", tmp_path / "c")
    assert f"adapters of `{copy}` merged into its weights" in (tmp_path / "c/README.md").read_text()
    for path in inputs:
        config = {"base_model_name_or_path": "team/bert", "revision": "v1"}
        replace(Adapter.load(path), config=config).save(tmp_path / path.name)
    ours = [tmp_path / path.name for path in inputs]
    for given in ("team/bert", copy):  # a copy of it is where it is, not what it is called
        osrm("merge", *ours, "--base", given, "--overwrite", "-o", tmp_path / "m")
        merged = Adapter.load(tmp_path / "m")
        assert (merged.base, merged.config["revision"]) == ("team/bert", "v1")


def test_a_covariance_of_another_model_is_refused(
    refused: Run,
    inputs: list[Path],
    toy_suite: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    other = tmp_path / "other.safetensors"
    command = ["covariance", "--suite", toy_suite, "--task", "half", "-o", other]
    assert main([*map(str, command), "--model", str(tiny_model("roberta"))]) == 0
    said = refused("merge", *inputs, "--method", "regmean", "--covariances", other,
                   "-o", tmp_path / "out")  # fmt: skip
    assert re.search("was collected on .* with fingerprint", said)


def test_covariances_are_of_the_models_that_are_merged(
    osrm: Run, refused: Run, trained: Path, inputs: list[Path], toy_suite: Path, tmp_path: Path
) -> None:
    made = {"right": ("half", "half"), "wrong": ("half", "size"), "size": ("size", "size")}
    for name, (task, tuned) in made.items():
        osrm("covariance", "--suite", toy_suite, "--task", task, "--tuned", trained / tuned,
             "-o", tmp_path / f"{name}.safetensors")  # fmt: skip
    right, wrong, size = (tmp_path / f"{name}.safetensors" for name in made)
    merging = ["merge", *inputs[:2], "--method", "regmean", "-o", tmp_path / "m", "--covariances"]
    said = refused(*merging, wrong, size)
    assert "covariance of 'half' was collected with another adapter" in said
    assert "'size' without: collect all in one way" in refused(
        *merging, right, trained / "size.safetensors"
    )
    assert not (tmp_path / "m").exists()
    osrm(*merging, right, size)


def test_eval_refuses_what_it_would_not_use(
    refused: Run, inputs: list[Path], toy_suite: Path
) -> None:
    for flag in (
        ["--density", 0.5],
        ["--weights", 1, 2, 3],
        ["--coefficient", 0.5],
        ["--covariances", "half.safetensors"],
        ["--fishers", "half.safetensors"],
    ):
        assert "without --merge" in refused("eval", *inputs, "--suite", toy_suite, *flag)
