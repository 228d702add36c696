"""The paper's own set-up: adapters of a diffusers pipeline, merged while it draws."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import nn

from benchmarks.experiments.orthogonal_dropout.results import Row
from benchmarks.experiments.orthogonal_dropout.settings import DIRECT, MC, ORTHOGONAL
from benchmarks.schema import checked, read_yaml
from merge_algorithms import attach, methods
from merge_algorithms.errors import UserError, suggest
from trainers.store import Report, Store

GRID, SCORES = "grid.png", "scores.json"
# Weights, configurations and vocabularies: what of a directory decides a picture.
READ = (".safetensors", ".json", ".txt")


@dataclass(frozen=True)
class Source:
    """Where an adapter is: a Hub id or a directory, and the file in it."""

    source: str
    file: str


@dataclass(frozen=True)
class Scene:
    """A prompt, and the adapters that draw it: two that are merged, or one that is thinned."""

    prompt: str
    adapters: tuple[str, ...]
    negative: str = ""


@dataclass(frozen=True)
class Config:
    """The YAML file.

    Attributes:
        model: A pipeline's Hub id or directory.
        adapters: Name -> where it is.
        scenes: Name -> scene.
        scheduler: Class of diffusers; null keeps the pipeline's own.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        clip_skip: How many of the text encoders' last layers are left out; null for none.
        size: Width and height in pixels.
        seeds: One set of pictures for each.
        pictures: In a set.
        methods: How pairs are merged.
        drop_rate: Of every adapter of a pair.
        rates: Drop rates of single adapters.
        clip: A CLIP model that scores pictures against prompts; null for none.
    """

    model: str
    adapters: Mapping[str, Source]
    scenes: Mapping[str, Scene]
    scheduler: str | None = None
    steps: int = 40
    guidance: float = 7.0
    clip_skip: int | None = None
    size: int = 1024
    seeds: tuple[int, ...] = (0,)
    pictures: int = 4
    methods: tuple[str, ...] = (DIRECT, MC, ORTHOGONAL)
    drop_rate: float = 0.5
    rates: tuple[float, ...] = (0.0, 0.5)
    clip: str | None = None

    def variants(self, scene: Scene) -> list[tuple[str, float]]:
        """(method, drop rate) of everything that is drawn of a scene."""
        if len(scene.adapters) == 1:
            return [(MC, rate) for rate in self.rates]
        return [(method, self.drop_rate) for method in self.methods]

    def stages(self) -> int:
        """How many stages there are, for the progress bar."""
        return len(self.seeds) * sum(len(self.variants(s)) for s in self.scenes.values())


def read_config(path: Path) -> Config:
    """The file as a Config.

    Raises:
        UserError: No such file, unknown keys, wrong types, an adapter, a method or a scheduler that
            there is not, a scene that names no known adapter or one twice, numbers that cannot be.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: name a YAML file of pairs with --sdxl")
    tree = checked(read_yaml(path), Config, str(path), "")
    for key in ("model", "adapters", "scenes"):
        if key not in tree:
            raise UserError(f"{path} has no '{key}': add it")
    try:
        adapters = {name: Source(**about) for name, about in tree["adapters"].items()}
        scenes = {name: Scene(**about) for name, about in tree["scenes"].items()}
    except TypeError as error:
        raise UserError(
            f"{path}: an adapter has a source and a file, a scene a prompt and adapters ({error})"
        ) from None
    for name, about in adapters.items():
        if Path(about.source).is_dir() and not (Path(about.source) / about.file).is_file():
            raise UserError(
                f"{path}: adapter '{name}' is in no file {about.file} of {about.source}: name one"
            )
    for name, scene in scenes.items():
        unknown = next((key for key in scene.adapters if key not in adapters), None)
        if unknown is not None or not scene.adapters:
            hint = suggest(str(unknown), adapters)
            raise UserError(f"{path}: scene '{name}' names no adapter '{unknown}': {hint}")
        if len(set(scene.adapters)) < len(scene.adapters):
            raise UserError(f"{path}: scene '{name}' names an adapter twice: name each once")
    config = Config(**tree | {"adapters": adapters, "scenes": scenes})
    known = methods(runtime=True)
    for method in config.methods:
        if method not in known:
            raise UserError(f"{path}: unknown run-time method '{method}': {suggest(method, known)}")
        required = [option.name for option in known[method].options if option.required]
        if required:
            raise UserError(
                f"{path}: method '{method}' needs a {required[0]}, which pictures have none of:"
                " leave it out"
            )
    if config.scheduler is not None and not hasattr(diffusers, config.scheduler):
        raise UserError(f"{path}: diffusers has no scheduler '{config.scheduler}': name a class")
    _check_numbers(config, path)
    return config


def _check_numbers(config: Config, path: Path) -> None:
    """UserError for what would only fail once some pictures are drawn."""
    if not config.seeds:
        raise UserError(f"{path} has no seeds: give at least one")
    for key in ("steps", "pictures"):
        if getattr(config, key) < 1:
            raise UserError(f"{path} has {key} {getattr(config, key)}: give at least 1")
    for rate in (config.drop_rate, *config.rates):
        if not 0 <= rate < 1:
            raise UserError(f"{path} has a drop rate of {rate}: give numbers in [0, 1)")
    for name, scene in config.scenes.items():
        count = len(scene.adapters)
        kept = count * (1 - config.drop_rate)
        if count > 1 and ORTHOGONAL in config.methods and kept > 1 + 1e-6:
            raise UserError(
                f"{path}: with drop_rate {config.drop_rate} the {count} adapters of scene '{name}'"
                f" cannot have disjoint masks: give at least {1 - 1 / count:.4g}, or leave"
                f" {ORTHOGONAL} out"
            )


def content_hash(path: Path) -> str | None:
    """SHA-256 of a file's content, or of what a directory holds; None for a Hub id."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        return None
    listed = [
        (
            file.relative_to(path).as_posix(),
            file.stat().st_size,
            content_hash(file) if file.suffix in READ else None,
        )
        for file in sorted(filter(Path.is_file, path.rglob("*")))
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def attach_pipeline(
    stack: ExitStack, pipeline: Any, adapters: Sequence[str], method: str, **options: Any
) -> None:
    """Attach the adapters to every part of the pipeline that holds any of them.

    A part that holds some of them only (a text encoder, say) merges those.

    Raises:
        UserError: An adapter that no part holds; diffusers only warns of a file that fits none.
    """
    drop_rate = options.pop("drop_rate", None)
    parts: list[tuple[nn.Module, list[str]]] = []
    for name in pipeline._lora_loadable_modules:
        part = getattr(pipeline, name, None)
        if isinstance(part, nn.Module):
            held = getattr(part, "peft_config", None) or {}
            parts.append((part, [adapter for adapter in adapters if adapter in held]))
    for adapter in adapters:
        if not any(adapter in present for _, present in parts):
            raise UserError(
                f"adapter '{adapter}' is in no part of the pipeline: name a file that was made for"
                " this model"
            )
    for part, present in parts:
        if present:
            if method != DIRECT:
                options["drop_rates"] = [drop_rate] * len(present)
            stack.enter_context(attach(part, present, method, **options))


@dataclass
class Gallery:
    """Draws what is missing.

    Attributes:
        config: What to draw.
        store: Where the pictures are kept.
    """

    config: Config
    store: Store
    _loaded: list[str] = field(default_factory=list)
    _contents: dict[Path, str | None] = field(default_factory=dict)

    def run(self) -> tuple[list[Row], dict[str, str]]:
        """CLIP scores, if wanted, and title -> PNG file of all pictures."""
        rows: list[Row] = []
        pictures: dict[str, str] = {}
        for name, scene in self.config.scenes.items():
            for seed in self.config.seeds:
                for method, rate in self.config.variants(scene):
                    path = self.draw(name, scene, method, rate, seed)
                    title = f"{name}, {method}, drop rate {rate:g}, seed {seed}"
                    pictures[title] = (path / GRID).relative_to(self.store.root).as_posix()
                    rows += _rows(path, name, scene, method, rate, seed)
        return rows, pictures

    def draw(self, name: str, scene: Scene, method: str, rate: float, seed: int) -> Path:
        """The stage of one set of pictures."""
        config = self.config
        used = [config.adapters[key] for key in scene.adapters]
        paths = [Path(config.model), *(Path(about.source) / about.file for about in used)]
        paths += [Path(config.clip)] if config.clip else []
        drawn = ("model", "scheduler", "steps", "guidance", "clip_skip", "size", "pictures", "clip")
        inputs = {
            "scene": asdict(scene),
            "adapters": [asdict(about) for about in used],
            "contents": [self.content(path) for path in paths],
            "drawn_with": {name: version(name) for name in ("diffusers", "pillow")},
            "method": method,
            "drop_rate": rate,
            "seed": seed,
            **{key: getattr(config, key) for key in drawn},
        }

        def build(directory: Path, report: Report) -> None:
            def told(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                report(step + 1, config.steps)
                return tensors

            self.load(scene.adapters)
            with ExitStack() as stack:
                attach_pipeline(
                    stack, self.pipeline, scene.adapters, method, masks=seed, drop_rate=rate
                )
                pictures = self.pipeline(
                    scene.prompt,
                    negative_prompt=scene.negative,
                    num_inference_steps=config.steps,
                    guidance_scale=config.guidance,
                    clip_skip=config.clip_skip,
                    width=config.size,
                    height=config.size,
                    num_images_per_prompt=config.pictures,
                    generator=torch.Generator().manual_seed(seed),
                    callback_on_step_end=told,
                ).images
            for number, picture in enumerate(pictures):
                picture.save(directory / f"{number}.png")
            _grid(pictures).save(directory / GRID)
            scores = self.scores(pictures, scene.prompt) if config.clip else []
            (directory / SCORES).write_text(json.dumps(scores), encoding="utf-8")

        return self.store.run("sdxl", f"{name}/{method}-{rate:g}-seed{seed}", inputs, build)

    def content(self, path: Path) -> str | None:
        """`content_hash`, of gigabytes perhaps, so once."""
        if path not in self._contents:
            self._contents[path] = content_hash(path)
        return self._contents[path]

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline, in float16 on a GPU."""
        config, gpu = self.config, torch.cuda.is_available()
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            config.model, torch_dtype=torch.float16 if gpu else torch.float32
        )
        if config.scheduler is not None:
            kind = getattr(diffusers, config.scheduler)
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to("cuda" if gpu else "cpu")

    def load(self, adapters: Sequence[str]) -> None:
        """Have these adapters in the pipeline, and no others."""
        if self._loaded == list(adapters):
            return
        self.pipeline.unload_lora_weights()
        for name in adapters:
            about = self.config.adapters[name]
            self.pipeline.load_lora_weights(about.source, weight_name=about.file, adapter_name=name)
        self._loaded = list(adapters)

    @cached_property
    def clip(self) -> tuple[Any, Any]:
        """The CLIP model and its processor."""
        from transformers import CLIPModel, CLIPProcessor

        name = str(self.config.clip)
        return CLIPModel.from_pretrained(name).eval(), CLIPProcessor.from_pretrained(name)

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], prompt: str) -> list[float]:
        """Cosine of every picture's and the prompt's embeddings."""
        model, processor = self.clip
        inputs = processor(
            text=[prompt], images=list(pictures), return_tensors="pt", truncation=True
        )
        output = model(**inputs)
        cosines = output.image_embeds @ output.text_embeds.T
        return [float(value) for value in cosines[:, 0]]


def _rows(
    path: Path, name: str, scene: Scene, method: str, rate: float, seed: int
) -> Iterator[Row]:
    scores: list[float] = json.loads((path / SCORES).read_text(encoding="utf-8"))
    if scores:
        yield Row(
            part="sdxl",
            seed=seed,
            init="",
            method=method,
            task=name,
            metric="CLIP score",
            value=sum(scores) / len(scores),
            samples=1,
            drop_rate=rate if len(scene.adapters) == 1 else None,
        )


def _grid(pictures: Sequence[Image.Image], width: int = 256) -> Image.Image:
    """All in a row, small enough for a report."""
    small = [picture.resize((width, width)) for picture in pictures]
    grid = Image.new("RGB", (width * len(small), width))
    for number, picture in enumerate(small):
        grid.paste(picture, (number * width, 0))
    return grid
