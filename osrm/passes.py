"""A pass of a model over data that measures something and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import track
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from merge_algorithms.precision import full_precision


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and full precision; both as before on exit."""
    with evaluation_mode(model), full_precision(next(model.parameters()).device):
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

    Args:
        model: Says the device.
        dataloader: Mappings of the model's arguments.
        what: What is collected, for the progress bar and the messages.
        progress: Show the bar.
        may_be_empty: Having no batch is fine: other ranks have some.

    Raises:
        UserError: a batch is no mapping, or there is none.
    """
    device = next(model.parameters()).device
    number = -1
    for number, batch in enumerate(track(dataloader, what.capitalize(), disable=not progress)):
        if not isinstance(batch, Mapping):
            raise UserError(
                f"batch {number} is a {type(batch).__name__}: expected a mapping with the model's"
                " arguments, such as a Transformers data collator makes"
            )
        yield (
            number,
            {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
                if name != "labels"
            },
        )
    if number < 0 and not may_be_empty:
        raise UserError(f"there is no batch to collect the {what} from: the data is empty")
