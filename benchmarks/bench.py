"""The main job: train every task, merge the adapters, evaluate the merged model, report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.evaluate import (
    Evaluator,
    Fusion,
    Split,
    evaluate_individual,
    make_evaluator,
)
from benchmarks.report.page import write_report
from benchmarks.results import RUNTIME_SUFFIX, Arm, MergeInfo, Results, Score, TaskInfo
from benchmarks.search import SCALE, evaluate_merge, evaluation_record
from benchmarks.suites import Suite
from merge_algorithms import Adapter, UserError
from merge_algorithms.registry import Method, get_method
from osrm import interference_matrix
from trainers.backbone import ModelRef, load_skeleton, load_tokenizer
from trainers.data import TaskData
from trainers.jobs import Job, Progress, Report, Store
from trainers.settings import Init, SubspaceSettings
from trainers.training import TrainerOptions, check_targets, no_trainer_options, versions

DEFAULT_MERGES = (
    "task_arithmetic",
    "ties",
    "orthogonal_mc_dropout",
    "orthogonal_mc_dropout" + RUNTIME_SUFFIX,
)


@dataclass(frozen=True)
class BenchSettings:
    """What `osrm bench` compares.

    Attributes:
        inits: Initialisations of A.
        subspace: Constraint and all else about A, for every initialisation but 'lora'.
        merges: Merging methods; the suffix '_runtime' means the run-time form.
    """

    inits: Sequence[Init] = ("lora", "osrm")
    subspace: SubspaceSettings = field(default_factory=SubspaceSettings)
    merges: Sequence[str] = DEFAULT_MERGES


@dataclass
class Bench:
    """One run of a suite.

    Attributes:
        suite: Tasks, model, settings of the preset.
        model: The base model.
        settings: What is compared.
        run_dir: Where everything is written.
        progress: Told about every stage.
        trainer_options: Gives further keyword arguments for Lightning's Trainer.
        trainer_key: The same as JSON.
    """

    suite: Suite
    model: ModelRef
    settings: BenchSettings
    run_dir: Path
    progress: Progress = field(default_factory=Progress)
    trainer_options: TrainerOptions = no_trainer_options
    trainer_key: str = "{}"

    def __post_init__(self) -> None:
        """Refuse what would only fail after the training."""
        for method in self.settings.merges:
            find_method(method).check_count(len(self.suite.tasks))
            if find_method(method).needs == "fisher":
                raise UserError(
                    f"--merges {method}: a bench collects covariances but no Fisher information;"
                    " use `osrm fisher` on its adapters, then `osrm merge`"
                )
        for key in ("inits", "merges"):
            values = list(getattr(self.settings, key))
            if len(set(values)) != len(values):
                raise UserError(f"--{key} {' '.join(values)} names one twice: name each once")
        skeleton = load_skeleton(self.model.path)
        check_targets(skeleton, self.suite.adapter, self.settings.subspace)
        if len(self.suite.tasks) < 2:
            raise UserError(
                f"suite '{self.suite.name}' has {len(self.suite.tasks)} task: merging needs at"
                " least 2; name more with --tasks"
            )

    @staticmethod
    def count_stages(suite: Suite, settings: BenchSettings) -> int:
        """How many stages a run has, for the progress bar."""
        tasks = len(suite.tasks)
        confined = sum(init != "lora" for init in settings.inits)
        padded = "official" in settings.inits
        arms = len(settings.inits) * len(suite.seeds)
        plain = any(init != "official" for init in settings.inits)
        return tasks * (plain + padded + confined) + arms * (tasks + 1 + len(settings.merges))

    @cached_property
    def data(self) -> dict[str, TaskData]:
        """The rows of every task, validated; tokenised when first needed."""
        tokenizer = load_tokenizer(self.model.path)
        return {
            name: TaskData(task, tokenizer, self.suite.train, self.suite.rows)
            for name, task in self.suite.tasks.items()
        }

    def run(self) -> Results:
        """Compute what is missing, then write results.json, results.csv and report.html."""
        store = Store(self.run_dir, self.progress)
        with store.lock():
            results = Results(
                name=self.run_dir.name,
                suite=self.suite.name,
                preset=self.suite.preset,
                model=self.model.name,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                tasks=[
                    TaskInfo(name, data.task.headline, data.task.kind, len(data.rows("test")))
                    for name, data in self.data.items()
                ],
                settings=self.describe(),
                versions=versions(),
                arms=[],
                scores=[],
            )
            for seed, init in product(self.suite.seeds, self.settings.inits):
                arm, scores = ArmRun(self, store, init, seed).run()
                results.arms.append(arm)
                results.scores += scores
            results.add_averages()
            results.save(self.run_dir)
            write_report(results, self.run_dir)
        return results

    def describe(self) -> dict[str, Any]:
        """The settings that results.json records."""
        suite = self.suite
        return {
            "adapter": asdict(suite.adapter),
            "head": asdict(suite.head),
            "train": asdict(suite.train),
            "rows": asdict(suite.rows),
            "seeds": list(suite.seeds),
            "coefficients": list(suite.coefficients),
            "samples": suite.samples,
            "trainer": json.loads(self.trainer_key),
        } | asdict(replace(self.settings, inits=list(self.settings.inits)))


class ArmRun:
    """One initialisation with one seed: eight adapters, their merges, their scores."""

    def __init__(self, bench: Bench, store: Store, init: Init, seed: int) -> None:
        self.bench = bench
        self.store = store
        confined = replace(bench.settings.subspace, init=init)
        suite = bench.suite
        self.job = Job(
            store=store,
            model=bench.model,
            data=bench.data,
            adapter=suite.adapter,
            head=suite.head,
            train=suite.train,
            subspace=SubspaceSettings("lora") if init == "lora" else confined,
            seed=seed,
            trainer_options=bench.trainer_options,
            trainer_key=bench.trainer_key,
        )
        self.paths: dict[str, Path] = {}

    def run(self) -> tuple[Arm, list[Score]]:
        """All stages of the arm, and what they measured."""
        for stage in (self.job.covariance, *([self.job.subspace_of] if self.confined else [])):
            for task in self.bench.data:
                stage(task)
        self.paths = {task: self.job.train_adapter(task) for task in self.bench.data}
        individual = self.individual()
        scores = [
            *self.rows("individual", 1.0, "validation", individual["validation"]),
            *self.rows("individual", 1.0, "test", individual["test"]),
        ]
        merges: list[MergeInfo] = []
        for method in self.bench.settings.merges:
            info, rows = self.merge(method)
            merges.append(info)
            scores += rows
        diagnostics = {
            task: json.loads((path / "osrm.json").read_text(encoding="utf-8"))["diagnostics"]
            for task, path in self.paths.items()
        }
        arm = Arm(
            init=self.job.subspace.init,
            constraint=self.job.subspace.constraint,
            seed=self.job.seed,
            adapters={task: self.relative(path) for task, path in self.paths.items()},
            leaked_before={t: d["leaked_before"] for t, d in diagnostics.items()},
            leaked_after={t: d["leaked_after"] for t, d in diagnostics.items()},
            leaked_own_ratio={t: d["leaked_own_ratio"] for t, d in diagnostics.items()},
            interference=individual["interference"],
            merges=merges,
        )
        return arm, scores

    @property
    def confined(self) -> bool:
        """Whether A starts in a subspace."""
        return self.job.subspace.init != "lora"

    @cached_property
    def adapters(self) -> list[Adapter]:
        """The trained adapters, one per task."""
        return [Adapter.load(path, name=task) for task, path in self.paths.items()]

    @cached_property
    def evaluator(self) -> Evaluator:
        """Backbone and heads, loaded when a score is missing."""
        return make_evaluator(self.bench.model, self.bench.data, self.adapters)

    def inputs(self) -> dict[str, Any]:
        """What every score of this arm depends on."""
        data = self.bench.data
        return {
            "adapters": {task: path.name for task, path in self.paths.items()},
            "data": {
                task: [data[task].fingerprint(split) for split in ("validation", "test")]
                for task in data
            },
            "metrics": {task: data[task].task.metrics for task in data},
        }

    def individual(self) -> dict[str, Any]:
        """Scores of every adapter alone, and the interference matrix."""

        def build(directory: Path, report: Report) -> None:
            outcome: dict[str, Any] = {}
            splits: tuple[Split, Split] = ("validation", "test")
            for index, split in enumerate(splits):
                outcome[split] = evaluate_individual(
                    self.evaluator,
                    self.adapters,
                    split,
                    lambda done, total, index=index: report(index * total + done, 2 * total),  # type: ignore[misc]
                )
            matrix = interference_matrix(self.adapters, self.job.covariances())
            write_json(directory / "scores.json", outcome | {"interference": matrix.tolist()})

        path = self.store.run("scores", f"{self.job.arm}/individual", self.inputs(), build)
        return read_json(path / "scores.json")

    def merge(self, method: str) -> tuple[MergeInfo, list[Score]]:
        """Merge by one method at its best coefficient; validation curve and test scores."""
        suite = self.bench.suite
        known = find_method(method)
        runtime, needs = known.runtime, known.needs
        # More than one pass tells something only where masks are drawn anew.
        samples = suite.samples if runtime and known.seeded else None
        inputs = self.inputs() | {
            "method": method,
            "covariances": {t: self.job.covariance(t).name for t in self.paths} if needs else {},
            "coefficients": list(suite.coefficients),
            "samples": samples,
            "seed": self.job.seed,
        }

        def build(directory: Path, report: Report) -> None:
            statistics = (
                {t: c.by_module() for t, c in self.job.covariances().items()} if needs else None
            )
            fusion = Fusion(self.adapters, method, self.job.seed, statistics=statistics)
            outcome = evaluate_merge(
                self.evaluator, fusion, suite.coefficients, samples or 1, report
            )
            lost = {"": 0.0}
            if fusion.merged is not None:
                scores = {
                    "validation": outcome.curve[outcome.coefficient],
                    "test": outcome.test,
                }
                grid = {SCALE: suite.coefficients}
                evaluation = {
                    "suite": suite.name,
                    "preset": suite.preset,
                    **evaluation_record(self.evaluator, grid, len(outcome.curve), scores),
                }
                merged = replace(fusion.merged.scaled(outcome.coefficient), evaluation=evaluation)
                lost = merged.save_adapter(directory / "adapter")
            curve = [[coefficient, scores] for coefficient, scores in outcome.curve.items()]
            write_json(
                directory / "scores.json",
                {
                    "coefficient": outcome.coefficient,
                    "curve": curve,
                    "test": outcome.test,
                    "lost_energy": max(lost.values()),
                },
            )

        path = self.store.run("scores", f"{self.job.arm}/{method}", inputs, build)
        outcome = read_json(path / "scores.json")
        chosen = outcome["coefficient"]
        rows = [
            row
            for coefficient, scores in outcome["curve"]
            for row in self.rows(method, coefficient, "validation", scores)
        ]
        rows += self.rows(method, chosen, "test", outcome["test"])
        info = MergeInfo(
            method=method,
            coefficient=chosen,
            runtime=runtime,
            samples=samples,
            path=None if runtime else self.relative(path / "adapter"),
            lost_energy=None if runtime else outcome["lost_energy"],
        )
        return info, rows

    def rows(
        self, merge: str, coefficient: float, split: str, scores: Mapping[str, Mapping[str, float]]
    ) -> Iterator[Score]:
        """Tidy rows of some scores."""
        for task, metrics in scores.items():
            for metric, score in metrics.items():
                yield Score(
                    suite=self.bench.suite.name,
                    seed=self.job.seed,
                    init=self.job.subspace.init,
                    constraint=self.job.subspace.constraint,
                    merge=merge,
                    coefficient=coefficient,
                    task=task,
                    split="validation" if split == "validation" else "test",
                    metric=metric,
                    score=score,
                )

    def relative(self, path: Path) -> str:
        """A path as results.json names it."""
        return str(path.relative_to(self.bench.run_dir))


def find_method(name: str) -> Method:
    """The method that --merges calls `name`."""
    return get_method(name.removesuffix(RUNTIME_SUFFIX), name.endswith(RUNTIME_SUFFIX))


def write_json(path: Path, value: Any) -> None:
    """One JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """One JSON file that write_json wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
