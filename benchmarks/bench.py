"""The main job: train every task, merge the adapters, evaluate the merged model, report."""

from __future__ import annotations

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
from benchmarks.plan import Piece, plan
from benchmarks.report.page import write_report
from benchmarks.results import RUNTIME_SUFFIX, Results, TaskInfo
from benchmarks.stages import build_stages
from benchmarks.suites import Suite
from merge_algorithms import UserError
from trainers.backbone import ModelRef, auto_class, load_skeleton, load_tokenizer
from trainers.data import TaskData, check_settings
from trainers.settings import TrainerOptions, TrainSettings
from trainers.store import Progress, Store, versions
from trainers.subspace import check_tasks
from trainers.training import check_targets

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
        merges: Merging methods; the suffix '_runtime' means the run-time form, '_aligned' that
            the heads are aligned with the merge at every coefficient.
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
        workers: Processes that build the stages; if one, this one.
        trainer_options: Further keyword arguments for Lightning's Trainer.
    """

    suite: Suite
    model: ModelRef
    settings: BenchSettings
    run_dir: Path
    progress: Progress = field(default_factory=Progress)
    workers: int = 1
    trainer_options: TrainerOptions = field(default_factory=TrainerOptions)

    def __post_init__(self) -> None:
        """Refuse what would only fail after the training."""
        language = are_language(self.suite.tasks)
        for method in self.settings.merges:
            find_method(method, heads=not language).check_count(len(self.suite.tasks))
            if find_method(method).needs == "fisher":
                raise UserError(
                    f"--merges {method}: a bench collects covariances but no Fisher information;"
                    " use `osrm fisher` on its adapters, then `osrm merge`"
                )
        names = [arm.name for arm in self.settings.arms]
        for flag, values in (("inits", names), ("merges", list(self.settings.merges))):
            if len(set(values)) != len(values):
                raise UserError(f"--{flag} {' '.join(values)} names one twice: name each once")
        joint = [arm.name for arm in self.settings.arms if arm.joint]
        if language and joint:
            raise UserError(
                f"arm '{joint[0]}' trains tasks with heads jointly, and a causal_lm has none: use"
                " `osrm experiment lora-summation`, or leave the arm out"
            )
        if len(self.suite.tasks) < 2:
            raise UserError(
                f"suite '{self.suite.name}' has {len(self.suite.tasks)} task: merging needs at"
                " least 2; name more with --tasks"
            )
        kind = auto_class("causal_lm" if language else "classification")
        skeleton, tokenizer = load_skeleton(self.model.path, kind), load_tokenizer(self.model.path)
        for arm in self.settings.arms:
            check_targets(skeleton, arm.adapter, arm.subspace)
            check_tasks(arm.subspace, self.suite.tasks)
            for task in self.suite.tasks.values():
                check_settings(task, tokenizer, arm.train, self.suite.rows)
        self._data: dict[tuple[int, int], dict[str, TaskData]] = {}
        self._arm: ArmRun | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the bars of this one, and what is loaded here."""
        return self.__dict__ | {"progress": Progress(), "_data": {}, "_arm": None}

    @staticmethod
    def count_stages(suite: Suite, settings: BenchSettings) -> int:
        """How many stages a run has, for the progress bar; arms share those that are the same."""
        return sum(piece.stages for phase in plan(suite, settings) for piece in phase)

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
            build_stages(self, store, self.workers)
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
            for seed, index in product(self.suite.seeds, range(len(self.settings.arms))):
                arm, scores = self.arm(store, index, seed).run()
                results.arms.append(arm)
                results.scores += scores
            results.add_averages()
            results.save(self.run_dir)
            write_report(results, self.run_dir)
        return results

    def arm(self, store: Store, index: int, seed: int) -> ArmRun:
        """One of the arms with one seed."""
        settings = self.settings.arms[index]
        return (JointRun if settings.joint else ArmRun)(self, store, settings, seed)

    def pieces(self) -> list[list[Piece]]:
        """What processes can build side by side, in phases."""
        return plan(self.suite, self.settings)

    def build(self, store: Store, piece: Piece) -> None:
        """Build the stages of one piece; what its arm has loaded is kept for the next."""
        wanted = self.settings.arms[piece.arm], piece.seed
        if self._arm is None or (self._arm.arm, self._arm.job.seed) != wanted:
            self._arm = self.arm(store, piece.arm, piece.seed)
        self._arm.build(piece.kind, piece.name)

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
            "trainer": self.trainer_options.record(),
            "arms": {arm.name: arm.overrides(suite) for arm in self.settings.arms},
            "merges": list(self.settings.merges),
        }
