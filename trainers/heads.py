"""Task heads: pooled token states to logits, as transformers' classification heads compute them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_algorithms import Adapter, UserError
from trainers.settings import HeadSettings


class TaskHead(nn.Module):
    """Pooling, an optional dense + tanh layer, and the output layer.

    With `hidden` it is the head of RobertaForSequenceClassification (pooling 'cls') and of
    T5ForSequenceClassification (pooling 'last' on the decoder's states); with pooling 'last' and
    no bias that of LlamaForSequenceClassification. Regression outputs are standardised inside:
    the layer predicts (target - mean) / std, the caller sees the target's own unit.

    Args:
        width: Width d of the token states.
        outputs: Number of classes, or 1 for regression.
        settings: See HeadSettings.
        target_mean: Mean of the training targets (regression), in their unit.
        target_std: Their standard deviation.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        width: int,
        outputs: int,
        settings: HeadSettings,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.dropout = nn.Dropout(settings.dropout)
        self.dense = nn.Linear(width, width) if settings.hidden else None
        self.out = nn.Linear(width, outputs, bias=settings.bias)
        self.register_buffer("target_mean", torch.tensor(target_mean, dtype=torch.float32))
        self.register_buffer("target_std", torch.tensor(target_std, dtype=torch.float32))

    @classmethod
    def load(cls, directory: str | Path, task: str | None = None) -> TaskHead:
        """The head that `osrm train` or `osrm merge` left beside an adapter, in evaluation mode.

        Args:
            directory: The adapter's, or a Hub id.
            task: Which of a merge's heads; an adapter of one task has one only.

        Raises:
            UserError: No adapter there, or no head of this task that osrm trained.
        """
        adapter = Adapter.load(directory)
        name = task or next(iter(adapter.heads), "")
        spec = (adapter.head_info(name) or {}).get("head")
        if name not in adapter.heads or spec is None or (task is None and len(adapter.heads) > 1):
            wanted = f"task '{task}'" if task else "one task alone"
            raise UserError(
                f"{directory} has no head of {wanted} that osrm trained: name one of"
                f" {', '.join(adapter.heads) or 'none'}"
            )
        tensors = adapter.heads[name]
        return cls.of(spec, tensors, tensors["out.weight"].shape[1])

    @classmethod
    def of(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor], width: int) -> TaskHead:
        """A head from what osrm.json says of it and its tensors, in evaluation mode.

        Raises:
            RuntimeError: They do not fit together, as torch says it.
        """
        known = {field.name for field in fields(HeadSettings)}
        settings = HeadSettings(**{key: value for key, value in spec.items() if key in known})
        head = cls(width, spec["outputs"], settings)
        head.load_state_dict(dict(tensors))
        return head.eval()

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """(batch, length, d) token states and their (batch, length) mask to (batch, d)."""
        if self.settings.pooling == "cls":
            return states[:, 0]
        if self.settings.pooling == "last":
            positions = torch.arange(mask.shape[1], device=mask.device)
            last = (positions * mask).argmax(dim=1)
            return states[torch.arange(len(states), device=states.device), last]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Token states (batch, length, d) to logits (batch, outputs), float32."""
        return self.logits(self.pool(states.to(self.out.weight.dtype), mask))

    def logits(self, pooled: Tensor) -> Tensor:
        """What `pool` made, (batch, d), to logits (batch, outputs), float32."""
        pooled = self.dropout(pooled)
        if self.dense is not None:
            pooled = self.dropout(torch.tanh(self.dense(pooled)))
        logits: Tensor = self.out(pooled).float()
        return logits * self.target_std + self.target_mean
