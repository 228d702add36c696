"""attach(..., samples=K): the mean of K draws in one batched pass."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.utils import ModelOutput

from merge_algorithms import Adapter, LowRank, UserError, attach
from merge_algorithms.sampling import averaged


@dataclass
class Output(ModelOutput):
    logits: Tensor | None = None
    states: tuple[Tensor, ...] | None = None
    size: Tensor | None = None


class Model(nn.Module):
    """Returns nested results, and keeps what it was called with; memory for `most` rows."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__()
        self.m, self.most, self.seen = nn.Linear(3, 4, bias=False), most, []
        nn.init.zeros_(self.m.weight)

    def forward(self, x: Tensor, time: Tensor | None = None, **extra: object) -> Output:
        self.seen.append((len(x), time, extra))
        if len(x) > self.most:
            raise torch.OutOfMemoryError
        y = self.m(x)
        return Output(logits=y, states=(y, x), size=torch.tensor(len(y)))


@pytest.fixture
def two() -> list[Adapter]:
    ones = torch.ones(1, 3)
    return [Adapter(f"t{t}", {"m": LowRank(torch.full((4, 1), t + 1.0), ones)}) for t in (0, 1)]


def test_the_mean_of_as_many_draws(two):
    model, x = Model(), torch.randn(5, 3)
    with torch.no_grad(), attach(model, two, masks=1, samples=16):
        found = model(x)
    assert [rows for rows, *_ in model.seen] == [80]
    assert found.logits.shape == (5, 4)
    with torch.no_grad(), attach(model, two, masks=1):
        draws = model(x.repeat(16, 1)).logits.view(16, 5, 4)
    torch.testing.assert_close(found.logits, draws.mean(0))
    torch.testing.assert_close(found.states, (found.logits, x))
    assert isinstance(found, Output)


def test_only_what_has_the_batch_first_is_repeated(two):
    model, x = Model(), torch.randn(2, 3)
    cached, extra = torch.arange(2), {"ids": [torch.zeros(2, 7)], "text": "as it is"}
    with attach(model, two, samples=3):
        model(x, time=torch.tensor(4.0), table=torch.ones(5), cache_position=cached, extra=extra)
        model(x, torch.tensor([1, 2]))
    (_, time, others), (_, times, _) = model.seen
    assert time.shape == ()
    assert others["table"].shape == (5,)
    assert others["cache_position"] is cached
    assert others["extra"]["ids"][0].shape == (6, 7)
    assert others["extra"]["text"] == "as it is"
    assert times.tolist() == [1, 2] * 3


@pytest.mark.parametrize(("most", "batches"), [(2, [8, 4, 2, 2, 2, 2]), (6, [8, 4, 4])])
def test_batches_that_do_not_fit_are_split(two, most, batches):
    model, x = Model(most), torch.randn(2, 3)
    with attach(model, two, samples=4, masks=0):
        found = model(x).logits
    assert [rows for rows, *_ in model.seen] == batches
    possible = torch.cartesian_prod(*[torch.tensor([2.0, 4.0])] * 4).mean(1)
    ratios = found / x.sum(1, keepdim=True)
    assert (ratios[..., None] - possible).abs().min(-1).values.max() < 1e-4


def test_what_does_not_fit_at_all_and_what_has_a_cache_raise(two):
    for most, extra in ((1, {}), (4, {"past_key_values": [torch.ones(2, 1)]})):
        model = Model(most)
        with attach(model, two, samples=4), pytest.raises(torch.OutOfMemoryError):
            model(torch.randn(2, 3), **extra)
    assert "forward" not in vars(model)


def test_half_precision_is_averaged_in_float32():
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(1, len(x) + 1).to(torch.bfloat16)

    model = Steps()
    with averaged(model, 300):
        assert model(torch.zeros(1)).tolist() == [150.0]


def test_a_forward_of_the_models_own_comes_back(two):
    """As libraries that wrap forward() leave it on the instance."""
    model = Model()
    own = model.forward
    model.forward = own
    with attach(model, two, samples=2):
        assert model.forward is not own
    assert model.forward is own


def test_dataclasses_and_mappings_of_other_kinds_keep_their_type(two):
    @dataclass
    class Plain:
        logits: Tensor
        note: str

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Linear(3, 4, bias=False)

        def forward(self, given: UserDict) -> Plain:
            return Plain(self.m(given["x"]), given["note"])

    model = Wrapping()
    with torch.no_grad(), attach(model, two, masks=1, samples=4):
        found = model(UserDict(x=torch.randn(5, 3), note="as it is"))
    assert isinstance(found, Plain)
    assert found.logits.shape == (5, 4)
    assert found.note == "as it is"


@pytest.mark.parametrize("most", [1000, 4])
def test_integers_have_no_mean(two, most):
    class Numbers(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = super().forward(x).logits
            large = torch.full((len(x),), (1 << 24) + 1)
            return (y > 9, large) if self.mixed else (large, large[0])

    model, x = Numbers(most), torch.ones(2, 3)
    model.mixed = False
    with attach(model, two, samples=4):
        large, one = model(x)
        assert large.tolist() == [(1 << 24) + 1] * 2
        assert one == (1 << 24) + 1
        model.mixed = True
        with pytest.raises(UserError, match=r"type torch.bool differs between the draws"):
            model(x)


@pytest.fixture
def llama_and_adapters():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=50, num_attention_heads=2, pad_token_id=0, **sizes)
    q = "model.layers.0.self_attn.q_proj"
    updates = [LowRank(torch.randn(16, 2), torch.randn(2, 16)) for _ in "ab"]
    adapters = [Adapter(name, {q: update}) for name, update in zip("ab", updates, strict=True)]
    return LlamaForCausalLM(config).eval(), adapters


def test_positions_to_keep_are_no_batch(llama_and_adapters):
    model, adapters = llama_and_adapters
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad(), attach(model, adapters, samples=4):
        assert model(ids, logits_to_keep=torch.tensor([0, 5])).logits.shape == (2, 2, 50)


def test_generation_that_loses_the_copies_is_refused(llama_and_adapters):
    model, adapters = llama_and_adapters
    ids = torch.randint(3, 50, (1, 6))
    with torch.no_grad(), attach(model, adapters, samples=4):
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 9)
        with pytest.raises(UserError, match="beam search picks rows without the copies"):
            model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))
    update = LowRank(torch.randn(16, 2), torch.randn(2, 16))
    adapters = [Adapter(n, {"encoder.block.0.layer.0.SelfAttention.q": update}) for n in "ab"]
    with torch.no_grad(), attach(t5.eval(), adapters, samples=4):
        assert t5(ids, decoder_input_ids=ids).logits.shape == (1, 6, 50)
        with pytest.raises(UserError, match="encoder's outputs came with the call, from one draw"):
            t5.generate(ids, max_new_tokens=2)


def test_what_nobody_calls_has_no_mean(llama_and_adapters):
    model, adapters = llama_and_adapters
    parts = torch.nn.ModuleDict({"lm": model})
    adapters = [Adapter(a.name, {f"lm.{m}": u for m, u in a.updates.items()}) for a in adapters]
    with pytest.raises(UserError, match="ModuleDict has no forward pass"):
        attach(parts, adapters, samples=4).__enter__()
    with attach(parts, adapters):  # which the attempt has left free
        pass
