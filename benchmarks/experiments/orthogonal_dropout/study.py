"""The study: its parts one after the other, results and report after each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.orthogonal_dropout.page import write_page
from benchmarks.experiments.orthogonal_dropout.plan import Piece
from benchmarks.experiments.orthogonal_dropout.results import Measured, Row
from benchmarks.experiments.orthogonal_dropout.settings import Part, StudySettings
from benchmarks.experiments.orthogonal_dropout.text import Texts
from benchmarks.stages import build_stages
from benchmarks.suites import Suite
from merge_algorithms.errors import UserError
from trainers.backbone import ModelRef, load_skeleton
from trainers.settings import TrainerOptions
from trainers.store import Store, versions
from trainers.training import check_targets

if TYPE_CHECKING:
    from benchmarks.experiments.orthogonal_dropout.images import Images

PARTS_LOADED = ("images", "texts")


@dataclass
class Study:
    """One run.

    Attributes:
        suite: Tasks and model of the text parts, settings of the preset.
        model: The text model; None where no part needs it.
        settings: What is compared.
        store: Where the stages are kept.
        trainer_options: Further keyword arguments for Lightning's Trainer.
        workers: Processes that build the stages; if one, this one.
    """

    suite: Suite
    model: ModelRef | None
    settings: StudySettings
    store: Store
    trainer_options: TrainerOptions
    workers: int = 1

    def __post_init__(self) -> None:
        """Refuse what would only fail later."""
        others = [t.name for t in self.suite.tasks.values() if t.kind == "causal_lm"]
        if self.model is None:
            return
        if others:
            raise UserError(
                f"task '{others[0]}' of suite '{self.suite.name}' is a language model's, whose"
                " perplexity the study does not score: choose a suite such as embedded"
            )
        check_targets(load_skeleton(self.model.path), self.suite.adapter)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the bars of this one, and what is loaded here."""
        left = {key: value for key, value in self.__dict__.items() if key not in PARTS_LOADED}
        return left | {"store": Store(self.store.root)}

    @property
    def run_dir(self) -> Path:
        """Where everything is written."""
        return self.store.root

    def pieces(self) -> list[list[Piece]]:
        """What processes can build side by side, in phases: pictures and texts at a time."""
        images = self.images.pieces() if self.settings.pictures_wanted else []
        texts = self.texts.pieces() if self.model is not None else []
        return [[*a, *b] for a, b in zip_longest(images, texts, fillvalue=())]

    def build(self, store: Store, piece: Piece) -> None:
        """Build the stages of one piece."""
        self.store = store
        getattr(getattr(self, piece.part), piece.step)(*piece.arguments)

    @cached_property
    def images(self) -> Images:
        """The image model's stages; diffusers is loaded only for them."""
        from benchmarks.experiments.orthogonal_dropout.images import Images

        return Images(self.store, self.settings)

    @cached_property
    def texts(self) -> Texts:
        """The text suite's stages."""
        assert self.model is not None
        return Texts(
            self.store,
            self.settings,
            self.suite,
            self.model,
            self.trainer_options,
        )

    def stages(self) -> int:
        """How many stages the run has, for the progress bar."""
        total = sum(piece.stages for phase in self.pieces() for piece in phase)
        if "sdxl" in self.settings.parts:
            from benchmarks.experiments.orthogonal_dropout.sdxl import read_config

            total += read_config(self.settings.sdxl).stages()
        return total

    def run(self) -> Measured:
        """Compute what is missing; results and report are written after every part."""
        with self.store.lock():
            build_stages(self, self.store, self.workers)
            measured = Measured(
                name=self.store.root.name,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                settings=self.describe(),
                versions=versions(),
            )
            if self.settings.pictures_wanted:
                for name, accuracy in self.images.accuracy().items():
                    measured.facts[f"judge of {name}"] = f"{accuracy:.1%} of unseen renderings"
            for part in self.settings.parts:
                measured.rows += self.measure(part, measured)
                measured.save(self.store.root)
                write_page(measured, self.store.root)
        return measured

    def measure(self, part: Part, measured: Measured) -> Iterable[Row]:
        """The rows of one part; its pictures go to `measured`."""
        if part == "redundancy":
            return [*self.images.redundancy(), *self.texts.redundancy()]
        if part == "images":
            rows = list(self.images.compose())
            measured.pictures |= self.images.grids()
            return rows
        if part == "text":
            return list(self.texts.merges())
        from benchmarks.experiments.orthogonal_dropout.sdxl import Gallery, read_config

        rows, pictures = Gallery(read_config(self.settings.sdxl), self.store).run()
        measured.pictures |= pictures
        return rows

    def describe(self) -> dict[str, Any]:
        """The settings that results.json records."""
        known: dict[str, Any] = asdict(self.settings)
        known["sdxl"] = self.settings.sdxl.name
        if self.model is not None:
            known["text"] = {
                "suite": self.suite.name,
                "preset": self.suite.preset,
                "model": self.model.name,
                "adapter": asdict(self.suite.adapter),
                "train": asdict(self.suite.train),
                "rows": asdict(self.suite.rows),
                "seeds": list(self.suite.seeds),
                "coefficients": list(self.suite.coefficients),
            }
        return known
