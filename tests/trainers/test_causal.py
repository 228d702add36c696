from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge_algorithms.errors import UserError
from trainers.causal import RowLosses, check_packing, row_losses
from trainers.metrics import LanguageMetrics
from trainers.texts import IGNORED, collate, pack

Models = Callable[[str], Path]


def load(path: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path)
    return model.eval()


def features(count: int = 5) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in range(3, 3 + count):
        ids = [2, *torch.randint(4, 60, (size,), generator=generator).tolist(), 3]
        labels = [IGNORED] * (size // 2) + ids[size // 2 :]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return made


def oracle(model: nn.Module, ids: list[int], labels: list[int]) -> tuple[list[float], list[int]]:
    """-log p of every counted token in float64, and the model's own choice in its place.

    One row at a time, without padding.
    """
    logits = model.double()(input_ids=torch.tensor([ids])).logits[0].detach().numpy()
    losses, choices = [], []
    for position in range(1, len(ids)):
        if labels[position] != IGNORED:
            scores = logits[position - 1]
            log_sum = scores.max() + math.log(np.exp(scores - scores.max()).sum())
            losses.append(log_sum - scores[labels[position]])
            choices.append(int(scores.argmax()))
    return losses, choices


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_perplexity_and_its_standard_error_match_a_float64_oracle(
    tiny_language_model: Models, kind: str
) -> None:
    rows = features()
    model = load(tiny_language_model(kind))
    for row in rows[::2]:  # a random model is hardly ever right
        row["labels"][-1] = oracle(model, row["input_ids"], row["labels"])[1][-1]
    model.float()
    metrics = LanguageMetrics(("perplexity", "perplexity_stderr", "token_accuracy"))
    for part in (rows[:2], rows[2:]):
        losses = row_losses(model, collate(0, part))
        metrics.update(losses.nll, losses.tokens, losses.correct)
    found = [oracle(model, row["input_ids"], row["labels"]) for row in rows]
    s = np.array([sum(losses) for losses, _ in found])
    n = np.array([len(losses) for losses, _ in found])
    level = s.sum() / n.sum()
    # The ratio of means over independent rows: variance of the mean residual over the mean size.
    residuals = s - level * n
    error = residuals.std(ddof=1) / math.sqrt(len(s)) / n.mean()
    scores = metrics.scores()
    assert scores["perplexity"] == pytest.approx(math.exp(level), rel=1e-5)
    assert scores["perplexity_stderr"] == pytest.approx(math.exp(level) * error, rel=1e-4)
    right = sum(
        choice == label
        for row, (_, choices) in zip(rows, found, strict=True)
        for choice, label in zip(choices, row["labels"][-len(choices) :], strict=True)
    )
    assert 3 <= right < n.sum()
    assert scores["token_accuracy"] == pytest.approx(right / n.sum())


def test_the_standard_error_is_that_of_repeated_samples() -> None:
    generator = np.random.default_rng(0)
    levels, errors = [], []
    for _ in range(400):
        n = generator.integers(5, 60, 80)
        s = n * generator.normal(3, 0.3, 80)
        metrics = LanguageMetrics()
        metrics.update(torch.tensor(s), torch.tensor(n), torch.zeros(80))
        found = metrics.compute()
        levels.append(found["perplexity"])
        errors.append(found["perplexity_stderr"])
    assert np.mean(errors) == pytest.approx(np.std(levels), rel=0.1)


def test_scores_without_tokens_or_with_one_row() -> None:
    metrics = LanguageMetrics()
    zero = torch.zeros(1)
    metrics.update(zero, zero, zero)
    assert math.isnan(metrics.compute()["perplexity"])
    metrics.update(torch.tensor([2.0]), torch.tensor([1]), torch.tensor([1]))
    found = metrics.compute()
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["perplexity_stderr"] == math.inf
    assert found["token_accuracy"] == 1


class Alternating(nn.Module):
    """A model that answers differently at every call, as a run-time merge with masks does."""

    def __init__(self, logits: list[Tensor]) -> None:
        super().__init__()
        self.logits = logits
        self.calls = 0

    def forward(self, **inputs: object) -> object:
        found = self.logits[self.calls % len(self.logits)]
        self.calls += 1
        return type("Output", (), {"logits": found})


def test_samples_average_probabilities() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(2, 4, 7) for _ in range(3)]
    mean = torch.stack([x.double().softmax(-1) for x in logits]).mean(0)
    best = mean.argmax(-1)[0].tolist()
    labels = (best[0], (best[1] + 1) % 7, best[2])  # right, wrong, right
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "labels": torch.tensor([[1, *labels], [5, 6, IGNORED, IGNORED]]),
    }
    found = row_losses(Alternating(logits), batch, samples=3)
    expected = [
        -sum(math.log(mean[0, i, token]) for i, token in enumerate(labels)),
        -math.log(mean[1, 0, 6]),
    ]
    assert found.nll.tolist() == pytest.approx(expected, rel=1e-6)
    assert found.tokens.tolist() == [3, 1]
    assert any(x[0, i].argmax() != best[i] for x in logits for i in (0, 2)), "no single draw tells"
    assert found.correct.tolist() == [2, int(mean[1, 0].argmax() == 6)]
    twice = RowLosses.cat([found, found])
    assert twice.tokens.tolist() == [3, 1, 3, 1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_rows_have_the_losses_of_rows_on_their_own(
    tiny_language_model: Models, kind: str
) -> None:
    model = load(tiny_language_model(kind))
    check_packing(model)
    rows = features()
    apart = row_losses(model, collate(0, rows))
    packed = pack(rows, 20)
    assert len(packed) < len(rows)
    together = row_losses(model, collate(0, packed))
    assert float(together.nll.sum()) == pytest.approx(float(apart.nll.sum()), rel=1e-6)
    assert together.tokens.sum() == apart.tokens.sum()


def test_a_model_that_lets_packed_rows_see_each_other_is_refused(
    tiny_language_model: Models,
) -> None:
    model = load(tiny_language_model("gpt2"))
    forward = model.forward
    model.forward = lambda input_ids, **ignored: forward(input_ids=input_ids)
    with pytest.raises(UserError, match="set the task's packing to false"):
        check_packing(model)


def test_padding_changes_nothing_without_a_padding_token(tiny_language_model: Models) -> None:
    path = tiny_language_model("gpt2")
    assert AutoTokenizer.from_pretrained(path).pad_token is None
    model = load(path)
    rows = features()
    padded = row_losses(model, collate(3, rows, length=40))
    alone = RowLosses.cat([row_losses(model, collate(3, [row])) for row in rows])
    assert padded.nll.tolist() == pytest.approx(alone.nll.tolist(), rel=1e-5)
