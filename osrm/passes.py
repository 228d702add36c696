"""A pass of a model over data that measures something and leaves the model as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from merge_algorithms.precision import full_precision
from osrm.targets import base_model


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes, which is not where accelerate keeps what it has offloaded."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, full precision, and nothing compiled; all as before on exit.

    What torch.compile has made of a module does not see hooks that came later.
    """
    device = device_of(model)
    eager: AbstractContextManager[Any] = nullcontext()
    if any(module._compiled_call_impl is not None for module in model.modules()):
        eager = torch.compiler.set_stance("force_eager")  # takes a second to import
    with evaluation_mode(model), full_precision(device), eager:
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout; every module's own mode is back on exit.

    bitsandbytes' layers of 4 bits, which have no dropout, are kept in training mode: in evaluation
    mode some CPUs pack their weights anew, with rounded scales, no way back, and no gradient for
    what they read.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module, _ in training:
            if hasattr(module, "quant_state"):
                module.training = True
        yield
    finally:
        for module, mode in training:
            module.training = mode


def model_batches(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    what: str,
    progress: bool,
    may_be_empty: bool = False,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, arguments of the model) for every batch, on its device, without "labels".

    Of "labels" that are what a decoder is to write, its input is made, as in training.

    Args:
        model: Says the device.
        dataloader: Mappings of the model's arguments.
        what: What is collected, for the progress bar and the messages.
        progress: Show the bar.
        may_be_empty: Having no batch is fine: other ranks have some.

    Raises:
        UserError: a batch is no mapping, or there is none.
    """
    device = device_of(model)
    number = -1
    console = Console(stderr=True)  # results can be piped
    bar = track(dataloader, what.capitalize(), console=console, disable=not progress)
    for number, batch in enumerate(bar):
        if not isinstance(batch, Mapping):
            raise UserError(
                f"batch {number} is a {type(batch).__name__}: expected a mapping with the model's"
                " arguments, such as a Transformers data collator makes"
            )
        yield (
            number,
            {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in {**batch, **_decoder_inputs(model, batch)}.items()
                if name != "labels"
            },
        )
    if number < 0 and not may_be_empty:
        raise UserError(f"there is no batch to collect the {what} from: the data is empty")


def _decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a decoder reads where the batch has its "labels" only, and which of it is real."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return {}
    name = "prepare_decoder_input_ids_from_labels"  # of the model, or of the language model in it
    base = base_model(model)
    prepare = next((getattr(part, name) for part in base.modules() if hasattr(part, name)), None)
    if prepare is None or "decoder_input_ids" not in inspect.signature(base.forward).parameters:
        return {}
    if "decoder_attention_mask" in batch or "decoder_inputs_embeds" in batch:
        return {}
    ids = batch.get("decoder_input_ids")
    ids = prepare(labels=labels) if ids is None else ids
    if ids.shape != labels.shape:
        return {}
    return {"decoder_input_ids": ids, "decoder_attention_mask": (labels != -100).long()}
