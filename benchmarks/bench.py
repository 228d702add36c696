"""The main job: train every task, merge the adapters, evaluate the merged model, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.arm_run import ArmRun, find_method
from benchmarks.arms import ArmSettings
from benchmarks.evaluate import are_language
from benchmarks.joint_run import JointRun
from benchmarks.report.page import write_report
from benchmarks.results import RUNTIME_SUFFIX, Results, TaskInfo
from benchmarks.suites import Suite
from merge_algorithms import UserError
from trainers.backbone import ModelRef, load_skeleton, load_tokenizer
from trainers.data import TaskData
from trainers.jobs import Progress, Store
from trainers.settings import TrainSettings, effective, rows_settings
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
        arms: How adapters are trained.
        merges: Merging methods; the suffix '_runtime' means the run-time form.
    """

    arms: Sequence[ArmSettings]
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
        names = [arm.name for arm in self.settings.arms]
        for flag, values in (("inits", names), ("merges", list(self.settings.merges))):
            if len(set(values)) != len(values):
                raise UserError(f"--{flag} {' '.join(values)} names one twice: name each once")
        language = are_language(self.suite.tasks)
        joint = [arm.name for arm in self.settings.arms if arm.joint]
        if language and joint:
            raise UserError(
                f"arm '{joint[0]}' trains tasks with heads jointly, and a causal_lm has none: use"
                " `osrm experiment lora-summation`, or leave the arm out"
            )
        skeleton = load_skeleton(self.model.path)
        for arm in self.settings.arms:
            check_targets(skeleton, arm.adapter, arm.subspace)
        if len(self.suite.tasks) < 2:
            raise UserError(
                f"suite '{self.suite.name}' has {len(self.suite.tasks)} task: merging needs at"
                " least 2; name more with --tasks"
            )
        self._data: dict[tuple[int, int], dict[str, TaskData]] = {}

    @staticmethod
    def count_stages(suite: Suite, settings: BenchSettings) -> int:
        """How many stages a run has, for the progress bar; arms share those that are the same."""
        stages, joint = set(), set()
        measured = any(find_method(name).needs for name in settings.merges)
        for arm, seed in product(settings.arms, suite.seeds):
            if arm.joint:
                joint.add(repr((arm.adapter, arm.train, seed)))
                continue
            padded = arm.subspace.init == "official"
            inputs = repr((arm.adapter.targets, arm.train.max_length, padded))
            stages.add(("covariance", inputs))
            if arm.confined:
                rows = rows_settings(arm.subspace)
                stages.add(("subspace", repr((inputs, arm.adapter.rank, rows))))
            adapter = repr((inputs, arm.adapter, arm.train, effective(arm.subspace), seed))
            stages |= {("adapter", adapter), ("scores", adapter)}
        ways = 1 + len(settings.merges)  # each on validation rows and on test rows
        tasks = len(suite.tasks)
        sizes = {"adapter": tasks * (1 + measured), "scores": 2 * ways}
        counts = [sizes.get(kind, tasks) for kind, _ in stages]
        return sum(counts) + 3 * len(joint)

    def data(self, train: TrainSettings) -> dict[str, TaskData]:
        """The rows of every task, validated; tokenised when first needed."""
        key = train.batch_size, train.max_length
        if key not in self._data:
            tokenizer = load_tokenizer(self.model.path)
            self._data[key] = {
                name: TaskData(task, tokenizer, train, self.suite.rows)
                for name, task in self.suite.tasks.items()
            }
        return self._data[key]

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
                    TaskInfo(
                        name,
                        data.task.headline,
                        data.task.kind,
                        len(data.rows("test")),
                        data.num_labels,
                    )
                    for name, data in self.data(self.settings.arms[0].train).items()
                ],
                settings=self.describe(),
                versions=versions(),
                arms=[],
                scores=[],
            )
            for seed, settings in product(self.suite.seeds, self.settings.arms):
                kind = JointRun if settings.joint else ArmRun
                arm, scores = kind(self, store, settings, seed).run()
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
            "arms": {arm.name: arm.overrides(suite) for arm in self.settings.arms},
            "merges": list(self.settings.merges),
        }
