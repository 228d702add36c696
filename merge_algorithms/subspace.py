"""Methods that merge in shared singular directions: exact in the factors.

Every update of a module lives in the span of all b_t and all a_t, so that after two thin QRs the
rest is R x R, R = sum r_t. Where a paper counts dimensions with min(d_out, d_in), full fine-tuning
in mind, these methods count the numerical rank (`factors.RANK_TOLERANCE`): the other directions
of a LoRA merge hold nothing but rounding errors. Results are LoRAs of rank at most R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from merge_algorithms.adapter import LowRank
from merge_algorithms.elementwise import dare_linear, dare_ties, ties
from merge_algorithms.errors import UserError
from merge_algorithms.factors import Svd, compact, left_vectors, polar, stack, svd, with_identity
from merge_algorithms.registry import get_method, register
from merge_algorithms.task_vectors import TaskVectors
from merge_algorithms.tiles import Update
from merge_algorithms.trim import int_share

KNOTS = "Stoica et al. 2025, arXiv 2410.19735"
ISO = "Marczak et al. 2025, arXiv 2502.04959"
# Coordinates up to this share of the whole are zero: an update that has no part in a direction
# must not vote there with the rounding errors of float64.
_NOISE = 1e-12


@register(
    summary="TIES on the coordinates in the updates' common left singular directions",
    paper=KNOTS,
    low_rank=True,
)
def knots_ties(
    tasks: TaskVectors,
    *,
    density: float = 0.2,
    scope: Literal["global", "tensor"] = "global",
    combine: Literal["mean", "sum", "weighted"] = "mean",
) -> dict[str, LowRank]:
    """KnOTS-TIES (arXiv 2410.19735, figure 1): dW = U X, X the TIES merge of the U^T dW_t.

    [dW_1 .. dW_T] = U S [V_1 .. V_T]^T, thus U^T dW_t = S V_t^T. U has as many columns as that
    matrix has rank. It does not depend on the weights, which act on the U^T dW_t as in TIES.
    Where two singular values are exactly equal, their directions are not unique and neither is
    the result; the signs of the directions play no role.

    Args:
        density: Share of each adapter's coordinates that is kept, in (0, 1].
        scope: What the share refers to: 'global' is the whole adapter (the authors), 'tensor'
            each module on its own.
        combine: 'mean' divides the agreeing sum by the number of agreeing tasks (the authors),
            'weighted' by the sum of their |w_t|, 'sum' by nothing.
    """
    bases, coordinates = _knots(tasks)
    merged = ties(coordinates, density=density, scope=scope, combine=combine)
    return _knotted(tasks, bases, merged)


@register(
    summary="DARE on the coordinates in the updates' common left singular directions",
    paper=KNOTS,
    low_rank=True,
    seeded=True,
)
def knots_dare(
    tasks: TaskVectors, *, density: float = 0.9, election: bool = True
) -> dict[str, LowRank]:
    """KnOTS-DARE (arXiv 2410.19735, figure 1): dW = U X, X the DARE merge of the U^T dW_t.

    U and the role of the weights are those of `knots_ties`. The masks fall on the entries of the
    U^T dW_t.

    Args:
        density: Share of each adapter's coordinates that is kept, in (0, 1]; default: the
            authors' drop rate of 0.1 for ViT-B/32.
        election: Merge by `dare_ties` (the authors' KnOTS-DARE-TIES), else by `dare_linear`.
    """
    bases, coordinates = _knots(tasks)
    merged = (dare_ties if election else dare_linear)(coordinates, density=density)
    return _knotted(tasks, bases, merged)


def _knots(tasks: TaskVectors) -> tuple[dict[str, Tensor], TaskVectors]:
    """Per module U (d_out, k), and the task vectors U^T dW_t."""
    bases = {}
    modules = {}
    for module, updates in tasks.modules.items():
        # dW_t = p_t q_t^T with orthonormal columns of q_t = qr(a_t^T): U is that of [p_1 .. p_T].
        ends = [torch.linalg.qr(u.a.double().T) for u in updates]
        parts = [u.b.double() @ end.R.T for u, end in zip(updates, ends, strict=True)]
        left = left_vectors(torch.cat(parts, dim=1))
        bases[module] = left.to(updates[0].b.dtype)
        modules[module] = tuple(
            LowRank(_cleaned(left.T @ part), end.Q.T).to(u.b.device, u.b.dtype)
            for u, part, end in zip(updates, parts, ends, strict=True)
        )
    return bases, replace(tasks, modules=modules)


def _cleaned(coordinates: Tensor) -> Tensor:
    """Coordinates with rows of nothing but rounding errors set to zero."""
    sizes = coordinates.norm(dim=1, keepdim=True)
    return coordinates.where(sizes > _NOISE * sizes.norm(), 0.0)


def _knotted(
    tasks: TaskVectors, bases: Mapping[str, Tensor], merged: Mapping[str, Update]
) -> dict[str, LowRank]:
    """U X for every module."""
    return {
        module: _outside(bases[module], merged[module], None, updates[0])
        for module, updates in tasks.modules.items()
    }


def _outside(left: Tensor, core: Update, right: Tensor | None, like: LowRank) -> LowRank:
    """left core right^T, or left core, in the dtype of `like`; rank 0, which PEFT lacks, is 1."""
    if not isinstance(core, LowRank):
        core = with_identity(core.rows(0, core.shape[0]))
    m, n = core.shape
    core = compact(core) if core.rank else LowRank(core.b.new_zeros(m, 1), core.a.new_zeros(1, n))
    b, a = left.double() @ core.b.double(), core.a.double()
    a = a if right is None else a @ right.T
    return LowRank(b.to(like.b.dtype), a.to(like.b.dtype))


@register(
    summary="another method applied to the core matrices between common bases",
    paper="Panariello et al. 2025, arXiv 2509.17786",
    low_rank=True,
    seeded=True,
)
def core_space(
    tasks: TaskVectors,
    *,
    inner: str = "ties",
    inner_options: Mapping[str, Any] | None = None,
    reference: Literal["balanced", "stored"] = "balanced",
) -> dict[str, LowRank]:
    """Core Space (arXiv 2509.17786, figure 2): dW = U_B M V_A^T, M the merge of the core matrices.

    U_B: left singular vectors of [b_1 .. b_T]; V_A: right ones of [a_1; ..; a_T]; core matrices
    M_t = U_B^T dW_t V_A, merged module by module, with the weights. U_B and V_A have as many
    columns as the stacks have rank and do not depend on the weights. Methods that are linear in
    the updates give the same result as without the core space. Where singular values of a stack
    are exactly equal, its basis is not unique, and elementwise results are not either; signs of
    the basis play no role but for the places of random masks, and are fixed.

    Args:
        inner: The method that merges the core matrices: any static one that reads no data.
        inner_options: Its options.
        reference: The factors that the bases are made of. 'balanced': b_t = U_t sqrt(S_t),
            a_t = sqrt(S_t) V_t^T of the update's SVD, so that the bases are the eigenvectors of
            sum_t (dW_t dW_t^T)^(1/2) and sum_t (dW_t^T dW_t)^(1/2). 'stored': those of the
            adapter, as in the authors' code; another basis of its factors gives another result.

    Raises:
        UserError: An unknown inner method, options that it does not take, or one that reads data.
    """
    method = get_method(inner)
    if method.needs:
        raise UserError(
            f"core_space: the inner method '{inner}' reads the {method.needs} of the data, which"
            " has no core matrix: choose one that does not, such as ties"
        )
    if not isinstance(inner_options, Mapping | None):
        raise UserError(
            f"core_space: inner_options={inner_options!r}: give a mapping such as"
            " {'density': 0.3}"
        )
    options = method.check_options(inner_options or {})
    method.check_count(len(tasks.names))
    merged = {}
    for module, updates in tasks.modules.items():
        factors = [_balanced(u) for u in updates] if reference == "balanced" else updates
        left = left_vectors(torch.cat([u.b.double() for u in factors], dim=1))
        right = left_vectors(torch.cat([u.a.double() for u in factors]).T)
        cores = tuple(
            _core(left, factor, right).to(left.device, u.b.dtype)
            for factor, u in zip(factors, updates, strict=True)
        )
        core = method.function(replace(tasks, modules={module: cores}), **options)[module]
        merged[module] = _outside(left, core, right, updates[0])
    return merged


def _core(left: Tensor, update: LowRank, right: Tensor) -> LowRank:
    """left^T dW right in float64, as factors: T core matrices would be T dense updates if R > d.

    Entries of nothing but rounding errors are zero: a method that keeps few entries could keep
    those alone.
    """
    b, a = left.T @ update.b.double(), update.a.double() @ right
    return LowRank(*(x.where(x.abs() > _NOISE * x.norm(), 0.0) for x in (b, a)))


def _balanced(update: LowRank) -> LowRank:
    u, s, v = svd(update)
    return LowRank(u * s.sqrt(), (v * s.sqrt()).T)


class _Cores(NamedTuple):
    """Updates in the orthonormal bases of the stacks: w_t dW_t = left tasks[t] right^T, float64."""

    left: Tensor
    right: Tensor
    tasks: list[LowRank]


def _cores(updates: Sequence[LowRank], weights: Sequence[float]) -> _Cores:
    ranks = [update.rank for update in updates]
    weighted = [w * u.b.double() for w, u in zip(weights, updates, strict=True)]
    left, b = torch.linalg.qr(torch.cat(weighted, dim=1))
    right, a = torch.linalg.qr(torch.cat([u.a for u in updates]).double().T)
    pairs = zip(b.split(ranks, dim=1), a.split(ranks, dim=1), strict=True)
    return _Cores(left, right, [LowRank(x, y.T) for x, y in pairs])


@register(
    summary="the updates' singular vectors, made orthogonal across tasks",
    paper="Gargiulo et al. 2025, arXiv 2412.00081",
    low_rank=True,
)
def tsv_m(tasks: TaskVectors) -> dict[str, LowRank]:
    """TSV-Merge (arXiv 2412.00081, algorithm 1) of the w_t dW_t = U_t S_t V_t^T.

    U = [U_1 .. U_T], V = [V_1 .. V_T], S = diag(S_1 .. S_T): dW = U' S V'^T with the polar factors
    U' and V' of U and V, the nearest matrices with orthonormal columns. All singular vectors of
    every update are kept, where the paper keeps the first min(d_out, d_in) / T. Where tasks share
    directions, and U or V has not full rank, the polar factor is the partial isometry
    U (U^T U)^(-1/2) on its range. A task of weight 0 has no part.
    """
    merged = {}
    for module, updates in tasks.modules.items():
        cores = _cores(updates, tasks.weights)
        core = _orthogonalised([svd(task) for task in cores.tasks])
        merged[module] = _outside(cores.left, core, cores.right, updates[0])
    return merged


def _orthogonalised(parts: Sequence[Svd]) -> LowRank:
    """U' S V'^T for the triplets of all parts and the polar factors U' and V'."""
    u, v = polar(torch.cat([x.u for x in parts], 1)), polar(torch.cat([x.v for x in parts], 1))
    return LowRank(u * torch.cat([x.s for x in parts]), v.T)


def _flat(parts: Sequence[Svd]) -> list[Svd]:
    """The same directions, every singular value replaced by the mean of all."""
    mean = torch.cat([x.s for x in parts]).mean()
    return [Svd(x.u, mean.expand_as(x.s), x.v) for x in parts]


@register(summary="the sum with equal singular values", paper=ISO, low_rank=True)
def iso_c(tasks: TaskVectors) -> dict[str, LowRank]:
    """Iso-C (arXiv 2502.04959): sum_t w_t dW_t = U S V^T becomes mean(S) U V^T.

    U, S and V at the sum's numerical rank, over which the mean is taken too; what is left where
    updates cancel is compared with the largest singular value of any of them.
    """
    return iso_cts(tasks, common=1.0)


@register(
    summary="common and task-specific directions with equal singular values",
    paper=ISO,
    low_rank=True,
)
def iso_cts(tasks: TaskVectors, *, common: float = 0.8) -> dict[str, LowRank]:
    """Iso-CTS (arXiv 2502.04959) of the w_t dW_t.

    With R the numerical rank of the sum U S V^T and T the number of updates that are not zero:
    s = round((R - floor(common R)) / T), at most floor(R / T), and k = R - T s. The common
    directions are the first k of the sum, the specific ones of task t the first s of
    w_t dW_t - U_k U_k^T w_t dW_t. All of them side by side, U and V are replaced by their polar
    factors U' and V', S by its mean m: dW = m U' V'^T. A task of weight 0 has no part.

    Args:
        common: Share of the sum's directions that is kept as common, in [0, 1]; 1 is Iso-C.
    """
    if not 0 <= common <= 1:
        raise UserError(f"iso_cts: common={common} is outside [0, 1]: give a share such as 0.8")
    merged = {}
    for module, updates in tasks.modules.items():
        cores = _cores(updates, tasks.weights)
        core = _orthogonalised(_flat(_common_and_specific(cores.tasks, common)))
        merged[module] = _outside(cores.left, core, cores.right, updates[0])
    return merged


def _common_and_specific(tasks: Sequence[LowRank], share: float) -> list[Svd]:
    spectra = [svd(task).s for task in tasks]
    own = {t: float(s[0]) for t, s in enumerate(spectra) if len(s)}
    whole = svd(stack(tasks, [1.0] * len(tasks)), scale=max(own.values(), default=0.0))
    rank = len(whole.s)
    count = max(1, len(own))
    specific = min(round((rank - int_share(share, rank)) / count), rank // count)
    basis = whole.top(rank - specific * len(own))
    parts = [basis]
    if specific:
        for t, largest in own.items():
            b, a = tasks[t].b, tasks[t].a
            rest = LowRank(b - basis.u @ (basis.u.T @ b), a)
            parts.append(svd(rest, scale=largest).top(specific))
    return parts
