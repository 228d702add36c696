"""TSV-Merge and Iso-C/-CTS: the spectra that their definitions promise."""

from __future__ import annotations

import pytest
import torch
from formulas import subspace
from torch import Tensor
from torch.linalg import svdvals

from merge_algorithms import Adapter, LowRank, UserError, merge

SHAPE = (60, 50)
METHODS = ["tsv_m", "iso_c", "iso_cts"]


def factors(seed: int, rank: int, shape: tuple[int, int] = SHAPE) -> LowRank:
    """Random float32 factors with a decaying spectrum."""
    draw = torch.Generator().manual_seed(seed)
    b = torch.randn(shape[0], rank, generator=draw) * 0.7 ** torch.arange(rank)
    return LowRank(b, torch.randn(rank, shape[1], generator=draw))


def named(*updates: LowRank) -> list[Adapter]:
    return [Adapter(f"t{t}", {"m": update}) for t, update in enumerate(updates)]


def dense(adapters: list[Adapter]) -> Tensor:
    return torch.stack([a.updates["m"].b.double() @ a.updates["m"].a.double() for a in adapters])


def merged(adapters: list[Adapter], method: str, *arguments, **options) -> Tensor:
    return merge(adapters, method, *arguments, **options).updates["m"].dense().double()


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert (actual - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [[2, 3, 4, 5], [8] * 12], ids=["R < d", "R > d"])
def test_agrees_with_its_dense_definition(method, ranks):
    adapters = named(*[factors(t, rank) for t, rank in enumerate(ranks)])
    w = [1.0 + 0.1 * t for t in range(len(ranks))]
    formula = getattr(subspace, method)
    expected = formula({"m": dense(adapters)}, torch.tensor(w).double())["m"]
    assert_close(merged(adapters, method, w), expected)
    assert merge(adapters, method, w).updates["m"].rank <= min(sum(ranks), *SHAPE)


def test_tsv_m_keeps_every_singular_value():
    """U' and V' have orthonormal columns: the spectrum is the union of the weighted spectra."""
    adapters = named(factors(0, 4), factors(1, 6), factors(2, 2))
    w = [1.0, 0.5, 2.0]
    spectra = [w * svdvals(x)[:r] for w, x, r in zip(w, dense(adapters), [4, 6, 2], strict=True)]
    expected = torch.cat(spectra).sort(descending=True).values
    found = merge(adapters, "tsv_m", w).updates["m"]
    assert_close(svdvals(found.dense().double())[:12], expected)
    b, a = found.b.double(), found.a.double()
    torch.testing.assert_close(a @ a.T, torch.eye(12).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(b.T @ b, torch.diag(torch.diag(b.T @ b)), rtol=0, atol=1e-4)


def test_tsv_m_of_orthogonal_updates_is_their_sum():
    updates = [factors(t, 3) for t in range(3)]
    for t, update in enumerate(updates):
        keep_out, keep_in = torch.arange(60) // 20 == t, torch.arange(50) // 16 == t
        update.b[~keep_out] = 0
        update.a[:, ~keep_in] = 0
    adapters = named(*updates)
    assert_close(merged(adapters, "tsv_m"), dense(adapters).sum(0), 1e-6)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_one_adapter(copies):
    """Shared directions: the polar factors of [U U ..] are [U U ..] / sqrt(copies)."""
    adapters = named(*[factors(0, 4)] * copies)
    x = dense(adapters)[0]
    assert_close(merged(adapters, "tsv_m"), x, 1e-6)
    u, s, v = subspace.truncated(x)
    assert_close(merged(adapters, "iso_c"), copies * s.mean() * u @ v.T, 1e-6)
    assert_close(merged(adapters, "iso_cts"), copies * s.mean() * u @ v.T, 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_copies_in_another_basis_add_no_direction(method):
    """float32 rounding moves the copy by 1e-7; raised to the mean, that would be half the merge."""
    update = factors(0, 4)
    g = torch.eye(4) + 0.3 * factors(1, 4, (4, 4)).b
    copy = LowRank(update.b @ g.inverse(), g @ update.a)
    assert_close(
        merged(named(update, copy), method), merged(named(update, update), method), relative=1e-5
    )


def test_iso_spectra_are_flat():
    adapters = named(factors(0, 4), factors(1, 6), factors(2, 2))
    total = dense(adapters).sum(0)
    u, s, v = subspace.truncated(total)
    found = merged(adapters, "iso_c")
    assert_close(found, s.mean() * u @ v.T)
    assert_close(svdvals(found)[:12], s.mean().expand(12))
    spectrum = svdvals(merged(adapters, "iso_cts"))
    assert_close(spectrum[:12], spectrum[0].expand(12))
    assert spectrum[12] < 1e-5 * spectrum[0]
    assert_close(merged(adapters, "iso_cts", common=1.0), found, 1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_rank_deficient_factors(method):
    """Repeated columns of b and rows of a: rank 3 stored as 6, and a zero adapter beside it."""
    update = factors(0, 3)
    doubled = LowRank(torch.cat([update.b, update.b], 1) / 2, torch.cat([update.a, update.a]))
    zero = LowRank(torch.zeros(60, 2), torch.ones(2, 50))
    found = merged(named(doubled, factors(1, 4), zero), method)
    assert_close(found, merged(named(update, factors(1, 4)), method))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_weight_zero_has_no_part(method):
    three = named(factors(0, 3), factors(1, 4), factors(2, 5))
    assert_close(merged(three, method, [1.0, 0.0, 2.0]), merged(three[::2], method, [1.0, 2.0]))


@pytest.mark.parametrize("method", METHODS)
def test_updates_that_cancel(method, tmp_path):
    """Iso has nothing to flatten but rounding errors; TSV-M takes the second as -S."""
    update = factors(0, 4)
    g = torch.eye(4) + 0.3 * factors(1, 4, (4, 4)).b
    opposite = LowRank(-update.b @ g.inverse(), g @ update.a)
    found = merge(named(update, opposite), method)
    assert found.updates["m"].dense().norm() < 1e-5 * update.dense().norm()
    found.save_adapter(tmp_path / "out")
    assert Adapter.load(tmp_path / "out").updates["m"].rank >= 1


def test_common_share_is_checked():
    with pytest.raises(UserError, match=r"common=1.5 is outside \[0, 1\]"):
        merge(named(factors(0, 2)), "iso_cts", common=1.5)
