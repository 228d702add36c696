"""A sketch against the formula C ~ F^T F + sigma (I - U^T U) on the whole data, in float64."""

from __future__ import annotations

import functools
import json
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from osrm import Covariance, bottom_subspace, collect_covariance, leaked_energy, subspace_state


class Wide(nn.Module):
    """One linear layer that reads the batch as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def inputs(spectrum: Tensor, tokens: int, seed: int) -> Tensor:
    """(tokens, d) rows whose second moment has about this spectrum, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    d = len(spectrum)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    h = torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    return (h * spectrum.sqrt()) @ basis


def power(d: int, exponent: float) -> Tensor:
    return torch.arange(1, d + 1, dtype=torch.float64) ** -exponent


def collect(h: Tensor, size: int = 64, **options) -> Covariance:
    batches = [{"x": part.float()[None]} for part in h.split(size)]
    return collect_covariance(Wide(h.shape[1]), batches, ["layer"], **options)


def oracle(h: Tensor, k: int) -> Tensor:
    c = h.T @ h / len(h)
    values, vectors = torch.linalg.eigh(c)
    top, u = values[-k:], vectors[:, -k:]
    sigma = (c.trace() - top.sum()) / (len(c) - k)
    return (u * top) @ u.T + sigma * (torch.eye(len(c), dtype=torch.float64) - u @ u.T)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_second_buffer_a_sketch_is_the_formula(dtype):
    h = inputs(power(160, 1.0), 90, seed=0)  # fewer rows than the buffer holds
    matrix = collect(h, sketch=20, dtype=dtype).matrix("layer")
    assert matrix.dtype == dtype
    assert torch.equal(matrix, matrix.T)
    # The inputs are float32, whatever the sums are.
    assert relative(matrix, oracle(h.float().double(), 20)) < (
        1e-6 if dtype.itemsize == 4 else 1e-12
    )


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_streaming_loses_little_of_the_top_directions(exponent):
    h = inputs(power(160, exponent), 3000, seed=1)
    expected = oracle(h, 24)
    matrix = collect(h, sketch=24).matrix("layer").double()
    assert relative(matrix, expected) < 0.01
    top = torch.linalg.eigvalsh(expected)[-24:]
    found = torch.linalg.eigvalsh(matrix)[-24:]
    assert torch.all(found <= top * (1 + 1e-5))  # truncation can only lose energy
    assert found.sum() > 0.99 * top.sum()


@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(1, 400),
    k=st.integers(1, 39),
    size=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_the_trace_is_exact_and_nothing_is_negative(tokens, k, size, seed):
    h = inputs(power(40, 1.0), tokens, seed)
    covariance = collect(h, size, sketch=k)
    matrix = covariance.matrix("layer").double()
    torch.testing.assert_close(
        matrix.trace(), (h.square().sum() / tokens), rtol=1e-5, atol=0, check_dtype=False
    )
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-6 * matrix.trace()
    assert covariance.tokens == tokens


def test_inputs_of_low_rank_are_exact():
    h = inputs(power(100, 1.0) * (torch.arange(100) < 10), 700, seed=2)
    matrix = collect(h, sketch=12).matrix("layer")
    assert relative(matrix, h.T @ h / len(h)) < 1e-5


def test_narrow_inputs_are_kept_exactly():
    h = inputs(power(16, 1.0), 300, seed=3)
    exact, sketch = collect(h), collect(h, sketch=16)
    assert torch.equal(sketch.matrix("layer"), exact.matrix("layer"))
    assert torch.equal(sketch.means["layer"], exact.means["layer"])


def test_save_and_load_keep_the_factors_only(tmp_path):
    covariance = collect(inputs(power(300, 1.0), 400, seed=4), sketch=8, meta={"task": "a"})
    covariance.save(tmp_path / "a.safetensors")
    loaded = Covariance.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.matrix("layer"), covariance.matrix("layer"))
    assert loaded.fingerprint == covariance.fingerprint
    assert (loaded.counts, loaded.meta) == (covariance.counts, {"task": "a"})
    assert (tmp_path / "a.safetensors").stat().st_size < 300 * (8 + 2) * 4 + 1000
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = collect(inputs(power(300, 1.0), 400, seed=5), sketch=8)
    assert again.fingerprint != covariance.fingerprint


def test_a_damaged_sketch_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    collect(inputs(power(200, 1.0), 50, seed=4), sketch=8).save(path)
    tensors = load_file(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    tensors["sketch/layer"] = torch.ones(9, 200)
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"shape \(9, 200\).*\(k, d\)"):
        Covariance.load(path)
    del tensors["sketch/layer"]
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="not a usable covariance file"):
        Covariance.load(path)


def test_sketches_of_shards_add_up():
    h = inputs(power(160, 1.5), 1500, seed=6)
    both = collect(h[:500], sketch=24) + collect(h[500:], sketch=16)
    matrix = both.matrix("layer").double()
    assert relative(matrix, oracle(h, 24)) < 0.03
    torch.testing.assert_close(
        float(matrix.trace()), float(h.square().sum() / 1500), rtol=1e-5, atol=0
    )
    assert both.tokens == 1500


@settings(deadline=None, max_examples=15)
@given(
    exponent=st.floats(0, 1.5),
    ks=st.tuples(st.integers(1, 39), st.integers(1, 39)),
    tokens=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_a_sum_is_the_sketch_of_what_its_parts_stand_for(exponent, ks, tokens, dtype, seed):
    """Oracle: the top directions of the mean of the dense matrices, and the mean of the rest."""
    parts = [
        collect(inputs(power(40, exponent), n, seed + i), sketch=k, dtype=dtype)
        for i, (k, n) in enumerate(zip(ks, tokens, strict=True))
    ]
    both = parts[0] + parts[1]
    share = tokens[0] / sum(tokens)
    first, second = (part.matrix("layer").double() for part in parts)
    mean = share * first + (1 - share) * second
    values, vectors = torch.linalg.eigh(mean)
    rest = values[: 40 - max(ks)].mean()
    values[: 40 - max(ks)] = rest
    found = both.matrix("layer").double()
    assert relative(found, (vectors * values) @ vectors.T) < 2e-6
    torch.testing.assert_close(found.trace(), mean.trace(), rtol=1e-6, atol=0)
    assert both.remainder("layer") == pytest.approx(float(rest), abs=1e-6 * float(mean.trace()))
    above = torch.linalg.eigvalsh(found - both.remainder("layer") * torch.eye(40).double())
    assert above[0] > -1e-6 * values[-1]


def test_a_sum_of_many_white_sketches_has_a_subspace():
    """What is kept has at least the energy of what is not, sum after sum."""
    parts = [
        collect(inputs(power(200, 0.0), 1000, seed), sketch=8, meta={"task": "pool"})
        for seed in range(8)
    ]
    pool = functools.reduce(operator.add, parts)
    own = collect(inputs(power(200, 1.0), 400, seed=8), sketch=8, meta={"task": "own"})
    assert pool.remainder("layer") == pytest.approx(1, abs=0.02)
    rows = subspace_state({"own": own, "pool": pool}, "own", rank=4)["layer"]
    assert leaked_energy(rows, pool.matrix("layer")) == pytest.approx(pool.remainder("layer"))


def test_directions_that_lost_more_than_they_kept_are_left_out():
    """Rows that fill the buffer again and again, each a little weaker than the first ones."""
    basis = torch.eye(300)
    h = torch.cat([3.0 * basis[:8], (2.9 * basis[8:136]).repeat(20, 1)])
    tasks = {
        "own": collect(inputs(power(300, 1.0), 400, seed=9), sketch=4),
        "other": collect(h, sketch=4),
    }
    matrix = tasks["other"].matrix("layer").double()
    assert float(matrix.trace()) == pytest.approx(float(h.square().sum()) / len(h), rel=1e-6)
    assert torch.linalg.eigvalsh(matrix)[0] > (1 - 1e-6) * tasks["other"].remainder("layer")
    assert subspace_state(tasks, "own", rank=2)["layer"].shape == (2, 300)


def test_what_sketches_cannot_do_is_refused():
    h = inputs(power(60, 1.0), 200, seed=7)
    sketch, exact = collect(h, sketch=8), collect(h[:50])
    with pytest.raises(UserError, match="cannot be subtracted"):
        sketch - collect(h[:50], sketch=8)
    for a, b in ((sketch, exact), (exact, sketch)):
        with pytest.raises(UserError, match="a sketch and an exact one at layer"):
            a + b
    with pytest.raises(UserError, match="keeps 0 directions"):
        collect(h, sketch=0)


@pytest.mark.parametrize(("exponent", "bound"), [(1.0, 0.03), (1.5, 0.01)])
def test_error_of_the_leaked_energy_against_the_exact_one(exponent, bound):
    """A from the sketch, an eighth of the directions kept; relative to the inputs' mean energy."""
    d = 256
    h = inputs(power(d, exponent), 6000, seed=8)
    exact, sketch = collect(h).matrix("layer"), collect(h, sketch=d // 8).matrix("layer")
    mean = float(exact.trace()) / d
    a = bottom_subspace(sketch, 8)
    best = leaked_energy(bottom_subspace(exact, 8), exact) / mean
    leaks, believed = (leaked_energy(a, c) / mean for c in (exact, sketch))
    assert abs(leaks - believed) < bound
    assert best < leaks < 0.45


def test_a_subspace_from_sketches_leaks_far_less_than_a_random_one(random_covariance):
    tasks = {
        name: collect(inputs(power(200, 1.5), 800, seed), sketch=32, meta={"task": name})
        for seed, name in enumerate("abc")
    }
    state = subspace_state(tasks, "a", rank=4)
    others = sum(tasks[name].matrix("layer").double() for name in "bc") / 2
    assert leaked_energy(state["layer"], others) < 0.2 * float(others.trace()) / 200


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_what_sketches_leave_out_is_chosen_for_the_own_task(solver):
    """Oracle: the own task's top directions outside of what the others' sketches hold."""
    tasks = {
        name: collect(inputs(power(200, 1.5), 800, seed), sketch=8, meta={"task": name})
        for seed, name in enumerate("abc")
    }
    rows = subspace_state(tasks, "a", rank=4, solver=solver)["layer"].double()
    held = torch.cat([tasks[name].matrices.kept["layer"].rows for name in "bc"]).double()
    outside = torch.eye(200).double() - torch.linalg.pinv(held) @ held
    own = tasks["a"].matrix("layer").double()
    best = torch.linalg.eigvalsh(outside @ own @ outside)[-4:].sum()
    assert float((rows @ own @ rows.T).trace()) == pytest.approx(float(best), rel=1e-3)
    assert (rows @ held.T).norm() < 1e-3 * held.norm()


def test_inputs_that_are_zero_have_a_sketch_too(tmp_path):
    covariance = collect(torch.zeros(50, 40), sketch=8)
    covariance.save(tmp_path / "zero.safetensors")
    loaded = Covariance.load(tmp_path / "zero.safetensors")
    assert torch.equal(loaded.matrix("layer"), torch.zeros(40, 40))
    assert torch.equal((loaded + covariance).matrix("layer"), torch.zeros(40, 40))
