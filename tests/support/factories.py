"""Adapters of random numbers, and the covariance of inputs that a test has at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merge_algorithms import Adapter, LowRank
from osrm import Covariance

SHAPES = {"layer.0.query": (12, 10), "layer.0.value": (8, 10), "layer.1.query": (12, 10)}


def random_adapter(
    name: str,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **parts: Any,
) -> Adapter:
    """Shapes are (d_out, d_in) by module; parts are what else an Adapter takes."""
    draw = torch.Generator().manual_seed(seed)
    updates = {
        module: LowRank(
            torch.randn(d_out, rank, generator=draw, dtype=dtype),
            torch.randn(rank, d_in, generator=draw, dtype=dtype),
        )
        for module, (d_out, d_in) in shapes.items()
    }
    return Adapter(name, updates, **parts)


def covariance_of(
    inputs: Mapping[str, Tensor],
    modules: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    **meta: str,
) -> Covariance:
    """Of inputs (tokens, d) by key, from float64; each key is a module unless `modules` says."""
    exact = {key: h.double() for key, h in inputs.items()}
    counts = {key: len(h) for key, h in inputs.items()}
    return Covariance(
        {key: (h.T @ h / len(h)).to(dtype) for key, h in exact.items()},
        {key: h.mean(0).to(dtype) for key, h in exact.items()},
        dict(modules or {key: key for key in inputs}),
        counts,
        dict(counts),
        meta,
    )
