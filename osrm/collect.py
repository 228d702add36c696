"""One pass of a model over a task's data that collects what its modules read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from merge_algorithms.errors import UserError
from osrm.accumulate import Accumulator, moment_bytes
from osrm.covariance import Covariance
from osrm.distributed import Ranks
from osrm.passes import device_of, evaluating, model_batches
from osrm.spill import Spill, choose_storage
from osrm.targets import (
    base_model,
    input_width,
    is_sharded,
    linear_modules,
    resolve_targets,
    runnable,
)
from osrm.tokens import TokenSelector


def covariance_memory(
    model: nn.Module,
    target_modules: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    sketch: int | None = None,
) -> int:
    """The most bytes that the accumulators of `collect_covariance` take, for the same arguments.

    As if no two modules read the same input, which only shows when the model runs; the model may
    be on the meta device.

    Raises:
        UserError: as `collect_covariance`, of the arguments.
    """
    _check(dtype, sketch)
    layers = linear_modules(model)
    widths = [input_width(layers[name]) for name in resolve_targets(model, target_modules)]
    return sum(moment_bytes(width, sketch, dtype) for width in widths)


@torch.inference_mode(False)  # the collector compares version counters, inference tensors have none
@torch.no_grad()
def collect_covariance(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    target_modules: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    sketch: int | None = None,
    spill: Spill = "auto",
    spill_directory: str | Path | None = None,
    meta: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Covariance:
    """Run `model` over the data and collect what the target modules read.

    Streams: memory is one (d, d) accumulator per distinct input, whatever the data's size.
    Padding is left out by the batch's "attention_mask" ("decoder_attention_mask" in a decoder with
    cross-attention; without it all decoder positions count if the batch has decoder inputs, and
    the encoder's mask applies if the model derives them from the encoder's; of a model that
    generates, labels (batch, length) say what the decoder reads, and those of -100 what is
    padding). Dropout, adapters, autocast, TF32 and what torch.compile made are off during the
    pass; afterwards everything is as before.

    Under torch.distributed every rank passes its own share of the data and gets the covariance of
    all of it. The ranks go batch by batch, so that one that fails stops all. Shares may be
    of different sizes, or empty unless FSDP shards the model.

    Args:
        model: The base model, bare or wrapped by PEFT, DataParallel, DDP or FSDP. It runs on the
            device it is on, or that accelerate's hooks take it to. Its weights may be quantised:
            only inputs are read.
        dataloader: Batches: mappings of the model's arguments; the model does not get "labels".
        target_modules: As in PEFT: full names or last parts of names of linear layers.
        dtype: Of the sums and the result, float32 or float64.
        sketch: Keep this many directions of each input that is wider, and the rest as one number,
            see `osrm.sketch`: 3 k rows (at least 2 k + 128) in place of d.
        spill: Keep the accumulators in files on disk that are mapped into memory: "auto" if they
            may not fit (see `covariance_memory`). The result is the same to the bit, and stays
            mapped. Each batch then goes through the files once, so make batches large.
        spill_directory: Where the files are made, already without a name, so that nothing is left
            behind; default: the system's directory for temporary files.
        meta: Kept with the result: "model" (id) and "task" by convention.
        progress: Show a progress bar.

    Raises:
        UserError: a target matches nothing, a module never runs, an input is not finite (names
            the module and the batch), the mask does not fit, there is no data, no such dtype,
            a sketch of fewer than 1 direction, or another rank has failed.
    """
    bound = covariance_memory(model, target_modules, dtype=dtype, sketch=sketch)
    base, run = base_model(model), runnable(model)
    layers = linear_modules(model)
    names = resolve_targets(model, target_modules)
    device = device_of(model)
    storage = choose_storage(bound, spill, spill_directory, dtype, device)
    selector = TokenSelector(base)
    accumulator = Accumulator(selector, storage, sketch)
    ranks = Ranks()
    with _measuring(run), ExitStack() as hooks:
        for name in names:
            hook = functools.partial(accumulator.see, name)
            hooks.callback(layers[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
        for handle in selector.attach():
            hooks.callback(handle.remove)
        batches = model_batches(
            run, dataloader, "covariance", progress and ranks.rank == 0, ranks.size > 1
        )

        def step(number: int | None, inputs: dict[str, Any]) -> None:
            selector.start(inputs)
            accumulator.start(number)
            run(**inputs)
            accumulator.finish()

        _all_batches(batches, step, ranks, is_sharded(model))
        accumulator.pool(ranks, device)
    return accumulator.result(names, dict(meta or {}))


def _check(dtype: torch.dtype, sketch: int | None) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"the covariance's dtype is {dtype}: choose float32 or float64")
    if sketch is not None and sketch < 1:
        raise UserError(
            f"the sketch keeps {sketch} directions: choose at least 1, or none to keep all"
        )


def _all_batches(
    batches: Iterator[tuple[int, dict[str, Any]]],
    step: Callable[[int | None, dict[str, Any]], None],
    ranks: Ranks,
    sharded: bool,
) -> None:
    """Call `step` on every batch, the ranks side by side; the first failure stops all ranks.

    A rank of a sharded model that has run out of batches repeats its last one, which does not
    count (its number is None): the others need its part of the weights.
    """
    failure: Exception | None = None
    last: dict[str, Any] | None = None
    rounds = 0
    while True:
        batch = None
        if failure is None:
            try:
                batch = next(batches, None)
                if batch is None and last is None and sharded:
                    raise UserError(
                        f"rank {ranks.rank} has no batch: a model that FSDP shards needs at least"
                        " one on every rank"
                    )
            except Exception as error:  # whatever it is, the other ranks have to know
                failure = error
        if not ranks.any_left(batch is not None, failure):
            break
        rounds += 1
        number, last = batch or (None, last)
        try:
            if number is not None or sharded:
                assert last is not None
                step(number, last)
        except Exception as error:  # as above
            failure = error
    if not rounds:
        raise UserError("no rank has a batch to collect the covariance from: the data is empty")


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, adapters off and full precision; all as before on exit."""
    wrappers = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged_adapters:
            # Switched off, PEFT would take it out of the weights, which rounds them.
            raise UserError(
                f"adapter '{module.merged_adapters[0]}' is merged into the weights of {name}: call"
                " unmerge_adapter() first, or load the model again"
            )
    enabled = [(wrapper, not wrapper.disable_adapters) for wrapper in wrappers]
    # PEFT switches requires_grad along with the adapters: a frozen A would come back trainable.
    gradients = [(p, p.requires_grad) for wrapper in wrappers for p in wrapper.parameters()]
    with evaluating(model):
        try:
            for wrapper in wrappers:
                wrapper.enable_adapters(False)
            yield
        finally:
            for wrapper, on in enabled:
                wrapper.enable_adapters(on)
            for parameter, on in gradients:
                parameter.requires_grad_(on)
