"""Scores of one task, accumulated batch by batch with torchmetrics."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef, classification

from trainers.tasks import METRICS, Task


class Matthews(classification.MulticlassConfusionMatrix):
    """Matthews' correlation coefficient, 0 where it is undefined (one class only).

    torchmetrics' own gives constant predictions on two classes a score far from 0 there.
    """

    def compute(self) -> Tensor:
        """The coefficient of all batches so far, a float64 scalar."""
        counts = self.confmat.cpu().double()  # whole numbers: the comparison with 0 is exact
        rows, true, found = counts.sum(), counts.sum(dim=1), counts.sum(dim=0)
        covariance = counts.trace() * rows - true @ found
        variances = (rows**2 - true @ true) * (rows**2 - found @ found)
        return torch.where(variances > 0, covariance / variances.sqrt(), 0.0)


class TaskMetrics(nn.Module):
    """Accumulates a task's metrics on the CPU, in dtypes of its own.

    Built by `make_metrics`. `names` are the task's metrics in its order, the headline first.
    """

    def __init__(self, task: Task, parts: MetricCollection) -> None:
        super().__init__()
        self.names = task.metrics
        self.kind = task.kind
        self.parts = parts

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: (n, classes) logits; for a regression (n,) or (n, 1) predictions in the
                units of the labels. Any float dtype.
            labels: (n,) class indices, or numbers.
        """
        outputs, labels = outputs.detach().cpu(), labels.cpu()
        if self.kind == "classification":
            self.parts.update(outputs.argmax(dim=-1), labels)
        else:
            # Sums of equal float32 numbers are exact in float64: of constant predictions not even
            # rounding is left to correlate with.
            outputs = outputs.float().double()
            self.parts.update(outputs.reshape(-1), labels.double().reshape(-1))

    def compute(self) -> dict[str, float]:
        """The scores so far, by the task's metric names, each a number of at most 1.

        A correlation with constant predictions is undefined; it counts as 0, so that a model
        that has collapsed scores as one that knows nothing.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns of the constant predictions
            parts = self.parts.compute()
        scores = {part: torch.nan_to_num(score, nan=0.0).item() for part, score in parts.items()}
        return {
            name: statistics.fmean(scores[part] for part in name.split("+")) for name in self.names
        }

    def reset(self) -> None:
        """Forget every batch."""
        self.parts.reset()

    def _apply(self, *_: Any, **__: Any) -> TaskMetrics:
        """Stay as it is when the module around it goes to another device or dtype."""
        return self


def make_metrics(task: Task, num_labels: int = 1) -> TaskMetrics:
    """The metrics of a task.

    'accuracy'; 'f1' of class 1 if there are two classes, otherwise the unweighted mean over the
    classes that occur; 'matthews', Matthews' correlation coefficient; 'pearson'; 'spearman'
    (ties get their mean rank); "a+b", the mean of a and b. A `Task` holds no other names.

    Args:
        task: Names the metrics, the headline first.
        num_labels: Number of classes, at least 2; not used for a regression.
    """
    wanted = dict.fromkeys(part for name in task.metrics for part in name.split("+"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Spearman's announces that it keeps every prediction
        parts = MetricCollection(
            {part: _build(part, num_labels) for part in wanted}, compute_groups=False
        )
    return TaskMetrics(task, parts)


def _build(name: str, num_labels: int) -> Metric:
    match name:
        case "accuracy":
            return classification.MulticlassAccuracy(num_labels, average="micro")
        case "f1" if num_labels == 2:
            return classification.BinaryF1Score()
        case "f1":
            return classification.MulticlassF1Score(num_labels, average="macro")
        case "matthews":
            return Matthews(num_labels)
        case "pearson":
            return PearsonCorrCoef().set_dtype(torch.float64)
        case _:
            return SpearmanCorrCoef()


class LanguageMetrics(Metric):
    """Scores of a language model over rows of text, whatever the batches.

    With s_i the summed negative log-likelihood of row i's n_i counted tokens, N rows:
    'log_likelihood' -L, L = sum s_i / sum n_i, in nats per token; 'perplexity' exp(L), so every
    token weighs the same; 'token_accuracy', the share of tokens that were the most probable;
    'perplexity_stderr' exp(L) sqrt(N/(N-1) sum (s_i - L n_i)^2) / sum n_i: the delta method for a
    ratio of means over independent rows (tokens of one row are not independent), infinite for one
    row.

    Args:
        names: What `scores` returns, in this order; "a+b" is the mean of a and b.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = tuple(names)
        # N, sum n, sum s, sum n^2, sum s n, sum s^2, correct tokens.
        self.add_state("sums", torch.zeros(7, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor, correct: Tensor) -> None:
        """Add rows: (n,) each, see trainers.causal.RowLosses."""
        nll, tokens, correct = (column.cpu() for column in (nll, tokens, correct))
        s, n = nll.double(), tokens.double()
        parts = [(n > 0).sum().double(), n.sum(), s.sum(), n @ n, s @ n, s @ s, correct.sum()]
        self.sums += torch.stack([part.double() for part in parts]).to(self.sums)

    def compute(self) -> dict[str, float]:
        """Every score of all rows so far; NaN if no token counted."""
        count, n, s, nn_, sn, ss, correct = self.sums.tolist()
        if not n:
            return dict.fromkeys(METRICS["causal_lm"], math.nan)
        loss = s / n
        residual = max(ss - 2 * loss * sn + loss**2 * nn_, 0.0)
        error = math.sqrt(count / (count - 1) * residual) / n if count > 1 else math.inf
        perplexity = math.exp(min(loss, 700.0))  # what a float holds
        return {
            "token_accuracy": correct / n,
            "log_likelihood": -loss,
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * error,
        }

    def _apply(self, *_: Any, **__: Any) -> LanguageMetrics:
        """Stay as it is: in bfloat16 a count of tokens would stop at 256."""
        return self

    def scores(self) -> dict[str, float]:
        """Those that `names` lists."""
        found = self.compute()
        return {name: statistics.fmean(found[p] for p in name.split("+")) for name in self.names}
