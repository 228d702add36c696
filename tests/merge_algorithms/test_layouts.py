"""LoRA on convolutions and embeddings: what is stored, applied, merged and refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from merge_algorithms import Adapter, LowRank, UserError, attach, merge
from merge_algorithms.layout import Layout


class Mixed(nn.Module):
    """Every layout at once, with kernels of one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 6)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.plane = nn.Conv2d(5, 4, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(4, 7, 1)
        self.space = nn.Conv3d(7, 3, (1, 2, 1))
        self.out = nn.Linear(3, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.line(self.token(ids).transpose(1, 2))
        x = self.point(self.plane(x.unsqueeze(-1).expand(-1, -1, -1, 4)))
        x = self.space(x.unsqueeze(2).expand(-1, -1, 3, -1, -1))
        return self.out(x.flatten(2).mean(-1))


TARGETS = ["token", "line", "plane", "point", "space", "out"]
LAYOUTS = {
    "token": Layout("embedding"),
    "line": Layout("convolution", (3,)),
    "plane": Layout("convolution", (3, 2)),
    "point": Layout("convolution", (1, 1)),
    "space": Layout("convolution", (1, 2, 1)),
}
IDS = torch.arange(24).reshape(3, 8) % 11


@pytest.fixture
def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def trained(base: nn.Module, seed: int, **config) -> PeftModel:
    """The base with an adapter that has random factors."""
    config = {"r": 3, "lora_alpha": 4, "target_modules": TARGETS, **config}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def saved(mixed, tmp_path):
    def save(seed: int, **config) -> PeftModel:
        model = trained(mixed, seed, **config)
        model.save_pretrained(tmp_path / f"t{seed}")
        return model

    return save


def test_layouts_and_dense_updates_are_those_of_peft(mixed, saved, tmp_path):
    model = saved(1, alpha_pattern={"plane": 9}, rank_pattern={"token": 2})
    adapter = Adapter.load(tmp_path / "t1")
    assert adapter.layouts == LAYOUTS
    for name, update in adapter.updates.items():
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
        expected = delta.T if name == "token" else delta.flatten(1)
        torch.testing.assert_close(update.dense(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_updates_give_the_adapters_outputs(mixed, saved, tmp_path, dtype):
    expected = saved(1)(IDS)
    adapter = Adapter.load(tmp_path / "t1")
    before = copy.deepcopy(mixed.state_dict())
    with merge([adapter]).apply_to(mixed):
        torch.testing.assert_close(mixed(IDS), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, before[key]) for key, x in mixed.state_dict().items())
    model = copy.deepcopy(mixed).to(dtype)
    merge([adapter]).apply_to(model)
    for name, update in adapter.updates.items():
        weight = mixed.get_submodule(name).weight.to(dtype).float()
        dense = update.dense().T if name == "token" else update.dense().reshape(weight.shape)
        assert torch.equal(model.get_submodule(name).weight, (weight + dense).to(dtype))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_order_of_a_kernel_in_memory(mixed, saved, tmp_path, memory_format):
    expected = saved(1)(IDS)
    mixed.plane.to(memory_format=memory_format)
    merge([Adapter.load(tmp_path / "t1")]).apply_to(mixed)
    torch.testing.assert_close(mixed(IDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "orthogonal_mc_dropout"])
def test_merges_reload_in_stock_peft_with_equal_outputs(mixed, saved, tmp_path, method):
    for seed in (1, 2):
        saved(seed, r=seed + 1)
    merged = merge([Adapter.load(tmp_path / f"t{seed}") for seed in (1, 2)], method)
    rank = 30 if method == "ties" else None
    assert max(merged.save_adapter(tmp_path / "out", rank=rank).values()) < 1e-9
    reloaded = PeftModel.from_pretrained(copy.deepcopy(mixed), tmp_path / "out").eval()
    assert Adapter.load(tmp_path / "out").layouts == LAYOUTS
    merged.apply_to(mixed)
    torch.testing.assert_close(reloaded(IDS), mixed(IDS), rtol=1e-4, atol=1e-5)


def test_modules_saved_whole_beside_adapted_ones(mixed, tmp_path):
    """A convolution and an embedding as the head: kept per task, never averaged."""
    config = {"target_modules": ["line", "plane"], "modules_to_save": ["point", "token"]}
    expected = {}
    for seed in (1, 2):
        model = trained(mixed, seed, **config)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / f"t{seed}")
        expected[f"t{seed}"] = model
    adapters = [Adapter.load(tmp_path / name) for name in expected]
    merged = merge(adapters, weights=[1, 0])
    assert {key: x.ndim for key, x in merged.heads["t2"].items()} == {
        "point.weight": 4,
        "point.bias": 1,
        "token.weight": 2,
    }
    merged.save_adapter(tmp_path / "out", head="t1")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(mixed), tmp_path / "out").eval()
    torch.testing.assert_close(reloaded(IDS), expected["t1"](IDS), rtol=1e-4, atol=1e-5)


def test_half_precision_adapters_are_merged_in_float32(saved, tmp_path):
    for seed in (1, 2):
        saved(seed)
        path = tmp_path / f"t{seed}" / "adapter_model.safetensors"
        dtype = torch.bfloat16 if seed == 1 else torch.float16
        save_file({key: x.to(dtype) for key, x in load_file(path).items()}, path)
    merged = merge([Adapter.load(tmp_path / f"t{seed}") for seed in (1, 2)], weights=[0.3, 0.7])
    stored = [load_file(tmp_path / f"t{seed}" / "adapter_model.safetensors") for seed in (1, 2)]
    expected = sum(
        w
        * 4
        / 3
        * x["base_model.model.out.lora_B.weight"].double()
        @ x["base_model.model.out.lora_A.weight"].double()
        for w, x in zip((0.3, 0.7), stored, strict=True)
    )
    assert merged.updates["out"].b.dtype == torch.float32
    torch.testing.assert_close(merged.updates["out"].dense().double(), expected, rtol=1e-6, atol=0)
    merged.save_adapter(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.float32}


def test_adapters_whose_layouts_differ_do_not_belong_together():
    point = Adapter(
        "point",
        {"m": LowRank(torch.ones(4, 1), torch.ones(1, 4))},
        layouts={"m": Layout("convolution", (1, 1))},
    )
    linear = Adapter("linear", point.updates)
    with pytest.raises(
        UserError, match=r"m is convolution 1x1 in adapter 'point' but linear in 'linear'"
    ):
        merge([point, linear])


def test_models_whose_layouts_differ_are_refused(mixed, saved, tmp_path):
    saved(1)
    merged = merge([Adapter.load(tmp_path / "t1")])
    mixed.point = nn.Linear(4, 7)
    with pytest.raises(UserError, match=r"point is linear in Mixed .* for convolution 1x1"):
        merged.apply_to(mixed)
    mixed.point = nn.Conv2d(8, 7, 1, groups=1)
    with pytest.raises(UserError, match=r"point has a weight of shape \(7, 8\)"):
        merged.apply_to(mixed)
    mixed.point = nn.Conv2d(4, 8, 1, groups=2)
    with pytest.raises(UserError, match="point is a convolution in groups"):
        merged.apply_to(mixed)


def test_grouped_convolutions_are_refused_at_once(tmp_path):
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3, groups=2)})
    get_peft_model(base, LoraConfig(r=4, target_modules=["conv"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"grouped convolution \(conv\).*target_modules"):
        Adapter.load(tmp_path)


def test_factors_of_odd_shapes_are_refused(saved, tmp_path):
    saved(1)
    path = tmp_path / "t1" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.plane.lora_B.weight"] = torch.ones(4, 3, 2, 2)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"\(4, 3, 2, 2\) and \(3, 5, 3, 2\) for plane"):
        Adapter.load(tmp_path / "t1")
    tensors["base_model.model.plane.lora_B.weight"] = torch.ones(4, 3, 1, 1)
    del tensors["base_model.model.token.lora_embedding_A"]
    save_file(tensors, path)
    with pytest.raises(UserError, match="lora_embedding_B of token but no lora_embedding_A"):
        Adapter.load(tmp_path / "t1")


def test_tied_embeddings_are_refused_and_copies_of_theirs_left_out(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    model = trained(base, 1, target_modules=["embed_tokens", "lm_head", "q_proj"])
    model.save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in stored
    adapter = Adapter.load(tmp_path / "a")
    assert sorted(adapter.updates) == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
    ]
    with torch.no_grad():
        expected = model(IDS).logits
        merge([adapter]).apply_to(base)
        torch.testing.assert_close(base(IDS).logits, expected, rtol=1e-4, atol=1e-5)

    config.tie_word_embeddings = True
    tied = LlamaForCausalLM(config)
    with pytest.raises(UserError, match=r"shares its weight with .*: untie the two"):
        merge([adapter]).apply_to(tied)


def test_merging_at_run_time_is_for_linear_modules(mixed, saved, tmp_path):
    saved(1)
    adapter = Adapter.load(tmp_path / "t1")
    with (
        pytest.raises(UserError, match=r"line is convolution 3, .*use merge"),
        attach(mixed, [adapter]),
    ):
        pass
