"""A pass of a model over a task's data, and back: what its log-likelihood's gradients are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from merge_algorithms.modules import input_of
from osrm.passes import evaluating, model_batches
from osrm.targets import base_model, linear_modules

# The model's arguments -> logits (n, outputs)
Predict = Callable[[dict[str, Any]], Tensor]
# Module name -> what it reads, and the gradient of what it writes, in every call on a batch
Calls = Mapping[str, Sequence[tuple[Tensor, Tensor]]]


@torch.inference_mode(False)
@torch.enable_grad()
def backpropagate(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    add: Callable[[Calls, int], None],
    *,
    what: str,
    predict: Predict | None,
    draws: int | None,
    seed: int,
    progress: bool,
) -> int:
    """Call `add` with the modules' inputs and output gradients, and return how many examples.

    Gradients are those of directions l . logits that stand for the classes y ~ p(y|x): the sum
    over the directions of the squares of what is linear in them is that of E_y over d log p(y|x).
    So `add` is called for each direction of each batch, with the batch's number of examples.

    Args:
        model: The model or its backbone, as `collect_fisher` says.
        dataloader: Batches: mappings of the model's arguments; "labels" is left out.
        names: Full names of linear modules.
        add: Adds up.
        what: What is collected, for the progress bar and the messages.
        predict: Batch -> logits (n, outputs), by running `model`; default: what the model's
            output calls `logits`.
        draws: Classes to draw per example from p(y|x), None for the exact sum over all.
        seed: Of the drawn classes.
        progress: Show a progress bar.

    Raises:
        UserError: as `collect_fisher`.
    """
    if draws is not None and draws < 1:
        raise UserError(f"draws is {draws}: draw at least 1 class per example, or sum all")
    layers = linear_modules(model)
    generator = torch.Generator().manual_seed(seed)
    # Module name -> its (input, output) in every call on the current batch.
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    ran: set[str] = set()
    examples = 0
    with evaluating(base_model(model)), ExitStack() as hooks:
        for name in names:
            hook = functools.partial(_record, calls, name)
            hooks.callback(layers[name].register_forward_hook(hook, with_kwargs=True).remove)
        for number, inputs in model_batches(model, dataloader, what, progress):
            calls.clear()
            logits = predict(inputs) if predict else model(**inputs).logits
            _check(logits, number)
            examples += len(logits)
            ran |= calls.keys()
            outputs = [output for pairs in calls.values() for _, output in pairs]
            for direction in _directions(logits.detach(), draws, generator):
                found = iter(
                    torch.autograd.grad(
                        logits, outputs, direction, retain_graph=True, materialize_grads=True
                    )
                )
                add(
                    {name: [(x, next(found)) for x, _ in c] for name, c in calls.items()},
                    len(logits),
                )
    for name in names:
        if name not in ran:
            raise UserError(f"{name} never ran on the data: leave it out of the target modules")
    return examples


def _record(
    calls: dict[str, list[tuple[Tensor, Tensor]]],
    name: str,
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    output: Tensor,
) -> Tensor:
    """Forward hook, with keywords. The model goes on with a copy, so that it may write into it."""
    if not output.requires_grad:
        output.requires_grad_()
    calls.setdefault(name, []).append((input_of(args, kwargs).detach(), output))
    return output.clone()


def _check(logits: Tensor, batch: int) -> None:
    if logits.ndim != 2:
        raise UserError(
            f"the logits of batch {batch} have shape {tuple(logits.shape)}: expected (n, outputs)"
            " of a classifier or regressor"
        )
    if not logits.isfinite().all():
        raise UserError(
            f"the logits of batch {batch} have a NaN or infinite value: check the data and the"
            " model's weights, or load the model in float32"
        )
    if not logits.requires_grad:
        raise UserError(
            "the logits do not depend on the target modules: predict has to run the model with"
            " them, and with gradients"
        )


def _directions(logits: Tensor, draws: int | None, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield l (n, outputs) such that F is the mean over examples of sum_l (d (l . logits) / dW)^2.

    The log-likelihood's gradient in the logits is e_y - p for class y. Summed over y ~ p its
    outer products give diag(p) - p p^T = L L^T, with the columns of the Cholesky factor
    l_k = sqrt(p_k p_{>k} / p_{>=k}) (e_k - p restricted to the classes after k / p_{>k}).
    """
    if logits.shape[1] == 1:
        yield torch.ones_like(logits)
        return
    p = logits.double().softmax(1)
    if draws is not None:
        for y in torch.multinomial(p.cpu(), draws, replacement=True, generator=generator).T:
            chosen = nn.functional.one_hot(y, p.shape[1]).to(p)
            yield ((chosen - p) / draws**0.5).to(logits.dtype)
        return
    rest = p.flip(1).cumsum(1).flip(1).clamp(min=torch.finfo(p.dtype).tiny)  # p_{>=k}
    for k in range(p.shape[1] - 1):
        direction = torch.zeros_like(p)
        direction[:, k] = 1
        direction[:, k + 1 :] = -p[:, k + 1 :] / rest[:, k + 1, None]
        scale = (p[:, k] * rest[:, k + 1] / rest[:, k]).sqrt()
        yield (scale[:, None] * direction).to(logits.dtype)
