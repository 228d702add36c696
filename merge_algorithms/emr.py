"""EMR-Merging (arXiv 2405.17461): one unified update, and a mask and a rescaler for every task.

It needs the task at inference: an upper bound of what one merged model could do, not one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from merge_algorithms.errors import UserError, suggest
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors
from merge_algorithms.tiles import Stack, row_tiles

Rescale = Literal["sums", "means"]


@register(
    summary="one task's share of the unified update (elect, mask, rescale)",
    paper="Huang et al. 2024, arXiv 2405.17461",
    runtime=True,
)
def emr(
    tasks: TaskVectors, *, task: str, rescale: Rescale = "sums"
) -> dict[str, Callable[[Tensor], Tensor]]:
    """y = W0 x + lambda_t (M_t * tau) x, t the task that is served (arXiv 2405.17461, section 3).

    With tau_t = w_t dW_t: tau has the sign of sum_t tau_t (- for 0) and the largest |tau_t| among
    the entries of that sign; M_t = [tau_t tau > 0]; lambda_t = sum |tau_t| / sum |M_t * tau|.
    lambda_t (M_t * tau) is formed once, dense, in the factors' dtype. `EmrBundle` holds all tasks;
    `osrm merge --method emr` writes one, or the model of one --task.

    Args:
        task: Name of the adapter whose task is served.
        rescale: 'sums' of magnitudes over the whole adapter make up lambda_t (the paper);
            'means' are taken module by module and added up, so that a small module counts as much
            as a large one (the authors' code).

    Raises:
        UserError: There is no adapter of that name.
    """
    if task not in tasks.names:
        raise UserError(f"method 'emr': there is no adapter '{task}': {suggest(task, tasks.names)}")
    unified, masks, (rescaler,) = unify(tasks, [tasks.names.index(task)], rescale)
    return {
        module: partial(_product, masked(whole, masks[module][0]).mul_(rescaler))
        for module, whole in unified.items()
    }


def unify(
    tasks: TaskVectors, served: Sequence[int], rescale: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Tau by module; of the served tasks the packed masks by module, and the rescalers.

    Masks are uint8 (len(served), d_out, ceil(d_in / 8)): eight entries of a row in a byte.
    """
    unified, masks, chosen = {}, {}, list(served)
    own = torch.zeros(len(chosen), dtype=torch.float64)
    shared = torch.zeros_like(own)
    for module, updates in tasks.modules.items():
        (d_out, d_in), b = updates[0].shape, updates[0].b
        whole = unified[module] = b.new_empty(d_out, d_in)
        packed = masks[module] = torch.empty(
            len(chosen), d_out, -(-d_in // 8), dtype=torch.uint8, device=b.device
        )
        weights = torch.tensor(tasks.weights, dtype=torch.float64).to(b)[:, None, None]
        unit = d_out * d_in if rescale == "means" else 1
        stack = Stack(updates)
        for start, stop in row_tiles((d_out, d_in), copies=2 * len(updates)):
            rows = stack.rows(start, stop).mul_(weights)
            own += _totals(rows[chosen].abs()) / unit
            signs = torch.where(rows.sum(0) > 0, 1.0, -1.0).to(b)
            agreeing = rows.mul_(signs).clamp_(min=0)
            largest = agreeing.amax(0)
            whole[start:stop] = largest * signs
            agreeing = agreeing[chosen]
            packed[:, start:stop] = _pack(agreeing)
            # 1 where it agrees, as floats: on a CPU several times as fast as booleans.
            shared += _totals(torch.gt(agreeing, 0, out=agreeing).mul_(largest)) / unit
    return unified, masks, torch.where(shared > 0, own / shared, 0).tolist()


def _totals(tiles: Tensor) -> Tensor:
    """The sum of every tile (n, rows, d_in), (n,) float64 on the CPU."""
    return tiles.sum((-2, -1), dtype=torch.float64).cpu()


def _pack(values: Tensor) -> Tensor:
    """Bits that are set where a value is positive."""
    bits = np.packbits(values.cpu().numpy() > 0, axis=-1)
    return torch.from_numpy(bits).to(values.device)


def masked(rows: Tensor, packed: Tensor) -> Tensor:
    """Rows (n, d_in) where the bits of a mask (n, ceil(d_in / 8)) are set, else 0."""
    bits = np.unpackbits(packed.cpu().numpy(), axis=-1, count=rows.shape[1])
    return rows * torch.from_numpy(bits).to(rows)


def _product(dense: Tensor, x: Tensor) -> Tensor:
    return linear(x.to(dense.dtype), dense)
