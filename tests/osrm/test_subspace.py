from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subspaces import projector
from torch import Tensor

from merge_algorithms.errors import UserError
from osrm import bottom_subspace, leaked_energy, official_subspace

QUICK = settings(deadline=None, max_examples=30)


def features(tokens: int, d: int, seed: int, decay: float = 2.0) -> Tensor:
    """(tokens, d) float64 inputs with a decaying spectrum in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    return h * torch.logspace(0, -decay, d, dtype=torch.float64) @ rotation(d, seed)


def rotation(d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def moment(h: Tensor) -> Tensor:
    return h.T @ h / len(h)


def assert_orthonormal(rows: Tensor) -> None:
    gram = rows.double() @ rows.double().T
    torch.testing.assert_close(gram, torch.eye(len(rows), dtype=torch.float64), atol=1e-6, rtol=0)


problems = st.tuples(st.integers(4, 20), st.integers(1, 40), st.integers(0, 10_000), st.data())


@QUICK
@given(problems)
def test_it_attains_the_smallest_energy_there_is(problem):
    d, tokens, seed, data = problem
    rank = data.draw(st.integers(1, d))
    cov, own = moment(features(tokens, d, seed)), moment(features(tokens, d, seed + 1))
    rows = bottom_subspace(cov, rank, own)
    assert rows.shape == (rank, d)
    assert rows.dtype == torch.float32
    assert_orthonormal(rows)
    values = np.linalg.eigvalsh(cov.numpy())
    energy = float(torch.trace(rows.double() @ cov @ rows.double().T))
    assert abs(energy - values[:rank].sum()) <= 2e-6 * rank * values[-1]
    each = ((rows.double() @ cov) * rows.double()).sum(1)
    assert (each.diff() >= -3e-6 * values[-1]).all(), "eigenvalues must ascend"


@QUICK
@given(problems)
def test_rows_of_a_smaller_rank_are_the_first_rows_of_a_larger_one(problem):
    d, tokens, seed, data = problem
    rank = data.draw(st.integers(1, d))
    cov = moment(features(tokens, d, seed))
    own = data.draw(st.sampled_from([None, moment(features(tokens, d, seed + 1))]))
    assert torch.equal(bottom_subspace(cov, d, own)[:rank], bottom_subspace(cov, rank, own))
    means = features(tokens, d, seed)
    assert torch.equal(official_subspace(means, d)[:rank], official_subspace(means, rank))


@pytest.mark.parametrize(("tokens", "own_tokens"), [(100, 100), (6, 100), (6, 9), (20, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_turning_the_problem_turns_the_subspace(tokens, own_tokens, dtype):
    d, rank = 24, 4
    if own_tokens < rank:  # the own energy must decide all the rows that are compared
        rank = own_tokens
    h, g = features(tokens, d, 1), features(own_tokens, d, 2, decay=1.0)
    turn = rotation(d, 3)
    permutation = torch.eye(d, dtype=torch.float64)[torch.randperm(d)]
    straight = bottom_subspace(moment(h).to(dtype), rank, moment(g).to(dtype))
    for q in (turn, permutation):
        turned = bottom_subspace(moment(h @ q).to(dtype), rank, moment(g @ q).to(dtype))
        back = turned.double() @ q.T
        torch.testing.assert_close(projector(back), projector(straight), atol=2e-3, rtol=0)


def test_null_directions_with_the_most_own_energy_come_first():
    """Oracle: 6 tokens in 20 dimensions leave 14 free; pick by own energy inside them."""
    d, h = 20, features(6, 20, 1)
    own = moment(features(200, d, 2, decay=0.5))
    _, _, vh = np.linalg.svd(h.numpy(), full_matrices=True)
    null = torch.from_numpy(vh[6:].T.copy())
    values, turn = np.linalg.eigh((null.T @ own @ null).numpy())
    best = (null @ torch.from_numpy(turn[:, ::-1].copy())).T
    rows = bottom_subspace(moment(h).float(), 16, own)
    for rank in (1, 3, 8, 14):
        torch.testing.assert_close(
            projector(rows[:rank]), projector(best[:rank]), atol=1e-4, rtol=0
        )
        assert leaked_energy(rows[:rank], moment(h)) < 1e-8
        found = leaked_energy(rows[:rank], own) * rank
        assert found == pytest.approx(values[::-1][:rank].sum(), rel=1e-4)
    assert leaked_energy(rows[14:15], moment(h)) > 1e-7, "then the smallest eigenvalues"


def test_linearly_dependent_features_are_null_directions():
    h = features(300, 16, 5, decay=0.3)
    h[:, 3] = h[:, 1] + h[:, 2]
    h[:, 9] = 0
    rows = bottom_subspace(moment(h).float(), 2, moment(features(300, 16, 6)))
    expected = torch.zeros(2, 16, dtype=torch.float64)
    expected[0, [1, 2, 3]] = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64) / 3**0.5
    expected[1, 9] = 1
    torch.testing.assert_close(projector(rows), projector(expected), atol=1e-3, rtol=0)


def dead(h: Tensor) -> Tensor:
    """Feature 3 is the opposite of feature 1, feature 2 says nothing: in every task alike."""
    h = h.clone()
    h[:, 3], h[:, 2] = -h[:, 1], 0
    return h


_CASES = {
    "no own": (moment(features(8, 24, 1)), None),
    "own": (moment(features(8, 24, 1)), moment(features(50, 24, 2))),
    "own of low rank": (moment(features(8, 24, 1)), moment(features(3, 24, 2))),
    "own is isotropic": (moment(features(8, 24, 1)), torch.eye(24, dtype=torch.float64)),
    "ties": (torch.eye(24, dtype=torch.float64), moment(features(4, 24, 2))),
    "dead features": (moment(dead(features(99, 24, 1))), moment(dead(features(99, 24, 2)))),
    "dead features, no own": (moment(dead(features(99, 24, 1))), None),
}


@pytest.mark.parametrize("case", [*_CASES])
def test_another_lapack_gives_the_same_rows(case, monkeypatch):
    """Eigenvectors of equal eigenvalues, and all signs, are the LAPACK's choice: turn them."""
    rank = 6
    cov, own = _CASES[case]
    reference = bottom_subspace(cov, rank, own)
    real, calls = torch.linalg.eigh, []

    def other_lapack(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = real(matrix)
        vectors = vectors.clone()
        largest = values.abs().max()
        start = 0
        while start < len(values):
            same = (values - values[start]).abs() <= 1e-13 * largest
            span = vectors[:, same]
            vectors[:, same] = span @ rotation(span.shape[1], len(calls))
            start = int(same.nonzero().max()) + 1
        calls.append(matrix)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", other_lapack)
    again = bottom_subspace(cov, rank, own)
    assert calls
    torch.testing.assert_close(again, reference, atol=1e-5, rtol=0)


def test_without_own_a_large_null_space_is_announced(caplog):
    cov = moment(features(4, 12, 1))
    with caplog.at_level(logging.INFO, logger="osrm"):
        bottom_subspace(cov, 8, moment(features(4, 12, 2)))
        bottom_subspace(moment(features(50, 12, 1)), 3)
        assert not caplog.records
        bottom_subspace(cov, 3)
    assert "null space has 8 dimensions, more than the rank 3" in caplog.text


def test_nothing_seen_at_all_still_gives_an_orthonormal_basis():
    rows = bottom_subspace(torch.zeros(5, 5), 5)
    assert_orthonormal(rows)


def test_signs_do_not_depend_on_the_input_s_order_of_rows():
    h = features(40, 10, 1)
    first, second = (bottom_subspace(moment(x), 4) for x in (h, h[torch.randperm(40)]))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solve", [bottom_subspace, official_subspace])
def test_one_thread_solves_and_the_setting_comes_back(solve, monkeypatch):
    threads = []
    for name in ("eigh", "svd"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg,
            name,
            lambda *args, real=real, **kwargs: (
                threads.append(torch.get_num_threads()),
                real(*args, **kwargs),
            )[1],
        )
    torch.set_num_threads(2)
    solve(torch.eye(6), 2)
    assert threads
    assert set(threads) == {1}
    assert torch.get_num_threads() == 2


def test_official_is_the_end_of_the_full_svd():
    """Oracle: numpy's SVD. With as many means as dimensions the vectors are unique up to sign."""
    means = features(7, 7, 3, decay=1.0)
    _, _, vh = np.linalg.svd(means.numpy(), full_matrices=True)
    rows = official_subspace(means.float(), 3)
    assert_orthonormal(rows)
    torch.testing.assert_close(
        projector(rows), projector(torch.from_numpy(vh[-3:].copy())), atol=1e-3, rtol=0
    )


def test_official_is_orthogonal_to_every_mean_when_it_can_be():
    means = features(3, 12, 4)
    rows = official_subspace(means, 9).double()
    assert (rows @ means.T).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bottom_subspace(torch.eye(4), 5), "rank 5 .* reads 4 features: choose 1 to 4"),
        (lambda: bottom_subspace(torch.eye(4), 0), "choose 1 to 4"),
        (lambda: bottom_subspace(torch.ones(4, 3), 1), "expected a finite .d, d. matrix"),
        (lambda: bottom_subspace(torch.full((2, 2), torch.nan), 1), "finite"),
        (lambda: bottom_subspace(torch.eye(4), 1, torch.eye(3)), "own is 3 wide and cov 4"),
        (lambda: bottom_subspace(torch.diag(torch.tensor([1.0, -1.0])), 1), "eigenvalue -1"),
        (lambda: official_subspace(torch.ones(2, 4), 5), "choose 1 to 4"),
        (lambda: official_subspace(torch.ones(4), 1), "finite .T - 1, d. matrix"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
