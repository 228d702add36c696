"""What the study makes of its numbers, and the parts that judge pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.experiments.orthogonal_dropout import diffusion, glyphs, images, judges
from benchmarks.experiments.orthogonal_dropout.findings import sentences, verdict
from benchmarks.experiments.orthogonal_dropout.results import Mean, Measured, Row
from benchmarks.experiments.orthogonal_dropout.settings import (
    OBJECTS,
    STYLES,
    DiffusionSettings,
    StudySettings,
)
from trainers.store import Store


def compared(shift: float) -> Measured:
    """Orthogonal masks better than the others by `shift`, give or take a little."""
    measured = Measured("run", "", {}, {})
    for seed in range(4):
        for number, style in enumerate(STYLES):
            for method in ("direct", "mc_dropout", "orthogonal_mc_dropout"):
                value = 0.5 + 0.1 * number + 0.01 * (-1) ** seed * (method != "direct")
                value += shift * (method == "orthogonal_mc_dropout")
                row = Row("images", seed, "lora", method, "2", "both", value, style, 1)
                measured.rows.append(row)
    return measured


@pytest.mark.parametrize(
    ("shift", "word"), [(0.1, "better"), (-0.1, "worse"), (0.0, "no difference seen")]
)
def test_whether_orthogonality_helps_is_said_as_far_as_it_is_known(shift: float, word: str) -> None:
    """Paired: the large differences between styles do not drown the effect."""
    (sentence,) = [s for s in sentences(compared(shift)) if s.startswith("Strict")]
    assert f"against the direct merge: {word}" in sentence
    assert f"{shift:+.3f}" in sentence


def test_too_few_units_decide_nothing() -> None:
    assert verdict(Mean.of([0.3])) == "not decided (too few units)"
    # Five standard errors, but with one degree of freedom the interval is 12.7 of them wide.
    assert verdict(Mean.of([0.2, 0.3])) == "no difference seen"
    assert math.isnan(Mean.of([]).value)
    assert str(Mean.of([])) == "-"
    assert str(Mean.of([1.0, 2.0])) == "1.500 ± 0.500"
    assert str(Mean.of([math.inf, math.inf])) == "nan"


def test_what_draws_the_pictures_decides_their_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keys(Store):
        def run(self, kind: str, label: str, inputs: Mapping[str, Any], build: object) -> Path:
            return super().run(kind, label, inputs, lambda directory, report: None)

    def stages() -> list[Path]:
        made = images.Images(Keys(tmp_path), StudySettings())
        return [made.base, made.judges, made.adapter("5", "osrm", 0), made.alone("lora", 0)]

    first = stages()
    assert stages() == first
    monkeypatch.setitem(images.DRAWN_WITH, "drawn_with", {"diffusers": "0"})
    assert not set(stages()) & set(first)


def test_renderings_follow_the_seed_and_differ_in_look() -> None:
    first, again = (glyphs.renderings("2A", ["bold", "regular"], 5) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (2, 1, 16, 16)
    assert first.min() >= -1
    assert first.max() <= 1
    looks = {look: glyphs.renderings("2" * 20, [look] * 20, 5).mean(0) for look in glyphs.LOOKS}
    assert looks["framed"][:, [0, -1]].min() == 1
    torch.testing.assert_close(looks["framed"][:, 1:-1, 1:-1], looks["regular"][:, 1:-1, 1:-1])
    assert looks["bold"].mean() > looks["regular"].mean() > looks["striped"].mean()


def test_the_base_model_never_sees_an_object() -> None:
    settings = DiffusionSettings(batch_size=64, base_pictures=2, style_pictures=2)
    for kind, name in (("base", ""), ("style", "bold")):
        labels = torch.cat([y for _, y in diffusion.draws(kind, name, settings, 10, 0)])
        assert {glyphs.CHARACTERS[i] for i in labels} == set(glyphs.BASE)
    labels = torch.cat([y for _, y in diffusion.draws("object", "5", settings, 2, 0)])
    assert {glyphs.CHARACTERS[i] for i in labels} == {"5"}
    assert not set(OBJECTS) & set(glyphs.BASE)


def test_frechet_distance_of_gaussians() -> None:
    """Against its closed form for diagonal covariances."""
    draw = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    x = torch.randn(200_000, 3, generator=draw, dtype=torch.float64)
    y = torch.randn(200_000, 3, generator=draw, dtype=torch.float64) * scales + 1
    expected = 3 + (1 - scales).square().sum()
    assert judges.frechet_distance(x, y) == pytest.approx(float(expected), rel=0.02)
    assert judges.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_judges_learn_and_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "EPOCHS", 3)
    told: list[tuple[int, int]] = []
    accuracy = judges.train_judges(tmp_path, 8, lambda done, total: told.append((done, total)))
    assert told[-1] == (6, 6)
    assert accuracy["styles"] > 0.6
    pictures, _, looks = judges.real(2, judges.REAL_SEED)
    decided = judges.load_judges(tmp_path).decide(pictures)[1]
    assert (decided == looks).float().mean() > 0.6
