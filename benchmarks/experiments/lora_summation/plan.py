"""The study cut into pieces that need nothing of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from benchmarks.arm_run import find_method
from benchmarks.experiments.lora_summation.settings import (
    HIGHER_METHODS,
    StudySettings,
    groups,
    part_names,
    sample_subsets,
)
from trainers.settings import Init, SubspaceSettings


@dataclass(frozen=True)
class Piece:
    """What one process builds at a time.

    Attributes:
        kind: A covariance, a subspace, the base model's scores, a joint adapter with its scores, an
            adapter, or all else of an initialisation.
        seed: The seed.
        init: The initialisation; any where there is none to it.
        names: Tasks, or a part of one in the higher-order study.
        higher: Whether it belongs to that study.
        stages: How many stages of the store it builds that no earlier phase has.
    """

    kind: Literal["covariance", "subspace", "base", "joint", "adapter", "arm"]
    seed: int
    init: Init = "lora"
    names: tuple[str, ...] = ()
    higher: bool = False
    stages: int = 1


def plan(tasks: Sequence[str], seeds: Sequence[int], settings: StudySettings) -> list[list[Piece]]:
    """Phases of pieces, each needing only those of the phases before.

    Args:
        tasks: Their names.
        seeds: The study's; the higher-order study has the first.
        settings: What is compared.
    """
    first, parts = seeds[0], part_names(tasks, settings.parts)
    # Only the released code's variant reads padded inputs: all others share their covariances.
    distinct = {init == "official": init for init in settings.inits}.values()
    trained = [(task, False) for task in tasks] + [(part, True) for part in parts]
    covariances = [
        Piece("covariance", first, init, (name,), higher)
        for init, (name, higher) in product(distinct, trained)
    ]
    subspaces = [
        Piece("subspace", first, init, (name,), higher)
        for init, (name, higher) in product(settings.inits, trained)
        if SubspaceSettings(init).has_rows
    ]
    combinations = groups(tasks)
    # The adapter and its scores.
    joint = [
        Piece("joint", seed, names=names, stages=2) for seed in seeds for names in combinations
    ]
    # The longest first: begun last, one process would end alone.
    joint.sort(key=lambda piece: -len(piece.names))
    alone = [
        Piece("adapter", seed, init, (name,), higher)
        for seed, init, (name, higher) in product(seeds, settings.inits, trained)
        if seed == first or not higher
    ]
    # Scores of the adapters alone and merged, and what the methods read of the trained models.
    measured = any(find_method(name).needs for name in settings.merges)
    subsets = sample_subsets(parts, settings.subsets, first)
    stages = {
        False: (1 + measured) * len(tasks) + len(combinations) * len(settings.merges),
        True: len(parts) + len(subsets) * len(HIGHER_METHODS),
    }
    arms = [
        Piece("arm", seed, init, higher=higher, stages=stages[higher])
        for higher in (False, True)
        for seed, init in product(seeds, settings.inits)
        if not higher or (parts and seed == first)
    ]
    return [covariances, subspaces, [*joint, *alone, Piece("base", first)], arms]
