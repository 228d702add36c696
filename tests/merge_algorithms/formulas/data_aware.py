"""Methods that read statistics of the adapters' data."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from formulas.case import Case, Dense
from merge_algorithms import Adapter


def regmean(
    dense: Dense, w: Tensor, statistics: Dense, off_diagonal: float = 0.9, ridge: float = 1e-6
) -> Dense:
    """argmin_X sum_t w_t tr((X - dW_t) C_t (X - dW_t)^T) as one dense least-squares problem."""
    merged = {}
    for module, updates in dense.items():
        roots, targets = [], []
        for weight, c, update in zip(w, statistics[module], updates, strict=True):
            diagonal = c.diagonal()
            reduced = off_diagonal * c + torch.diag((1 - off_diagonal) * diagonal)
            reduced += ridge * diagonal.mean() * torch.eye(len(c), dtype=c.dtype)
            values, vectors = torch.linalg.eigh(weight * reduced)
            roots.append(values.clamp(min=0).sqrt()[:, None] * vectors.T)
            targets.append(roots[-1] @ update.T)
        merged[module] = torch.linalg.lstsq(torch.cat(roots), torch.cat(targets)).solution.T
    return merged


def fisher(
    dense: Dense, w: Tensor, statistics: Dense, floor: float = 1e-6, normalize: bool = False
) -> Dense:
    """sum_t w_t F_t dW_t / sum_t w_t F_t on the flattened model."""
    flat = torch.cat([x.flatten(1) for x in dense.values()], 1)
    information = torch.cat([statistics[m].flatten(1) for m in dense], 1)
    information = torch.maximum(information, floor * information.mean(1, keepdim=True))
    if normalize:
        raw = torch.cat([statistics[m].flatten(1) for m in dense], 1)
        information = information / raw.norm(dim=1, keepdim=True)
    weighted = information * w[:, None]
    pieces = (weighted * flat).sum(0) / weighted.sum(0)
    sizes = [x[0].numel() for x in dense.values()]
    return {m: p.view_as(dense[m][0]) for m, p in zip(dense, pieces.split(sizes), strict=True)}


def _numbers(*names: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(names).encode()))


def _shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    return {m: u.shape for a in adapters for m, u in a.updates.items()}


def covariances(adapters: Sequence[Adapter]) -> dict[str, Dense]:
    """Of 7 tokens, few or enough; modules of one block with one width share a tensor."""
    result: dict[str, Dense] = {}
    for adapter in adapters:
        shared: dict[tuple[str, int], Tensor] = {}
        result[adapter.name] = {}
        for module, (_, width) in _shapes(adapters).items():
            key = module.rpartition(".")[0], width
            if key not in shared:
                h = torch.randn(
                    7, width, generator=_numbers(adapter.name, *key), dtype=torch.float64
                )
                h += 0.5
                shared[key] = (h.T @ h / 7).float()
            result[adapter.name][module] = shared[key]
    return result


def informations(adapters: Sequence[Adapter]) -> dict[str, Dense]:
    """Many orders of magnitude apart; a fifth of the entries is exactly 0."""
    result: dict[str, Dense] = {}
    for adapter in adapters:
        result[adapter.name] = {}
        for module, shape in _shapes(adapters).items():
            draw = _numbers(adapter.name, module)
            x = torch.rand(shape, generator=draw, dtype=torch.float32) - 0.2
            result[adapter.name][module] = x.relu() ** 4 * 1e-6
    return result


_BAD_WEIGHTS = ({"weights": [1.0, -0.5]}, {"weights": [0.0, 0.0]})
CASES = [
    Case(
        "regmean",
        regmean,
        options=(
            {},
            {"off_diagonal": 1.0, "ridge": 1e-3},
            {"off_diagonal": 0.5, "ridge": 0.0},
            {"off_diagonal": 0.0},
        ),
        bad=(
            *_BAD_WEIGHTS,
            {"off_diagonal": 1.5},
            {"off_diagonal": -0.1},
            {"off_diagonal": float("nan")},
            {"ridge": -1e-3},
            {"ridge": float("nan")},
        ),
        statistics=covariances,
    ),
    Case(
        "fisher",
        fisher,
        options=({}, {"normalize": True}, {"floor": 0.3, "normalize": True}, {"floor": 1.0}),
        bad=(*_BAD_WEIGHTS, {"floor": 0.0}, {"floor": 2.0}, {"floor": float("nan")}),
        statistics=informations,
    ),
]
