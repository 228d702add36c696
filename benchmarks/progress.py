"""Progress on the terminal: one bar for all stages, one for each stage at work."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from trainers import store


class TerminalProgress(store.Progress):
    """Bars where the output is a terminal; a line per finished stage where it is not.

    Args:
        total: Number of stages.
    """

    def __init__(self, total: int) -> None:
        self.console = Console(stderr=True)  # results can be piped
        self.total = total
        self.done = 0
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.stages = self.bars.add_task("all stages", total=total)
        self.running: defaultdict[str, list[TaskID]] = defaultdict(list)

    def __enter__(self) -> TerminalProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def started(self, stage: str) -> store.Report:
        """Open a bar for the stage."""
        bar = self.bars.add_task(f"  {stage}", total=None)
        self.running[stage].append(bar)  # stages of different arms may be called the same

        def report(done: int, total: int) -> None:
            if bar in self.bars.task_ids:
                self.bars.update(bar, completed=done, total=total)

        return report

    def finished(self, stage: str, reused: bool) -> None:
        """Close the stage's bar and count it."""
        self.bars.remove_task(self.running[stage].pop(0))
        self.done += 1
        self.bars.update(self.stages, completed=self.done)
        if not self.console.is_terminal:
            note = " (reused)" if reused else ""
            self.console.print(
                f"[{self.done}/{self.total}] {stage}{note}", markup=False, soft_wrap=True
            )
