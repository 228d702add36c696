"""An adaptive search for the best way of confining A: individual against merged scores."""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.arm_run import ArmRun
from benchmarks.arms import ArmSettings, save_arms
from benchmarks.bench import Bench
from benchmarks.evaluate import headline_average
from benchmarks.report.study import write_study_report
from benchmarks.study_results import (
    StudyResults,
    StudyTrial,
    TrialOutcome,
    arm_as_json,
    arm_from_json,
    training_key,
)
from benchmarks.study_space import REFERENCES, Space
from benchmarks.workers import Done, Refused, Stage, Workers
from merge_algorithms.errors import UserError
from trainers.data import Part
from trainers.store import Progress, Store, stage_key, versions

if TYPE_CHECKING:
    import optuna

DEFAULT_MERGES = ("task_arithmetic", "regmean")
DEFAULT_MINUTES = 90.0
JOURNAL = "study.log"
REFERENCE = "reference"
ATTEMPTS = 200  # proposals in a row that were there before: nothing new is left
PARTS: tuple[Part, ...] = ("train", "validation", "covariance")  # no trial sees a test row
REFUSALS = 5  # without a single score: something is wrong with all of them


@dataclass(frozen=True)
class StudySettings:
    """When the search ends, and how many processes it has.

    Attributes:
        minutes: No trial is begun that would probably end later; None for no such limit.
        trials: Trials in all, those of earlier runs included; None for no such limit.
        workers: Processes that measure trials.
    """

    minutes: float | None = DEFAULT_MINUTES
    trials: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        for flag, least in (("trials", 1), ("minutes", 0)):
            value = getattr(self, flag)
            if value is not None and not value >= least:
                raise UserError(f"--study-{flag} is {value}: give at least {least}")


class Watcher:
    """Told what a study does; this one keeps it to itself."""

    def heard(self, worker: int, trial: StudyTrial, stage: Stage) -> None:
        """A worker is at a stage of a trial."""

    def finished(self, worker: int, trial: StudyTrial, results: StudyResults) -> None:
        """A trial has an outcome, or was refused."""


def measure(bench: Bench, trial: StudyTrial, progress: Progress) -> TrialOutcome:
    """Train an arm with the suite's first seed and score it on validation rows."""
    store = Store(bench.run_dir, progress)
    run = ArmRun(bench, store, trial.arm, bench.suite.seeds[0])
    curves = {
        method: {
            coefficient: headline_average(scores, run.data)
            for coefficient, scores in run.curve(method).items()
        }
        for method in bench.settings.merges
    }
    ratios = run.diagnostics()["leaked_own_ratio"].values()
    return TrialOutcome(
        individual=headline_average(run.alone("validation")["scores"], run.data),
        curves=curves,
        leaked_own_ratio=statistics.fmean(ratios),
    )


@dataclass
class Study:
    """A search over arms in the run directory of a bench, whose stages it shares.

    Attributes:
        bench: Suite, model and merging methods.
        settings: When it ends.
        watcher: Told about the trials.
    """

    bench: Bench
    settings: StudySettings
    watcher: Watcher = field(default_factory=Watcher)

    def run(self) -> StudyResults:
        """Search; study.csv, study.html and arms.yaml are written after every trial."""
        self.space = Space(self.bench.suite, self.bench.model)
        self.started = time.monotonic()
        self.running: dict[int, StudyTrial] = {}
        self.asked: dict[int, optuna.Trial] = {}
        self.exhausted = 0
        with Store(self.bench.run_dir).lock():
            self.study = self._open()
            results = self._results()
            with Workers(partial(measure, self.bench), self.settings.workers) as workers:
                while self._employ(workers, results):
                    for index, message in workers.messages():
                        match message:
                            case Stage():
                                self.watcher.heard(index, self.running[index], message)
                            case Done() | Refused():
                                trial = self._record(self.running.pop(index), message)
                                results = self._results()
                                self._save(results)
                                self.watcher.finished(index, trial, results)
            self._save(results)
        return results

    def _employ(self, workers: Workers, results: StudyResults) -> bool:
        """Give idle workers new trials while there is time; whether any worker is busy."""
        for index in workers.idle:
            trial = self._ask() if self._more(results) else None
            if trial is None:
                break
            self.running[index] = trial
            workers.give(index, trial)
        return bool(self.running)

    def _more(self, results: StudyResults) -> bool:
        """Whether another trial would be one of those wanted, and end in time."""
        wanted, minutes = self.settings.trials, self.settings.minutes
        if wanted is not None and len(results.trials) + len(self.running) >= wanted:
            return False
        usual = statistics.median([trial.seconds for trial, _ in results.scored()] or [0.0])
        elapsed = time.monotonic() - self.started
        return minutes is None or elapsed + usual <= 60 * minutes

    def _ask(self) -> StudyTrial | None:
        """The next trial; None if nothing is left that was not tried."""
        from optuna.trial import TrialState

        seen = {
            training_key(_arm(trial.user_attrs))
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state == TrialState.RUNNING or _is_finished(trial.user_attrs)
        }
        for _ in range(ATTEMPTS):
            self.study.sampler = self._sampler()
            asked = self.study.ask()
            arm = self.space.propose(asked)
            if training_key(arm) not in seen:
                asked.set_user_attr("name", arm.name)
                asked.set_user_attr("settings", arm_as_json(arm))
                self.asked[asked.number] = asked
                return StudyTrial(asked.number, arm, asked.user_attrs.get(REFERENCE, ""))
            self.study.tell(asked, state=TrialState.FAIL)
        return None

    def _sampler(self) -> optuna.samplers.BaseSampler:
        """Made anew for every trial, so that an interrupted study goes on as it would have."""
        import optuna

        count = len(self.study.get_trials(deepcopy=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=(1000 * self.bench.suite.seeds[0] + count) % 2**32,
                multivariate=True,
                group=True,
                constant_liar=True,
            )

    def _record(self, trial: StudyTrial, message: Done | Refused) -> StudyTrial:
        """Keep what came of a trial; the finished trial.

        Raises:
            UserError: The first trials were refused, all of them.
        """
        from optuna.trial import TrialState

        asked = self.asked.pop(trial.number)
        if isinstance(message, Refused):
            if message.again:  # left running, as by a run that was stopped: for the next one
                self.exhausted += 1
            else:
                asked.set_user_attr("refused", message.reason)
                self.study.tell(asked, state=TrialState.FAIL)
            results = self._results()
            count = len(results.trials) + self.exhausted
            if count >= REFUSALS and not results.scored():
                raise UserError(f"none of {count} trials could be scored: {message.reason}")
            return replace(trial, refused=message.reason)
        outcome = message.outcome
        asked.set_user_attr("outcome", outcome.as_json())
        asked.set_user_attr("seconds", message.seconds)
        if math.isnan(outcome.individual + outcome.merged):
            self.study.tell(asked, state=TrialState.FAIL)
        else:
            self.study.tell(asked, (outcome.individual, outcome.merged))
        return replace(trial, outcome=outcome, seconds=message.seconds)

    def _results(self) -> StudyResults:
        """The finished trials, those of earlier runs included."""
        suite = self.bench.suite
        results = StudyResults(
            name=self.bench.run_dir.name,
            suite=suite.name,
            preset=suite.preset,
            model=self.bench.model.name,
            merges=list(self.bench.settings.merges),
        )
        for trial in self.study.get_trials(deepcopy=False):
            known = trial.user_attrs
            if _is_finished(known):
                outcome = known.get("outcome")
                results.trials.append(
                    StudyTrial(
                        number=trial.number,
                        arm=_arm(known),
                        reference=known.get(REFERENCE, ""),
                        outcome=TrialOutcome.from_json(outcome) if outcome else None,
                        seconds=known.get("seconds", math.nan),
                        refused=known.get("refused", ""),
                    )
                )
        return results

    def _open(self) -> optuna.Study:
        """The study in the run directory's journal, begun now unless it is there already."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        suite = self.bench.suite
        # What decides a trial's scores; of the rows that is what is in them, wherever they are.
        apart = ("arms", "rows", "seeds")
        settings = {k: value for k, value in self.bench.describe().items() if k not in apart} | {
            "model": self.bench.model.fingerprint,
            "data": {
                name: [data.task.metrics, *map(data.fingerprint, PARTS)]
                for name, data in self.bench.data(suite.train).items()
            },
            "seed": suite.seeds[0],
            "space": self.space.choices(),
            "versions": versions(),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                study_name=f"{suite.name}-{stage_key(json.dumps(settings, sort_keys=True))}",
                storage=open_journal(self.bench.run_dir / JOURNAL),
                directions=["maximize", "maximize"],
                load_if_exists=True,
            )
        trials = study.get_trials(deepcopy=False)
        known = {trial.user_attrs.get(REFERENCE) for trial in trials}
        for name, parameters in self.space.references():
            if name not in known:
                study.enqueue_trial(parameters, user_attrs={REFERENCE: name})
        for trial in trials:
            if trial.state == optuna.trial.TrialState.RUNNING:  # when the last run was stopped
                parameters = trial.system_attrs.get("fixed_params", {}) | trial.params
                name = trial.user_attrs.get(REFERENCE, "")
                study.enqueue_trial(parameters, user_attrs={REFERENCE: name})
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return study

    def _save(self, results: StudyResults) -> None:
        directory, suite = self.bench.run_dir, self.bench.suite
        results.save(directory / "study.csv")
        write_study_report(results, directory)
        always = [
            replace(self.space.arm(REFERENCES[reference]), name=name)
            for reference, name in (("plain LoRA", "lora"), ("the paper", "osrm"))
        ]
        finalists = results.finalists(always)
        # What rank, rate and modules do alone is not to be counted as what confining A does.
        twins = {training_key(arm): arm for arm in map(self.space.plain, finalists)}
        for arm in (*finalists, *always):
            twins.pop(training_key(arm), None)
        save_arms(directory / "arms.yaml", [*finalists, *twins.values(), *always], suite)


def open_journal(path: Path) -> optuna.storages.JournalStorage:
    """The journal of a study, rid of what a killed process left: a lock, half a last line.

    The caller alone may write it, as the holder of the run directory's lock does.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists():
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        with path.open("rb+") as file:
            file.truncate(len(whole))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def _is_finished(attributes: Mapping[str, Any]) -> bool:
    """Whether a trial has an outcome, be it undefined, or was refused for good."""
    return "outcome" in attributes or "refused" in attributes


def _arm(attributes: Mapping[str, Any]) -> ArmSettings:
    return arm_from_json(attributes["name"], attributes["settings"])
