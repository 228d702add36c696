"""Files and directories appear complete or not at all, whatever interrupts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_algorithms import UserError
from merge_algorithms.files import atomic_directory, atomic_file


def interrupted(writer) -> None:
    """Write through `writer`, a context manager, and be interrupted half way."""
    with writer as path:
        (path / "x" if path.is_dir() else path).write_text("half")
        raise KeyboardInterrupt


def test_files_appear_complete_or_not_at_all(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(atomic_file(tmp_path / "f"))
    with pytest.raises(KeyboardInterrupt):
        interrupted(atomic_directory(tmp_path / "d"))
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with atomic_file(tmp_path / "f") as path:
        path.write_text("new")
    assert (tmp_path / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_directories_are_replaced_only_when_asked_and_as_a_whole(tmp_path):
    with atomic_directory(tmp_path / "d") as path:
        (path / "x").write_text("one")
    with pytest.raises(UserError, match="already exists"), atomic_directory(tmp_path / "d"):
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupted(atomic_directory(tmp_path / "d", overwrite=True))
    assert (tmp_path / "d" / "x").read_text() == "one"
    with atomic_directory(tmp_path / "d", overwrite=True) as path:
        (path / "y").write_text("two")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_directory_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("one")
    replace = Path.replace

    def fail_to_move_in(self, target):
        if target == tmp_path / "d" and (self / "y").exists():
            raise OSError("disk error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_to_move_in)

    def attempt() -> None:
        with atomic_directory(tmp_path / "d", overwrite=True) as path:
            (path / "y").write_text("two")

    with pytest.raises(OSError, match="disk error"):
        attempt()
    assert (tmp_path / "d" / "x").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("interrupted_at", ["retiring", "moving in"])
def test_an_interrupt_between_the_two_renames_loses_nothing(tmp_path, monkeypatch, interrupted_at):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("one")
    replace = Path.replace

    def replace_and_be_interrupted(self, target):
        incoming = (self / "y").exists()
        moved = replace(self, target)
        if incoming == (interrupted_at == "moving in"):
            monkeypatch.setattr(Path, "replace", replace)
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "replace", replace_and_be_interrupted)

    def attempt() -> None:
        with atomic_directory(tmp_path / "d", overwrite=True) as path:
            (path / "y").write_text("two")

    with pytest.raises(KeyboardInterrupt):
        attempt()
    kept = {"retiring": "x", "moving in": "y"}[interrupted_at]
    assert [p.name for p in (tmp_path / "d").iterdir()] == [kept]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("which", [1, 2])
def test_an_interrupt_as_soon_as_a_directory_is_made_leaves_none(tmp_path, monkeypatch, which):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("one")
    mkdir, made = os.mkdir, []

    def make_and_be_interrupted(path, *args, **kwargs):
        mkdir(path, *args, **kwargs)
        made.append(path)
        if len(made) == which:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", make_and_be_interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(tmp_path / "d", overwrite=True) as path,
    ):
        (path / "y").write_text("two")
    assert len(made) == which
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["x"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_the_only_copy_survives_when_it_cannot_come_back(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("one")
    replace = Path.replace

    def fail_to_arrive(self, target):
        if target == tmp_path / "d":
            raise OSError("disk error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_to_arrive)

    def attempt() -> None:
        with atomic_directory(tmp_path / "d", overwrite=True) as path:
            (path / "y").write_text("two")

    with pytest.raises(OSError, match="disk error"):
        attempt()
    assert [p.read_text() for p in tmp_path.rglob("x")] == ["one"]
