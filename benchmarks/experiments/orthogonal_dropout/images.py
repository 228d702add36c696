"""Composition and redundancy on pictures: adapters of a diffusion model of glyphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.experiments.orthogonal_dropout import diffusion
from benchmarks.experiments.orthogonal_dropout.glyphs import (
    BASE,
    CHARACTERS,
    LOOKS,
    REGULAR,
    renderings,
)
from benchmarks.experiments.orthogonal_dropout.judges import (
    REAL_SEED,
    Judges,
    frechet_distance,
    load_judges,
    train_judges,
)
from benchmarks.experiments.orthogonal_dropout.plan import Piece
from benchmarks.experiments.orthogonal_dropout.results import ALONE, REAL, Row
from benchmarks.experiments.orthogonal_dropout.settings import MC, StudySettings, Way
from merge_algorithms import attach
from osrm import Covariance, subspace_state
from trainers.settings import Init
from trainers.store import Report, Store

DATA = ("batch_size", "object_pictures", "style_pictures")  # what decides an adapter's data
DRAWN_WITH = {"drawn_with": {name: version(name) for name in ("diffusers", "pillow", "matplotlib")}}
SHOWN = 6  # pictures of each pair in a grid
MORE = 4  # real renderings for each picture that they are compared with
FREE: Init = "lora"


class Images:
    """All stages of the image model.

    Args:
        store: Where the stages are kept.
        settings: What is compared.
    """

    def __init__(self, store: Store, settings: StudySettings) -> None:
        self.store = store
        self.settings = settings
        self.model_settings = settings.diffusion
        self.key = asdict(settings.diffusion)
        self.tasks: list[str] = [*settings.objects, *settings.styles]
        self.pairs = list(product(settings.objects, settings.styles))
        self._model: tuple[dict[str, Path], Any] | None = None
        self._references: dict[tuple[tuple[str, ...], str], Tensor] = {}

    @cached_property
    def base(self) -> Path:
        """The trained base model."""

        def build(directory: Path, report: Report) -> None:
            diffusion.train_base(directory, self.model_settings, 0, report)

        inputs = self._of("channels", "steps", "batch_size", "learning_rate", "base_pictures")
        return self.store.run("diffusion", "base", inputs | DRAWN_WITH, build)

    @cached_property
    def judges(self) -> Path:
        """The trained judges, and judges.json with their accuracy."""

        def build(directory: Path, report: Report) -> None:
            accuracy = train_judges(directory, self.model_settings.judge_pictures, report)
            (directory / "judges.json").write_text(json.dumps(accuracy), encoding="utf-8")

        inputs = self._of("judge_pictures") | DRAWN_WITH
        return self.store.run("diffusion", "judges", inputs, build)

    def accuracy(self) -> dict[str, float]:
        """Of the judges on renderings that they have not seen."""
        text = (self.judges / "judges.json").read_text(encoding="utf-8")
        accuracy: dict[str, float] = json.loads(text)
        return accuracy

    def covariance(self, task: str) -> Path:
        """Directory with the covariance.safetensors of an object or a style."""

        def build(directory: Path, report: Report) -> None:
            model = diffusion.load_base(self.base)
            covariance = diffusion.covariance(model, task, self.model_settings, 1)
            covariance.save(directory / "covariance.safetensors")

        inputs = {"base": self.base.name, **self._of(*DATA)}
        return self.store.run("covariances", f"glyphs/{task}", inputs, build)

    def adapter(self, task: str, init: str, seed: int, dropout: float = 0.0) -> Path:
        """The trained adapter of an object or a style."""
        others = () if init == FREE else self.tasks
        paths = {other: self.covariance(other) for other in others}
        inputs = {
            "base": self.base.name,
            "init": init,
            "covariances": {name: path.name for name, path in paths.items()},
            "seed": seed,
            "dropout": dropout,
            **self._of(*DATA, "rank", "adapter_steps", "adapter_learning_rate"),
        }

        def build(directory: Path, report: Report) -> None:
            state = None
            if paths:
                known = {
                    name: Covariance.load(path / "covariance.safetensors")
                    for name, path in paths.items()
                }
                state = subspace_state(known, task, self.model_settings.rank, init)  # type: ignore[arg-type]
            model = diffusion.load_base(self.base)
            diffusion.train_adapter(
                model, task, directory, self.model_settings, seed, report, dropout, state
            )

        label = f"glyphs-{init}-dropout{dropout}-seed{seed}/{task}"
        return self.store.run("adapters", label, inputs, build)

    def composition(self, init: str, seed: int, way: Way) -> Path:
        """Pictures of every pair under one way of merging."""
        paths = {task: self.adapter(task, init, seed) for task in self.tasks}
        inputs = {"adapters": {t: p.name for t, p in paths.items()}, "way": way, **self._sampling()}

        def build(directory: Path, report: Report) -> None:
            model = self._loaded(paths)
            pictures = {}
            for number, (name, style) in enumerate(self.pairs, 1):
                with attach(model, [name, style], way.method, masks=seed, samples=way.samples):
                    pictures[f"{name} {style}"] = self._sample(model, name, seed)
                report(number, len(self.pairs))
            _save(directory, pictures)

        label = f"{init}-seed{seed}/{way.method}-{way.samples}"
        return self.store.run("samples", label, inputs, build)

    def alone(self, init: str, seed: int) -> Path:
        """Pictures by each adapter alone."""
        paths = {task: self.adapter(task, init, seed) for task in self.tasks}
        inputs = {"adapters": {t: p.name for t, p in paths.items()}, **self._sampling()}

        def build(directory: Path, report: Report) -> None:
            model = self._loaded(paths)
            pictures = {}
            for number, task in enumerate(self.tasks, 1):
                with attach(model, [task], "direct"):
                    pictures[task] = self._sample(model, task, seed)
                report(number, len(self.tasks))
            _save(directory, pictures)

        return self.store.run("samples", f"{init}-seed{seed}/alone", inputs, build)

    def thinned(self, task: str, seed: int, dropout: float) -> Path:
        """Pictures by one adapter at every drop rate."""
        path = self.adapter(task, FREE, seed, dropout)
        rates = self.settings.all_rates
        inputs = {"adapter": path.name, "rates": rates, **self._sampling()}

        def build(directory: Path, report: Report) -> None:
            model = self._loaded({task: path})
            pictures = {}
            for number, rate in enumerate(rates, 1):
                with attach(model, [task], MC, masks=seed, drop_rates=[rate]):
                    pictures[str(rate)] = self._sample(model, task, seed)
                report(number, len(rates))
            _save(directory, pictures)

        label = f"thinned-dropout{dropout}-seed{seed}/{task}"
        return self.store.run("samples", label, inputs, build)

    def compose(self) -> Iterator[Row]:
        """Every pair under every way of merging; the adapters alone; real renderings."""
        yield from self._real()
        for init, seed in product(self.settings.inits, self.settings.seeds):
            for task, pictures in load_file(self.alone(init, seed) / FILE).items():
                yield from self._judged(
                    pictures, task, part="images", seed=seed, init=init, method=ALONE
                )
            for way in self.settings.ways:
                found = load_file(self.composition(init, seed, way) / FILE)
                for name, style in self.pairs:
                    yield from self._judged(
                        found[f"{name} {style}"],
                        name,
                        style,
                        part="images",
                        seed=seed,
                        init=init,
                        method=way.method,
                        samples=way.samples,
                    )

    def redundancy(self) -> Iterator[Row]:
        """One object's adapter against its drop rate, by the dropout that it was trained with."""
        for dropout, seed in product(self.settings.dropouts, self.settings.seeds):
            task = self.settings.objects[0]
            for rate, pictures in load_file(self.thinned(task, seed, dropout) / FILE).items():
                yield from self._judged(
                    pictures,
                    task,
                    name=f"glyph {task}",
                    part="redundancy",
                    seed=seed,
                    init=FREE,
                    method=MC,
                    samples=1,
                    drop_rate=float(rate),
                    dropout=dropout,
                )

    def grids(self) -> dict[str, str]:
        """Title -> the PNG of the first seed's samples of each way of merging."""
        found = {}
        seed = self.settings.seeds[0]
        for init, way in product(self.settings.inits, self.settings.ways):
            path = self.composition(init, seed, way)
            found[f"{way.label}, {init} adapters"] = self._relative(path / GRID)
        for init in self.settings.inits:
            found[f"each adapter alone, {init}"] = self._relative(self.alone(init, seed) / GRID)
        return found

    def pieces(self) -> list[list[Piece]]:
        """Phases of what processes can do side by side."""
        settings = self.settings
        confined = "images" in settings.parts and any(x != FREE for x in settings.inits)
        adapters: dict[tuple[str, Init, int, float], None] = {}
        samples: list[Piece] = []
        if "images" in settings.parts:
            for init, seed in product(settings.inits, settings.seeds):
                adapters |= dict.fromkeys((task, init, seed, 0.0) for task in self.tasks)
                ways = settings.ways
                samples += [Piece("images", "composition", (init, seed, way)) for way in ways]
                samples.append(Piece("images", "alone", (init, seed)))
        if "redundancy" in settings.parts:
            for dropout, seed in product(settings.dropouts, settings.seeds):
                first = settings.objects[0]
                adapters[first, FREE, seed, dropout] = None
                samples.append(Piece("images", "thinned", (first, seed, dropout)))
        return [
            [Piece("images", "accuracy"), Piece("images", "trained")],
            [Piece("images", "covariance", (task,)) for task in self.tasks if confined],
            [Piece("images", "adapter", arguments) for arguments in adapters],
            samples,
        ]

    def trained(self) -> None:
        """Train the base model."""
        _ = self.base

    def _real(self) -> Iterator[Row]:
        """Renderings that nothing was trained on, judged as the samples are."""
        count = self.model_settings.pictures
        for name, style in self.pairs:
            pictures = renderings([name] * count, [style] * count, REAL_SEED + 1)
            yield from self._judged(
                pictures, name, style, part="images", seed=0, init="", method=REAL
            )

    def _judged(
        self, pictures: Tensor, task: str, style: str = "", name: str | None = None, **known: Any
    ) -> Iterator[Row]:
        """What the judges say of pictures of a task, in a style; `name` for the rows."""
        judges = self._loaded_judges
        is_object = diffusion.task_kind(task) == "object"
        wanted = [task] * len(pictures) if is_object else _turns(len(pictures))
        look = style or (REGULAR if is_object else task)
        characters, looks = judges.decide(pictures)
        right = characters == torch.tensor([CHARACTERS.index(x) for x in wanted])
        styled = looks == LOOKS.index(look)
        distance = frechet_distance(judges.features(pictures), self._reference(tuple(wanted), look))
        measured = {
            "object": float(right.float().mean()),
            "style": float(styled.float().mean()),
            "both": float((right & styled).float().mean()),
            "frechet distance": distance,
        }
        for metric, value in measured.items():
            yield Row(task=name or task, metric=metric, value=value, style=style, **known)

    @cached_property
    def _loaded_judges(self) -> Judges:
        return load_judges(self.judges)

    def _reference(self, wanted: tuple[str, ...], look: str) -> Tensor:
        """The features of real renderings of the same."""
        key = wanted, look
        if key not in self._references:
            real = renderings(wanted * MORE, [look] * (MORE * len(wanted)), REAL_SEED)
            self._references[key] = self._loaded_judges.features(real)
        return self._references[key]

    def _loaded(self, paths: dict[str, Path]) -> Any:
        """The base model with these adapters, kept until others are asked for."""
        if self._model is None or self._model[0] != paths:
            base = diffusion.load_base(self.base)
            self._model = paths, diffusion.with_adapters(base, paths)
        return self._model[1]

    def _sample(self, model: Any, task: str, seed: int) -> Tensor:
        labels = diffusion.labels_of(task, self.model_settings.pictures)
        return diffusion.sample(model, labels, self.model_settings, 1000 + seed)

    def _sampling(self) -> dict[str, Any]:
        return self._of("sampling_steps", "guidance", "pictures")

    def _of(self, *names: str) -> dict[str, Any]:
        return {name: self.key[name] for name in names}

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.store.root).as_posix()


FILE, GRID = "pictures.safetensors", "grid.png"


def _turns(count: int) -> list[str]:
    return [BASE[i % len(BASE)] for i in range(count)]


def _save(directory: Path, pictures: dict[str, Tensor]) -> None:
    save_file({name: x.contiguous() for name, x in pictures.items()}, directory / FILE)
    rows = [torch.cat(list(x[:SHOWN, 0]), dim=1) for x in pictures.values()]
    grid = torch.cat(rows).add(1).mul(127.5).round().byte().numpy()
    image = Image.fromarray(grid)
    image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST).save(
        directory / GRID, optimize=True
    )
