from __future__ import annotations

import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge_algorithms.errors import UserError
from osrm import Covariance, collect_covariance
from osrm.others import leave_one_out

QUICK = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_same(a: Covariance, b: Covariance, tolerance: float = 0.0) -> None:
    assert (a.modules, a.counts, a.positions) == (b.modules, b.counts, b.positions)
    for part in ("matrices", "means"):
        for key, tensor in getattr(a, part).items():
            torch.testing.assert_close(
                tensor, getattr(b, part)[key], rtol=0, atol=tolerance * float(tensor.abs().max())
            )


def test_save_and_load_round_trip(tmp_path, random_covariance):
    covariance = random_covariance("sst2", seed=1)
    covariance.save(tmp_path / "new" / "a.safetensors")
    loaded = Covariance.load(tmp_path / "new" / "a.safetensors")
    assert_same(loaded, covariance)
    assert loaded.meta == {"model": "tiny", "task": "sst2"}
    loaded.save(tmp_path / "b.safetensors")
    first, second = (tmp_path / "new" / "a.safetensors"), (tmp_path / "b.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["a.safetensors"]


def test_the_same_covariance_gives_the_same_bytes(tmp_path, random_covariance):
    a = random_covariance("a")
    parts = [a.matrices, a.means, a.modules, a.counts, a.positions, a.meta]
    reverse = Covariance(*(dict(reversed(part.items())) for part in parts))
    a.save(tmp_path / "a.safetensors")
    reverse.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_fingerprint_tells_matrices_apart(tmp_path, random_covariance):
    covariance = random_covariance("a", seed=1)
    covariance.save(tmp_path / "a.safetensors")
    assert Covariance.load(tmp_path / "a.safetensors").fingerprint == covariance.fingerprint
    assert random_covariance("a", seed=2).fingerprint != covariance.fingerprint


def test_adding_pools_the_data(make_model, texts, batches):
    model, rows = make_model("bert"), texts(9, seed=1)
    both = collect_covariance(model, batches(rows, 3, 9), ["query", "pooler.dense"])
    first = collect_covariance(model, batches(rows[:2], 3, 9), ["query", "pooler.dense"])
    second = collect_covariance(model, batches(rows[2:], 3, 9), ["query", "pooler.dense"])
    assert_same(first + second, both, 1e-6)


@QUICK
@given(tokens=st.tuples(st.integers(1, 200), st.integers(1, 200)), seed=st.integers(0, 99))
def test_subtracting_undoes_adding(tokens, seed, random_covariance):
    a = random_covariance("a", tokens=tokens[0], seed=seed)
    b = random_covariance("b", tokens=tokens[1], seed=seed + 100)
    assert_same((a + b) - b, a, 1e-4)
    assert_same(a + b, b + a, 1e-6)
    assert (a + b).meta == {"model": "tiny", "pooled": "2"}


def test_subtracting_keeps_where_the_data_come_from(random_covariance):
    a, b = random_covariance("a", tokens=50), random_covariance("b", tokens=20)
    assert (a - b).meta == {"model": "tiny", "task": "a"}
    assert (a - b).tokens == 30


def test_leave_one_out_is_the_mean_of_the_others_in_any_order(random_covariance):
    tasks = {name: random_covariance(name, seed=i, tokens=9 + i) for i, name in enumerate("abcd")}
    for i, name in enumerate("acd"):  # of magnitudes whose sum rounds
        for matrix in tasks[name].matrices.values():
            matrix *= 10 ** (5 * i)
    reverse = dict(reversed(tasks.items()))
    pairs = zip(leave_one_out(tasks, "b"), leave_one_out(reverse, "b"), strict=True)
    for (key, others, own), (_, again, _) in pairs:
        expected = sum(tasks[u].matrices[key].double() for u in "acd") / 3
        torch.testing.assert_close(others, expected, rtol=1e-9, atol=0)
        assert torch.equal(others, again)
        assert torch.equal(own, tasks["b"].matrices[key].double())


def test_covariances_that_do_not_fit_together(random_covariance):
    a = random_covariance("a")
    cases = {
        r"task 'a' .* task 'b' are of different models, tiny and big": random_covariance(
            "b", model="big"
        ),
        "widths 12 and 10 at 0.query": random_covariance("b", d=10),
        "different modules": random_covariance("b", modules=1),
    }
    for message, b in cases.items():
        with pytest.raises(UserError, match=message):
            a + b
        with pytest.raises(UserError, match=message):
            a - b
    with pytest.raises(UserError, match="cannot take 40 tokens from the 40"):
        a - a


def test_one_model_under_two_paths_fits_and_two_models_of_one_name_do_not(random_covariance):
    def of(path, fingerprint):
        covariance = random_covariance(path, model=path)
        covariance.meta["model_fingerprint"] = fingerprint
        return covariance

    both = of("/home/a/m", "f") + of("/home/b/m", "f")
    assert "model" not in both.meta
    assert both.meta["model_fingerprint"] == "f"
    with pytest.raises(UserError, match="different models, f and g"):
        of("m", "f") + of("m", "g")
    with pytest.raises(UserError, match="different models, m and n"):
        of("m", "f") + of("n", "g")


def test_an_unknown_module_names_the_nearest(random_covariance):
    with pytest.raises(
        UserError, match=r"task 'a' has no module '0\.qeury', did you mean '0\.query'"
    ):
        random_covariance("a").matrix("0.qeury")


def corrupted(tmp_path, covariance, name):
    path = tmp_path / "covariance.safetensors"
    covariance.save(path)
    content = path.read_bytes()
    tensors = load_file(path)
    header = {
        "format": "osrm-covariance",
        "version": 1,
        "modules": covariance.modules,
        "counts": covariance.counts,
        "positions": covariance.positions,
        "meta": {},
    }
    match name:
        case "missing":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "header truncated":
            path.write_bytes(content[:20])
        case "pickle":
            path.write_bytes(pickle.dumps(tensors))
        case "other safetensors":
            save_file(tensors, path)
        case "header is no JSON":
            save_file(tensors, path, {"osrm": "{"})
        case "other format":
            save_file(tensors, path, {"osrm": json.dumps(header | {"format": "x"})})
        case "version":
            save_file(tensors, path, {"osrm": json.dumps(header | {"version": 3})})
        case "no counts":
            del header["counts"]
            save_file(tensors, path, {"osrm": json.dumps(header)})
        case "modules is a list":
            save_file(tensors, path, {"osrm": json.dumps(header | {"modules": ["a"]})})
        case "zero tokens":
            counts = dict.fromkeys(covariance.counts, 0)
            save_file(tensors, path, {"osrm": json.dumps(header | {"counts": counts})})
        case "a matrix is missing":
            del tensors["matrix/0.query"]
            save_file(tensors, path, {"osrm": json.dumps(header)})
        case "a matrix is not square":
            tensors["matrix/0.query"] = torch.ones(12, 11)
            save_file(tensors, path, {"osrm": json.dumps(header)})
        case "a matrix is not finite":
            tensors["matrix/0.query"][0, 0] = float("nan")
            save_file(tensors, path, {"osrm": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist"),
        ("directory", "is no file"),
        ("empty", "not a complete safetensors file"),
        ("truncated", "not a complete safetensors file"),
        ("header truncated", "not a complete safetensors file"),
        ("pickle", "not a complete safetensors file"),
        ("other safetensors", "not a covariance"),
        ("header is no JSON", "not a covariance"),
        ("other format", "not a covariance"),
        ("version", "format version 3, this release reads version 1 or 2"),
        ("no counts", "not a usable covariance file"),
        ("modules is a list", "not a usable covariance file"),
        ("zero tokens", "over no token"),
        ("a matrix is missing", "name different keys"),
        ("a matrix is not square", "expected .d, d. and .d,."),
        ("a matrix is not finite", "not finite"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(name, message, tmp_path, random_covariance):
    path = corrupted(tmp_path, random_covariance("a"), name)
    with pytest.raises(UserError, match=message) as caught:
        Covariance.load(path)
    assert str(path) in str(caught.value)


def test_files_of_version_1_still_load(tmp_path, random_covariance):
    covariance = random_covariance("a", seed=1)
    path = tmp_path / "a.safetensors"
    covariance.save(path)
    header = {"format": "osrm-covariance", "version": 1, "meta": covariance.meta}
    header |= {name: getattr(covariance, name) for name in ("modules", "counts", "positions")}
    save_file(load_file(path), path, {"osrm": json.dumps(header)})
    loaded = Covariance.load(path)
    assert_same(loaded, covariance)
    assert loaded.meta == covariance.meta


def test_an_empty_covariance_is_refused():
    with pytest.raises(UserError, match="holds no module"):
        Covariance({}, {}, {}, {}, {})
