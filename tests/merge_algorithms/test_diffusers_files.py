"""LoRA files of diffusers pipelines, written and read back by diffusers itself."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from merge_algorithms import Adapter, LowRank, UserError, merge
from merge_algorithms.layout import Layout

FILE = "pytorch_lora_weights.safetensors"
UNET = {"target_modules": ["to_q", "to_out.0", "conv1", "conv_shortcut"]}
TEXT = {"target_modules": ["q_proj", "fc1"]}
SCALED = {"lora_alpha": 5, "rank_pattern": {"conv1": 2}, "alpha_pattern": {"conv1": 7}}


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    return StableDiffusionPipeline(
        unet=unet.eval(),
        text_encoder=text.eval(),
        scheduler=DDIMScheduler(),
        vae=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def fresh(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The pipeline with copies of the parts that have weights."""
    parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("unet", "text_encoder")}
    return StableDiffusionPipeline(
        **{**pipeline.components, **parts}, requires_safety_checker=False
    )


def weights_of(pipeline: StableDiffusionPipeline) -> nn.ModuleDict:
    """What the names in a LoRA file refer to."""
    return nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})


@torch.no_grad()
def output(pipeline: StableDiffusionPipeline) -> Tensor:
    ids = torch.arange(8)[None] * 5 % 64
    noise = torch.linspace(-3, 3, 256).sin().reshape(1, 4, 8, 8)
    hidden = pipeline.text_encoder(ids).last_hidden_state
    return pipeline.unet(noise, 10, encoder_hidden_states=hidden).sample


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def trained(base, tmp_path) -> Callable[..., Tensor]:
    """Save a random adapter by diffusers; return the output of the pipeline that has it."""

    def save(name: str, seed: int, rank: int = 3, metadata: bool = True, **config: Any) -> Tensor:
        pipeline = fresh(base)
        parts = {"unet": (pipeline.unet, UNET), "text_encoder": (pipeline.text_encoder, TEXT)}
        torch.manual_seed(seed)
        for model, targets in parts.values():
            model.add_adapter(LoraConfig(r=rank, **{"lora_alpha": rank, **targets, **config}))
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    nn.init.normal_(parameter, std=0.3)
        models = {part: model for part, (model, _) in parts.items()}
        StableDiffusionPipeline.save_lora_weights(
            tmp_path / name,
            **{f"{part}_lora_layers": get_peft_model_state_dict(m) for part, m in models.items()},
            **(_collate_lora_metadata(models) if metadata else {}),
        )
        return output(pipeline)

    return save


@pytest.mark.parametrize(
    ("metadata", "config"),
    [(False, {}), (True, {}), (True, SCALED), (True, {**SCALED, "use_rslora": True})],
)
def test_files_that_diffusers_wrote(base, trained, tmp_path, metadata, config):
    expected = trained("style", 1, metadata=metadata, **config)
    adapter = Adapter.load(tmp_path / "style")
    assert adapter.name == "style"
    assert Adapter.load(tmp_path / "style" / FILE).name == "style"
    assert adapter.layouts["unet.mid_block.resnets.0.conv1"] == Layout("convolution", (3, 3))
    assert {name.partition(".")[0] for name in adapter.updates} == {"unet", "text_encoder"}
    pipeline = fresh(base)
    assert not torch.allclose(output(pipeline), expected, atol=1e-3)
    merge([adapter]).apply_to(weights_of(pipeline))
    assert_same(output(pipeline), expected)


def test_files_of_before_transformers_5_merge_with_those_of_today(base, trained, tmp_path):
    """Their text encoder has a `text_model` inside, which diffusers drops when it loads them."""
    expected = trained("old", 1, metadata=False)
    trained("new", 2, metadata=False)
    new = ".text_model." not in str(load_file(tmp_path / "new" / FILE).keys())
    assert new, "the transformers of today"
    tensors = load_file(tmp_path / "old" / FILE)
    renamed = {
        k.replace("text_encoder.", "text_encoder.text_model."): t for k, t in tensors.items()
    }
    save_file(renamed, tmp_path / "old" / FILE)
    old = Adapter.load(tmp_path / "old")
    pipeline = fresh(base)
    merge([old]).apply_to(weights_of(pipeline))
    assert_same(output(pipeline), expected)

    merged = merge([old, Adapter.load(tmp_path / "new")], weights=[0.6, -1.1])
    merged.save_adapter(tmp_path / "both", format="diffusers")
    found = fresh(base)
    found.load_lora_weights(tmp_path / "both")
    by_hand = fresh(base)
    for name, weight in (("old", 0.6), ("new", -1.1)):
        merge([Adapter.load(tmp_path / name)], weights=[weight]).apply_to(weights_of(by_hand))
    assert_same(output(found), output(by_hand))


def test_a_merge_is_loaded_by_diffusers(base, trained, tmp_path):
    """Against weights merged by hand: W + sum_t w_t alpha_t / r_t B_t A_t."""
    weights = {"one": 0.6, "two": -1.1}
    alphas = {"one": 4, "two": 9}
    trained("one", 1, rank=2, lora_alpha=4)
    trained("two", 2, rank=3, lora_alpha=9, rank_pattern={"conv1": 5})
    adapters = [Adapter.load(tmp_path / name) for name in weights]
    merged = merge(adapters, weights=list(weights.values()))
    assert set(merged.save_adapter(tmp_path / "out", format="diffusers").values()) == {0.0}

    by_hand = fresh(base)
    modules = weights_of(by_hand)
    for name, w in weights.items():
        tensors = load_file(tmp_path / name / FILE)
        for key, a in tensors.items():
            if ".lora_A." not in key:
                continue
            b = tensors[key.replace(".lora_A.", ".lora_B.")].double().flatten(1)
            delta = w * alphas[name] / len(a) * (b @ a.double().flatten(1))
            weight = modules.get_submodule(key.removesuffix(".lora_A.weight")).weight
            with torch.no_grad():
                weight += delta.reshape(weight.shape).float()

    loaded = fresh(base)
    loaded.load_lora_weights(str(tmp_path / "out"))
    assert_same(output(loaded), output(by_hand))
    info = json.loads((tmp_path / "out" / "osrm.json").read_text())
    assert info["merge"]["adapters"] == ["one", "two"]
    assert "load_lora_weights" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("rank", [None, 4, 1000])
def test_dense_merges_and_truncation(base, trained, tmp_path, rank):
    """Against the best factors of each rank by hand; at 1000 they are the merge itself."""
    for seed in (1, 2):
        trained(f"t{seed}", seed)
    merged = merge([Adapter.load(tmp_path / f"t{seed}") for seed in (1, 2)], "ties", density=0.5)
    merged.save_adapter(tmp_path / "out", rank, format="diffusers")
    again = Adapter.load(tmp_path / "out")
    assert again.layouts == merged.layouts
    loaded, applied, by_hand = fresh(base), fresh(base), fresh(base)
    loaded.load_lora_weights(str(tmp_path / "out"))
    merge([again]).apply_to(weights_of(applied))
    assert_same(output(loaded), output(applied))
    if rank == 1000:
        merged.apply_to(weights_of(by_hand))
    else:
        for module, update in merged.updates.items():
            u, s, vh = torch.linalg.svd(update.rows(0, update.shape[0]), full_matrices=False)
            kept = slice(rank or merged.ranks[module])
            weight = weights_of(by_hand).get_submodule(module).weight
            with torch.no_grad():
                weight += ((u[:, kept] * s[kept]) @ vh[kept]).reshape(weight.shape)
    assert_same(output(loaded), output(by_hand))


def test_both_formats_hold_the_same_adapter(base, trained, tmp_path):
    trained("style", 1, **SCALED)
    adapter = Adapter.load(tmp_path / "style")
    adapter.save(tmp_path / "peft")
    adapter.save(tmp_path / "diffusers", format="diffusers")
    tensors = load_file(tmp_path / "diffusers" / FILE)
    ranks = {len(tensor) for key, tensor in tensors.items() if ".lora_A." in key}
    assert ranks == {3}  # one rank, though that of conv1 is 2
    for form in ("peft", "diffusers"):
        again = Adapter.load(tmp_path / form)
        assert again.layouts == adapter.layouts
        assert again.updates.keys() == adapter.updates.keys()
        for module, update in adapter.updates.items():
            torch.testing.assert_close(again.updates[module].dense(), update.dense())


def rename(path: Path, *patterns: tuple[str, str], **more: Tensor) -> None:
    """Rewrite a file under other tensor names, without its metadata."""
    tensors = {}
    for key, tensor in load_file(path).items():
        for old, new in patterns:
            key = re.sub(old, new, key)
        tensors[key] = tensor
    save_file(tensors | more, path)


OLD_NAMES = [
    (r"^(unet\..*)\.lora_A\.", r"\1.lora.down."),
    (r"^(unet\..*)\.lora_B\.", r"\1.lora.up."),
    (r"^(text_encoder\..*)\.lora_A\.", r"\1.lora_linear_layer.down."),
    (r"^(text_encoder\..*)\.lora_B\.", r"\1.lora_linear_layer.up."),
]
PROCESSOR_NAMES = [
    (r"\.to_(q|out)(\.0)?\.lora\.(down|up)", r".processor.to_\1_lora.\3"),
]


@pytest.mark.parametrize("names", [OLD_NAMES, OLD_NAMES + PROCESSOR_NAMES])
def test_older_names_mean_what_diffusers_takes_them_for(base, trained, tmp_path, names):
    expected = trained("style", 1, metadata=False)
    modules = set(Adapter.load(tmp_path / "style").updates)
    rename(tmp_path / "style" / FILE, *names)
    assert not any("lora_A" in key for key in load_file(tmp_path / "style" / FILE))
    loaded, applied = fresh(base), fresh(base)
    loaded.load_lora_weights(str(tmp_path / "style"))
    assert_same(output(loaded), expected)
    adapter = Adapter.load(tmp_path / "style")
    assert set(adapter.updates) == modules
    merge([adapter]).apply_to(weights_of(applied))
    assert_same(output(applied), expected)


def write(path: Path, metadata: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    named = {key.replace("__", "."): tensor.clone() for key, tensor in tensors.items()}
    text = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(named, path, text)
    return path


A, B = torch.ones(2, 4), torch.ones(3, 2)
ONE = {"transformer__m__lora_A__weight": A, "transformer__m__lora_B__weight": B}


def test_alphas_of_modules(tmp_path):
    alpha = {"transformer__m__alpha": torch.tensor(6.0)}
    adapter = Adapter.load(write(tmp_path / "my-style.safetensors", **ONE, **alpha))
    assert adapter.name == "my-style"
    assert torch.equal(adapter.updates["transformer.m"].dense(), 6 / 2 * B @ A)


LORA = {"transformer.peft_type": "LORA", "transformer.r": 2, "transformer.lora_alpha": 2}


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        ({"transformer__m__lora_A__weight": A}, None, "no lora_B"),
        (
            {**ONE, "transformer__m__lora_B__weight": B.to(torch.int8)},
            None,
            r"lora_B of transformer\.m in torch\.int8, which are no numbers",
        ),
        ({**ONE, "transformer__m__dora_scale": B}, None, "belongs to DoRA"),
        ({**ONE, "transformer__m__lora_magnitude_vector": B}, None, "belongs to DoRA"),
        ({**ONE, "transformer__m__lora_B__bias": B}, None, "not a LoRA factor.*save_lora_weights"),
        ({"lora_unet_m__lora_down__weight": A}, None, "not a LoRA factor as diffusers names them"),
        ({"transformer__m__alpha": torch.ones(())}, None, "no LoRA factors"),
        ({**ONE, "transformer__n__alpha": torch.ones(())}, None, r"none for transformer\.m"),
        (
            {**ONE, "transformer__m__alpha": torch.ones(()), "unet__n__alpha": torch.ones(())},
            None,
            r"an alpha for unet\.n but no factors",
        ),
        ({**ONE, "transformer__m__alpha": torch.ones(())}, LORA, "states its scales twice"),
        (
            {**ONE, "transformer__m__lora__down__weight": A},
            None,
            r"factor A of transformer\.m twice",
        ),
        (ONE, {"unet.r": 2}, "describes unet in its metadata but not transformer"),
        (ONE, {**LORA, "transformer.r": 3}, "rank 2 for m but .* says 3"),
        (ONE, {**LORA, "transformer.use_dora": True}, "DoRA"),
        (ONE, {**LORA, "transformer.init_lora_weights": "pissa"}, "pissa"),
        ({**ONE, "transformer__m__lora_A__weight": A / 0}, None, r"NaN .*m\.lora_A\.weight"),
    ],
)
def test_files_that_are_refused(tmp_path, tensors, metadata, reason):
    path = write(tmp_path / FILE, metadata, **tensors)
    with pytest.raises(UserError, match=reason):
        Adapter.load(path)


def test_damaged_files_and_files_of_peft(tmp_path, random_adapter):
    path = write(tmp_path / FILE, **ONE)
    save_file(load_file(path), path, {"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="damaged lora_adapter_metadata"):
        Adapter.load(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        Adapter.load(path)
    random_adapter("peft").save(tmp_path / "peft")
    with pytest.raises(UserError, match="give the directory"):
        Adapter.load(tmp_path / "peft" / "adapter_model.safetensors")


def test_a_file_of_one_model_does_not_name_its_component(base, tmp_path):
    unet = fresh(base).unet
    unet.add_adapter(LoraConfig(r=2, **UNET))
    unet.save_lora_adapter(tmp_path / "unet")
    with pytest.raises(UserError, match=r"does not name the component: .* save_lora_weights"):
        Adapter.load(tmp_path / "unet")


def test_what_a_diffusers_file_cannot_hold(tmp_path, random_adapter):
    update = {"text_encoder.token_embedding": LowRank(B, A)}
    embedding = Adapter("e", update, layouts={next(iter(update)): Layout("embedding")})
    headed = Adapter("h", {"unet.m": LowRank(B, A)}, {"h": {"bias": A}})
    for adapter, reason in [
        (embedding, "is an embedding"),
        (headed, "has task heads"),
        (random_adapter("bert"), "does not begin with a pipeline's component"),
    ]:
        with pytest.raises(UserError, match=reason):
            adapter.save(tmp_path / "out", format="diffusers")
    for save in (Adapter("a", update).save, merge([Adapter("a", update)]).save_adapter):
        with pytest.raises(UserError, match=r"format 'difusers': did you mean 'diffusers'"):
            save(tmp_path / "out", format="difusers")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_exist(tmp_path):
    adapter = Adapter("a", {"unet.m": LowRank(B, A)})
    adapter.save(tmp_path / "a", format="diffusers")
    with pytest.raises(UserError, match="already exists"):
        adapter.save(tmp_path / "a", format="diffusers")
    adapter.save(tmp_path / "a", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    adapter.save(tmp_path / "a", overwrite=True, format="diffusers")
    assert [path.name for path in (tmp_path / "a").iterdir()] == [FILE]
