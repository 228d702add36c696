"""The paper's set-up on a pipeline of SDXL's shape with random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from benchmarks.cli import main
from benchmarks.experiments.orthogonal_dropout.sdxl import Gallery, attach_pipeline, read_config
from benchmarks.experiments.orthogonal_dropout.settings import PAPERS_PAIRS
from merge_algorithms import UserError, attach
from trainers.store import Store

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters, alone and at the end of a word."""
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|unknown|>", "<|startoftext|>", "<|endoftext|>"]
    words += [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


@pytest.fixture(scope="module")
def pipeline_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline, and beside it two adapter files: one for the U-Net alone."""
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(2, 4),
        norm_num_groups=1,
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextConfig(**TEXT)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer(folder / "one"),
        tokenizer_2=tokenizer(folder / "two"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )
    pipeline.save_pretrained(folder / "pipeline")
    for number, name in enumerate(("thing", "look")):
        torch.manual_seed(number)
        parts = {"unet_lora_layers": (pipeline.unet, ["to_q", "to_v", "conv1"])}
        if name == "thing":
            parts["text_encoder_lora_layers"] = (pipeline.text_encoder, ["q_proj", "v_proj"])
        state = {}
        for key, (module, targets) in parts.items():
            module.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets), name)
            for parameter, tensor in module.named_parameters():
                if "lora_" in parameter:
                    nn.init.normal_(tensor, std=0.5)
            state[key] = get_peft_model_state_dict(module, adapter_name=name)
        StableDiffusionXLPipeline.save_lora_weights(folder / name, **state)
        pipeline.unload_lora_weights()
    return folder


@pytest.fixture(scope="module")
def loaded(pipeline_path: Path) -> StableDiffusionXLPipeline:
    """The pipeline with both adapters."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    for name in ("thing", "look"):
        pipeline.load_lora_weights(pipeline_path / name, adapter_name=name)
    return pipeline


def draw(pipeline: StableDiffusionXLPipeline, **options: object) -> torch.Tensor:
    pictures = pipeline(
        "a thing",
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    )
    return pictures.images


@pytest.mark.parametrize("method", ["direct", "mc_dropout", "orthogonal_mc_dropout"])
def test_every_part_of_a_pipeline_is_attached_and_left_as_found(
    loaded: StableDiffusionXLPipeline, method: str
) -> None:
    plain = draw(loaded)
    with ExitStack() as stack:
        attach_pipeline(stack, loaded, ["thing", "look"], method, masks=1, drop_rate=0.5)
        first = draw(loaded)
        with pytest.raises(UserError, match="do not nest"):
            stack.enter_context(attach(loaded.text_encoder, ["thing"], "direct"))
    assert torch.equal(draw(loaded), plain)
    with ExitStack() as stack:
        attach_pipeline(stack, loaded, ["thing", "look"], method, masks=1, drop_rate=0.5)
        assert torch.equal(draw(loaded), first)
    assert not torch.equal(first, plain)


def test_direct_is_what_diffusers_draws_with_both(loaded: StableDiffusionXLPipeline) -> None:
    loaded.set_adapters(["thing", "look"], [1.0, 1.0])
    expected = draw(loaded)
    scaled = draw(loaded, cross_attention_kwargs={"scale": 0.3})
    loaded.set_adapters(["look"], [1.0])
    with ExitStack() as stack:
        attach_pipeline(stack, loaded, ["thing", "look"], "direct")
        torch.testing.assert_close(draw(loaded), expected, rtol=1e-3, atol=1e-4)
        found = draw(loaded, cross_attention_kwargs={"scale": 0.3})
    torch.testing.assert_close(found, scaled, rtol=1e-3, atol=1e-4)
    assert (expected - scaled).abs().max() > 1e-3


def test_samples_are_averaged_in_the_unet(loaded: StableDiffusionXLPipeline) -> None:
    with attach(loaded.unet, ["thing", "look"], masks=1, samples=3):
        assert draw(loaded).shape == (1, 3, 16, 16)


@pytest.fixture
def config(pipeline_path: Path, tmp_path: Path) -> Path:
    """A file like the paper's: a pair and a single adapter, scored by a random CLIP."""
    clip = tmp_path / "clip"
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 30, "patch_size": 15}
    CLIPModel(
        CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16)
    ).save_pretrained(clip)
    square = {"height": 30, "width": 30}
    images = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=square)
    CLIPProcessor(images, tokenizer(tmp_path / "words")).save_pretrained(clip)
    name = "pytorch_lora_weights.safetensors"
    content = {
        "model": str(pipeline_path / "pipeline"),
        "scheduler": "KDPM2DiscreteScheduler",
        "steps": 2,
        "size": 16,
        "pictures": 2,
        "clip_skip": 1,
        "rates": [0.0, 0.5],
        "clip": str(clip),
        "adapters": {
            key: {"source": str(pipeline_path / key), "file": name} for key in ("thing", "look")
        },
        "scenes": {
            "pair": {"adapters": ["thing", "look"], "prompt": "a thing of that look"},
            "single": {"adapters": ["thing"], "prompt": "a thing"},
        },
    }
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_part_through_the_command_line(
    config: Path, tmp_path: Path, osrm: Callable[..., str]
) -> None:
    command = ["experiment", "orthogonal-dropout", "--parts", "sdxl", "--sdxl", str(config)]
    command += ["--runs-dir", str(tmp_path), "--name", "run"]
    assert "CLIP score" in osrm(*command)
    grids = sorted((tmp_path / "run").rglob("grid.png"))
    assert len(grids) == 3 + 2
    assert Image.open(grids[0]).size == (2 * 256, 256)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5
    assert "single, mc_dropout, drop rate 0.5, seed 0" in page
    before = {path: path.stat().st_mtime_ns for path in grids}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in grids} == before


TWICE = {"adapters": ["thing", "thing"], "prompt": ""}


def test_an_adapter_of_another_architecture_is_refused(
    config: Path, pipeline_path: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    state = {f"transformer.blocks.0.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(state, tmp_path / "other.safetensors")
    content = yaml.safe_load(config.read_text())
    content["adapters"]["look"] = {"source": str(tmp_path), "file": "other.safetensors"}
    config.write_text(yaml.safe_dump(content))
    command = ["experiment", "orthogonal-dropout", "--parts", "sdxl", "--sdxl", config]
    told = refused(*command, "--runs-dir", tmp_path / "runs")
    assert "adapter 'look' is in no part of the pipeline" in told
    assert not list((tmp_path / "runs").rglob("grid.png"))


def test_every_part_that_takes_adapters_is_attached() -> None:
    class Pipeline:
        """With a second transformer, as the video models that denoise in two stages."""

        _lora_loadable_modules = ("transformer", "transformer_2")

        def __init__(self) -> None:
            for seed, name in enumerate(self._lora_loadable_modules):
                torch.manual_seed(seed)
                part = get_peft_model(
                    nn.Sequential(nn.Linear(4, 4)),
                    LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
                    "thing",
                )
                part.set_adapter("thing")
                setattr(self, name, part)

    pipeline, inputs = Pipeline(), torch.ones(1, 4)
    for name in ("transformer", "transformer_2"):
        part = getattr(pipeline, name)
        with part.disable_adapter():
            plain = part(inputs)
        with ExitStack() as stack:
            attach_pipeline(stack, pipeline, ["thing"], "mc_dropout", masks=0, drop_rate=0.999)
            assert torch.equal(part(inputs), plain)


def test_the_papers_pairs_can_be_read() -> None:
    config = read_config(PAPERS_PAIRS)
    assert (config.steps, config.guidance, config.size) == (40, 7.0, 1024)
    assert config.scenes["kimoju_cloud"].adapters == ("kimoju", "cloud")
    assert config.stages() == 6 * 3 + 4 * 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stepz": 4}, "unknown key 'stepz'.*'steps'"),
        ({"steps": "many"}, "steps"),
        ({"adapters": {"thing": {"source": "x"}}}, "an adapter has a source and a file"),
        ({"scenes": {"pair": {"adapters": ["thng"], "prompt": ""}}}, "'thng': did you mean"),
        ({"scheduler": "NoScheduler"}, "no scheduler 'NoScheduler'"),
        ({"methods": ["dierct"]}, "unknown run-time method 'dierct': did you mean 'direct'"),
        ({"adapters": {"thing": {"source": ".", "file": "x.y"}}}, "in no file x.y of .: name one"),
        ({"scenes": {"pair": TWICE}}, "scene 'pair' names an adapter twice"),
        ({"methods": ["direct", "emr"]}, "method 'emr' needs a task, which pictures have none of"),
        ({"drop_rate": 1.0}, r"a drop rate of 1\.0: give numbers in \[0, 1\)"),
        ({"rates": [0.5, -0.1]}, r"a drop rate of -0\.1"),
        ({"drop_rate": 0.4}, r"2 adapters of scene 'pair' cannot have disjoint .* least 0\.5"),
        ({"seeds": []}, "no seeds: give at least one"),
        ({"pictures": 0}, "pictures 0: give at least 1"),
        ({"steps": 0}, "steps 0: give at least 1"),
    ],
)
def test_a_file_that_cannot_be_is_refused(
    config: Path, refused: Callable[..., str], change: dict[str, object], reason: str
) -> None:
    content = yaml.safe_load(config.read_text()) | change
    config.write_text(yaml.safe_dump(content))
    command = ["experiment", "orthogonal-dropout", "--parts", "sdxl", "--sdxl", config]
    told = refused(*command, "--runs-dir", config.parent / "runs")
    assert re.search(reason, told)
    assert not (config.parent / "runs").exists()


def test_overwritten_files_are_drawn_with_anew(
    config: Path, pipeline_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keys(Store):
        def run(self, kind: str, label: str, inputs: Mapping[str, Any], build: object) -> Path:
            def drawn(directory: Path, report: object) -> None:
                (directory / "scores.json").write_text("[]")

            return super().run(kind, label, inputs, drawn)

    shutil.copytree(pipeline_path, tmp_path / "local")
    text = config.read_text().replace(str(pipeline_path), str(tmp_path / "local"))
    config.write_text(text)

    def drawn() -> set[str]:
        _, pictures = Gallery(read_config(config), Keys(tmp_path / "run")).run()
        return set(pictures.values())

    first = drawn()
    assert drawn() == first
    (look,) = (tmp_path / "local" / "look").iterdir()
    look.write_bytes(look.read_bytes()[:-1] + b"x")
    second = drawn()
    assert {path.split("/")[1] for path in second - first} == {"pair"}
    scheduler = tmp_path / "local" / "pipeline" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("leading", "linspac"))
    third = drawn()
    assert not third & second
    sdxl = "benchmarks.experiments.orthogonal_dropout.sdxl"
    monkeypatch.setattr(f"{sdxl}.version", lambda name: "0")
    assert not drawn() & third
