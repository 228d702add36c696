"""In what numbers, and where, a covariance is summed up."""

from __future__ import annotations

import logging

import pytest
import torch

from merge_algorithms.errors import UserError
from osrm import Covariance, collect_covariance, covariance_memory, resolve_targets

TARGETS = ["query", "value", "intermediate.dense", "output.dense"]


def test_float64_sums_are_exact_where_float32_rounds(make_model, texts, batches):
    model, rows = make_model("bert").double(), texts(12, seed=1)
    data = batches(rows, 3)
    found = collect_covariance(model, data, ["query"], dtype=torch.float64)
    name = resolve_targets(model, ["query"])[1]
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for row in rows:
            model.eval()(input_ids=torch.tensor([row]))
    handle.remove()
    h = torch.cat(inputs)
    expected = h.T @ h / len(h)
    assert found.matrix(name).dtype == found.means[name].dtype == torch.float64
    torch.testing.assert_close(found.matrix(name), expected, rtol=1e-11, atol=1e-13)
    rounded = collect_covariance(model, data, ["query"]).matrix(name)
    assert rounded.dtype == torch.float32
    assert (rounded.double() - expected).abs().max() > 1e-9


def test_the_wider_dtype_wins_and_is_kept_in_the_file(tmp_path, make_model, texts, batches):
    model, rows = make_model("bert"), texts(8, seed=2)
    wide = collect_covariance(model, batches(rows[:4]), ["query"], dtype=torch.float64)
    narrow = collect_covariance(model, batches(rows[4:]), ["query"])
    for both in (wide + narrow, narrow + wide, (wide + narrow) - narrow):
        assert {matrix.dtype for matrix in both.matrices.values()} == {torch.float64}
    assert {matrix.dtype for matrix in (narrow + narrow).matrices.values()} == {torch.float32}
    wide.save(tmp_path / "wide.safetensors")
    loaded = Covariance.load(tmp_path / "wide.safetensors")
    for key, matrix in wide.matrices.items():
        assert torch.equal(loaded.matrices[key], matrix)
        assert loaded.matrices[key].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spilling_changes_no_bit(dtype, tmp_path, make_model, texts, batches):
    model, data = make_model("bert"), batches(texts(9, seed=3), 2)
    files = tmp_path / "spill"
    files.mkdir()
    options = {"dtype": dtype, "meta": {"task": "a"}}
    expected = collect_covariance(model, data, TARGETS, spill=False, **options)
    found = collect_covariance(model, data, TARGETS, spill=True, spill_directory=files, **options)
    assert list(files.iterdir()) == []  # the files have no name any more
    expected.save(tmp_path / "memory.safetensors")
    found.save(tmp_path / "disk.safetensors")
    content = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("memory", "disk")]
    assert content[0] == content[1]
    assert found.fingerprint == expected.fingerprint


def test_it_spills_by_itself_when_memory_is_short(
    monkeypatch, caplog, tmp_path, make_model, texts, batches
):
    model, data = make_model("bert"), batches(texts(4, seed=4))
    bound = covariance_memory(model, TARGETS)
    caplog.set_level(logging.INFO, "osrm")
    for free, where in ((10 * bound, "to memory"), (bound, f"to files in {tmp_path}")):
        monkeypatch.setattr("osrm.spill.free_memory", lambda device, free=free: free)
        collect_covariance(model, data, TARGETS, spill_directory=tmp_path)
        assert where in caplog.messages[-1]


def test_the_bound_on_memory_counts_every_module(make_model):
    model = make_model("bert")
    widths = [32, 32, 32, 48, 32] * 2  # query, value, attention's and the block's dense layers
    assert len(resolve_targets(model, TARGETS)) == len(widths)
    bound = covariance_memory(model, TARGETS)
    assert bound == sum(4 * d * (d + 1) for d in widths)
    assert covariance_memory(model, TARGETS, dtype=torch.float64) == 2 * bound
    with torch.device("meta"):
        assert covariance_memory(make_model("bert"), TARGETS) == bound
    gpt2 = make_model("gpt2")
    assert covariance_memory(gpt2, ["c_attn"]) == 2 * 4 * 32 * 33


@pytest.mark.parametrize("width", [1, 127, 128, 129, 700, 1300])
def test_every_width_is_summed_whole(width):
    """Sums run over panels of one triangle, the other is mirrored by tiles."""
    layer = torch.nn.Linear(width, 1)

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    x = torch.randn(2, 5, width)
    matrix = collect_covariance(Reader(), [{"x": x[:1]}, {"x": x[1:]}], ["layer"]).matrix("layer")
    flat = x.flatten(0, 1).double()
    torch.testing.assert_close(matrix.double(), flat.T @ flat / 10, rtol=1e-4, atol=1e-5)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, "float16: choose float32 or float64"),
        ({"spill_directory": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_options_that_cannot_be(options, message, make_model, texts, batches):
    with pytest.raises(UserError, match=message):
        collect_covariance(make_model("bert"), batches(texts(2, seed=1)), ["query"], **options)


def test_a_disk_without_room_is_an_error_at_the_start(
    monkeypatch, tmp_path, make_model, texts, batches
):
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=f"{tmp_path} cannot hold .* No space left"):
        collect_covariance(
            make_model("bert"),
            batches(texts(2, seed=1)),
            ["query"],
            spill=True,
            spill_directory=tmp_path,
        )
    assert list(tmp_path.iterdir()) == []
