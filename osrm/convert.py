"""Warm start: what was trained without a subspace, put into one afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merge_algorithms.adapter import Adapter, LowRank
from merge_algorithms.checkpoint import INDEX_FILE, SINGLE_FILE, weight_files
from merge_algorithms.errors import UserError, suggest
from merge_algorithms.hub import fetch
from osrm.initialize import find_rows
from osrm.interference import output_shift
from osrm.solvers import single_thread, times

Weights = Mapping[str, Tensor] | str | Path


@dataclass(frozen=True)
class Converted:
    """An adapter whose A lies in the subspace.

    Attributes:
        adapter: dW' = B A, A the state's rows, B the least-squares fit to the original dW.
        kept: Module name -> ||dW'||_F^2 / ||dW||_F^2, the share of the update's energy inside the
            subspace; 1 for an update that is zero.
        output_kept: Module name -> E ||dW' h||^2 / E ||dW h||^2 over the own task's inputs h; 1 for
            an update that does nothing there. Empty without their second moments.
    """

    adapter: Adapter
    kept: dict[str, float]
    output_kept: dict[str, float]


def convert_adapter(
    adapter: Adapter, state: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None
) -> Converted:
    """Replace every update by the nearest one whose A are the rows of `state`.

    B = dW A^+ minimises ||dW - B A||_F. dW has the LoRA scale folded in, and the result is stored
    with scale 1, so nothing is scaled twice (the released code of arXiv 2505.22934 fits B to dW
    and lets PEFT multiply by alpha / r again). Stays in factors, O(d r^2) per module.

    Args:
        adapter: Any LoRA adapter; its heads stay as they are.
        state: Module name -> rows (k, d_in), as `subspace_state` returns, of any scale; all k
            become A, so the result has rank k.
        own: Module name -> second moment (d_in, d_in) of the own task's inputs, as
            `Covariance.by_module` returns, to compare the outputs on them.

    Raises:
        UserError: a module that `state` lacks or has with another width, or dependent rows.
    """
    updates, kept, output_kept = {}, {}, {}
    for module, update in adapter.updates.items():
        rows = find_rows(state, module, update.a).double().to(update.a.device)
        b, a = update.b.double(), update.a.double()
        energy = float(((b.T @ b) * (a @ a.T)).sum())
        fitted, kept[module] = _fit(module, b @ (a @ rows.T), rows, energy)
        updates[module] = fitted
        if own is not None:
            moment = find_rows(own, module, update.a, "second moment")
            output_kept[module] = _share(fitted, output_shift(update, moment), moment)
    return Converted(replace(adapter, updates=updates), kept, output_kept)


def convert_checkpoint(
    base: Weights,
    tuned: Weights,
    state: Mapping[str, Tensor],
    *,
    name: str,
    base_model: str | None = None,
    fan_in_fan_out: bool = False,
    own: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> Converted:
    """An adapter in the subspace from a model that was fine-tuned whole: dW = W - W0.

    W and W0 are subtracted in float64, module by module. A half-precision W is refused: its
    rounding is of the size of a typical update. W0 may be in half precision if W was trained from
    exactly these values. What fine-tuning changed outside the modules of `state` (other matrices,
    biases, norms, the head) is not part of the result.

    Args:
        base: The base model's weights: a state dict, a safetensors file, or the directory or Hub
            id of a checkpoint.
        tuned: The fine-tuned model's, likewise. Prefixes before a module's name, such as "bert.",
            may differ.
        state: Module name -> rows (k, d_in), as for `convert_adapter`.
        name: The adapter's name: the task.
        base_model: Name or path of the base model, for the adapter's configuration.
        fan_in_fan_out: Weights are stored (d_in, d_out), as GPT-2's Conv1D does.
        own: As for `convert_adapter`.
        progress: Show a progress bar.

    Raises:
        UserError: a checkpoint that cannot be read, a module that one lacks, shapes that do not
            fit, non-finite values, `tuned` in half precision, dependent rows, or no difference.
    """
    befores, afters = _index(base, "base"), _index(tuned, "tuned")
    updates, kept, output_kept = {}, {}, {}
    for module in track(state, "Updates", console=Console(stderr=True), disable=not progress):
        before, after = _weight(befores, module, "base"), _weight(afters, module, "tuned")
        if after.dtype in (torch.float16, torch.bfloat16):
            raise UserError(
                f"the tuned checkpoint has {module} in {str(after.dtype).removeprefix('torch.')},"
                " whose rounding drowns the update: save the fine-tuned model in float32, or"
                " convert its adapter if it was trained as one"
            )
        if before.ndim != 2 or before.shape != after.shape:
            raise UserError(
                f"{module} is {tuple(before.shape)} in the base checkpoint and"
                f" {tuple(after.shape)} in the tuned one: expected the same matrix shape"
            )
        difference = after.double() - before.double()
        difference = difference.T if fan_in_fan_out else difference
        if not difference.isfinite().all():
            raise UserError(f"{module} has NaN or infinite values: its training diverged")
        rows = find_rows(state, module, difference).double()
        energy = float(difference.square().sum())
        fitted, kept[module] = _fit(module, difference @ rows.T, rows, energy)
        updates[module] = fitted
        if own is not None:
            moment = find_rows(own, module, difference, "second moment")
            output = float((times(moment, difference.T).T * difference).sum())
            output_kept[module] = _share(fitted, output, moment)
    if not any(update.b.any() for update in updates.values()):
        raise UserError("the tuned checkpoint equals the base in every module: give another one")
    config = {"base_model_name_or_path": base_model, "fan_in_fan_out": fan_in_fan_out}
    return Converted(Adapter(name, updates, {}, config), kept, output_kept)


def _fit(module: str, product: Tensor, rows: Tensor, energy: float) -> tuple[LowRank, float]:
    """B = dW A^+ from dW A^T, (d_out, k), and A, both float64; and the share of energy kept."""
    gram = rows @ rows.T
    with single_thread():
        values = torch.linalg.eigvalsh(gram)
        if not values[0] > 1e-10 * values[-1]:
            raise UserError(
                f"the rows of the subspace state for {module} are not independent: compute it again"
            )
        b = torch.linalg.solve(gram, product.T).T
    kept = float(((b @ gram) * b).sum()) / energy if energy > 0 else 1.0
    return LowRank(b.float().contiguous(), rows.float().contiguous()), kept


def _share(fitted: LowRank, output: float, own: Tensor) -> float:
    """E ||dW' h||^2 over `output`, what E ||dW h||^2 was."""
    return output_shift(fitted, own) / output if output > 0 else 1.0


def _weight(index: Mapping[str, Callable[[], Tensor]], module: str, what: str) -> Tensor:
    """The one weight whose name ends with the module's."""
    key = f"{module}.weight"
    fitting = [key] if key in index else [name for name in index if name.endswith(f".{key}")]
    if len(fitting) != 1:
        found = f"{len(fitting)} weights" if fitting else "no weight"
        raise UserError(
            f"the {what} checkpoint has {found} for {module}; {suggest(key, fitting or index)}"
        )
    return index[fitting[0]]()


def _index(source: Weights, what: str) -> dict[str, Callable[[], Tensor]]:
    """Tensor name -> a function that reads the tensor."""
    if isinstance(source, Mapping):
        return {name: functools.partial(source.__getitem__, name) for name in source}
    path = fetch(source, ["*.safetensors", INDEX_FILE])
    directory = path if path.is_dir() else path.parent
    try:
        files = [path.name] if path.is_file() else weight_files(path)
        return {
            name: functools.partial(_read, directory / file, name)
            for file in files
            for name in _names(directory / file)
        }
    except UserError as error:
        raise UserError(f"the {what} checkpoint {source} cannot be read: {error}") from error
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"the {what} checkpoint {source} cannot be read ({type(error).__name__}: {error}):"
            f" give a safetensors file, or a directory with {SINGLE_FILE} or its shards"
        ) from error


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor
