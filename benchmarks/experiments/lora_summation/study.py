"""The study: adapters alone, trained together, and merged in every combination, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.arm_run import find_method
from benchmarks.evaluate import scoring_dtype
from benchmarks.experiments.lora_summation.higher_order import HigherOrder
from benchmarks.experiments.lora_summation.page import write_page
from benchmarks.experiments.lora_summation.plan import Piece, plan
from benchmarks.experiments.lora_summation.predictors import Predictors
from benchmarks.experiments.lora_summation.results import Row, Summation
from benchmarks.experiments.lora_summation.scoring import Scored, Scorer
from benchmarks.experiments.lora_summation.settings import (
    BASE,
    INDIVIDUAL,
    JOINT,
    TUNED,
    UNION,
    StudySettings,
    groups,
)
from benchmarks.experiments.lora_summation.statistics import Rows, change, perplexity
from benchmarks.fusion import Fusion
from benchmarks.stages import build_stages
from benchmarks.suites import Suite
from merge_algorithms import Adapter, UserError
from trainers.backbone import ModelRef, auto_class, load_skeleton, load_tokenizer
from trainers.data import PooledData, TaskData
from trainers.jobs import Job
from trainers.settings import Init, SubspaceSettings, TrainerOptions
from trainers.store import Progress, Report, Store, versions
from trainers.subspace import check_tasks
from trainers.training import check_targets, train_task


@dataclass
class Study:
    """One run.

    Attributes:
        suite: Tasks, all of kind causal_lm, model, settings of the preset.
        model: The base model.
        settings: What is compared.
        run_dir: Where everything is written.
        progress: Told about every stage.
        workers: Processes that build the stages; if one, this one.
        trainer_options: Further keyword arguments for Lightning's Trainer.
    """

    suite: Suite
    model: ModelRef
    settings: StudySettings
    run_dir: Path
    progress: Progress = field(default_factory=Progress)
    workers: int = 1
    trainer_options: TrainerOptions = field(default_factory=TrainerOptions)

    def __post_init__(self) -> None:
        """Refuse what would only fail after the training."""
        others = [t.name for t in self.suite.tasks.values() if t.kind != "causal_lm"]
        if others:
            raise UserError(
                f"task '{others[0]}' of suite '{self.suite.name}' is no causal_lm: choose a suite"
                " of language modelling tasks, such as qa"
            )
        if UNION in self.suite.tasks:
            raise UserError(
                f"task '{UNION}' of suite '{self.suite.name}' is called as the results call the"
                " rows of all tasks together: give it another name"
            )
        if len(self.suite.tasks) < 2:
            raise UserError(
                f"suite '{self.suite.name}' has {len(self.suite.tasks)} task: a sum needs at least"
                " 2; name more with --tasks"
            )
        for name, combination in product(self.settings.merges, groups(list(self.suite.tasks))):
            method = find_method(name, heads=False)
            method.check_count(len(combination))
            if method.needs == "fisher":
                raise UserError(f"--merges {name}: the study collects no Fisher information")
        skeleton = load_skeleton(self.model.path, auto_class("causal_lm"))
        for init in self.settings.inits:
            check_tasks(self.subspace(init), self.suite.tasks)
            check_targets(skeleton, self.suite.adapter, self.subspace(init))
        self._scorer: Scorer | None = None
        self._higher: HigherOrder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the bars of this one, and what is loaded here."""
        left = {key: value for key, value in self.__dict__.items() if key != "data"}
        return left | {"progress": Progress(), "_scorer": None, "_higher": None}

    @cached_property
    def data(self) -> dict[str, TaskData]:
        """The rows of every task, validated; tokenised when first needed."""
        tokenizer = load_tokenizer(self.model.path)
        return {
            name: TaskData(task, tokenizer, self.suite.train, self.suite.rows)
            for name, task in self.suite.tasks.items()
        }

    def subspace(self, init: Init) -> SubspaceSettings:
        """What an initialisation's adapters start in and may do."""
        if init == "lora":
            return SubspaceSettings("lora")
        return replace(self.settings.subspace, init=init)

    def job(self, store: Store, data: Mapping[str, TaskData], init: Init, seed: int) -> Job:
        """What trains the adapters of one initialisation and one seed."""
        return Job(
            store=store,
            model=self.model,
            data=data,
            adapter=self.suite.adapter,
            head=self.suite.head,
            train=self.suite.train,
            subspace=self.subspace(init),
            seed=seed,
            trainer_options=self.trainer_options,
        )

    def run(self) -> Summation:
        """Compute what is missing; results and report are written after every seed."""
        store = Store(self.run_dir, self.progress)
        with store.lock():
            build_stages(self, store, self.workers)
            scorer = self.scorer(store)
            first = self.suite.seeds[0]
            higher = HigherOrder(self, scorer, first) if self.settings.parts else None
            results = Summation(
                name=self.run_dir.name,
                suite=self.suite.name,
                preset=self.suite.preset,
                model=self.model.name,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                tasks=list(self.data),
                truncated={
                    name: {
                        part: asdict(data.truncation(part))
                        for part in ("train", "validation", "test")
                    }
                    for name, data in self.data.items()
                },
                settings=self.describe(),
                versions=versions(),
            )
            for seed in self.suite.seeds:
                results.rows += SeedRun(self, scorer, seed).run()
                if seed == first and higher is not None:
                    results.higher_order = higher.run()
                results.save(self.run_dir)
                write_page(results, self.run_dir)
        return results

    def scorer(self, store: Store) -> Scorer:
        """What scores states of the base model."""
        targets, dtype = self.suite.adapter.targets, scoring_dtype(self.trainer_options)
        return Scorer(store, self.model, self.data, targets, dtype)

    def pieces(self) -> list[list[Piece]]:
        """What processes can build side by side: what is trained, then what is merged of it."""
        return plan(list(self.suite.tasks), self.suite.seeds, self.settings)

    def build(self, store: Store, piece: Piece) -> None:
        """Build the stages of one piece; what is loaded for it is kept for the next."""
        scorer = self._scorer = self._scorer or self.scorer(store)
        if piece.higher:
            self._higher = self._higher or HigherOrder(self, scorer, piece.seed)
            self._higher.build(piece)
        else:
            SeedRun(self, scorer, piece.seed).build(piece)

    def describe(self) -> dict[str, Any]:
        """The settings that results.json records."""
        suite = self.suite
        return {
            "adapter": asdict(suite.adapter),
            "train": asdict(suite.train),
            "rows": asdict(suite.rows),
            "tasks": {
                task.name: {"prompt": task.prompt, "loss": task.loss, "packing": task.packing}
                for task in suite.tasks.values()
            },
            "seeds": list(suite.seeds),
            "coefficients": list(suite.coefficients),
            "samples": suite.samples,
            "trainer": self.trainer_options.record(),
        } | asdict(replace(self.settings, inits=list(self.settings.inits)))


class SeedRun:
    """Everything of one seed."""

    def __init__(self, study: Study, scorer: Scorer, seed: int) -> None:
        self.study = study
        self.scorer = scorer
        self.seed = seed
        self.tasks = list(study.data)

    def run(self) -> list[Row]:
        """All stages, and what they measured."""
        rows = []
        for init in self.study.settings.inits:
            rows += self.arm(init)
        return rows

    def build(self, piece: Piece) -> None:
        """Build the stages of one piece."""
        job = self.study.job(self.scorer.store, self.study.data, piece.init, self.seed)
        match piece.kind:
            case "covariance":
                job.covariance(*piece.names)
            case "base":
                self.base()
            case "joint":
                self.joint(piece.names)
            case "subspace":
                job.subspace_of(*piece.names)
            case "adapter":
                job.train_adapter(*piece.names)
            case _:
                self.arm(piece.init)

    def base(self) -> Scored:
        """The base model as it is."""
        return self.scorer.score("base", self.tasks, {})

    def joint(self, combination: Sequence[str]) -> Scored:
        """One adapter trained on the combination's rows together, as often as each alone."""
        study, suite = self.study, self.study.suite
        data = PooledData([study.data[task] for task in combination])
        label = f"joint-seed{self.seed}/{data.task.name}"
        inputs = {
            "model": study.model.fingerprint,
            "data": data.fingerprint("train"),
            "adapter": asdict(suite.adapter),
            "train": asdict(suite.train),
            "seed": self.seed,
            "trainer": study.trainer_options.record(),
        }

        def build(directory: Path, report: Report) -> None:
            train_task(
                study.model,
                data,
                directory,
                adapter=suite.adapter,
                head=suite.head,
                train=suite.train,
                subspace=SubspaceSettings("lora"),
                seed=self.seed,
                measure=False,
                trainer_options=study.trainer_options,
                report=report,
            )

        path = self.scorer.store.run("adapters", label, inputs, build)
        return self.alone(label, path, combination)

    def alone(self, label: str, path: Path, tasks: Sequence[str]) -> Scored:
        """One adapter on the test rows of some tasks."""

        def fuse() -> Fusion:
            return Fusion([Adapter.load(path, name=path.name)], "task_arithmetic")

        return self.scorer.score(label, tasks, {"adapter": path.name}, fuse)

    def arm(self, init: Init) -> list[Row]:
        """The adapters of one initialisation, alone and in every combination."""
        study, base = self.study, self.base()
        joint = {combination: self.joint(combination) for combination in groups(self.tasks)}
        job = study.job(self.scorer.store, study.data, init, self.seed)
        for stage in (job.covariance, *([job.subspace_of] if job.subspace.has_rows else [])):
            for task in self.tasks:
                stage(task)
        paths = {task: job.train_adapter(task) for task in self.tasks}
        own = {t: self.alone(f"{job.arm}/{t}", path, [t]) for t, path in paths.items()}
        individual = Scored({task: scored.rows[task] for task, scored in own.items()})
        adapters = {task: Adapter.load(path, name=task) for task, path in paths.items()}
        predictors = Predictors(list(adapters.values()), job.covariances())
        rows = []
        for combination, reference in joint.items():
            scored = {BASE: base, INDIVIDUAL: individual, JOINT: reference}
            for name in study.settings.merges:
                scored[name] = self.merged(job, name, {t: adapters[t] for t in combination}, paths)
            known = predictors.of(combination)
            for method, state in scored.items():
                rows += self.rows(init, combination, method, state, reference, known)
        return rows

    def merged(
        self, job: Job, name: str, adapters: Mapping[str, Adapter], paths: Mapping[str, Path]
    ) -> Scored:
        """Some adapters merged by one method."""
        suite = self.study.suite
        method = find_method(name)
        read = adapters if method.needs else ()
        inputs = {
            "method": name,
            "adapters": {task: paths[task].name for task in adapters},
            "covariances": {task: job.tuned_covariance(task).name for task in read},
            "seed": self.seed,
        }

        def fuse() -> Fusion:
            statistics = job.statistics(read) if read else None
            return Fusion(list(adapters.values()), name, self.seed, statistics=statistics)

        return self.scorer.score(
            f"{job.arm}/{'-'.join(adapters)}/{name}",
            list(adapters),
            inputs,
            fuse,
            suite.coefficients if name == TUNED else (1.0,),
            suite.samples if method.seeded and method.runtime else 1,
        )

    def rows(
        self,
        init: Init,
        combination: tuple[str, ...],
        method: str,
        state: Scored,
        reference: Scored,
        predictors: Mapping[str, float],
    ) -> list[Row]:
        """What one state does on the union's test rows and on each task's."""
        row = partial(
            Row,
            seed=self.seed,
            init=init,
            combination=combination,
            method=method,
            coefficient=state.coefficient,
            rms_cosine=predictors["rms_cosine"],
            interference=predictors["interference"],
        )
        pairs: dict[str, tuple[Rows, Rows]] = {
            UNION: (state.union(combination), reference.union(combination)),
            **{task: (state.rows[task], reference.rows[task]) for task in combination},
        }
        found = []
        for task, (rows, others) in pairs.items():
            level, difference = perplexity(rows), change(rows, others)
            found.append(
                row(
                    task=task,
                    perplexity=level.value,
                    perplexity_stderr=level.stderr,
                    change=difference.value,
                    change_stderr=difference.stderr,
                )
            )
        return found
