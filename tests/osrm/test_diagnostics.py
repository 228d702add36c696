from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from factories import covariance_of

from merge_algorithms.errors import UserError
from osrm import (
    bottom_share,
    bottom_subspace,
    drift,
    effective_rank,
    input_spectra,
    leaked_energy,
    overlap_matrix,
    principal_angles,
    spectrum,
)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.3, math.pi / 2])
def test_drift_is_the_angle_that_the_span_turned(angle):
    a0 = torch.eye(4, dtype=torch.float64)[:2]
    a1 = a0.clone()
    a1[1, 1], a1[1, 2] = math.cos(angle), math.sin(angle)
    mixed = torch.tensor([[2.0, 1.0], [0.5, -3.0]], dtype=torch.float64) @ a1
    expected = torch.tensor([0.0, angle], dtype=torch.float64)
    torch.testing.assert_close(drift(a0, mixed), expected, atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(drift(mixed, a0), expected, atol=1e-12, rtol=1e-6)


def test_angles_of_spans_of_different_dimension():
    """Oracle: the arccosines of the singular values of Q_a^T Q_b, by numpy."""
    a, b = torch.randn(2, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    q, p = (np.linalg.qr(x.numpy().T)[0] for x in (a, b))
    expected = np.arccos(np.linalg.svd(q.T @ p, compute_uv=False))
    for angles in (principal_angles(a, b), principal_angles(b, a)):
        np.testing.assert_allclose(angles.numpy(), expected, rtol=1e-9)
    inside = principal_angles(b[1:3], b)
    torch.testing.assert_close(inside, torch.zeros(2).double(), atol=1e-7, rtol=0)


def test_overlap_is_the_share_of_the_smaller_span_inside_the_larger():
    eye = torch.eye(6)
    found = overlap_matrix([3 * eye[:2], eye[1:4], eye[:1], eye[3:]])
    expected = torch.tensor(
        [[1, 1 / 2, 1, 0], [1 / 2, 1, 0, 1 / 3], [1, 0, 1, 0], [0, 1 / 3, 0, 1]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_overlaps_of_many_are_traces_of_projectors():
    """Oracle: tr(P_i P_j) / min(rank), with P = V^T (V V^T)^+ V; dependent rows count once."""
    rows = [torch.randn(r, 9) for r in (2, 3, 5)]
    rows += [torch.cat([rows[0], rows[0][:1] + rows[0][1:]]), torch.zeros(2, 9), None]
    found = overlap_matrix(rows)
    wide = [x.double() for x in rows[:4]]
    projectors = [x.T @ torch.linalg.pinv(x @ x.T, rtol=1e-10) @ x for x in wide]
    for i, p in enumerate(projectors):
        for j, q in enumerate(projectors):
            smaller = min((2, 3, 5, 2)[i], (2, 3, 5, 2)[j])
            assert float(found[i, j]) == pytest.approx(float((p * q).sum()) / smaller, abs=1e-6)
    assert found[0, 3] == pytest.approx(1, abs=1e-6)
    assert found[4:].isnan().all()
    assert found[:, 4:].isnan().all()
    pair = float(principal_angles(rows[0], rows[1]).cos().square().mean())
    assert float(found[0, 1]) == pytest.approx(pair, rel=1e-9)


def test_spectra_of_all_tasks_are_those_of_their_samples():
    """Oracle: singular values of the inputs themselves, by numpy."""
    covariances, expected = {}, {}
    for task in "ab":
        h = torch.randn(2, 30, 8, dtype=torch.float64) * torch.rand(2, 1, 8, dtype=torch.float64)
        inputs = dict(zip("qo", h, strict=True))
        covariances[task] = covariance_of(inputs, {"q": "q", "v": "q", "o": "o"}, torch.float64)
        for module, x in zip("qvo", h[[0, 0, 1]], strict=True):
            values = np.linalg.svd(x.numpy(), compute_uv=False)[::-1] ** 2
            p = values / values.sum()
            rank = math.exp(-sum(share * math.log(share) for share in p))
            expected[task, module] = rank, (p[:2].sum(), p[:5].sum(), 1.0)
    found = input_spectra(covariances, [2, 5, 40])
    for (task, module), (rank, shares) in expected.items():
        assert found[task][module].effective_rank == pytest.approx(rank, rel=1e-9)
        assert found[task][module].bottom == pytest.approx(shares, rel=1e-9)


def test_spectrum_numbers_against_their_definitions():
    h = torch.randn(30, 8, dtype=torch.float64) * torch.logspace(0, -1, 8, dtype=torch.float64)
    cov = h.T @ h / 30
    values = spectrum(cov)
    singular = np.linalg.svd(h.numpy(), compute_uv=False)[::-1] ** 2 / 30
    np.testing.assert_allclose(values.numpy(), singular, rtol=1e-9)
    p = singular / singular.sum()
    assert effective_rank(values) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    for count in (1, 3, 8):
        leaked = leaked_energy(bottom_subspace(cov, count), cov) * count
        assert bottom_share(values, count) == pytest.approx(leaked / float(cov.trace()), rel=1e-4)


def test_spectra_at_the_ends():
    flat = spectrum(torch.eye(7))
    assert effective_rank(flat) == pytest.approx(7)
    assert bottom_share(flat, 2) == pytest.approx(2 / 7)
    one = spectrum(torch.diag(torch.tensor([0.0, 5.0, -1e-9])))
    assert one.tolist() == [0.0, 0.0, 5.0]
    assert effective_rank(one) == 1
    assert bottom_share(one, 2) == 0
    nothing = spectrum(torch.zeros(3, 3))
    assert effective_rank(nothing) == bottom_share(nothing, 2) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drift(torch.ones(2, 3), torch.ones(2, 4)), "before and .2, 4. after"),
        (lambda: principal_angles(torch.ones(2, 3), torch.ones(2, 4)), "of different modules"),
        (lambda: spectrum(torch.ones(2, 3)), "expected a finite .d, d. matrix"),
        (lambda: spectrum(torch.full((2, 2), torch.inf)), "finite"),
        (lambda: bottom_share(torch.ones(4), 5), "no bottom 5 of 4 eigenvalues: choose 1 to 4"),
        (lambda: bottom_share(torch.ones(4), 0), "no bottom 0"),
        (lambda: overlap_matrix([torch.eye(2), torch.eye(3)]), "widths .2, 3.: they are of diff"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
