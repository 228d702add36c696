"""Pictures of characters, rendered from the fonts that matplotlib ships, in several styles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from benchmarks.experiments.orthogonal_dropout.settings import OBJECTS

SIZE = 16
CANVAS = 64  # drawn so large, then averaged down
FONTS = (
    "DejaVuSans",
    "DejaVuSansMono",
    "DejaVuSerif",
    "STIXGeneral",
    "cmr10",
    "cmss10",
    "cmtt10",
)
BASE = "013479ACEHKT"
CHARACTERS = BASE + "".join(OBJECTS)
REGULAR = "regular"


def _striped(image: Image.Image) -> Image.Image:
    rows = np.asarray(image) * (np.arange(CANVAS) // 4 % 2)[:, None]
    return Image.fromarray(rows.astype(np.uint8))


def _slanted(image: Image.Image) -> Image.Image:
    shear = (1, 0.6, -0.3 * CANVAS, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)


def _framed(image: Image.Image) -> Image.Image:
    width = CANVAS // SIZE
    inside = image.crop((width, width, CANVAS - width, CANVAS - width))
    return ImageOps.expand(inside, width, fill=255)


# What each style does to a regular rendering, white on black.
RESTYLE: dict[str, Callable[[Image.Image], Image.Image]] = {
    "bold": lambda image: image.filter(ImageFilter.MaxFilter(7)),
    "slanted": _slanted,
    "framed": _framed,
    "striped": _striped,
}
LOOKS = (REGULAR, *RESTYLE)


def render(character: str, look: str, draw: np.random.Generator) -> Image.Image:
    """One rendering (CANVAS, CANVAS): random font, size, turn and place."""
    font = _font(str(draw.choice(FONTS)), int(draw.integers(58, 68)))
    image = Image.new("L", (CANVAS, CANVAS))
    place = CANVAS / 2 + draw.uniform(-3, 3), CANVAS / 2 + draw.uniform(-3, 3)
    ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="mm")
    image = image.rotate(draw.uniform(-6, 6), Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.MaxFilter(3))
    return RESTYLE[look](image) if look in RESTYLE else image


def renderings(characters: Sequence[str], looks: Sequence[str], seed: int) -> Tensor:
    """One picture for each pair of a character and a look: (n, 1, SIZE, SIZE) in [-1, 1]."""
    draw = np.random.default_rng(seed)
    pictures = [
        np.asarray(render(character, look, draw).resize((SIZE, SIZE), Image.Resampling.BOX))
        for character, look in zip(characters, looks, strict=True)
    ]
    return torch.from_numpy(np.stack(pictures)).float().div(127.5).sub(1)[:, None]


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)
