"""What the study compares. No heavy imports: the command line reads it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from merge_algorithms.errors import UserError
from trainers.settings import Init, SubspaceSettings

SUM = "lora_sum"
# The one whose coefficient is chosen on validation rows; all others run at their defaults.
TUNED = "task_arithmetic"
MERGES = (SUM, "average", TUNED, "ties", "regmean", "orthogonal_mc_dropout_runtime")
# Those of the higher-order study.
HIGHER_METHODS = (SUM, "average")
BASE, INDIVIDUAL, JOINT = "base", "individual", "joint"
UNION = "union"

# Percent change in perplexity of the sum against merged-data fine-tuning, GPT-2 Small, as
# published (arXiv 2508.11985, abstract).
PAPER = {
    ("math", "medicine"): -9.10,
    ("math", "finance"): 4.54,
    ("medicine", "finance"): 27.56,
}


@dataclass(frozen=True)
class StudySettings:
    """What the study compares.

    Attributes:
        inits: Initialisations of the adapters.
        subspace: Constraint and all else about A, for every initialisation but 'lora'.
        merges: Merging methods beside one another, the plain sum among them.
        parts: Adapters of the higher-order study, the domains split into that many parts; 0 leaves
            it out.
        subsets: How many subsets of each size it looks at.
    """

    inits: Sequence[Init] = ("lora", "osrm")
    subspace: SubspaceSettings = field(default_factory=SubspaceSettings)
    merges: Sequence[str] = MERGES
    parts: int = 8
    subsets: int = 2

    def __post_init__(self) -> None:
        if SUM not in self.merges:
            raise UserError(f"--merges leaves out {SUM}, which the study is about: add it")
        for key in ("inits", "merges"):
            values = list(getattr(self, key))
            if not values or len(set(values)) != len(values):
                raise UserError(f"--{key} {' '.join(values)}: name at least one, each once")
        if self.parts and not 3 <= self.parts <= 26:
            raise UserError(
                f"--parts {self.parts}: the higher-order study takes 3 to 26 adapters, 0 skips it"
            )
        if self.subsets < 1:
            raise UserError(f"--subsets {self.subsets}: look at at least 1 subset of each size")


def groups(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """Every pair, and all tasks together if they are more than two."""
    pairs: list[tuple[str, ...]] = list(combinations(tasks, 2))
    return [*pairs, tuple(tasks)] if len(tasks) > 2 else pairs


def shares(tasks: Sequence[str], parts: int) -> dict[str, int]:
    """Task -> its number of parts, as even as can be, the first tasks getting one more."""
    each, more = divmod(parts, len(tasks))
    return {task: each + (index < more) for index, task in enumerate(tasks)}


def part_names(tasks: Sequence[str], parts: int) -> list[str]:
    """What the parts of the higher-order study are called."""
    counts = shares(tasks, parts)
    return [f"{task}{index + 1}" for task in tasks for index in range(counts[task])]


def sample_subsets(names: Sequence[str], count: int, seed: int) -> list[tuple[str, ...]]:
    """Up to `count` subsets of every size from 2 to all, drawn without replacement."""
    rng = random.Random(f"{seed} subsets")
    chosen = []
    for size in range(2, len(names) + 1):
        every = math.comb(len(names), size)
        if every <= count:
            chosen += list(combinations(names, size))
            continue
        found: dict[tuple[str, ...], None] = {}
        while len(found) < count:
            found[tuple(sorted(rng.sample(list(names), size), key=list(names).index))] = None
        chosen += list(found)
    return chosen


def published(combination: Sequence[str]) -> float | None:
    """The paper's figure for a pair of domains, None if it has none."""
    names = {name.removeprefix("qa_") for name in combination}
    return next((change for pair, change in PAPER.items() if set(pair) == names), None)
