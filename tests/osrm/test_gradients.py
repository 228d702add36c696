"""Output gradients against one backward pass for each row and class; the filters made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge_algorithms import UserError
from osrm import Gradients, collect_gradients, output_filters

TARGETS = ["query", "output.dense"]


def classifier(make_model: Callable[..., nn.Module], outputs: int) -> nn.Module:
    config = make_model("bert").config
    config.num_labels = outputs
    torch.manual_seed(2)
    model = transformers.BertForSequenceClassification(config).eval().requires_grad_(False)
    nn.init.normal_(model.classifier.weight, std=0.5)
    return model


def brute_force(model: nn.Module, rows: list[list[int]], names: list[str]) -> dict[str, Tensor]:
    """Every row and class alone, in float64: E_y g g^T summed over the row's positions."""
    model = model.double()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output.requires_grad_()})

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    sums: dict[str, Tensor] = dict.fromkeys(names, torch.zeros(()))
    for row in rows:
        logits = model(input_ids=torch.tensor([row])).logits[0]
        terms = [(1.0, logits[0])]  # a Gaussian of variance 1: E (y - m)^2 (dm / dz)^2
        if len(logits) > 1:
            log_p = logits.log_softmax(0)
            terms = list(zip(log_p.detach().exp().tolist(), log_p, strict=True))
        for probability, value in terms:
            found = torch.autograd.grad(value, [seen[n] for n in names], retain_graph=True)
            for name, gradient in zip(names, found, strict=True):
                sums[name] = sums[name] + probability * gradient[0].T @ gradient[0]
    for handle in handles:
        handle.remove()
    model.float()
    return {name: total / len(rows) for name, total in sums.items()}


@pytest.mark.parametrize(("outputs", "size", "length"), [(1, 3, None), (2, 1, None), (4, 5, 12)])
def test_equals_brute_force_whatever_the_batches(outputs, size, length, make_model, texts, batches):
    model, rows = classifier(make_model, outputs), texts(7, seed=1)
    found = collect_gradients(model, batches(rows, size, length), TARGETS, draws=None)
    expected = brute_force(model, rows, list(found.moments))
    assert found.examples == 7
    assert len(expected) > 2
    for name, moment in expected.items():
        close = {"rtol": 1e-4, "atol": 1e-6 * float(moment.abs().max())}
        torch.testing.assert_close(found.moments[name].double(), moment, **close)


def test_one_draw_a_row_agrees_in_the_mean_and_by_seed(make_model, texts, batches):
    model, rows = classifier(make_model, 5), batches(texts(6, seed=3), 6)
    exact = collect_gradients(model, rows, ["query"], draws=None).moments
    drawn = [collect_gradients(model, rows, ["query"], seed=s).moments for s in range(300)]
    again = collect_gradients(model, rows, ["query"], seed=7).moments
    for name, moment in exact.items():
        mean = torch.stack([one[name] for one in drawn]).mean(0)
        assert float((mean - moment).norm() / moment.norm()) < 0.15
        assert torch.equal(drawn[7][name], again[name])
        assert not torch.equal(drawn[7][name], drawn[8][name])


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    gradients = Gradients({"b": torch.eye(3), "a": torch.rand(2, 2).T}, 7, {"task": "x"})
    gradients.save(tmp_path / "a.safetensors")
    loaded = Gradients.load(tmp_path / "a.safetensors")
    assert (loaded.examples, loaded.meta) == (7, {"task": "x"})
    assert all(torch.equal(loaded.moments[m], x) for m, x in gradients.moments.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "osrm-fisher"}, "not a gradients file"),
        ({"version": 2}, "gradients format version 2, this release reads version 1"),
        ({"examples": 0}, "of no module or no example"),
        ({"meta": 3}, "not a usable gradients file"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(change, message, tmp_path):
    path = tmp_path / "gradients.safetensors"
    Gradients({"a": torch.eye(3)}, 7).save(path)
    header = {"format": "osrm-gradients", "version": 1, "examples": 7, "meta": {}} | change
    save_file(load_file(path), path, {"osrm": json.dumps(header)})
    with pytest.raises(UserError, match=message) as caught:
        Gradients.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({}, "of no module"),
        ({"a": torch.ones(3, 2)}, r"shape \(3, 2\): expected \(d_out, d_out\)"),
        ({"a": torch.full((2, 2), math.nan)}, "gradients of a are not finite"),
    ],
)
def test_values_that_cannot_be_second_moments(moments, message):
    with pytest.raises(UserError, match=message):
        Gradients(moments, 7)


def random_gradients(seed: int, width: int, scale: float = 1.0) -> Gradients:
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    return Gradients({"one": scale * rows.T @ rows, "two": torch.eye(4)}, 3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tasks=st.integers(2, 5),
    mu=st.floats(0.01, 100),
    scale=st.sampled_from([1e-9, 1.0, 1e9]),
)
def test_filters_minimise_what_they_are_defined_by(
    seed: int, tasks: int, mu: float, scale: float
) -> None:
    """Without c the gradient of ||H - I||^2 + mu sum_u w_u tr(H G_u H^T) / g_u is zero."""
    width = 9
    files = {f"t{i}": random_gradients(seed + i, width, scale**i) for i in range(tasks)}
    filters = output_filters(files, "t0", weights={"t1": 2.0}, mu=mu)
    for module, h in filters.items():
        h = h.double()
        d = len(h)
        torch.testing.assert_close(h, h.T, rtol=0, atol=1e-5)
        assert float(h.square().sum()) == pytest.approx(d, rel=1e-4)
        noise = torch.zeros(d, d, dtype=torch.float64)
        for i in range(1, tasks):
            g = files[f"t{i}"].moments[module].double()
            noise += (2.0 if i == 1 else 1.0) * g * d / g.trace()
        # With H = c H0 and H0 (I + mu noise) = I, H (I + mu noise) is a multiple of I.
        product = h @ (torch.eye(d, dtype=torch.float64) + mu * noise)
        expected = product.trace() / d * torch.eye(d, dtype=torch.float64)
        torch.testing.assert_close(product, expected, rtol=0, atol=2e-3 * float(expected[0, 0]))


def test_what_the_others_read_passes_weakly_and_the_own_task_does_not_matter() -> None:
    g = torch.zeros(8, 8)
    g[2, 2] = 5.0
    files = {"own": random_gradients(1, 8), "other": Gradients({"one": g, "two": g[:4, :4]}, 3)}
    filters = output_filters(files, "own", mu=0.15)
    h = filters["one"]
    passed = h.diagonal()
    assert float(passed[2] / passed[0]) == pytest.approx(1 / (1 + 0.15 * 8), rel=1e-5)
    alone = output_filters({"other": files["other"]}, "own", mu=0.15)
    assert all(torch.equal(alone[module], h) for module, h in filters.items())


def test_a_task_that_reads_nothing_of_a_module_leaves_it_open() -> None:
    files = {"other": Gradients({"one": torch.zeros(3, 3)}, 3)}
    torch.testing.assert_close(output_filters(files, "own")["one"], torch.eye(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": 0.0}, "mu is 0.0: give a number above 0"),
        ({"weights": {"ohter": 1.0}}, "no other task; did you mean 'other'"),
        ({"weights": {"other": -1.0}}, "the weight of task 'other' is -1.0"),
        ({"weights": {"other": 0.0}}, "weights of all other tasks are 0"),
        ({"gradients": {"own": random_gradients(1, 8)}}, "no gradients of other tasks"),
        (
            {"gradients": {"a": random_gradients(1, 8), "b": random_gradients(1, 7)}},
            "'a' and 'b' are of different modules or widths",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {"gradients": {"other": random_gradients(1, 8)}, "task": "own"} | change
    with pytest.raises(UserError, match=message):
        output_filters(**arguments)
