"""What the study compares. No heavy imports: the command line reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from merge_algorithms.errors import UserError
from trainers.settings import Init

Part = Literal["redundancy", "images", "text", "sdxl"]
PARTS: tuple[Part, ...] = ("redundancy", "images", "text", "sdxl")
# Characters that the base model never sees, and looks that it does not know.
Object = Literal["2", "5", "8"]
Style = Literal["bold", "slanted", "framed", "striped"]
OBJECTS, STYLES = get_args(Object), get_args(Style)
DIRECT, MC, ORTHOGONAL = "direct", "mc_dropout", "orthogonal_mc_dropout"
# Static merges that stand beside the run-time ones on the text suite.
STATIC = ("task_arithmetic", "ties", MC, ORTHOGONAL)


class Way(NamedTuple):
    """A run-time merge and how many draws of its masks are averaged."""

    method: str
    samples: int = 1

    @property
    def label(self) -> str:
        """As tables name it."""
        return self.method if self.samples == 1 else f"{self.method}, K = {self.samples}"


PAPERS_PAIRS = Path(__file__).with_name("sdxl.yaml")


@dataclass(frozen=True)
class DiffusionSettings:
    """The diffusion model of glyphs, its training, its adapters and how it is sampled.

    Attributes:
        channels: Channels of the U-Net's two levels, multiples of 16.
        steps: Training steps of the base model.
        batch_size: Pictures in a batch.
        learning_rate: Peak learning rate of the base model.
        rank: LoRA rank of the adapters.
        adapter_steps: Training steps of an adapter.
        adapter_learning_rate: Peak learning rate of an adapter.
        base_pictures: Renderings of each base character that the base model learns from.
        style_pictures: Renderings of each base character that a style's adapter learns from.
        object_pictures: Renderings that an object's adapter learns from.
        sampling_steps: DDIM steps.
        guidance: Scale of classifier-free guidance; 1 for none.
        pictures: Pictures sampled for each pair, seed and way of merging.
        judge_pictures: Renderings of each pair that the judges are trained on.
    """

    channels: tuple[int, int] = (48, 96)
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    rank: int = 16
    adapter_steps: int = 250
    adapter_learning_rate: float = 3e-3
    base_pictures: int = 500
    style_pictures: int = 100
    object_pictures: int = 40
    sampling_steps: int = 25
    guidance: float = 1.0
    pictures: int = 32
    judge_pictures: int = 60


QUICK = DiffusionSettings(
    steps=800, adapter_steps=120, sampling_steps=15, pictures=16, judge_pictures=40
)


@dataclass(frozen=True)
class StudySettings:
    """What the study compares.

    Attributes:
        parts: Which experiments.
        inits: Initialisations of the adapters of 'images' and 'text'.
        objects: Objects of 'images'; the first is that of 'redundancy'.
        styles: Styles of 'images'.
        seeds: Seeds of training, of sampling and of the masks.
        rates: Drop rates of 'redundancy'.
        dropouts: LoRA dropout that the adapters of 'redundancy' were trained with.
        draws: Numbers of draws that run-time merges average; on pictures 1, and the largest of
            these but at most 4.
        diffusion: The image model.
        sdxl: YAML file of the pairs of 'sdxl'.
    """

    parts: Sequence[Part] = ("redundancy", "images", "text")
    inits: Sequence[Init] = ("lora", "osrm")
    objects: Sequence[Object] = OBJECTS
    styles: Sequence[Style] = STYLES
    seeds: Sequence[int] = (0, 1, 2)
    rates: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    dropouts: Sequence[float] = (0.0, 0.05, 0.9)
    draws: Sequence[int] = (1, 4, 16)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    sdxl: Path = PAPERS_PAIRS

    @property
    def all_rates(self) -> list[float]:
        """The drop rates of 'redundancy', 0 among them, each once."""
        return [*dict.fromkeys((0.0, *self.rates))]

    def __post_init__(self) -> None:
        if "wiener" in self.inits and "images" in self.parts:
            raise UserError(
                "--inits wiener trains A through a filter, which the experiment on pictures does"
                " not do: choose among lora, osrm, official and contrastive"
            )
        for key in ("parts", "inits", "objects", "styles", "seeds", "rates", "dropouts", "draws"):
            values = list(getattr(self, key))
            if not values or len(set(values)) != len(values):
                named = " ".join(map(str, values))
                raise UserError(f"--{key} {named}: name at least one, each once")
        for key in ("rates", "dropouts"):
            bad = [value for value in getattr(self, key) if not 0 <= value < 1]
            if bad:
                raise UserError(f"--{key} {bad[0]} is not possible: give numbers in [0, 1)")
        if min(self.draws) < 1:
            raise UserError(f"--draws {min(self.draws)}: average at least 1 draw")
        sizes = self.diffusion
        for key in (
            "steps",
            "adapter_steps",
            "pictures",
            "judge_pictures",
            "rank",
            "base_pictures",
        ):
            least = 2 if key == "pictures" else 1  # a distance takes their covariance
            if getattr(sizes, key) < least:
                raise UserError(f"--diffusion.{key} {getattr(sizes, key)}: give at least {least}")
        if any(width < 16 or width % 16 for width in sizes.channels):
            raise UserError(
                f"--diffusion.channels {list(sizes.channels)}: give multiples of 16, the width of"
                " an attention head"
            )

    @property
    def pictures_wanted(self) -> bool:
        """Whether the diffusion model of glyphs is needed."""
        return "images" in self.parts or "redundancy" in self.parts

    @property
    def ways(self) -> list[Way]:
        """How pairs of adapters of the image model are merged."""
        most = max(self.draws)
        return [Way(DIRECT), Way(MC), Way(ORTHOGONAL)] + (
            [Way(ORTHOGONAL, min(most, 4))] if most > 1 else []
        )
