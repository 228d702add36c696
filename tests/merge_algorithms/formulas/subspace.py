"""Methods that merge in shared singular directions, from dense singular value decompositions."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.linalg import svd

from formulas import elementwise
from formulas.case import Case, Dense
from merge_algorithms import LowRank


def rank(s: Tensor, largest: float | None = None) -> int:
    """Singular values above 1e-6 of the largest."""
    return int((s > 1e-6 * (float(s[0]) if largest is None else largest)).sum())


def truncated(x: Tensor, largest: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,), V (d_in, k) with the numerical rank k."""
    u, s, vh = svd(x, full_matrices=False)
    k = rank(s, largest)
    return u[:, :k], s[:k], vh[:k].T


def polar(x: Tensor) -> Tensor:
    u, _, v = truncated(x)
    return u @ v.T


def knots_basis(x: Tensor) -> tuple[Tensor, int]:
    """All of U of [dW_1 .. dW_T] = U S [V_1 .. V_T]^T, and how many columns count."""
    u, s, _ = svd(torch.cat(list(x), 1))
    return u, rank(s)


def knots_ties(dense: Dense, w: Tensor, **options: Any) -> Dense:
    """arXiv 2410.19735: TIES on the U^T dW_t = S V_t^T, mapped back."""
    bases = {}
    for m, x in dense.items():
        u, k = knots_basis(x)
        bases[m] = u[:, :k]
    merged = elementwise.ties({m: u.T @ dense[m] for m, u in bases.items()}, w, **options)
    return {m: u @ merged[m] for m, u in bases.items()}


def knots_coordinates(dense: Dense, merged: Dense) -> Dense:
    return {m: knots_basis(dense[m])[0].T @ x for m, x in merged.items()}


def knots_dare(dense: Dense, w: Tensor, density: float = 0.9, election: bool = True) -> Dense:
    """The entries of U^T dW that the masks of arXiv 2311.03099 on the U^T dW_t can leave."""
    inside = {m: knots_basis(x)[0].T @ x for m, x in dense.items()}
    return _subsets(inside, w, density, election)


def _subsets(dense: Dense, w: Tensor, density: float, election: bool) -> Dense:
    """The merge of every subset of the tasks, each divided by the density."""
    results: list[Dense] = []
    for kept in product((0.0, 1 / density), repeat=len(w)):
        masked = {m: torch.tensor(kept).double()[:, None, None] * x for m, x in dense.items()}
        results.append(elementwise.ties(masked, w, density=1.0) if election else _sum(masked, w))
    return {m: torch.stack([result[m] for result in results]) for m in dense}


def core_bases(x: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Eigenvectors of sum_t |dW_t^T| and sum_t |dW_t|, and how many of each count."""
    left, right = torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[2], x.shape[2])
    left, right = left.double(), right.double()
    for update in x:
        u, s, v = truncated(update)
        left += u * s @ u.T
        right += v * s @ v.T
    bases, counts = [], []
    for matrix in (left, right):
        energies, vectors = torch.linalg.eigh(matrix)
        bases.append(vectors.flip(1))
        counts.append(rank(energies.flip(0).clamp(min=0).sqrt()))
    return bases[0], bases[1], counts[0], counts[1]


def core_space(
    dense: Dense, w: Tensor, inner: str = "ties", inner_options: dict[str, Any] | None = None
) -> Dense:
    """arXiv 2509.17786 with balanced factors: another method on M_t = U_B^T dW_t V_A."""
    function = {"ties": elementwise.ties, "tsv_m": tsv_m, "task_arithmetic": _sum}[inner]
    merged = {}
    for m, x in dense.items():
        left, right, k, n = core_bases(x)
        left, right = left[:, :k], right[:, :n]
        core = function({m: left.T @ x @ right}, w, **(inner_options or {}))[m]
        merged[m] = left @ core @ right.T
    return merged


def core_coordinates(dense: Dense, merged: Dense) -> Dense:
    bases = {m: core_bases(x) for m, x in dense.items()}
    return {m: bases[m][0].T @ x @ bases[m][1] for m, x in merged.items()}


def core_dare(dense: Dense, w: Tensor, inner: str, inner_options: dict[str, Any]) -> Dense:
    """The entries of U_B^T dW V_A that the masks of arXiv 2311.03099 on the M_t can leave."""
    bases = {m: core_bases(x) for m, x in dense.items()}
    inside = {m: bases[m][0].T @ x @ bases[m][1] for m, x in dense.items()}
    return _subsets(inside, w, inner_options["density"], inner == "dare_ties")


def _sum(dense: Dense, w: Tensor) -> Dense:
    return {m: torch.einsum("t,tij->ij", w, x) for m, x in dense.items()}


def tsv_m(dense: Dense, w: Tensor) -> Dense:
    """arXiv 2412.00081, algorithm 1, with all singular vectors of every update."""
    merged = {}
    for m, x in dense.items():
        u, s, v = zip(*[truncated(update) for update in w[:, None, None] * x], strict=True)
        merged[m] = polar(torch.cat(u, 1)) * torch.cat(s) @ polar(torch.cat(v, 1)).T
    return merged


def iso_c(dense: Dense, w: Tensor) -> Dense:
    """arXiv 2502.04959: the sum with all singular values equal to their mean."""
    merged = {}
    for m, x in _sum(dense, w).items():
        u, s, v = truncated(x)
        merged[m] = s.mean() * u @ v.T
    return merged


def iso_cts(dense: Dense, w: Tensor, common: float = 0.8) -> Dense:
    """arXiv 2502.04959, algorithm 1, with the sum's numerical rank for min(d_out, d_in)."""
    merged = {}
    for m, x in dense.items():
        tasks = [update for update in w[:, None, None] * x if update.any()]
        u, s, v = truncated(sum(tasks))
        specific = round((len(s) - int(common * len(s) + 1e-9)) / len(tasks))
        specific = min(specific, len(s) // len(tasks))
        k = len(s) - len(tasks) * specific
        parts = [(u[:, :k], s[:k], v[:, :k])]
        for update in tasks:
            rest = update - u[:, :k] @ u[:, :k].T @ update
            p, q, r = truncated(rest, largest=float(svd(update).S[0]))
            parts.append((p[:, :specific], q[:specific], r[:, :specific]))
        p, q, r = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        merged[m] = q.mean() * polar(p) @ polar(r).T
    return merged


def flat(update: LowRank) -> LowRank:
    """The update with all its singular values equal."""
    u, s, v = truncated(update.dense().double())
    return LowRank(u * s.mean(), v.T).to(u.device, update.b.dtype)


_TIES: tuple[dict[str, Any], ...] = (
    {},
    {"density": 0.5, "combine": "sum"},
    {"density": 0.9, "scope": "tensor", "combine": "weighted"},
    {"density": 1.0},
)
_BAD_TIES: tuple[dict[str, Any], ...] = (
    {"density": 0.0},
    {"density": 1.5},
    {"density": float("nan")},
    {"combine": "median"},
)
CASES = [
    Case("knots_ties", knots_ties, options=_TIES, neutral={"density": 1.0}, bad=_BAD_TIES),
    Case(
        "knots_dare",
        None,
        possible=knots_dare,
        options=(
            {"density": 0.5},
            {"density": 0.25, "election": False},
            {"density": 1.0},
        ),
        neutral={"density": 1.0},
        bad=({"density": 0.0}, {"density": 1.5}, {"election": "yes"}),
        entrywise=True,
        coordinates=knots_coordinates,
    ),
    Case(
        "core_space",
        None,
        possible=core_dare,
        options=(
            {"inner": "dare_linear", "inner_options": {"density": 0.5}},
            {"inner": "dare_ties", "inner_options": {"density": 0.25}},
        ),
        neutral={"inner": "dare_linear", "inner_options": {"density": 1.0}},
        entrywise=True,
        coordinates=core_coordinates,
    ),
    Case(
        "core_space",
        core_space,
        options=(
            {},
            {"inner_options": {"density": 0.6, "combine": "weighted"}},
            {"inner": "task_arithmetic"},
            {"inner": "tsv_m"},
        ),
        neutral={"inner": "task_arithmetic"},
        bad=(
            {"inner": "tiez"},
            {"inner": "regmean"},
            {"inner": 3},
            {"inner_options": "density"},
            {"inner_options": {"densty": 0.5}},
            {"inner_options": {"density": 0.0}},
            {"reference": "own"},
        ),
    ),
    Case("tsv_m", tsv_m),
    Case("iso_c", iso_c, prepare=flat),
    Case(
        "iso_cts",
        iso_cts,
        options=({}, {"common": 0.5}, {"common": 0.0}, {"common": 1.0}),
        prepare=flat,
        bad=({"common": -0.1}, {"common": 1.5}, {"common": float("nan")}),
    ),
]
