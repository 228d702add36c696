"""The heads of all tasks aligned with one merge, see `trainers.alignment`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.results import merit
from merge_algorithms import Adapter, UserError, merge
from trainers.alignment import align_layer
from trainers.backbone import token_states
from trainers.metrics import make_metrics

if TYPE_CHECKING:  # which scores with what is made here
    from benchmarks.evaluate import Evaluator
    from benchmarks.fusion import Coefficient, Fusion

MUS = (10.0, 1.0, 0.1, 0.01)
"""Strengths of the shrinkage that validation rows choose from, the least change first."""
Head = dict[str, Tensor]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Alignment:
    """The heads that suit one merge at one coefficient.

    Attributes:
        heads: Task -> the tensors of its head, aligned or as trained.
        mus: Task -> the strength of the shrinkage that validation chose; None where no candidate
            scored better than the head as it was trained.
    """

    heads: dict[str, Head] = field(default_factory=dict)
    mus: dict[str, float | None] = field(default_factory=dict)


class HeadAligner:
    """Aligns the heads of an evaluator, all its tasks'.

    It reads the inputs of the training rows, and validation rows with their labels to choose how
    much a head changes. The adapters' own features do not depend on the merge: they are computed
    once and kept in memory, (rows, width) float32 a task.

    Args:
        evaluator: Backbone, heads and data.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self._alone: dict[str, tuple[Adapter, Tensor]] = {}
        self._made: tuple[Fusion | None, dict[str, Alignment]] = None, {}

    def check(self) -> None:
        """Refuse heads that are none of osrm's own: UserError."""
        if self.evaluator.modules:
            return
        task, data = next(iter(self.evaluator.data.items()))
        if data.task.kind == "causal_lm":
            raise UserError(
                f"task '{task}' is a causal_lm, which has no head to align: leave the aligning out"
            )
        raise UserError(
            f"the head of task '{task}' lies in the modules_to_save of a plain PEFT classifier:"
            " only heads that osrm trained can be aligned"
        )

    def rows(self, fusion: Fusion, coefficient: Coefficient) -> int:
        """Number of rows that `align` will read."""
        if repr(coefficient) in self._known(fusion):
            return 0
        data = self.evaluator.data
        merged = {task: len(rows.rows("train")) for task, rows in data.items()}
        alone = [rows for task, rows in merged.items() if self._kept(fusion, task) is None]
        return sum(merged.values()) + sum(alone) + self.evaluator.rows("validation")

    @torch.no_grad()
    def align(
        self, fusion: Fusion, coefficient: Coefficient, advance: Advance = lambda rows: None
    ) -> Alignment:
        """The heads for a merge at a coefficient; those of the last merge asked for are kept.

        Args:
            fusion: A merge in the weights, of adapters among which is every task's own.
            coefficient: What it is multiplied by.
            advance: Called with the number of rows after every batch.

        Raises:
            UserError: Heads that cannot be aligned, or a run-time merge.
        """
        self.check()
        if fusion.merged is None:
            raise UserError(
                f"method '{fusion.method}' works at run time: heads can be aligned only with a"
                " merge that is in the weights"
            )
        known = self._known(fusion)
        if repr(coefficient) not in known:
            tasks = self.evaluator.data
            alone = {task: self._own_features(fusion, task, advance) for task in tasks}
            found = Alignment()
            with fusion.on(self.evaluator.backbone, coefficient):
                for task in tasks:
                    found.mus[task], found.heads[task] = self._align(task, alone[task], advance)
            known[repr(coefficient)] = found
            self._made = fusion, known
        return known[repr(coefficient)]

    def _known(self, fusion: Fusion) -> dict[str, Alignment]:
        """Coefficient, as text, -> what was found for this merge."""
        last, known = self._made
        return known if last is fusion else {}

    def _align(self, task: str, alone: Tensor, advance: Advance) -> tuple[float | None, Head]:
        """Of the head as it is and of one for every mu, that with the best validation score."""
        data, trained = self.evaluator.data[task], self.evaluator.heads[task]
        merged, _ = self._features(task, data.ordered_train_dataloader(), advance)
        rows, labels = self._features(task, data.val_dataloader(), advance)
        layer = "out" if self.evaluator.modules[task].dense is None else "dense"
        weight, bias = trained[f"{layer}.weight"], trained.get(f"{layer}.bias")
        heads: dict[float | None, Head] = {None: trained}
        for mu in MUS:
            new_weight, new_bias = align_layer(merged, alone, weight, bias, mu)
            heads[mu] = trained | {f"{layer}.weight": new_weight}
            if new_bias is not None:
                heads[mu][f"{layer}.bias"] = new_bias
        scores = {mu: self._score(task, head, rows, labels) for mu, head in heads.items()}
        chosen = max(scores, key=lambda mu: scores[mu])  # the first of several: the least change
        return chosen, heads[chosen]

    def _score(self, task: str, head: Head, features: Tensor, labels: Tensor) -> float:
        """The headline metric of a head; where it is undefined, worse than any."""
        evaluator = self.evaluator
        with heads_in_place(evaluator, {task: head}):
            logits = evaluator.modules[task].logits(features.to(evaluator.device))
        metrics = make_metrics(evaluator.data[task].task, evaluator.outputs(task))
        metrics.update(evaluator.predictions(logits).cpu(), labels)
        return merit(metrics.compute()[evaluator.data[task].task.headline])

    def _own_features(self, fusion: Fusion, task: str, advance: Advance) -> Tensor:
        """The task's features under its own adapter alone, computed once."""
        kept = self._kept(fusion, task)
        if kept is None:
            adapter = _own_adapter(fusion, task)
            with merge([adapter]).apply_to(self.evaluator.backbone):
                loader = self.evaluator.data[task].ordered_train_dataloader()
                kept, _ = self._features(task, loader, advance)
            self._alone[task] = adapter, kept
        return kept

    def _kept(self, fusion: Fusion, task: str) -> Tensor | None:
        adapter, features = self._alone.get(task, (None, None))
        return features if adapter is _own_adapter(fusion, task) else None

    def _features(self, task: str, loader: DataLoader, advance: Advance) -> tuple[Tensor, Tensor]:
        """(n, width) pooled features of the rows as the backbone now is, and their labels."""
        head = self.evaluator.modules[task]
        features, labels = [], []
        for batch in loader:
            batch = {name: tensor.to(self.evaluator.device) for name, tensor in batch.items()}
            states = token_states(self.evaluator.backbone, batch).float()
            features.append(head.pool(states, batch["attention_mask"]).cpu())
            labels.append(batch["labels"].cpu())
            advance(len(batch["labels"]))
        return torch.cat(features), torch.cat(labels)


@contextmanager
def heads_in_place(evaluator: Evaluator, heads: Mapping[str, Head]) -> Iterator[None]:
    """While the context lasts, the evaluator scores these tasks with these heads."""
    try:
        for task, head in heads.items():
            evaluator.modules[task].load_state_dict(head)
        yield
    finally:
        for task in heads:
            evaluator.modules[task].load_state_dict(evaluator.heads[task])


def _own_adapter(fusion: Fusion, task: str) -> Adapter:
    return next(adapter for adapter in fusion.adapters if task in adapter.heads)
