"""EMR-Merging (arXiv 2405.17461): one unified update, and a mask and a rescaler for every task.

It needs the task at inference: an upper bound of what one merged model could do, not one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from merge_algorithms.adapter import Adapter
from merge_algorithms.errors import UserError, suggest
from merge_algorithms.files import atomic_directory
from merge_algorithms.layout import Layout, Layouts
from merge_algorithms.merge import Merged, merge
from merge_algorithms.peft_directory import (
    check_head_names,
    read_heads,
    read_json,
    read_tensors,
    write_heads,
    write_json,
    write_tensors,
)
from merge_algorithms.registry import register
from merge_algorithms.task_vectors import TaskVectors, align
from merge_algorithms.tiles import Stack, Tiled, row_tiles

Rescale = Literal["sums", "means"]
WEIGHTS_FILE = "emr.safetensors"
INFO_FILE = "emr.json"


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
    lambda_t (M_t * tau) is formed once, dense, in the factors' dtype.

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
    unified, masks, (rescaler,) = _unify(tasks, [tasks.names.index(task)], rescale)
    return {
        module: partial(_product, _masked(whole, masks[module][0]).mul_(rescaler))
        for module, whole in unified.items()
    }


@dataclass(frozen=True)
class EmrBundle:
    """All tasks of an EMR merge in one directory: 4 bytes and T bits for every merged entry.

    Attributes:
        unified: Module name -> tau (d_out, d_in), float32 or wider.
        masks: Module name -> the M_t, eight entries of a row in a byte, uint8
            (T, d_out, ceil(d_in / 8)).
        rescalers: Task name -> lambda_t, in the order of the masks.
        weights: The w_t, in the same order.
        rescale: How the lambda_t came about, as in `emr`.
        heads: Task name -> its head.
        head_info: Task name -> what its adapter's osrm.json says of the head, if anything.
        config: What an adapter of this merge says about its base model.
        layouts: Layouts of the modules that are not linear.
    """

    unified: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    rescalers: Mapping[str, float]
    weights: tuple[float, ...]
    rescale: str
    heads: Mapping[str, dict[str, Tensor]]
    head_info: Mapping[str, dict[str, Any] | None]
    config: Mapping[str, Any]
    layouts: Layouts

    @classmethod
    def build(
        cls,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
        rescale: Rescale = "sums",
    ) -> EmrBundle:
        """Merge adapters for all their tasks; arguments and errors as of `merge` and `emr`."""
        tasks = align(adapters, weights)
        unified, masks, rescalers = _unify(tasks, range(len(adapters)), rescale)
        whole = merge(adapters, "task_arithmetic", weights)
        return cls(
            unified,
            masks,
            dict(zip(tasks.names, rescalers, strict=True)),
            tasks.weights,
            rescale,
            whole.heads,
            whole.head_info,
            whole.config,
            whole.layouts,
        )

    def merged(self, task: str) -> Merged:
        """The model of one task: `merged(task).apply_to(model)` is undone on leaving its context.

        Raises:
            UserError: There is no such task.
        """
        if task not in self.rescalers:
            raise UserError(f"the bundle has no task '{task}': {suggest(task, self.rescalers)}")
        index = list(self.rescalers).index(task)
        updates = {
            module: Tiled(
                (whole.shape[0], whole.shape[1]),
                partial(_rows, whole, self.masks[module][index]),
                copies=2,
                factor=self.rescalers[task],
            )
            for module, whole in self.unified.items()
        }
        return Merged(
            updates=updates,
            heads={task: self.heads[task]} if task in self.heads else {},
            head_info={task: self.head_info.get(task)},
            config=dict(self.config),
            method="emr",
            options={"task": task, "rescale": self.rescale},
            names=tuple(self.rescalers),
            weights=self.weights,
            seed=0,
            ranks={module: min(update.shape) for module, update in updates.items()},
            layouts=self.layouts,
        )

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write emr.safetensors, emr.json and the heads, complete or not at all.

        Raises:
            UserError: `path` holds something and `overwrite` is false, or is no bundle.
        """
        path = Path(path)
        if overwrite and path.exists() and not (path / INFO_FILE).exists():
            raise UserError(
                f"{path} is not an EMR bundle, so it is not overwritten: choose another"
            )
        check_head_names(self.heads)
        tensors = {f"unified.{module}": whole for module, whole in self.unified.items()}
        tensors |= {f"masks.{module}": mask for module, mask in self.masks.items()}
        info = {
            "rescalers": [[task, rescaler] for task, rescaler in self.rescalers.items()],
            "weights": list(self.weights),
            "rescale": self.rescale,
            "head_info": dict(self.head_info),
            "config": dict(self.config),
            "layouts": {module: asdict(layout) for module, layout in self.layouts.items()},
        }
        with atomic_directory(path, overwrite) as directory:
            write_tensors(directory / WEIGHTS_FILE, tensors)
            write_json(directory / INFO_FILE, info)
            if self.heads:
                write_heads(directory, self.heads)

    @classmethod
    def load(cls, path: str | Path) -> EmrBundle:
        """Read what `save` wrote.

        Raises:
            UserError: No bundle there, or damaged files.
        """
        path = Path(path)
        if not (path / INFO_FILE).exists() or not (path / WEIGHTS_FILE).exists():
            raise UserError(f"{path} is not an EMR bundle: give the directory that save() wrote")
        info, tensors = read_json(path / INFO_FILE), read_tensors(path / WEIGHTS_FILE)
        unified, masks = _named(tensors, "unified."), _named(tensors, "masks.")
        try:
            rescalers = {str(task): float(rescaler) for task, rescaler in info["rescalers"]}
            weights = tuple(float(weight) for weight in info["weights"])
            if len(weights) != len(rescalers):
                raise ValueError
            rescale, head_info = str(info["rescale"]), dict(info["head_info"])
            config = dict(info["config"])
            layouts = {
                module: Layout(layout["kind"], tuple(layout["kernel"]))
                for module, layout in info["layouts"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path / INFO_FILE} is damaged: save the bundle again") from error
        for module, whole in unified.items():
            packed = (len(rescalers), len(whole), -(-whole.shape[-1] // 8))
            if module not in masks or masks[module].shape != packed:
                raise UserError(
                    f"{path / WEIGHTS_FILE} has no masks of shape {packed} for {module}: save the"
                    " bundle again"
                )
        heads = read_heads(path, "")
        return cls(unified, masks, rescalers, weights, rescale, heads, head_info, config, layouts)


def _unify(
    tasks: TaskVectors, served: Sequence[int], rescale: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Tau by module; of the served tasks the packed masks by module, and the rescalers."""
    unified, masks = {}, {}
    own = torch.zeros(len(served), dtype=torch.float64)
    shared = torch.zeros_like(own)
    for module, updates in tasks.modules.items():
        (d_out, d_in), b = updates[0].shape, updates[0].b
        whole = unified[module] = b.new_empty(d_out, d_in)
        packed = masks[module] = torch.empty(
            len(served), d_out, -(-d_in // 8), dtype=torch.uint8, device=b.device
        )
        weights = torch.tensor(tasks.weights, dtype=torch.float64).to(b)[:, None, None]
        unit = d_out * d_in if rescale == "means" else 1
        stack = Stack(updates)
        for start, stop in row_tiles((d_out, d_in), copies=2 * len(updates)):
            rows = stack.rows(start, stop).mul_(weights)
            signs = torch.where(rows.sum(0) > 0, 1.0, -1.0).to(b)
            agreeing = (rows * signs).clamp_(min=0)
            largest = agreeing.amax(0)
            whole[start:stop] = largest * signs
            for place, t in enumerate(served):
                mask = agreeing[t] > 0
                own[place] += float(rows[t].abs().sum(dtype=torch.float64)) / unit
                shared[place] += float(largest.where(mask, 0).sum(dtype=torch.float64)) / unit
                packed[place, start:stop] = _pack(mask)
    return unified, masks, torch.where(shared > 0, own / shared, 0).tolist()


def _pack(mask: Tensor) -> Tensor:
    bits = np.packbits(mask.cpu().numpy(), axis=-1)
    return torch.from_numpy(bits).to(mask.device)


def _masked(rows: Tensor, packed: Tensor) -> Tensor:
    bits = np.unpackbits(packed.cpu().numpy(), axis=-1, count=rows.shape[1])
    return rows * torch.from_numpy(bits).to(rows)


def _rows(whole: Tensor, packed: Tensor, start: int, stop: int) -> Tensor:
    return _masked(whole[start:stop], packed[start:stop])


def _product(dense: Tensor, x: Tensor) -> Tensor:
    return linear(x.to(dense.dtype), dense)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
