"""Variants against the tools they are named after, on the same adapters."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from peft.utils import merge_utils
from torch import Tensor

from merge_algorithms import Adapter, LowRank, merge

WEIGHTS = [1.0, 0.3, -0.7, 2.0]


@pytest.fixture
def adapters(random_adapter) -> list[Adapter]:
    return [random_adapter(f"t{t}", rank=t + 1, seed=t) for t in range(4)]


def deltas(adapters: list[Adapter], module: str) -> list[Tensor]:
    return [adapter.updates[module].dense() for adapter in adapters]


def check(adapters, method, tool, weights=WEIGHTS, **options) -> None:
    merged = merge(adapters, method, weights, **options)
    for module, update in merged.updates.items():
        expected = tool(deltas(adapters, module), torch.tensor(weights))
        torch.testing.assert_close(update.rows(0, update.shape[0]), expected)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.93])
def test_peft(adapters, density):
    check(
        adapters,
        "ties",
        lambda x, w: merge_utils.ties(x, w, density),
        density=density,
        variant="peft",
    )
    check(
        adapters,
        "magnitude_prune",
        lambda x, w: merge_utils.magnitude_prune(x, w, density),
        density=density,
        scope="tensor",
    )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_peft_with_drawn_masks(adapters, method, monkeypatch):
    """PEFT's arithmetic on our masks: those of an adapter are the same when it is merged alone."""
    for module in adapters[0].updates:
        pruned = [
            merge([adapter], "dare_linear", density=0.4).updates[module] for adapter in adapters
        ]
        drawn = iter([update.rows(0, update.shape[0]) for update in pruned])
        monkeypatch.setattr(merge_utils, "prune", lambda *_, drawn=drawn, **__: next(drawn))
        tool = getattr(merge_utils, method)
        expected = tool(deltas(adapters, module), torch.tensor(WEIGHTS), density=0.4)
        named = {} if method == "dare_linear" else {"variant": "peft"}
        found = merge(adapters, method, WEIGHTS, density=0.4, **named).updates[module]
        torch.testing.assert_close(found.rows(0, found.shape[0]), expected)


@pytest.mark.parametrize("kind", ["plain", "conv1d"])
@pytest.mark.parametrize(
    ("combination", "method", "options"),
    [
        ("ties_svd", "ties", {"variant": "peft"}),
        ("magnitude_prune_svd", "magnitude_prune", {"scope": "tensor"}),
    ],
)
def test_add_weighted_adapter(peft_cases, kind, combination, method, options, tmp_path):
    """The whole way from adapter directories, at a rank at which its SVD loses nothing."""
    case = peft_cases[kind]
    names, weights = ["a", "b", "c"], [1.0, 0.5, 2.0]
    for seed, name in enumerate(names):
        case.save(tmp_path / name, seed=seed)
    model = PeftModel.from_pretrained(case.base(), tmp_path / "a", adapter_name="a")
    for name in names[1:]:
        model.load_adapter(tmp_path / name, adapter_name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, "merged", combination, density=0.3, svd_rank=32)
    model.set_adapter("merged")
    merged = merge([Adapter.load(tmp_path / name) for name in names], method, weights,
                   density=0.3, **options)  # fmt: skip
    ours = case.base()
    with merged.apply_to(ours):
        torch.testing.assert_close(case.logits(ours), case.logits(model), rtol=1e-3, atol=1e-4)


def mergekit(x: list[Tensor], w: Tensor, keep, normalize: bool, elect: bool = True) -> Tensor:
    """Its generalised task arithmetic: sparsify, sign of the weighted sum (+ for 0), divide."""
    sparse = []
    for delta in x:
        order = delta.abs().flatten().argsort(descending=True)
        chosen = torch.zeros(delta.numel()).index_fill(0, keep(order), 1)
        sparse.append(delta * chosen.view_as(delta))
    weights = w[:, None, None]
    products = torch.stack(sparse) * weights
    agree = products.sign() == torch.where(products.sum(0) >= 0, 1, -1)
    if not elect:
        return products.sum(0)
    total = (products * agree).sum(0)
    divisor = (weights * agree).sum(0)
    return total / divisor.where(divisor != 0, 1) if normalize else total


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.93, 1.0])
def test_mergekit_ties(adapters, density):
    check(
        adapters,
        "ties",
        lambda x, w: mergekit(x, w, lambda order: order[: int(density * len(order))], True),
        density=density,
        variant="mergekit",
    )


@pytest.mark.parametrize(("density", "gamma"), [(0.2, 0.05), (0.9, 0.1), (0.5, 0.02)])
@pytest.mark.parametrize("elect", [True, False])
def test_mergekit_breadcrumbs(adapters, density, gamma, elect):
    def keep(order: Tensor) -> Tensor:
        top = int(gamma * len(order))
        return order[top : top + int(density * len(order))]

    check(
        adapters,
        "breadcrumbs_ties" if elect else "breadcrumbs",
        lambda x, w: mergekit(x, w, keep, False, elect),
        density=density,
        gamma=gamma,
        variant="mergekit",
    )


def test_presets_differ_where_the_tools_do():
    """One entry, weights that turn a sign: the vote, the tie and the divisor tell them apart."""
    adapters = [
        Adapter(name, {"m": LowRank(torch.ones(1, 1), torch.tensor([[value]]))})
        for name, value in (("a", 2.0), ("b", -1.0), ("c", 1.0))
    ]

    def result(weights, variant) -> float:
        merged = merge(adapters, "ties", weights, density=1.0, variant=variant)
        return merged.updates["m"].rows(0, 1).item()

    assert result([1, 5, 1], "authors") == -5.0
    assert result([1, 5, 1], "mergekit") == -1.0
    assert result([1, 5, 1], "peft") == 1.5
    assert result([1, 2, 0], "authors") == -2.0  # a tie, and no majority
    assert result([1, 2, 0], "mergekit") == 2.0


def test_an_explicit_option_wins_over_the_preset(adapters):
    """PEFT's vote with another scope and divisor; mergekit by all its options is the variant."""

    def run(**options) -> Tensor:
        return merge(adapters, "ties", density=0.4, **options).updates["layer.0.value"].rows(0, 8)

    peft = run(variant="peft")
    assert torch.equal(peft, run(variant="peft", scope="tensor", combine="mean"))
    assert not torch.equal(peft, run(variant="peft", scope="global"))
    assert not torch.equal(peft, run(variant="peft", combine="sum"))
    assert torch.equal(
        run(variant="mergekit"), run(variant="mergekit", scope="tensor", combine="weighted")
    )


@pytest.mark.parametrize(("method", "options"), [("ties", {"density": 1.0}), ("della", {})])
def test_weights_that_cancel_up_to_rounding_are_not_divided_by(method, options):
    """.1 + .6 - .7 is 6e-8 in float32, where all agree the divisor of 'net' is that sum."""
    torch.manual_seed(0)
    adapters = [
        Adapter(name, {"m": LowRank(torch.randn(51, 4), torch.randn(4, 64))}) for name in "abc"
    ]
    largest = [
        float(
            merge(adapters, method, weights, variant="mergekit", **options)
            .updates["m"]
            .rows(0, 51)
            .abs()
            .max()
        )
        for weights in ([0.1, 0.6, -0.7], [0.125, 0.625, -0.75])  # the second is exact in binary
    ]
    assert largest[0] < 2 * largest[1]
