"""One pass of a model over a task's data that collects what its modules read."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.progress import track
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from merge_algorithms.precision import full_precision
from osrm.covariance import Covariance
from osrm.targets import base_model, linear_modules, resolve_targets
from osrm.tokens import TokenSelector


@torch.inference_mode(False)  # the collector compares version counters, inference tensors have none
@torch.no_grad()
def collect_covariance(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    target_modules: Sequence[str],
    *,
    meta: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Covariance:
    """Run `model` over the data and collect what the target modules read.

    Streams: memory is one (d, d) float32 accumulator per distinct input, whatever the data's size.
    Padding is left out by the batch's "attention_mask" ("decoder_attention_mask" in a decoder with
    cross-attention; without it all decoder positions count if the batch has decoder inputs, and
    the encoder's mask applies if the model derives them from the encoder's). Dropout, adapters,
    autocast and TF32 are off during the pass; afterwards everything is as before.

    Args:
        model: The base model, bare or wrapped by PEFT. It runs on the device it is on.
        dataloader: Batches: mappings of the model's arguments; "labels" is left out.
        target_modules: As in PEFT: full names or last parts of names of linear layers.
        meta: Kept with the result: "model" (id) and "task" by convention.
        progress: Show a progress bar.

    Raises:
        UserError: a target matches nothing, a module never runs, an input is not finite (names
            the module and the batch), the mask does not fit, or there is no data.
    """
    base = base_model(model)
    layers = linear_modules(model)
    names = resolve_targets(model, target_modules)
    selector = TokenSelector(base)
    accumulator = _Accumulator(selector)
    device = next(base.parameters()).device
    batch_number = -1
    with _measuring(base), ExitStack() as hooks:
        for name in names:
            hook = functools.partial(accumulator.see, name)
            hooks.callback(layers[name].register_forward_pre_hook(hook).remove)
        for handle in selector.attach():
            hooks.callback(handle.remove)
        batches = track(dataloader, "Covariance", disable=not progress)
        for batch_number, batch in enumerate(batches):
            if not isinstance(batch, Mapping):
                raise UserError(
                    f"batch {batch_number} is a {type(batch).__name__}: expected a mapping with"
                    " the model's arguments, such as a Transformers data collator makes"
                )
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
                if name != "labels"
            }
            selector.start(inputs)
            accumulator.start(batch_number)
            base(**inputs)
    if batch_number < 0:
        raise UserError("there is no batch to collect the covariance from: the data is empty")
    return accumulator.result(names, dict(meta or {}))


class _Accumulator:
    """Sums per distinct input; the first module that reads an input gives it its key."""

    def __init__(self, selector: TokenSelector) -> None:
        self._select = selector.select
        self._modules: dict[str, str] = {}
        self._grams: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._positions: dict[str, int] = {}
        self._batch = 0
        # id of a tensor read in this batch -> (weak reference, version, key). A tensor that is
        # alive and not written to since is the same input; a dead one may have passed on its id.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def start(self, batch: int) -> None:
        self._batch = batch
        self._seen.clear()

    def see(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        reference, version, key = self._seen.get(id(x), (None, 0, name))
        if reference is None or reference() is not x or version != x._version:
            key = name
            self._seen[id(x)] = (weakref.ref(x), x._version, key)
            self._add(key, x)
        if self._modules.setdefault(name, key) != key:
            raise RuntimeError(
                f"{name} reads the input of {key} in batch {self._batch} and that of"
                f" {self._modules[name]} before: leave it out of the target modules"
            )

    def _add(self, key: str, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        total = flat.sum(0, dtype=torch.float32)
        if not total.isfinite().all():
            raise UserError(
                f"the input of {key} has a NaN or infinite value in batch {self._batch}: check the"
                " data and the model's weights, or load the model in float32"
            )
        tokens = self._select(x, key).float()
        if key not in self._grams:
            self._grams[key] = total.new_zeros(len(total), len(total))
            self._sums[key] = torch.zeros_like(total)
            self._counts[key] = self._positions[key] = 0
        self._grams[key].addmm_(tokens.T, tokens)
        self._sums[key] += total
        self._counts[key] += len(tokens)
        self._positions[key] += len(flat)

    def result(self, names: list[str], meta: dict[str, str]) -> Covariance:
        for name in names:
            if not self._counts.get(self._modules.get(name, "")):
                raise UserError(
                    f"{name} read no real token in any batch: leave it out of the target modules"
                    " or check the attention masks"
                )
        means = {key: (total / self._positions[key]).cpu() for key, total in self._sums.items()}
        matrices = {}
        for key in list(self._grams):
            gram = self._grams.pop(key)  # frees each accumulator as soon as it is used
            matrices[key] = ((gram + gram.T) / (2 * self._counts[key])).cpu()
        modules = {name: self._modules[name] for name in names}
        return Covariance(matrices, means, modules, self._counts, self._positions, meta)


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, adapters off and full precision; all as before on exit."""
    training = [(module, module.training) for module in model.modules()]
    wrappers = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    enabled = [(wrapper, not wrapper.disable_adapters) for wrapper in wrappers]
    # PEFT switches requires_grad along with the adapters: a frozen A would come back trainable.
    gradients = [(p, p.requires_grad) for wrapper in wrappers for p in wrapper.parameters()]
    try:
        model.eval()
        for wrapper in wrappers:
            wrapper.enable_adapters(False)
        with full_precision(next(model.parameters()).device):
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for wrapper, on in enabled:
            wrapper.enable_adapters(on)
        for parameter, on in gradients:
            parameter.requires_grad_(on)
