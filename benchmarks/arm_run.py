"""One arm with one seed: its adapters, their merges, their scores, all as stages of a store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.alignment import MUS
from benchmarks.arms import ArmSettings
from benchmarks.evaluate import (
    Evaluator,
    Scores,
    dtype_inputs,
    evaluate_fusion,
    evaluate_individual,
    make_evaluator,
    scoring_dtype,
)
from benchmarks.fusion import Fusion
from benchmarks.predictions import Predictions, save_predictions
from benchmarks.results import (
    ALIGNED_SUFFIX,
    CHOSEN,
    INDIVIDUAL,
    RUNTIME_SUFFIX,
    UNTUNED,
    Arm,
    MergeInfo,
    Score,
    Split,
)
from benchmarks.search import (
    SCALE,
    Curve,
    best_coefficient,
    evaluation_record,
    part_of,
    score_curve,
)
from merge_algorithms import Adapter, UserError
from merge_algorithms.registry import Method, get_method
from osrm import interference_matrix
from trainers.jobs import Job
from trainers.store import Report, Store

if TYPE_CHECKING:
    from benchmarks.bench import Bench

PREDICTIONS = "predictions.npz"
SPLITS: tuple[Split, ...] = ("validation", "test")


class ArmRun:
    """One arm with one seed: an adapter for every task, their merges, their scores.

    Args:
        bench: The run it belongs to.
        store: Where the stages are kept.
        arm: How the adapters are trained.
        seed: Seed of the training and of random masks.
    """

    def __init__(self, bench: Bench, store: Store, arm: ArmSettings, seed: int) -> None:
        self.bench = bench
        self.store = store
        self.arm = arm
        self.data = bench.data(arm.train)
        self.job = Job(
            store=store,
            model=bench.model,
            data=self.data,
            adapter=arm.adapter,
            head=bench.suite.head,
            train=arm.train,
            subspace=arm.subspace,
            seed=seed,
            trainer_options=bench.trainer_options,
        )
        self.dtype = scoring_dtype(bench.trainer_options)
        self._fused: tuple[str, Fusion] | None = None

    def run(self) -> tuple[Arm, list[Score]]:
        """All stages of the arm, and what they measured."""
        individual = [self.alone(split) for split in SPLITS]
        scores: list[Score] = []
        for split, outcome in zip(SPLITS, individual, strict=True):
            scores += self._rows(INDIVIDUAL, 1.0, True, split, outcome["scores"])
        merges: list[MergeInfo] = []
        for method in self.bench.settings.merges:
            info, rows = self.merge(method)
            merges.append(info)
            scores += rows
        arm = Arm(
            name=self.arm.name,
            init=self.job.subspace.init,
            constraint=self.job.subspace.kept,
            seed=self.job.seed,
            adapters={task: self._relative(path) for task, path in self.paths.items()},
            diagnostics=self.diagnostics(),
            interference=individual[1]["interference"],
            merges=merges,
            predictions=self._relative(self._alone("test") / PREDICTIONS),
        )
        return arm, scores

    def build(self, kind: str, name: str) -> None:
        """Build what a plan calls a piece."""
        if kind != "scores":
            builders = {
                "covariance": self.job.covariance,
                "subspace": self.job.subspace_of,
                "first_adapter": self.job.first.train_adapter,
                "gradients": self.job.gradients_of,
                "adapter": self.job.train_adapter,
                "diagnostics": self.job.diagnosed,
                "tuned_covariance": self.job.tuned_covariance,
            }
            builders[kind](name)
        elif name == INDIVIDUAL:
            for split in SPLITS:
                self.alone(split)
        else:
            self.merge(name)

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Task -> its trained adapter's directory."""
        for stage in (
            self.job.covariance,
            *([self.job.subspace_of] if self.arm.subspace.has_rows else []),
        ):
            for task in self.data:
                stage(task)
        return {task: self.job.train_adapter(task) for task in self.data}

    @cached_property
    def adapters(self) -> list[Adapter]:
        """The trained adapters, one per task."""
        return [Adapter.load(path, name=task) for task, path in self.paths.items()]

    @cached_property
    def evaluator(self) -> Evaluator:
        """Backbone and heads, loaded when a score is missing."""
        return make_evaluator(self.bench.model, self.data, self.adapters, self.dtype)

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Diagnostic -> task -> its value."""
        found: dict[str, dict[str, float]] = {}
        for task in self.paths:
            for name, value in self.job.diagnostics(task).items():
                found.setdefault(name, {})[task] = value
        return found

    def alone(self, split: Split) -> dict[str, Any]:
        """Scores of every adapter alone; with the test scores comes the interference matrix."""
        return read_json(self._alone(split) / "scores.json")

    def _alone(self, split: Split) -> Path:
        def build(directory: Path, report: Report) -> None:
            keep: Predictions = {}
            scores = evaluate_individual(self.evaluator, self.adapters, split, report, keep)
            outcome: dict[str, Any] = {"scores": scores}
            if split == "test":
                matrix = interference_matrix(self.adapters, self.job.covariances())
                outcome["interference"] = matrix.tolist()
                save_predictions(directory / PREDICTIONS, {CHOSEN: keep})
            write_json(directory / "scores.json", outcome)

        label = f"{self.job.arm}/{INDIVIDUAL}"
        inputs = self._inputs(split)
        if split == "test":
            # Of the interference matrix.
            inputs |= {"order": list(self.data), "covariances": self.job.covariance_keys()}
        return self.store.run(kind_of(split), label, inputs, build)

    def curve(self, method: str) -> Curve:
        """Validation scores of one merging method at every coefficient."""
        coefficients = self.bench.suite.coefficients

        def build(directory: Path, report: Report) -> None:
            samples = self._samples(method) or 1
            fusion = self._fusion(method)
            curve = score_curve(self.evaluator, fusion, coefficients, samples, report)
            write_json(directory / "scores.json", list(curve.items()))

        inputs = self._merge_inputs(method, "validation") | {"coefficients": list(coefficients)}
        path = self.store.run("curves", f"{self.job.arm}/{method}", inputs, build)
        return dict(read_json(path / "scores.json"))

    def merge(self, method: str) -> tuple[MergeInfo, list[Score]]:
        """Merge by one method at its best coefficient; validation curve and test scores."""
        curve = self.curve(method)
        chosen = best_coefficient(curve, self.data)
        path = self._tested(method, chosen, curve[chosen])
        outcome = read_json(path / "scores.json")
        rows: list[Score] = []
        for coefficient, scores in curve.items():
            best = coefficient == chosen
            rows += self._rows(method, coefficient, best, "validation", scores)
        rows += self._rows(method, chosen, True, "test", outcome["test"])
        if chosen != 1:
            rows += self._rows(method, 1.0, False, "test", outcome["untuned"])
        runtime = method.endswith(RUNTIME_SUFFIX)
        info = MergeInfo(
            method=method,
            coefficient=chosen,
            runtime=runtime,
            samples=self._samples(method),
            path=None if runtime else self._relative(path / "adapter"),
            lost_energy=None if runtime else outcome["lost_energy"],
            predictions=self._relative(path / PREDICTIONS),
        )
        return info, rows

    def _tested(self, method: str, chosen: float, validation: Scores) -> Path:
        """The stage of the test scores at the chosen coefficient and at 1, and of the bundle."""
        suite = self.bench.suite

        def build(directory: Path, report: Report) -> None:
            predictions: dict[str, Predictions] = {CHOSEN: {}, UNTUNED: {}}
            first, second = part_of(report, 0, 2), part_of(report, 1, 2)
            test = self._test(method, chosen, first, predictions[CHOSEN])
            untuned, predictions[UNTUNED] = test, predictions[CHOSEN]
            if chosen != 1:
                predictions[UNTUNED] = {}
                untuned = self._test(method, 1.0, second, predictions[UNTUNED])
            save_predictions(directory / PREDICTIONS, predictions)
            lost = {"": 0.0}
            fusion = self._fusion(method)
            if (merged := fusion.merged) is not None:
                scores = {"validation": validation, "test": test}
                grid = {SCALE: suite.coefficients}
                evaluation = {
                    "suite": suite.name,
                    "preset": suite.preset,
                    **evaluation_record(self.evaluator, grid, len(suite.coefficients), scores),
                }
                heads = merged.heads
                if fusion.aligned:
                    alignment = self.evaluator.aligner.align(fusion, chosen)
                    heads = heads | alignment.heads
                    evaluation["aligned_heads"] = alignment.mus
                scaled = replace(merged.scaled(chosen), heads=heads, evaluation=evaluation)
                lost = scaled.save_adapter(directory / "adapter")
            outcome = {"test": test, "untuned": untuned, "lost_energy": max(lost.values())}
            write_json(directory / "scores.json", outcome)

        inputs = self._merge_inputs(method, "test") | {
            "coefficient": chosen,
            "validation": validation,
            "coefficients": list(suite.coefficients),
        }
        return self.store.run("scores", f"{self.job.arm}/{method}", inputs, build)

    def _fusion(self, method: str) -> Fusion:
        """The merge, kept until another is asked for."""
        if self._fused is None or self._fused[0] != method:
            statistics = self.job.statistics(self.data) if find_method(method).needs else None
            fusion = Fusion(self.adapters, method, self.job.seed, statistics=statistics)
            self._fused = method, fusion
        return self._fused[1]

    def _test(self, method: str, coefficient: float, report: Report, keep: Predictions) -> Scores:
        samples = self._samples(method) or 1
        fusion = self._fusion(method)
        return evaluate_fusion(self.evaluator, fusion, coefficient, "test", samples, report, keep)

    def _samples(self, method: str) -> int | None:
        """Monte Carlo samples: more than one tells something only where masks are drawn anew."""
        known = find_method(method)
        return self.bench.suite.samples if known.runtime and known.seeded else None

    def _inputs(self, split: Split) -> dict[str, Any]:
        """What every score of this arm depends on."""
        inputs = dtype_inputs(self.dtype) | {
            "adapters": {task: path.name for task, path in self.paths.items()},
            "data": {task: data.fingerprint(split) for task, data in self.data.items()},
            "metrics": {task: data.task.metrics for task, data in self.data.items()},
        }
        if split == "test":  # whose predictions are kept with their groups
            inputs["groups"] = {task: data.groups_fingerprint for task, data in self.data.items()}
        return inputs

    def _merge_inputs(self, method: str, split: Split) -> dict[str, Any]:
        needs = find_method(method).needs
        aligned = {"mus": list(MUS)} | {
            task: [data.fingerprint("train"), data.fingerprint("validation")]
            for task, data in self.data.items()
        }
        known = {"aligned": aligned} if method.endswith(ALIGNED_SUFFIX) else {}
        return (
            self._inputs(split)
            | known
            | {
                "method": method,
                "covariances": {t: self.job.tuned_covariance(t).name for t in self.data}
                if needs
                else {},
                "samples": self._samples(method),
                "seed": self.job.seed,
            }
        )

    def _rows(
        self,
        merge: str,
        coefficient: float,
        chosen: bool,
        split: Split,
        scores: Mapping[str, Mapping[str, float]],
    ) -> Iterator[Score]:
        """Tidy rows of some scores."""
        for task, metrics in scores.items():
            for metric, score in metrics.items():
                yield Score(
                    suite=self.bench.suite.name,
                    seed=self.job.seed,
                    arm=self.arm.name,
                    init=self.job.subspace.init,
                    constraint=self.job.subspace.kept,
                    merge=merge,
                    coefficient=coefficient,
                    chosen=chosen,
                    task=task,
                    split=split,
                    metric=metric,
                    score=score,
                )

    def _relative(self, path: Path) -> str:
        """A path as results.json names it."""
        return str(path.relative_to(self.bench.run_dir))


def find_method(name: str, heads: bool = True) -> Method:
    """The method that --merges calls `name`.

    Args:
        name: Of a method, with its suffix if it has one.
        heads: Whether the tasks have heads, which can be aligned.

    Raises:
        UserError: No such method, or heads are to be aligned that cannot be.
    """
    stem = name.removesuffix(ALIGNED_SUFFIX)
    runtime = stem.endswith(RUNTIME_SUFFIX)
    if stem != name and (runtime or not heads):
        reason = "a run-time merge is not in the weights" if runtime else "a causal_lm has no head"
        raise UserError(f"--merges {name}: {reason}, so no heads are aligned: name {stem}")
    return get_method(stem.removesuffix(RUNTIME_SUFFIX), runtime)


def kind_of(split: Split) -> str:
    """The folder of a stage: choosing needs no test rows, so those are apart."""
    return "curves" if split == "validation" else "scores"


def write_json(path: Path, value: Any) -> None:
    """One JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """One JSON file that write_json wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
