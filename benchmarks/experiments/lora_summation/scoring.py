"""Test rows under one state of the model, as stages of a store."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.evaluate import dtype_inputs
from benchmarks.experiments.lora_summation.statistics import Rows
from benchmarks.fusion import Fusion
from benchmarks.language import losses
from benchmarks.results import Split
from osrm import resolve_targets
from trainers.backbone import ModelRef, auto_class, compute_in, load_backbone, pick_device
from trainers.data import TaskData
from trainers.store import Report, Store

FILE = "scores.json"
PARTS: tuple[Split, ...] = ("validation", "test")


@dataclass(frozen=True)
class Scored:
    """What one state of the model does.

    Attributes:
        rows: Task -> its test rows.
        coefficient: The scale of the merge.
        curve: (coefficient, validation loss in nats per token) of every one that was tried.
    """

    rows: dict[str, Rows]
    coefficient: float = 1.0
    curve: tuple[tuple[float, float], ...] = ()

    def union(self, tasks: Sequence[str]) -> Rows:
        """The test rows of some tasks together."""
        return Rows.union([self.rows[task] for task in tasks])


class Scorer:
    """Scores states of one base model, which it loads when a score is missing.

    Args:
        store: Where scores are kept.
        model: The base model.
        data: Task -> rows.
        targets: What the adapters' target modules are called.
        dtype: What the model computes in, but for those.
    """

    def __init__(
        self,
        store: Store,
        model: ModelRef,
        data: Mapping[str, TaskData],
        targets: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self.store = store
        self.model = model
        self.data = data
        self.targets = targets
        self.dtype = dtype

    @cached_property
    def backbone(self) -> nn.Module:
        """On the device."""
        backbone = load_backbone(self.model.path, torch.float32, auto_class("causal_lm"))
        compute_in(backbone, self.dtype, resolve_targets(backbone, self.targets))
        return backbone.to(pick_device())

    def score(
        self,
        label: str,
        tasks: Sequence[str],
        inputs: Mapping[str, Any],
        fuse: Callable[[], Fusion] | None = None,
        coefficients: Sequence[float] = (1.0,),
        samples: int = 1,
    ) -> Scored:
        """Choose the coefficient on validation rows if there are several, then test once.

        Args:
            label: Readable name of the stage.
            tasks: On whose rows.
            inputs: What the merge depends on, for the stage's key.
            fuse: Makes the merge, if the stage is missing; None for the base model as it is.
            coefficients: To choose from.
            samples: Draws that a run-time merge averages.
        """
        inputs = {
            **inputs,
            **dtype_inputs(self.dtype),
            "model": self.model.fingerprint,
            "coefficients": list(coefficients),
            "samples": samples,
            "data": {task: self._identity(task) for task in tasks},
        }

        def build(directory: Path, report: Report) -> None:
            fusion = fuse() if fuse is not None else None
            validated = list(coefficients) if len(coefficients) > 1 else []
            counts = {part: self._count(tasks, part) * samples for part in PARTS}
            total = counts["test"] + counts["validation"] * len(validated)
            done = 0

            def advance(rows: int) -> None:
                nonlocal done
                done += rows
                report(done, total)

            def measure(coefficient: float, part: Split) -> dict[str, Rows]:
                on = nullcontext() if fusion is None else fusion.on(self.backbone, coefficient)
                with on:
                    return {
                        task: Rows.of(
                            losses(self.backbone, self.data[task], part, samples, advance)
                        )
                        for task in tasks
                    }

            curve = [
                (value, Rows.union(list(measure(value, "validation").values())).loss)
                for value in validated
            ]
            best = coefficients[0]
            if curve:  # an undefined loss is worse than any
                best = min(curve, key=lambda point: (math.isnan(point[1]), point[1]))[0]
            content = {
                "coefficient": best,
                "curve": curve,
                "rows": {task: rows.as_json() for task, rows in measure(best, "test").items()},
            }
            (directory / FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")

        path = self.store.run("scores", label, inputs, build)
        found = json.loads((path / FILE).read_text(encoding="utf-8"))
        return Scored(
            {task: Rows.from_json(rows) for task, rows in found["rows"].items()},
            found["coefficient"],
            tuple((value, loss) for value, loss in found["curve"]),
        )

    def _identity(self, task: str) -> list[Any]:
        data = self.data[task]
        return [data.fingerprint("validation"), data.fingerprint("test"), data.max_length]

    def _count(self, tasks: Sequence[str], part: Split) -> int:
        return sum(len(self.data[task].rows(part)) for task in tasks)
