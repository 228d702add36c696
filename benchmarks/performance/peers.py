"""The work that is measured: merges by this package and by others, on the same adapters.

Each function makes its inputs and returns the work, which returns {module: merged update}.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.performance.problems import Problem
from merge_algorithms import LowRank, merge, methods
from merge_algorithms.factors import truncate
from merge_algorithms.tiles import Update, row_tiles

Work = Callable[[], dict[str, Update]]
DenseWork = Callable[[], dict[str, Tensor]]
DENSITY = 0.2


def ours(problem: Problem, method: str, rank: int | None = None) -> Work:
    """A registered method; every row of a dense result is evaluated, as if it were written.

    Args:
        problem: What to merge.
        method: Name of the method.
        rank: Truncate the result to this rank.
    """
    count = methods()[method].adapters or problem.tasks
    needs = methods()[method].needs
    adapters = problem.adapters(count)
    statistics = problem.statistics(needs, count) if needs else None

    def work() -> dict[str, Update]:
        merged = merge(adapters, method, statistics=statistics)
        updates = dict(merged.updates)
        if rank is not None:
            return {module: truncate(update, rank)[0] for module, update in updates.items()}
        for update in updates.values():
            if not isinstance(update, LowRank):
                for start, stop in row_tiles(update.shape):
                    update.rows(start, stop)
        return updates

    return work


class _Layer(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        for i, (d_out, d_in) in enumerate(problem.shapes):
            self.add_module(f"linear{i}", nn.Linear(d_in, d_out, bias=False))


class _Model(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(problem) for _ in range(problem.layers))


def peft(problem: Problem, combination: Literal["svd", "ties_svd"]) -> Work:
    """PEFT's add_weighted_adapter with one of its *svd combinations, truncated to rank r."""
    from peft import LoraConfig, PeftModel, get_peft_model  # seconds that other work need not wait

    adapters = problem.adapters()
    targets = [f"linear{i}" for i in range(len(problem.shapes))]
    config = LoraConfig(r=problem.rank, lora_alpha=problem.rank, target_modules=targets)
    model = get_peft_model(_Model(problem), config, adapter_name=adapters[0].name)
    assert isinstance(model, PeftModel)
    for adapter in adapters[1:]:
        model.add_adapter(adapter.name, config)
    with torch.no_grad():
        for adapter in adapters:
            for module, update in adapter.updates.items():
                b, a = _factors(model, module, adapter.name)
                b.copy_(update.b)
                a.copy_(update.a)
    names = [adapter.name for adapter in adapters]
    numbers = itertools.count()

    def work() -> dict[str, Update]:
        name = f"merged{next(numbers)}"  # PEFT does nothing if the name is taken
        model.add_weighted_adapter(
            names,
            [1.0] * len(names),
            name,
            combination_type=combination,
            svd_rank=problem.rank,
            density=DENSITY,
        )
        merged: dict[str, Update] = {}
        for module in problem.modules:
            b, a = _factors(model, module, name)
            merged[module] = LowRank(b.clone(), a.clone())
        model.delete_adapter(name)
        return merged

    return work


def _factors(model: nn.Module, module: str, adapter: str) -> tuple[Tensor, Tensor]:
    """PEFT's own tensors of B and A."""
    layer: Any = model.get_submodule(f"base_model.model.{module}")
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def dense_ties(problem: Problem) -> DenseWork:
    """TIES as the authors' code does it: all tasks' updates as the rows of one flat matrix.

    arXiv 2306.01708, algorithm 1, with dis-mean; the threshold is the kthvalue of each row.
    """
    adapters = problem.adapters()

    def work() -> dict[str, Tensor]:
        flat = torch.stack(
            [
                torch.cat([adapter.updates[m].dense().flatten() for m in problem.modules])
                for adapter in adapters
            ]
        )
        return _unflatten(_ties(flat), problem)

    return work


def dense_knots(problem: Problem) -> DenseWork:
    """KnOTS-TIES from its definition (arXiv 2410.19735, section 4), dense and in float64."""
    adapters = problem.adapters()

    def work() -> dict[str, Tensor]:
        left, aligned = {}, {}
        for module in problem.modules:
            dense = [adapter.updates[module].dense().double() for adapter in adapters]
            u, s, vh = torch.linalg.svd(torch.cat(dense, dim=1), full_matrices=False)
            kept = s > 1e-6 * s[0]
            left[module] = u[:, kept]
            aligned[module] = (s[kept, None] * vh[kept]).chunk(len(adapters), dim=1)
        flat = torch.stack(
            [
                torch.cat([aligned[module][t].flatten() for module in problem.modules])
                for t in range(len(adapters))
            ]
        )
        merged, start, result = _ties(flat), 0, {}
        for module, u in left.items():
            shape = aligned[module][0].shape
            size = shape.numel()
            result[module] = u @ merged[start : start + size].view(shape)
            start += size
        return result

    return work


def _ties(flat: Tensor) -> Tensor:
    """Trim, elect, dis-mean over the rows of (T, n)."""
    size = flat.shape[1]
    magnitudes = flat.abs()
    smallest = magnitudes.kthvalue(size - int(DENSITY * size) + 1, dim=1, keepdim=True).values
    flat = flat * (magnitudes >= smallest)
    signs = flat.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    agreeing = torch.where(signs > 0, flat > 0, flat < 0)
    flat = flat * agreeing
    return flat.sum(0) / (flat != 0).sum(0).clamp(min=1)


def _unflatten(flat: Tensor, problem: Problem) -> dict[str, Tensor]:
    parts = flat.split([d_out * d_in for d_out, d_in in problem.modules.values()])
    return {
        module: part.view(shape)
        for (module, shape), part in zip(problem.modules.items(), parts, strict=True)
    }
