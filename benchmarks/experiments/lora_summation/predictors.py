"""What could tell beforehand how a sum of adapters will do: one number for each combination."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from merge_algorithms import Adapter
from merge_algorithms.similarity import cosines, rms_cosine
from osrm import Covariance, interference_matrix

PREDICTORS = {
    "rms_cosine": "RMS cosine between the updates",
    "interference": "interference on the other tasks' data",
}


class Predictors:
    """The predictors of every combination of some adapters.

    Args:
        adapters: Named as their tasks.
        covariances: Task -> covariance; None leaves the interference out.
    """

    def __init__(
        self, adapters: Sequence[Adapter], covariances: Mapping[str, Covariance] | None
    ) -> None:
        self.index = {adapter.name: i for i, adapter in enumerate(adapters)}
        self._cosines = rms_cosine(cosines(adapters))
        self._interference = (
            None if covariances is None else interference_matrix(adapters, covariances)
        )

    def of(self, combination: Sequence[str]) -> dict[str, float]:
        """Predictor -> value for these adapters, at least two.

        'rms_cosine' (arXiv 2508.11985): root of the mean over modules and pairs of the squared
        cosine. 'interference': mean over ordered pairs i != j of sum_modules E_j||dW_i h||^2 /
        sum_modules E_i||dW_i h||^2. NaN where there is none.
        """
        where = [self.index[name] for name in combination]
        pairs = list(combinations(where, 2))
        squares = torch.stack([self._cosines[i, j] for i, j in pairs]).square()
        found = {"rms_cosine": float(squares.nanmean().sqrt())}
        found["interference"] = (
            math.nan
            if self._interference is None
            else float(_off_diagonal(self._interference[where][:, where]).mean())
        )
        return found


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]
