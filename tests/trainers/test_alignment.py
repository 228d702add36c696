"""The first layer of a head fitted to merged features: its formula, and what it must not do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_algorithms import UserError
from trainers.alignment import align_layer

ROWS, WIDTH, OUTPUTS = 40, 6, 3


def features(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merged and own features, weight and bias, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    alone = 3 + draw(rows, WIDTH)
    merged = alone @ (torch.eye(WIDTH) + 0.3 * draw(WIDTH, WIDTH)) + draw(WIDTH)
    return merged, alone, draw(OUTPUTS, WIDTH), draw(OUTPUTS)


def fitted(
    merged: Tensor, alone: Tensor, weight: Tensor, mu: float, constant: bool
) -> NDArray[np.float64]:
    """[D c]^T by least squares: a row for every input, and one for every entry that is shrunk."""
    z, y, w = merged.numpy(), alone.numpy(), weight.numpy()
    varying = z - z.mean(axis=0) if constant else z
    shrunk = math.sqrt(mu * (varying**2).sum() / WIDTH) * np.eye(WIDTH)
    design = np.vstack([z, shrunk])
    if constant:
        ones = np.concatenate([np.ones(len(z)), np.zeros(WIDTH)])
        design = np.column_stack([design, ones])
    target = np.vstack([(y - z) @ w.T, np.zeros((WIDTH, OUTPUTS))])
    return np.linalg.lstsq(design, target, rcond=None)[0]


@pytest.mark.parametrize("mu", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("rows", [ROWS, WIDTH - 2])
def test_the_least_squares_fit(mu: float, rows: int) -> None:
    merged, alone, weight, bias = features(rows)
    new_weight, new_bias = align_layer(merged, alone, weight, bias, mu)
    expected = fitted(merged, alone, weight, mu, constant=True)
    np.testing.assert_allclose(new_weight - weight, expected[:WIDTH].T, rtol=1e-9, atol=1e-11)
    assert new_bias is not None
    np.testing.assert_allclose(new_bias - bias, expected[WIDTH], rtol=1e-9, atol=1e-11)


def test_without_bias_there_is_no_constant() -> None:
    merged, alone, weight, _ = features()
    new_weight, new_bias = align_layer(merged, alone, weight, None, 0.1)
    assert new_bias is None
    expected = fitted(merged, alone, weight, 0.1, constant=False)
    np.testing.assert_allclose(new_weight - weight, expected.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("with_bias", [True, False])
def test_features_that_did_not_move_change_nothing(with_bias: bool) -> None:
    _, alone, weight, bias = features()
    new_weight, new_bias = align_layer(alone, alone, weight, bias if with_bias else None, 0.01)
    assert torch.equal(new_weight, weight)
    if new_bias is not None:
        assert torch.equal(new_bias, bias)


def test_endless_shrinkage_leaves_the_weight_and_moves_the_mean() -> None:
    merged, alone, weight, bias = features()
    new_weight, new_bias = align_layer(merged, alone, weight, bias, 1e15)
    torch.testing.assert_close(new_weight, weight)
    assert new_bias is not None
    gap = (alone - merged) @ weight.T
    torch.testing.assert_close(new_bias, bias + gap.mean(dim=0))
    torch.testing.assert_close(align_layer(merged, alone, weight, None, 1e15)[0], weight)


def test_a_linear_shift_is_undone_where_little_is_shrunk() -> None:
    merged, alone, weight, bias = features()
    new_weight, new_bias = align_layer(merged, alone, weight, bias, 1e-12)
    assert new_bias is not None
    torch.testing.assert_close(merged @ new_weight.T + new_bias, alone @ weight.T + bias)


def test_the_unit_of_the_features_and_their_order_do_not_matter() -> None:
    merged, alone, weight, bias = features()
    once, _ = align_layer(merged, alone, weight, bias, 0.1)
    scaled, _ = align_layer(100 * merged, 100 * alone, weight, bias, 0.1)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    shuffled, _ = align_layer(merged[order], alone[order], weight, bias, 0.1)
    torch.testing.assert_close(scaled, once)
    torch.testing.assert_close(shuffled, once)


def test_constant_features_move_the_bias_alone() -> None:
    _, alone, weight, bias = features()
    merged = torch.zeros_like(alone)
    for layer_bias in (bias, None):
        new_weight, new_bias = align_layer(merged, alone, weight, layer_bias, 0.1)
        assert torch.equal(new_weight, weight)
    new_bias = align_layer(merged, alone, weight, bias, 0.1)[1]
    assert new_bias is not None
    torch.testing.assert_close(new_bias, bias + (alone @ weight.T).mean(dim=0))


def test_float32_layers_stay_float32_and_are_solved_in_float64() -> None:
    exact = features()
    rounded = [tensor.float() for tensor in exact]
    expected, _ = align_layer(*(tensor.double() for tensor in rounded), mu=0.01)
    weight, bias = align_layer(*rounded, mu=0.01)
    assert bias is not None
    assert weight.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(weight, expected.float())


def test_bad_input_is_refused() -> None:
    merged, alone, weight, bias = features()
    for mu in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="positive, finite"):
            align_layer(merged, alone, weight, bias, mu)
    with pytest.raises(UserError, match=r"\(39, 6\) under the merge and \(40, 6\) alone"):
        align_layer(merged[1:], alone, weight, bias, 0.1)
    with pytest.raises(UserError, match="at least one row"):
        align_layer(merged[:0], alone[:0], weight, bias, 0.1)
    with pytest.raises(UserError, match=r"\(3, 5\) but the features have width 6"):
        align_layer(merged, alone, weight[:, 1:], bias, 0.1)
    merged[3, 2] = math.nan
    with pytest.raises(UserError, match="not finite"):
        align_layer(merged, alone, weight, bias, 0.1)
