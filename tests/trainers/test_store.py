"""Stages: built once, shared by processes that build the same at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_algorithms import UserError
from trainers.settings import SubspaceSettings, effective, rows_settings
from trainers.store import FORMATS, Report, Store

INPUTS = {"a": 1}


def write(text: str, directory: Path) -> None:
    (directory / "text").write_text(text, encoding="utf-8")


def test_a_finished_stage_is_not_built_again(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(directory: Path, report: Report) -> None:
        built.append(directory)
        write("once", directory)

    for store in (Store(tmp_path), Store(tmp_path)):
        path = store.run("kind", "label", INPUTS, build)
        assert (path / "text").read_text() == "once"
    assert len(built) == 1
    assert Store(tmp_path).run("kind", "label", {"a": 2}, build) != path


def test_a_stage_of_earlier_code_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> list[Path]:
        return [
            Store(tmp_path).run(kind, "label", INPUTS, lambda path, report: write("x", path))
            for kind in ("a", "b")
        ]

    first, other = keys()
    monkeypatch.setitem(FORMATS, "a", FORMATS.get("a", 1) + 1)
    again, same = keys()
    assert again != first
    assert same == other


def test_of_two_that_build_the_same_the_first_to_finish_wins(tmp_path: Path) -> None:
    def slow(directory: Path, report: Report) -> None:
        sibling = Store(tmp_path)
        sibling.run("kind", "label", INPUTS, lambda path, report: write("first", path))
        write("second", directory)

    path = Store(tmp_path).run("kind", "label", INPUTS, slow)
    assert (path / "text").read_text() == "first"
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize("error", [OSError("disk full"), UserError("no such task")])
def test_a_stage_that_fails_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    def fail(directory: Path, report: Report) -> None:
        write("half", directory)
        raise error

    with pytest.raises(type(error), match=str(error)):
        Store(tmp_path).run("kind", "label", INPUTS, fail)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_only_settings_that_have_an_effect_decide() -> None:
    plain = SubspaceSettings("lora", k=12, rho=0.3, weights={"a": 2.0})
    assert effective(plain) == effective(SubspaceSettings("lora"))
    assert effective(SubspaceSettings("osrm", rho=0.3)) == effective(SubspaceSettings("osrm"))
    assert "k" not in effective(SubspaceSettings("osrm", "project", energy=0.1))
    assert effective(SubspaceSettings("osrm", "project", k=12))["k"] == 12
    assert effective(SubspaceSettings("osrm", weights={"a": 2.0}))["weights"] == {"a": 2.0}
    wiener = SubspaceSettings("wiener", k=12, scale="matched", rho=0.2)
    same = SubspaceSettings("wiener", "filter", rho=0.2, leak_penalty=30.0)
    assert effective(wiener) == effective(same)
    assert effective(wiener) != effective(SubspaceSettings("wiener"))
    frozen = SubspaceSettings("osrm", "freeze", leak_penalty=3.0)
    assert rows_settings(frozen) == rows_settings(SubspaceSettings("osrm"))


def test_what_killed_processes_left_over_goes(tmp_path: Path) -> None:
    (tmp_path / "adapters" / ".half.x1.tmp" / "logs").mkdir(parents=True)
    (tmp_path / ".study.csv.x2.tmp").touch()
    with Store(tmp_path).lock():
        assert list(tmp_path.rglob("*.tmp")) == []
