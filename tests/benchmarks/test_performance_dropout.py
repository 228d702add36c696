"""The comparison of run-time merges at tiny size, and that what it compares is the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.performance import dropout
from merge_algorithms import attach, mixture


@pytest.fixture
def tiny():
    return dropout.build("tiny", 3, 4, "all-linear")


def test_a_row_for_every_model_and_number(capsys, monkeypatch):
    monkeypatch.setattr(dropout, "seconds", lambda work, device: work() is None or 0.5)
    dropout.compare(models=["tiny"], adapters=[2, 3], batch=2, length=5, rounds=2, threads=1)
    printed = capsys.readouterr().out
    assert "tiny, T = 3: 0.500, 1.00, 1.00, 1.00, 1.0" in printed
    assert printed.count("│ tiny") == 2


def test_both_forms_of_the_masked_part_have_one_mean(tiny):
    ours, papers = dropout.masked_parts(tiny, 3, 20_000)
    with torch.no_grad():
        a, b = ours().double(), papers().double()
    # An element is 3 o_t for one of three t: the mean over tokens is that of the direct merge.
    limit = 5 * (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < limit).all()
    assert not (a == 0).any()
    assert not (b == 0).any()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("count", [2, 3, 6, 8])
@pytest.mark.parametrize("tokens", [1 << 11, 1 << 15])
def test_a_call_needs_at_most_one_more_tensor_of_the_outputs_size(monkeypatch, count, gpu, tokens):
    """Than stock PEFT, once outputs are larger than those that a CPU makes in one step."""
    monkeypatch.setattr(mixture, "_on_gpu", lambda tensor: gpu)
    model = dropout.build("tiny", count, 1, "attention")
    for method in dropout.METHODS:
        assert dropout.extra_memory(model, method, count, tokens) < 1


@pytest.mark.parametrize("count", [2, 3, 6, 8])
@pytest.mark.parametrize("tokens", [1 << 11, 1 << 15])
def test_nor_does_it_in_half_precision_on_a_cpu(count, tokens):
    model = dropout.build("tiny", count, 1, "attention").to(torch.bfloat16)
    for method in dropout.METHODS:
        assert dropout.extra_memory(model, method, count, tokens) < 1


def test_memory_is_what_is_alive_at_one_time():
    with dropout.Peak() as peak:
        first = torch.ones(1000)
        second = first + 1
        del first
        first = second.view(10, 100) * 2
    assert peak.bytes == 8000
    assert len(first) + len(second) == 1010


def test_seconds_are_those_of_the_work():
    assert 0 < dropout.seconds(lambda: torch.ones(100) @ torch.ones(100), torch.device("cpu")) < 1


def test_forms_leave_the_model_to_stock_peft(tiny):
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        expected = tiny(ids)[0]
        with attach(tiny, dropout.names(3), "direct"):
            torch.testing.assert_close(tiny(ids)[0], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(tiny(ids)[0], expected)
