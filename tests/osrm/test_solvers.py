"""The iterative solvers against full decompositions, on spectra and null spaces of known size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subspaces import projector
from torch import Tensor

from merge_algorithms.errors import UserError
from osrm import bottom_subspace, contrastive_subspace
from osrm.solvers import cholesky, choose_solver, null_level, with_rounding

D = 400
SPECTRA = {
    "power": torch.arange(1, D + 1).double() ** -1.0,
    "steep": torch.arange(1, D + 1).double() ** -1.5,
    "exponential": 10 ** (-4 * torch.arange(D).double() / D),
    "flat": 1 + 0.2 * torch.arange(D).double() / D,
}


def turned(values: Tensor, seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues, exactly symmetric."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double()).Q
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def sampled(tokens: int, d: int, seed: int, decay: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    h = h * torch.logspace(0, -decay, d, dtype=torch.float64)
    return h.T @ h / tokens


def energy(rows: Tensor, cov: Tensor) -> float:
    return float(((rows.double() @ cov.double()) * rows.double()).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("spectrum", [*SPECTRA])
def test_the_iteration_s_energy_is_within_two_percent_of_the_optimum(spectrum, rank, dtype):
    cov = turned(SPECTRA[spectrum], 1).to(dtype)
    before = cov.clone()
    rows = bottom_subspace(cov, rank, solver="cholesky")
    assert torch.equal(cov, before), "the input is the caller's"
    gram = rows.double() @ rows.double().T
    torch.testing.assert_close(gram, torch.eye(rank).double(), atol=1e-6, rtol=0)
    optimum = float(np.linalg.eigvalsh(cov.double().numpy())[:rank].sum())
    assert optimum * (1 - 1e-4) <= energy(rows, cov) <= 1.02 * optimum


def test_separate_eigenvalues_give_the_eigenvectors_themselves():
    """The bottom five are a factor apart: nothing to mix, so both solvers return the same rows."""
    values = torch.cat([10.0 ** -torch.arange(3, 8).double() * 4, torch.linspace(0.1, 1, D - 5)])
    cov = turned(values.double(), 2)
    rows = bottom_subspace(cov, 4, solver="cholesky")
    torch.testing.assert_close(rows, bottom_subspace(cov, 4, solver="eigh"), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("null", "rank"), [(3, 8), (12, 4), (40, 16)], ids=str)
def test_null_directions_with_the_most_own_energy_come_first_whatever_the_solver(null, rank):
    """40 dimensions do not fit the block of the iteration: it must notice."""
    own = sampled(900, D, 3, decay=0.5)
    values = torch.cat([torch.zeros(null), torch.linspace(0.1, 1, D - null)]).double()
    cov = turned(values, 4)
    iterated, exact = (bottom_subspace(cov, rank, own, solver=s) for s in ("cholesky", "eigh"))
    inside = min(null, rank)
    torch.testing.assert_close(iterated[:inside], exact[:inside], atol=1e-5, rtol=0)
    _, vectors = np.linalg.eigh(cov.numpy())
    basis = torch.from_numpy(vectors[:, :null].copy())
    best = np.linalg.eigvalsh((basis.T @ own @ basis).numpy())[::-1][:inside].sum()
    assert energy(iterated[:inside], own) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_nothing_seen_and_nothing_preferred_still_give_a_basis(solver):
    for cov in (torch.zeros(300, 300), torch.eye(300)):
        rows = bottom_subspace(cov, 5, solver=solver)
        torch.testing.assert_close(rows @ rows.T, torch.eye(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_the_number_of_threads_does_not_matter(solver):
    others, own = sampled(300, D, 5).float(), sampled(900, D, 6).float()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            [
                projector(bottom_subspace(others, 8, own, solver)),
                projector(contrastive_subspace(own, others, 8, solver=solver)),
            ]
        )
        assert torch.get_num_threads() == threads
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("rho", [0.05, 1.0])
@pytest.mark.parametrize("enormous", [False, True])
def test_contrastive_rows_span_the_top_generalised_eigenvectors(solver, rho, enormous):
    """Oracle: numpy's eigenvectors of M^-1 C, for every smaller rank as well."""
    own, others = sampled(500, 300, 7, decay=2.0), sampled(700, 300, 8)
    level = others.diagonal().mean()
    if enormous:
        for moment in (own, others):
            moment[5, 5] += 1e6 * level
        level = 10 * others.diagonal().sort().values[:-3].mean()
    rows = contrastive_subspace(own, others, 6, rho, solver)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows @ rows.T, torch.eye(6), atol=1e-5, rtol=0)
    damped = others + rho * level * torch.eye(300)
    values, vectors = np.linalg.eig(np.linalg.solve(damped.numpy(), own.numpy()))
    order = np.argsort(values.real)
    values, vectors = values.real[order], vectors.real[:, order]
    for rank in (1, 3, 6):
        best = torch.linalg.qr(torch.from_numpy(vectors[:, ::-1][:, :rank].copy())).Q
        gain = torch.trace(torch.linalg.solve(best.T @ damped @ best, best.T @ own @ best))
        assert float(gain) == pytest.approx(values[::-1][:rank].sum(), rel=1e-8)
        mine = rows[:rank].double()
        found = torch.trace(torch.linalg.solve(mine @ damped @ mine.T, mine @ own @ mine.T))
        assert float(found) == pytest.approx(float(gain), rel=1e-5 if solver == "eigh" else 1e-2)
        if solver == "eigh":
            torch.testing.assert_close(projector(mine), best @ best.T, atol=1e-4, rtol=0)


def enormous_inputs(tokens: int, seed: int, times: float, few: int, decay: float = 1.0) -> Tensor:
    """(tokens, D) float64, `few` features `times` as large as they would be."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    h = h * torch.logspace(0, -decay, D, dtype=torch.float64)
    h[:, 5 + 37 * torch.arange(few)] *= times
    return h


def summed(h: Tensor, dtype: torch.dtype) -> Tensor:
    """The second moment, its products and sums in `dtype`."""
    total = torch.zeros(h.shape[1], h.shape[1], dtype=dtype)
    for batch in h.to(dtype).split(32):
        total.addmm_(batch.T, batch)
    total /= len(h)
    return total.triu() + total.triu(1).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("times", [30.0, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("few", [1, 4])
def test_beside_enormous_features_the_least_energy_is_still_found(few, times, solver, dtype):
    """Energies of up to 1e10 that of the others. Oracle: numpy's singular values of the inputs."""
    h, g = (enormous_inputs(1500, seed, times, few, seed / 2) for seed in (2, 1))
    rows = bottom_subspace(summed(h, dtype), 8, summed(g, dtype), solver)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=1e-6, rtol=0)
    optimum = (np.linalg.svd(h.numpy(), compute_uv=False)[-8:] ** 2).sum()
    assert float((h @ rows.double().T).square().sum()) == pytest.approx(optimum, rel=1e-2)


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("few", [1, 4])
@pytest.mark.parametrize("where", ["own", "both"])
def test_contrastive_rows_beside_enormous_features_are_as_many_as_asked_for(where, few, solver):
    """Oracle: numpy's eigenvalues of M^-1 C. Before, own energy in the others counted as none."""
    own = summed(enormous_inputs(1500, 14, 1e4, few, 0.5), torch.float32)
    h = enormous_inputs(1500, 15, 1e4 if where == "both" else 1.0, few)
    others = summed(h, torch.float32)
    rows = contrastive_subspace(own, others, 8, solver=solver).double()
    own, others = own.double(), others.double()
    plain = others.diagonal().mean()
    level = min(plain, max(10 * others.diagonal().sort().values[:-4].mean(), 1e-4 * plain))
    damped = others + 0.05 * level * torch.eye(D)
    best = np.sort(np.linalg.eigvals(np.linalg.solve(damped.numpy(), own.numpy())).real)[-8:].sum()
    found = torch.trace(torch.linalg.solve(rows @ damped @ rows.T, rows @ own @ rows.T))
    assert float(found) == pytest.approx(best, rel=1e-2)


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("times", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("few", [1, 4])
def test_few_tokens_leave_a_null_space_beside_enormous_features_too(few, times, dtype, solver):
    """Oracle: numpy's singular vectors; of its 340 directions those with the most own energy."""
    h, g = (enormous_inputs(tokens, tokens, times, few) for tokens in (60, 900))
    cov, own = summed(h, dtype), summed(g, dtype)
    rows = bottom_subspace(cov, 12, own, solver)
    null = torch.from_numpy(np.linalg.svd(h.numpy())[2][60:].T.copy())
    values = torch.linalg.eigvalsh(with_rounding(cov).double())
    assert int((values <= null_level(cov)).sum()) == 340
    wide = rows.double()
    assert float((wide @ null).square().sum()) == pytest.approx(12, rel=1e-5), "all of them inside"
    best = np.linalg.eigvalsh((null.T @ own.double() @ null).numpy())[-12:].sum()
    assert energy(rows, own) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
@pytest.mark.parametrize("raised", [340, 34_000])
def test_activations_that_are_the_same_in_every_text_leave_no_accidents(raised, solver):
    """Three enormous features of every eighth token are equal: one direction has their energy.

    Along the other two the float32 sums hold energy of either sign, far above the least that there
    is. Oracle: float64, from the inputs.
    """

    def inputs(seed: int) -> Tensor:
        h = enormous_inputs(8000, seed, 1.0, 0)
        h = h / h.square().mean().sqrt()
        few = 5 + 37 * torch.arange(3)
        constant = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)
        h[torch.arange(0, 8000, 8)[:, None], few] = (raised * D * 8) ** 0.5 * constant
        return h

    h, g = inputs(16), inputs(17)
    cov, own = (summed(x, torch.float32) for x in (h, g))
    optimum = float(np.linalg.eigvalsh((h.T @ h).numpy())[:8].sum())
    rows = bottom_subspace(cov, 8, own, solver).double()
    assert float((h @ rows.T).square().sum()) <= 1.01 * optimum
    assert len(contrastive_subspace(own, cov, 8, solver=solver)) == 8


def test_where_no_feature_is_enormous_the_level_is_a_share_of_the_whole():
    for cov in (sampled(700, D, 18), turned(SPECTRA["steep"], 19), torch.eye(3)):
        norm = float(torch.linalg.vector_norm(cov, dtype=torch.float64))
        assert null_level(cov) == 1e-6 * norm
        assert with_rounding(cov) is cov
    cov[0, 0] = 1e6
    assert null_level(cov) == pytest.approx(1e-5 * 2**0.5)
    assert null_level(cov.diagonal()) == null_level(cov)
    assert with_rounding(cov)[0, 0] == pytest.approx(1e6 + 10)
    assert cov[0, 0] == 1e6, "the input is the caller's"
    assert null_level(torch.diag(torch.tensor([0.0, 4.0, 0.0]))) == pytest.approx(4e-14)
    assert null_level(torch.zeros(3, 3)) == 0


def test_rounding_is_as_much_as_a_negative_eigenvalue_proves():
    """The correlation of the two enormous features is 1.0001, of which 1e-4 can but be rounding."""
    cov = torch.eye(200, dtype=torch.float64)
    cov[:2, :2] = 1e8 * torch.tensor([[1.0, 1.0001], [1.0001, 1.0]])
    more = with_rounding(cov)
    torch.testing.assert_close(more.diagonal()[:2] / 1e8 - 1, torch.full((2,), 2e-4).double())
    assert torch.equal(more - more.diagonal().diag(), cov - cov.diagonal().diag())
    assert torch.linalg.eigvalsh(more)[0] > 0
    cov[:2, :2] = 1e8 * torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    with pytest.raises(UserError, match="a second moment has none below zero"):
        bottom_subspace(cov, 2)


def test_contrastive_beats_both_of_its_ends_at_what_it_is_for():
    """More own energy than the bottom subspace, and a better ratio than the own top directions."""
    own, others = sampled(500, 60, 9), sampled(500, 60, 10)
    contrastive = contrastive_subspace(own, others, 4)
    bottom = bottom_subspace(others, 4, own)
    top = bottom_subspace(torch.eye(60) * own.trace() - own, 4)

    def ratio(rows):
        return energy(rows, own) / energy(rows, others)

    assert energy(contrastive, own) > energy(bottom, own)
    assert ratio(contrastive) > ratio(top)


def test_contrastive_turns_with_its_inputs():
    own, others = sampled(500, 40, 11, decay=2.0), sampled(500, 40, 12)
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40, generator=generator).double()).Q
    straight = contrastive_subspace(own, others, 3)
    turned_back = contrastive_subspace(q.T @ own @ q, q.T @ others @ q, 3).double() @ q.T
    torch.testing.assert_close(projector(turned_back), projector(straight), atol=1e-5, rtol=0)


def test_size_decides_the_solver():
    assert choose_solver("auto", 1024, 8) == "eigh"
    assert choose_solver("auto", 4096, 16) == "cholesky"
    assert choose_solver("auto", 4096, 1024) == "eigh"
    assert choose_solver("cholesky", 10, 5) == "cholesky"


def test_factors_are_lower_and_what_has_none_is_told():
    matrix = sampled(50, 20, 13)
    lower = cholesky(matrix, 0.5)
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower @ lower.T, matrix + 0.5 * torch.eye(20).double())
    assert cholesky(-matrix, 0.0) is None


EYE = torch.eye(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bottom_subspace(EYE, 2, solver="lanczos"), "unknown solver 'lanczos'; known"),
        (lambda: bottom_subspace(-torch.eye(300), 2, solver="cholesky"), "eigenvalue -1"),
        (lambda: contrastive_subspace(EYE, EYE, 5), "rank 5 .* choose 1 to 4"),
        (lambda: contrastive_subspace(torch.eye(3), EYE, 2), "own is 3 wide and others 4"),
        (lambda: contrastive_subspace(EYE, EYE, 2, rho=0.0), "rho is 0.0: .* positive"),
        (lambda: contrastive_subspace(EYE, EYE, 2, rho=float("nan")), "rho is nan"),
        (lambda: contrastive_subspace(EYE, 0 * EYE, 2), "not positive definite"),
        (lambda: contrastive_subspace(EYE, -EYE, 2), "not positive definite"),
        (lambda: contrastive_subspace(torch.nan * EYE, EYE, 2), "own of shape .* finite"),
        (
            lambda: contrastive_subspace(torch.diag(torch.tensor([0.0, 1, 0, 2])), EYE, 3),
            "own has energy in 2 directions only and rank 3 asks for more",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
