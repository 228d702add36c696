"""A study on the terminal: a line for every trial that has finished, a bar for every worker."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.study import StudySettings, Watcher
from benchmarks.study_results import StudyResults, StudyTrial
from benchmarks.workers import Stage


class StudyProgress(Watcher):
    """Bars where the output is a terminal; lines anywhere.

    Args:
        settings: Say how long the study is.
    """

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.console = Console(stderr=True)  # results can be piped
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.started = time.monotonic()
        total = settings.trials or 60 * (settings.minutes or 0) or None
        self.all = self.bars.add_task("study", total=total)
        self.workers = [
            self.bars.add_task(f"  worker {index + 1}: starting", total=None)
            for index in range(settings.workers)
        ]

    def __enter__(self) -> StudyProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def heard(self, worker: int, trial: StudyTrial, stage: Stage) -> None:
        """Draw how far the worker's stage is."""
        said = f"  {trial.arm.name}: {stage.title}"
        bar = self.workers[worker]
        self.bars.update(bar, description=said, completed=stage.done, total=stage.total or None)
        if not self.settings.trials:
            self.bars.update(self.all, completed=time.monotonic() - self.started)

    def finished(self, worker: int, trial: StudyTrial, results: StudyResults) -> None:
        """Say what the trial scored."""
        count = len(results.trials)
        of = f"/{self.settings.trials}" if self.settings.trials else ""
        outcome = trial.outcome
        if outcome is None:
            said = f"refused: {trial.refused}"
        else:
            method, coefficient = outcome.best
            said = (
                f"individual {outcome.individual:.3f}, merged {outcome.merged:.3f}"
                f" ({method} × {coefficient:g}), {trial.seconds:.0f} s"
            )
        name = trial.arm.name + (f" ({trial.reference})" if trial.reference else "")
        line = f"[{count}{of}] {name}: {said}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self.settings.trials:
            self.bars.update(self.all, completed=count)
