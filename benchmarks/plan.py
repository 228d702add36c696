"""A bench cut into pieces: what there is to build, what is the same for several arms, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Literal, get_args

from benchmarks.arm_run import find_method
from benchmarks.results import INDIVIDUAL
from trainers.joint import JOINT
from trainers.settings import SubspaceSettings, effective, rows_settings

if TYPE_CHECKING:
    from benchmarks.arms import ArmSettings
    from benchmarks.bench import BenchSettings
    from benchmarks.suites import Suite

Kind = Literal[
    "covariance",
    "subspace",
    "first_adapter",
    "gradients",
    "adapter",
    "diagnostics",
    "tuned_covariance",
    "scores",
]
PHASES: Sequence[Kind] = get_args(Kind)


@dataclass(frozen=True)
class Piece:
    """What one process builds at a time.

    Attributes:
        arm: The arm's index; the first one of those that share the piece.
        seed: Its seed; likewise.
        kind: What it is; a piece needs only those of earlier kinds.
        name: A task, or the merge that is scored.
    """

    arm: int
    seed: int
    kind: Kind
    name: str

    @property
    def stages(self) -> int:
        """How many stages of the store it is: scores are those on validation and on test rows."""
        return 2 if self.kind == "scores" else 1


def plan(suite: Suite, settings: BenchSettings) -> list[list[Piece]]:
    """Phases of pieces, each needing only those of the phases before.

    Args:
        suite: Tasks and seeds.
        settings: Arms and merging methods.
    """
    phases: dict[Kind, dict[tuple[bool, str, str], Piece]] = {kind: {} for kind in PHASES}
    measured = any(find_method(name).needs for name in settings.merges)
    # The joint trainings are the longest by far: begun last, one process would end alone.
    arms = sorted(enumerate(settings.arms), key=lambda item: not item[1].joint)
    for seed, (index, arm) in product(suite.seeds, arms):
        for kind, inputs in _kinds(arm, seed, measured):
            names = [INDIVIDUAL, *settings.merges] if kind == "scores" else list(suite.tasks)
            for name in [JOINT] if arm.joint else names:
                piece = Piece(index, seed, kind, name)
                phases[kind].setdefault((arm.joint, inputs, name), piece)
    for key in phases["first_adapter"]:  # which may be all that another arm trains
        phases["adapter"].pop(key, None)
    return [list(phase.values()) for phase in phases.values()]


def _kinds(arm: ArmSettings, seed: int, measured: bool) -> Iterator[tuple[Kind, str]]:
    """What an arm consists of, and what each depends on but for the task.

    Args:
        arm: The arm.
        seed: Its seed.
        measured: Whether a merging method needs the covariances of the trained models.
    """
    if arm.joint:
        trained = repr((arm.adapter, arm.train, seed))
    else:
        inputs = repr((arm.adapter.targets, arm.train.max_length, arm.subspace.init == "official"))
        yield "covariance", inputs
        if arm.subspace.has_rows:
            yield "subspace", repr((inputs, arm.adapter.rank, rows_settings(arm.subspace)))
        trained = _trained(inputs, arm, arm.subspace, seed)
        if arm.subspace.needs_gradients:
            first = _trained(inputs, arm, replace(arm.subspace, output_mu=0.0), seed)
            yield "first_adapter", first
            yield "gradients", first
    yield "adapter", trained
    if not arm.joint:
        yield "diagnostics", trained
        if measured:
            yield "tuned_covariance", trained
    yield "scores", trained


def _trained(inputs: str, arm: ArmSettings, subspace: SubspaceSettings, seed: int) -> str:
    return repr((inputs, arm.adapter, arm.train, effective(subspace), seed))
