"""Aligned heads: a head's first layer corrected for what a merge did to the features it reads.

A head is trained on the features that its own adapter gives. Merging other adapters in shifts
them, while what the head should say stays the same: so the layer is fitted, by ridge regression
and without a label, to give on the merged features what it gave on its own. The correction is
ours. Representation surgery (Yang et al. 2024, arXiv 2402.02705) trains a bottleneck per task
that undoes the same shift; RegMean (Jin et al. 2023, arXiv 2212.09849) solves the same
least-squares problem for the layers of the backbone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge_algorithms.errors import UserError


def align_layer(
    merged: Tensor, alone: Tensor, weight: Tensor, bias: Tensor | None, mu: float
) -> tuple[Tensor, Tensor | None]:
    """A linear layer that gives on merged features nearly what it gave on the adapter's own.

    With rows z of the merged features, y of the adapter's own and the layer W x + b, the result is
    W + D and b + c, where D and c minimise

        sum_n ||D z_n + c - W (y_n - z_n)||^2 + mu s ||D||_F^2,

    and s is the mean square of a centred merged feature times the number of rows: ridge regression
    of the own outputs, shrunk towards the trained layer. c is not shrunk, so a large mu keeps the
    weight and moves the bias by the mean of the gap. A layer without bias gets none: there is no
    c, and the features are not centred.

    Args:
        merged: (n, d) features of the task's inputs under the merge.
        alone: (n, d) features of the same inputs under the task's adapter alone.
        weight: (outputs, d) W.
        bias: (outputs,) b, or None.
        mu: Strength of the shrinkage, without unit; above 0.

    Returns:
        Weight and bias of the same shapes and dtypes; solved in float64 on the CPU.

    Raises:
        UserError: Shapes that do not fit, no rows, numbers that are not finite, or a mu that is
            not positive and finite.
    """
    if not 0 < mu < math.inf:
        raise UserError(f"mu is {mu}: give a positive, finite strength of the shrinkage")
    if merged.ndim != 2 or not len(merged) or merged.shape != alone.shape:
        raise UserError(
            f"the features are {tuple(merged.shape)} under the merge and {tuple(alone.shape)}"
            " alone: expected the same (rows, width) of both, with at least one row"
        )
    if weight.shape[1:] != merged.shape[1:]:
        raise UserError(
            f"the layer's weight is {tuple(weight.shape)} but the features have width"
            f" {merged.shape[1]}: expected (outputs, {merged.shape[1]})"
        )
    z = merged.cpu().double()
    w = weight.cpu().double()
    gap = (alone.cpu().double() - z) @ w.T
    if not gap.isfinite().all():
        raise UserError("features or layer hold numbers that are not finite: nothing can be fitted")
    center, shift = torch.zeros_like(z[0]), torch.zeros_like(gap[0])
    if bias is not None:
        center, shift = z.mean(dim=0), gap.mean(dim=0)
    z, gap = z - center, gap - shift
    gram = z.T @ z
    ridge = mu * gram.diagonal().mean()
    change = torch.zeros_like(w)
    if ridge > 0:  # features that never change have nothing to fit a weight to
        gram.diagonal().add_(ridge)
        change = torch.cholesky_solve(z.T @ gap, torch.linalg.cholesky(gram)).T
    aligned = (w + change).to(weight)
    return aligned, None if bias is None else (bias.cpu().double() + shift - change @ center).to(
        bias
    )
