"""Scoring language models: the same merges, but the model predicts with its own head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.evaluate import Evaluator
from benchmarks.predictions import Predicted
from benchmarks.results import Split
from merge_algorithms import Adapter, UserError
from trainers.backbone import ModelRef, auto_class, load_backbone
from trainers.causal import RowLosses, next_token_logits, row_losses
from trainers.data import Part, TaskData
from trainers.metrics import LanguageMetrics
from trainers.texts import check_vocabulary


def losses(
    model: nn.Module,
    data: TaskData,
    part: Part,
    samples: int = 1,
    advance: Callable[[int], None] = lambda rows: None,
) -> RowLosses:
    """The losses of a task's rows, longest row first; see `row_losses`.

    Args:
        model: Computes with whatever updates it carries.
        data: Of a causal_lm.
        part: Which rows.
        samples: Forward passes whose probabilities are averaged.
        advance: Called with the number of rows after every batch.
    """
    device = next(model.parameters()).device
    found = []
    for batch in loader(data, part):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        found.append(row_losses(model, batch, samples))
        advance(len(batch["labels"]) * samples)
    return RowLosses.cat(found)


def loader(data: TaskData, part: Part) -> DataLoader:
    """Batches of the rows to score."""
    return data.val_dataloader() if part == "validation" else data.test_dataloader()


class LanguageEvaluator(Evaluator):
    """Scores causal_lm tasks; their adapters have heads without tensors."""

    def load_backbone(self, model: ModelRef) -> nn.Module:
        """The whole language model, in float32."""
        return load_backbone(model.path, torch.float32, auto_class("causal_lm"))

    def prepare_heads(self, adapters: Sequence[Adapter]) -> None:
        """Refuse adapters of other tokenizers or of tasks with heads of their own.

        Raises:
            UserError: As said.
        """
        for adapter in adapters:
            for task in adapter.heads:
                info = adapter.head_info(task) or {}
                if task in self.data:
                    if adapter.heads[task]:
                        raise UserError(
                            f"the adapter of task '{task}' has a head of its own, so it is none of"
                            " a causal_lm: check the kind of the task"
                        )
                    tokenizer = self.data[task].tokenizer
                    check_vocabulary(task, info.get("vocabulary"), tokenizer)

    def logits(self, task: str, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch, length, vocabulary)."""
        return next_token_logits(self.backbone, batch)

    def _score(
        self, task: str, split: Split, samples: int, advance: Callable[[int], None]
    ) -> tuple[dict[str, float], Predicted]:
        found = losses(self.backbone, self.data[task], split, samples, advance)
        metrics = LanguageMetrics(self.data[task].task.metrics)
        metrics.update(found.nll, found.tokens, found.correct)
        groups = np.array(self.data[task].groups(split))
        return metrics.scores(), Predicted(
            found.tokens.numpy(),
            torch.stack([found.nll, found.correct.to(found.nll)], 1).numpy(),
            groups,
        )
