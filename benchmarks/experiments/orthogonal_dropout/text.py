"""Composition and redundancy on texts: the adapters of a suite, merged at run time and before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.evaluate import (
    Evaluator,
    Scores,
    dtype_inputs,
    evaluate_fusion,
    evaluate_individual,
    headline_average,
    make_evaluator,
    scoring_dtype,
)
from benchmarks.experiments.orthogonal_dropout.plan import Piece
from benchmarks.experiments.orthogonal_dropout.results import AVERAGE, INDIVIDUAL, Row
from benchmarks.experiments.orthogonal_dropout.settings import (
    DIRECT,
    MC,
    ORTHOGONAL,
    STATIC,
    StudySettings,
)
from benchmarks.fusion import Fusion
from benchmarks.results import RUNTIME_SUFFIX, Split
from benchmarks.search import best_coefficient, score_curve
from benchmarks.suites import Suite
from merge_algorithms import Adapter
from trainers.backbone import ModelRef, load_tokenizer
from trainers.data import TaskData
from trainers.jobs import Job
from trainers.settings import Init, SubspaceSettings, TrainerOptions
from trainers.store import Report, Store

FREE: Init = "lora"
FILE = "scores.json"


@dataclass
class Texts:
    """All stages of the text suite.

    Attributes:
        store: Where the stages are kept.
        settings: What is compared.
        suite: Tasks, model, settings of the preset.
        model: The base model.
        trainer_options: Further keyword arguments for Lightning's Trainer.
    """

    store: Store
    settings: StudySettings
    suite: Suite
    model: ModelRef
    trainer_options: TrainerOptions
    _arm: Arm | None = None

    @cached_property
    def data(self) -> dict[str, TaskData]:
        """The rows of every task, validated; tokenised when first needed."""
        tokenizer = load_tokenizer(self.model.path)
        return {
            name: TaskData(task, tokenizer, self.suite.train, self.suite.rows)
            for name, task in self.suite.tasks.items()
        }

    def arm(self, init: Init, seed: int, dropout: float | None = None) -> Arm:
        """The adapters of one initialisation and seed; `dropout` replaces the suite's.

        What they have loaded is kept until others are asked for.
        """
        adapter = self.suite.adapter
        job = Job(
            store=self.store,
            model=self.model,
            data=self.data,
            adapter=adapter if dropout is None else replace(adapter, dropout=dropout),
            head=self.suite.head,
            train=self.suite.train,
            subspace=SubspaceSettings(init),
            seed=seed,
            trainer_options=self.trainer_options,
        )
        if self._arm is None or self._arm.job != job:
            self._arm = Arm(job, self.suite)
        return self._arm

    def merges(self) -> Iterator[Row]:
        """Run-time merges and static ones, and every task with its own adapter."""
        for init, seed in product(self.settings.inits, self.suite.seeds):
            arm = self.arm(init, seed)
            known = {"part": "text", "seed": seed, "init": init}
            yield from arm.rows(arm.individual(), method=INDIVIDUAL, **known)
            for method in STATIC:
                yield from self._merged(arm, method, None, **known)
            for method in (DIRECT, MC, ORTHOGONAL):
                for samples in (1,) if method == DIRECT else self.settings.draws:
                    yield from self._merged(arm, method + RUNTIME_SUFFIX, samples, **known)

    def redundancy(self) -> Iterator[Row]:
        """Every adapter alone against its drop rate, by the dropout that it was trained with."""
        for dropout, seed in product(self.settings.dropouts, self.suite.seeds):
            arm = self.arm(FREE, seed, dropout)
            for rate in self.settings.all_rates:
                yield from arm.rows(
                    arm.thinned(rate),
                    part="redundancy",
                    seed=seed,
                    init=FREE,
                    method=MC,
                    samples=1,
                    drop_rate=rate,
                    dropout=dropout,
                )

    def pieces(self) -> list[list[Piece]]:
        """Phases of what processes can do side by side."""
        settings, seeds = self.settings, self.suite.seeds
        arms: dict[tuple[Init, int, float], None] = {}
        scores: list[Piece] = []
        if "text" in settings.parts:
            ways: list[tuple[str, int | None]] = [(method, None) for method in STATIC]
            ways.append((DIRECT + RUNTIME_SUFFIX, 1))
            ways += [(m + RUNTIME_SUFFIX, k) for m, k in product((MC, ORTHOGONAL), settings.draws)]
            for arm in product(settings.inits, seeds, [self.suite.adapter.dropout]):
                arms[arm] = None
                scores.append(Piece("texts", "individual", arm))
                scores += [Piece("texts", "merge", (*arm, *way)) for way in ways]
        if "redundancy" in settings.parts:
            for seed, dropout in product(seeds, settings.dropouts):
                arms[FREE, seed, dropout] = None
                rates = settings.all_rates
                scores += [Piece("texts", "thin", (seed, dropout, rate)) for rate in rates]
        tasks = list(self.suite.tasks)
        confined = any(SubspaceSettings(init).needs_others for init in settings.inits)
        read = tasks if "text" in settings.parts and confined else []
        covariances = [Piece("texts", "covariance", (task,)) for task in read]
        subspaces = [
            Piece("texts", "subspace", (init, task))
            for init, task in product(settings.inits, tasks)
            if "text" in settings.parts and SubspaceSettings(init).has_rows
        ]
        adapters = [Piece("texts", "adapter", (*arm, task)) for arm, task in product(arms, tasks)]
        return [covariances, subspaces, adapters, scores]

    def covariance(self, task: str) -> None:
        """Build the stage of a task's covariance."""
        self.arm(FREE, self.suite.seeds[0]).job.covariance(task)

    def subspace(self, init: Init, task: str) -> None:
        """Build the stage of a task's subspace."""
        self.arm(init, self.suite.seeds[0]).job.subspace_of(task)

    def adapter(self, init: Init, seed: int, dropout: float, task: str) -> None:
        """Build the stage of a task's adapter."""
        self.arm(init, seed, dropout).job.train_adapter(task)

    def individual(self, init: Init, seed: int, dropout: float) -> None:
        """Build the stage of every task with its own adapter."""
        self.arm(init, seed, dropout).individual()

    def merge(
        self, init: Init, seed: int, dropout: float, method: str, samples: int | None
    ) -> None:
        """Build the stages of a merge."""
        self.arm(init, seed, dropout).merged(method, samples or 1)

    def thin(self, seed: int, dropout: float, rate: float) -> None:
        """Build the stage of the adapters under a drop rate."""
        self.arm(FREE, seed, dropout).thinned(rate)

    def _merged(self, arm: Arm, method: str, samples: int | None, **known: Any) -> Iterator[Row]:
        coefficient, scores = arm.merged(method, samples or 1)
        known |= {"method": method.removesuffix(RUNTIME_SUFFIX), "samples": samples}
        yield from arm.rows(scores, coefficient=coefficient, **known)


class Arm:
    """The adapters of one job, and their scores as stages.

    Args:
        job: What trains them.
        suite: Coefficients to choose from.
    """

    def __init__(self, job: Job, suite: Suite) -> None:
        self.job = job
        self.suite = suite
        self.label = f"{job.arm}-dropout{job.adapter.dropout}"
        self.dtype = scoring_dtype(job.trainer_options)

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Task -> its trained adapter's directory."""
        return {task: self.job.train_adapter(task) for task in self.job.data}

    @cached_property
    def adapters(self) -> list[Adapter]:
        """The trained adapters, one per task."""
        return [Adapter.load(path, name=task) for task, path in self.paths.items()]

    @cached_property
    def evaluator(self) -> Evaluator:
        """Backbone and heads, loaded when a score is missing."""
        return make_evaluator(self.job.model, self.job.data, self.adapters, self.dtype)

    def individual(self) -> Scores:
        """Test scores of every task with its own adapter."""

        def build(report: Report) -> Scores:
            return evaluate_individual(self.evaluator, self.adapters, "test", report)

        scores: Scores = self._stage("scores", INDIVIDUAL, {}, build)
        return scores

    def merged(self, method: str, samples: int) -> tuple[float, Scores]:
        """The coefficient that validation rows choose, and the test scores at it."""

        def curve(report: Report) -> Any:
            fusion = Fusion(self.adapters, method, self.job.seed)
            grid = self.suite.coefficients
            return list(score_curve(self.evaluator, fusion, grid, samples, report).items())

        inputs = {"method": method, "samples": samples, "rows": self._rows("validation")}
        inputs["coefficients"] = list(self.suite.coefficients)
        label = f"{method}-{samples}"
        chosen = best_coefficient(dict(self._stage("curves", label, inputs, curve)), self.job.data)

        def build(report: Report) -> Scores:
            fusion = Fusion(self.adapters, method, self.job.seed)
            return evaluate_fusion(self.evaluator, fusion, chosen, "test", samples, report)

        inputs = {"method": method, "samples": samples, "coefficient": chosen}
        return chosen, self._stage("scores", label, inputs, build)

    def thinned(self, rate: float) -> Scores:
        """Test scores of every task with its own adapter under Monte Carlo dropout."""

        def build(report: Report) -> Scores:
            scores: Scores = {}
            for done, adapter in enumerate(self.adapters, 1):
                fusion = Fusion([adapter], MC + RUNTIME_SUFFIX, self.job.seed, drop_rates=[rate])
                with fusion.on(self.evaluator.backbone, 1.0):
                    scores |= self.evaluator.scores("test", [adapter.name])
                report(done, len(self.adapters))
            return scores

        scores: Scores = self._stage("thinned", f"rate{rate}", {"rate": rate}, build)
        return scores

    def rows(self, scores: Scores, **known: Any) -> Iterator[Row]:
        """The headline metric of every task, and their mean."""
        known = {"dropout": self.job.adapter.dropout} | known
        for task, data in self.job.data.items():
            metric = data.task.headline
            yield Row(task=task, metric=metric, value=scores[task][metric], **known)
        average = headline_average(scores, self.job.data)
        yield Row(task=AVERAGE, metric="headline", value=average, **known)

    def _stage(
        self, kind: str, label: str, inputs: Mapping[str, Any], make: Callable[[Report], Any]
    ) -> Any:
        """What `make` returns, kept as JSON."""

        def build(directory: Path, report: Report) -> None:
            text = json.dumps(make(report), indent=1)
            (directory / FILE).write_text(text + "\n", encoding="utf-8")

        known = dtype_inputs(self.dtype) | {
            "adapters": {task: path.name for task, path in self.paths.items()},
            "rows": self._rows("test"),
            "train": asdict(self.job.train)["max_length"],
            "seed": self.job.seed,
        }
        path = self.job.store.run(kind, f"{self.label}/{label}", known | dict(inputs), build)
        return json.loads((path / FILE).read_text(encoding="utf-8"))

    def _rows(self, split: Split) -> dict[str, str]:
        return {task: data.fingerprint(split) for task, data in self.job.data.items()}
