"""The upper reference: one adapter trained on all tasks, scored like a merge at coefficient 1."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from benchmarks.arm_run import PREDICTIONS, SPLITS, ArmRun, kind_of, read_json, write_json
from benchmarks.evaluate import Scores, evaluate_fusion
from benchmarks.fusion import Fusion
from benchmarks.predictions import Predictions, save_predictions
from benchmarks.results import CHOSEN, UNTUNED, Arm, MergeInfo, Score, Split
from merge_algorithms import Adapter
from trainers.joint import JOINT
from trainers.store import Report


class JointRun(ArmRun):
    """An arm that is one adapter under the heads of all tasks, with one seed."""

    def run(self) -> tuple[Arm, list[Score]]:
        """The adapter's scores; as nothing is merged, there are neither individual ones nor
        diagnostics.
        """
        stages = {split: self._scored(split) for split in SPLITS}
        scores: list[Score] = []
        for split, stage in stages.items():
            found: Scores = read_json(stage / "scores.json")
            scores += self._rows(JOINT, 1.0, True, split, found)
        (path,) = self.paths.values()
        info = MergeInfo(
            method=JOINT,
            coefficient=1.0,
            path=self._relative(path),
            lost_energy=0.0,
            predictions=self._relative(stages["test"] / PREDICTIONS),
        )
        arm = Arm(
            name=self.arm.name,
            init=self.arm.subspace.init,
            constraint=self.arm.subspace.kept,
            seed=self.job.seed,
            adapters={},
            diagnostics={},
            interference=[],
            merges=[info],
        )
        return arm, scores

    def build(self, kind: str, name: str) -> None:
        """Train the adapter, or score it."""
        if kind == "adapter":
            self.job.train_joint()
        else:
            self.run()

    @cached_property
    def paths(self) -> dict[str, Path]:
        """The one adapter's directory."""
        return {JOINT: self.job.train_joint()}

    @cached_property
    def adapters(self) -> list[Adapter]:
        """The one adapter, with all heads."""
        return [Adapter.load(path, name=name) for name, path in self.paths.items()]

    def _scored(self, split: Split) -> Path:
        def build(directory: Path, report: Report) -> None:
            keep: Predictions = {}
            fusion = Fusion(self.adapters, "task_arithmetic")
            scores = evaluate_fusion(self.evaluator, fusion, 1.0, split, 1, report, keep)
            if split == "test":
                save_predictions(directory / PREDICTIONS, {CHOSEN: keep, UNTUNED: keep})
            write_json(directory / "scores.json", scores)

        label = f"{JOINT}-seed{self.job.seed}/{JOINT}"
        return self.store.run(kind_of(split), label, self._inputs(split), build)
