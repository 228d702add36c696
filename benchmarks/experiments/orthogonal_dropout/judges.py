"""Who judges generated glyphs: two classifiers of real renderings, a distance of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.experiments.orthogonal_dropout.glyphs import CHARACTERS, LOOKS, SIZE, renderings
from trainers.store import Report

FEATURES = 24
EPOCHS = 12
BATCH = 64
# Renderings of training and test come from seeds that no model's data uses.
TRAIN_SEED, TEST_SEED, REAL_SEED = 2**20, 2**20 + 1, 2**20 + 2


class Judge(nn.Module):
    """A small convolutional classifier; its last hidden layer are the features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(48 * (SIZE // 4) ** 2, FEATURES),
            nn.Tanh(),
        )
        self.out = nn.Linear(FEATURES, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (n, classes) of pictures (n, 1, SIZE, SIZE)."""
        logits: Tensor = self.out(self.body(pictures))
        return logits


@dataclass(frozen=True)
class Judges:
    """One classifier of characters and one of looks.

    Attributes:
        objects: Knows CHARACTERS, in every look.
        styles: Knows LOOKS, of every character.
    """

    objects: Judge
    styles: Judge

    @torch.no_grad()
    def decide(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Indices in CHARACTERS and in LOOKS, (n,) each."""
        return self.objects(pictures).argmax(1), self.styles(pictures).argmax(1)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Both judges' features, (n, 2 FEATURES) float64."""
        both = [self.objects.body(pictures), self.styles.body(pictures)]
        return torch.cat(both, 1).double()


def real(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Renderings of every pair of a character and a look, and their indices."""
    pairs = list(product(range(len(CHARACTERS)), range(len(LOOKS)))) * count
    pictures = renderings([CHARACTERS[c] for c, _ in pairs], [LOOKS[k] for _, k in pairs], seed)
    characters, looks = torch.tensor(pairs).T
    return pictures, characters, looks


def train_judges(directory: Path, count: int, report: Report) -> dict[str, float]:
    """Train both on `count` renderings of each pair, save them; their accuracy on others."""
    pictures, characters, looks = real(count, TRAIN_SEED)
    test, *truth = real(max(4, count // 4), TEST_SEED)
    accuracy = {}
    parts = (("objects", characters, truth[0]), ("styles", looks, truth[1]))
    for number, (name, labels, expected) in enumerate(parts):

        def told(epoch: int, before: int = number * EPOCHS) -> None:
            report(before + epoch, 2 * EPOCHS)

        judge = _trained(pictures, labels, told)
        save_file(judge.state_dict(), directory / f"{name}.safetensors")
        with torch.no_grad():
            accuracy[name] = float((judge(test).argmax(1) == expected).float().mean())
    return accuracy


def load_judges(directory: Path) -> Judges:
    """The trained judges."""
    objects, styles = Judge(len(CHARACTERS)), Judge(len(LOOKS))
    objects.load_state_dict(load_file(directory / "objects.safetensors"))
    styles.load_state_dict(load_file(directory / "styles.safetensors"))
    return Judges(objects.eval(), styles.eval())


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between Gaussians fitted to two sets of features (n, d), float64.

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), as in the Frechet inception distance
    (arXiv 1706.08500); positive even between samples of one distribution, the more so the smaller.
    """
    covariances = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return float(shift + covariances[0].trace() + covariances[1].trace() - 2 * cross)


def _trained(pictures: Tensor, labels: Tensor, report: Callable[[int], None]) -> Judge:
    torch.manual_seed(0)
    judge = Judge(int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            # Noise, so that a judge of clean renderings copes with slight flaws of samples.
            noisy = pictures[rows] + 0.1 * torch.randn_like(pictures[rows])
            loss = cross_entropy(judge(noisy), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report(epoch + 1)
    return judge.eval()
