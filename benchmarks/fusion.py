"""Adapters that act together on one backbone: merged into its weights, or at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

from torch import Tensor, nn

from benchmarks.results import ALIGNED_SUFFIX, RUNTIME_SUFFIX
from merge_algorithms import Adapter, Merged, UserError, attach, merge
from merge_algorithms.registry import get_method

Coefficient = float | Mapping[str, float]
"""What a merged update is multiplied by: one number, or one by pattern of module names."""


class Fusion:
    """Several adapters and how they act together: merged into the weights, or at run time.

    Args:
        adapters: One or more.
        method: A method of merge_algorithms; with the suffix '_runtime' its run-time form, with
            '_aligned' its tasks are scored with heads aligned with the merge.
        seed: Decides random masks.
        weights: One per adapter, 1 by default.
        statistics: Adapter name -> module -> what a method that reads the data needs.
        options: The method's own. A run-time method whose `task` is left out computes another
            model for every task: each task is then scored on that of its own adapter.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        method: str,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        self.adapters = adapters
        self.aligned = method.endswith(ALIGNED_SUFFIX)
        method = method.removesuffix(ALIGNED_SUFFIX)
        self.method = method.removesuffix(RUNTIME_SUFFIX)
        self.runtime = method.endswith(RUNTIME_SUFFIX)
        self.seed = seed
        self.weights = weights or [1.0] * len(adapters)
        self.options = options
        self.merged: Merged | None = None
        if not self.runtime:
            self.merged = merge(
                adapters, method, weights=weights, seed=seed, statistics=statistics, **options
            )

    def with_aligned_heads(self) -> Fusion:
        """The same, its tasks scored with heads aligned with it."""
        fusion = copy(self)
        fusion.aligned = True
        return fusion

    @property
    def per_task(self) -> bool:
        """Whether every task has a model of its own, so that it has to be known which is asked."""
        known = get_method(self.method, self.runtime).options
        return any(option.name == "task" for option in known) and "task" not in self.options

    def on(
        self, backbone: nn.Module, coefficient: Coefficient, task: str | None = None
    ) -> AbstractContextManager[Any]:
        """While the context lasts, the backbone computes with `coefficient` times the merge.

        Args:
            backbone: Computes so while the context lasts, and is as before afterwards.
            coefficient: As `Merged.scaled` takes it; a run-time merge takes one number.
            task: The task to be scored, for methods that compute another model for each.
        """
        if self.merged is not None:
            return self.merged.scaled(coefficient).apply_to(backbone)
        if not isinstance(coefficient, int | float):
            raise UserError(
                f"method '{self.method}' works at run time, where one number scales all modules:"
                f" give that in place of {coefficient}"
            )
        if coefficient == 0:
            return nullcontext()
        weights = [coefficient * weight for weight in self.weights]
        options = dict(self.options)
        if self.per_task:
            options["task"] = next(a.name for a in self.adapters if task in a.heads)
        return attach(
            backbone, self.adapters, self.method, weights=weights, masks=self.seed, **options
        )
