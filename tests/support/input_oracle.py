"""What modules read, in float64 and text by text, to check covariances against."""

from __future__ import annotations

import torch


def oracle(model, samples, names, lengths=None):
    """C = H^T H / n per module in float64: every sample runs alone, so there is no padding.

    Unless the model pads by itself: of each sample so many positions are real, the first ones.
    """
    inputs = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs[name].append(args[0].flatten(0, -2).double())
        )
        for name in names
    ]
    model.eval()
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for handle in handles:
        handle.remove()
    if lengths is not None:
        inputs = {
            name: [rows[:length] for rows, length in zip(h, lengths, strict=True)]
            for name, h in inputs.items()
        }
    stacked = {name: torch.cat(h) for name, h in inputs.items()}
    return {name: (h.T @ h / len(h), len(h)) for name, h in stacked.items()}


def singles(rows):
    return [{"input_ids": torch.tensor([row])} for row in rows]


def seq2seq_samples(rows, targets):
    return [
        {"input_ids": torch.tensor([a]), "decoder_input_ids": torch.tensor([b])}
        for a, b in zip(rows, targets, strict=True)
    ]


def assert_matches(covariance, expected):
    assert set(covariance.modules) == set(expected)
    for name, (matrix, tokens) in expected.items():
        found = covariance.matrix(name)
        assert found.dtype == torch.float32
        assert torch.equal(found, found.T)
        torch.testing.assert_close(
            found.double(), matrix, rtol=0, atol=1e-5 * float(matrix.abs().max())
        )
        assert covariance.counts[covariance.modules[name]] == tokens
