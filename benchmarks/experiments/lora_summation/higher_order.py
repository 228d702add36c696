"""Beyond three: adapters of parts of the domains, summed in subsets of growing size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.lora_summation.plan import Piece
from benchmarks.experiments.lora_summation.predictors import Predictors
from benchmarks.experiments.lora_summation.results import HigherRow
from benchmarks.experiments.lora_summation.scoring import Scored, Scorer
from benchmarks.experiments.lora_summation.settings import (
    HIGHER_METHODS,
    SUM,
    part_names,
    sample_subsets,
    shares,
)
from benchmarks.fusion import Fusion
from merge_algorithms import Adapter, UserError
from trainers.data import Part, TaskData
from trainers.rows import Row
from trainers.settings import Init

if TYPE_CHECKING:
    from benchmarks.experiments.lora_summation.study import Study

COVARIANCE_ROWS = 32


class PartData(TaskData):
    """One of several disjoint parts of a task's training rows; all else is the task's.

    Args:
        name: What the part's adapter is called.
        whole: The task's rows, enough for all parts.
        start: The part's first row.
        size: Its number of rows.
    """

    def __init__(self, name: str, whole: TaskData, start: int, size: int) -> None:
        super().__init__(
            replace(whole.task, name=name),
            whole.tokenizer,
            whole.train_settings,
            whole.row_settings,
        )
        self.whole = whole
        self.slice = slice(start, start + size)

    def rows(self, part: Part) -> list[Row]:
        """The rows in use."""
        if part == "covariance":
            return self.rows("train")[: self.row_settings.covariance]
        rows = self.whole.rows(part)
        return rows[self.slice] if part == "train" else rows


class HigherOrder:
    """The higher-order study of one seed: every initialisation, the same parts and subsets."""

    def __init__(self, study: Study, scorer: Scorer, seed: int) -> None:
        self.study = study
        self.scorer = scorer
        self.seed = seed
        self.domain: dict[str, str] = {}
        self.parts: dict[str, PartData] = {}
        suite = study.suite
        counts = shares(list(suite.tasks), study.settings.parts)
        for task, count in counts.items():
            if not count:
                continue
            size = None if suite.rows.train is None else max(suite.rows.train // 2, 2)
            cap = None if size is None else count * size
            covariance = min(suite.rows.covariance or COVARIANCE_ROWS, COVARIANCE_ROWS)
            rows = replace(suite.rows, train=cap, covariance=covariance)
            tokenizer = study.data[task].tokenizer
            whole = TaskData(suite.tasks[task], tokenizer, suite.train, rows)
            each = len(whole.rows("train")) // count
            if each < 2:
                raise UserError(
                    f"task '{task}' has {len(whole.rows('train'))} training rows, too few for"
                    f" {count} parts: use fewer with --parts"
                )
            for index, name in enumerate(part_names([task], count)):
                self.parts[name] = PartData(name, whole, index * each, each)
                self.domain[name] = task
        self.subsets = sample_subsets(list(self.parts), study.settings.subsets, seed)

    def run(self) -> list[HigherRow]:
        """All stages, and what they measured."""
        base = self.base()
        return [row for init in self.study.settings.inits for row in self.arm(init, base)]

    def build(self, piece: Piece) -> None:
        """Build the stages of one piece."""
        job = self.study.job(self.scorer.store, self.parts, piece.init, self.seed)
        match piece.kind:
            case "covariance":
                job.covariance(*piece.names)
            case "subspace":
                job.subspace_of(*piece.names)
            case "adapter":
                job.train_adapter(*piece.names)
            case _:
                self.arm(piece.init, self.base())

    def base(self) -> Scored:
        """The base model's scores."""
        return self.scorer.score("base", list(self.study.data), {})

    def arm(self, init: Init, base: Scored) -> list[HigherRow]:
        """One initialisation."""
        job = self.study.job(self.scorer.store, self.parts, init, self.seed)
        paths = {part: job.train_adapter(part) for part in self.parts}
        adapters = {part: Adapter.load(path, name=part) for part, path in paths.items()}
        predictors = Predictors(list(adapters.values()), job.covariances())
        alone = {
            part: self.score(f"{job.arm}/part-{part}", SUM, [part], adapters, paths)
            for part in self.parts
        }
        rows = []
        for subset in self.subsets:
            known = predictors.of(subset)
            for method in HIGHER_METHODS:
                label = f"{job.arm}/{method}-{len(subset)}of{len(self.parts)}-{'-'.join(subset)}"
                state = self.score(label, method, subset, adapters, paths)
                rows.append(
                    HigherRow(
                        seed=self.seed,
                        init=init,
                        subset=subset,
                        method=method,
                        change_individual=self._change(
                            subset, state, {part: alone[part] for part in subset}
                        ),
                        change_base=self._change(subset, state, dict.fromkeys(subset, base)),
                        rms_cosine=known["rms_cosine"],
                        interference=known["interference"],
                    )
                )
        return rows

    def score(
        self,
        label: str,
        method: str,
        subset: Sequence[str],
        adapters: Mapping[str, Adapter],
        paths: Mapping[str, Path],
    ) -> Scored:
        """Some adapters merged, on the test rows of their domains."""
        domains = list(dict.fromkeys(self.domain[part] for part in subset))
        inputs = {
            "method": method,
            "adapters": {part: paths[part].name for part in subset},
            "seed": self.seed,
        }
        chosen = [adapters[part] for part in subset]
        return self.scorer.score(label, domains, inputs, partial(Fusion, chosen, method, self.seed))

    def _change(
        self, subset: Sequence[str], state: Scored, references: Mapping[str, Scored]
    ) -> float:
        """Percent change in perplexity, the geometric mean over the parts' domains."""
        differences = [
            state.rows[self.domain[part]].loss - references[part].rows[self.domain[part]].loss
            for part in subset
        ]
        return 100 * math.expm1(math.fsum(differences) / len(differences))
