"""A small class-conditional diffusion model of glyphs: training, adapters, sampling.

It works on pictures whose squares of PATCH x PATCH pixels are folded into channels: a fixed, exact
stand-in for the autoencoder of a latent diffusion model, and as much cheaper to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_shuffle, pixel_unshuffle

from benchmarks.experiments.orthogonal_dropout.glyphs import (
    BASE,
    CHARACTERS,
    REGULAR,
    SIZE,
    renderings,
)
from benchmarks.experiments.orthogonal_dropout.settings import OBJECTS, DiffusionSettings
from osrm import Covariance, collect_covariance, initialize_lora_osrm_weights
from trainers.store import Report

PATCH = 2
NOTHING = len(CHARACTERS)  # the label that stands for no character, for guidance
# Every linear module of the blocks; q, k and v among them.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"]


def new_model(settings: DiffusionSettings) -> Any:
    """The U-Net: attention at both levels, labels for all characters and for none."""
    return UNet2DModel(
        sample_size=SIZE // PATCH,
        in_channels=PATCH**2,
        out_channels=PATCH**2,
        block_out_channels=settings.channels,
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=len(CHARACTERS) + 1,
    )


def scheduler() -> Any:
    """Noise schedule for training and sampling; pictures are in [-1, 1]."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True
    )


def draws(
    kind: str, name: str, settings: DiffusionSettings, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pictures and labels.

    Args:
        kind: 'base': regular base characters. 'object': `object_pictures` regular pictures of the
            character `name`. 'style': base characters in the style `name`.
        name: See above.
        settings: Sizes.
        steps: Number of batches.
        seed: Decides everything.
    """
    choose = torch.Generator().manual_seed(seed)
    if kind == "object":
        characters = name * settings.object_pictures
    else:
        count = settings.style_pictures if kind == "style" else settings.base_pictures
        characters = BASE * count
    looks = [name if kind == "style" else REGULAR] * len(characters)
    pictures = renderings(characters, looks, seed)
    labels = torch.tensor([CHARACTERS.index(character) for character in characters])
    for _ in range(steps):
        chosen = torch.randint(len(labels), (settings.batch_size,), generator=choose)
        yield pictures[chosen], labels[chosen]


def noised(
    pictures: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the model at random times, one label in ten left out, and its target."""
    schedule, pictures = scheduler(), pixel_unshuffle(pictures, PATCH)
    times = torch.randint(schedule.config.num_train_timesteps, (len(labels),), generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)
    left_out = torch.rand(len(labels), generator=generator) < 0.1
    arguments = {
        "sample": schedule.add_noise(pictures, noise, times),
        "timestep": times,
        "class_labels": labels.where(~left_out, NOTHING),
    }
    return arguments, schedule.get_velocity(pictures, noise, times)


def fit(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    seed: int,
    report: Report,
    decay: float = 0.0,
) -> None:
    """Train what requires gradients to predict the velocity; warm-up, then a cosine.

    Args:
        model: Trained in place.
        batches: Pictures and labels.
        steps: How many.
        learning_rate: At the peak.
        seed: Decides noise and times.
        report: Told (steps done, steps in all).
        decay: Of the exponential moving average that replaces the weights at the end; 0 for none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, (n + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * n / steps)),
    )
    means = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for number, (pictures, labels) in enumerate(batches, 1):
        arguments, velocity = noised(pictures, labels, generator)
        loss = mse_loss(model(**arguments).sample, velocity)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for mean, p in zip(means, parameters, strict=True):
            mean.lerp_(p.detach(), 1 - min(decay, number / (number + 10)))
        report(number, steps)
    if decay:
        for mean, p in zip(means, parameters, strict=True):
            p.data.copy_(mean)
    model.eval()


def train_base(directory: Path, settings: DiffusionSettings, seed: int, report: Report) -> None:
    """Train the model on the base characters and save it."""
    torch.manual_seed(seed)
    model = new_model(settings)
    batches = draws("base", "", settings, settings.steps, seed)
    fit(model, batches, settings.steps, settings.learning_rate, seed, report, decay=0.995)
    model.save_pretrained(directory)


def load_base(directory: Path) -> Any:
    """The trained model, frozen."""
    model: Any = UNet2DModel.from_pretrained(directory)
    return model.eval().requires_grad_(False)


def task_kind(task: str) -> str:
    """Whether an adapter's task is an 'object' or a 'style'."""
    return "object" if task in OBJECTS else "style"


def covariance(model: nn.Module, task: str, settings: DiffusionSettings, seed: int) -> Covariance:
    """What the linear modules read on a task's noised pictures."""
    generator = torch.Generator().manual_seed(seed)
    batches = draws(task_kind(task), task, settings, 4, seed)
    inputs = [noised(pictures, labels, generator)[0] for pictures, labels in batches]
    return collect_covariance(model, inputs, TARGETS, meta={"task": task})


def train_adapter(
    model: nn.Module,
    task: str,
    directory: Path,
    settings: DiffusionSettings,
    seed: int,
    report: Report,
    dropout: float = 0.0,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Train the adapter of one object or style and save it as PEFT does.

    Args:
        model: The base model; it carries the adapter afterwards.
        task: A character of OBJECTS, or a style.
        directory: Where to.
        settings: Sizes and steps.
        seed: Decides everything.
        report: Told (steps done, steps in all).
        dropout: LoRA dropout while training.
        state: Rows that A starts from (osrm.subspace_state); PEFT's default without.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=dropout,
        target_modules=TARGETS,
    )
    wrapped = get_peft_model(model, config)
    if state is not None:
        initialize_lora_osrm_weights(wrapped, state)
    steps = settings.adapter_steps
    batches = draws(task_kind(task), task, settings, steps, seed)
    fit(wrapped, batches, steps, settings.adapter_learning_rate, seed, report)
    wrapped.save_pretrained(str(directory))


def with_adapters(model: nn.Module, paths: Mapping[str, Path]) -> PeftModel:
    """The model with these adapters loaded under their names."""
    (first, path), *others = paths.items()
    wrapped = PeftModel.from_pretrained(model, str(path), adapter_name=first)
    for name, path in others:
        wrapped.load_adapter(str(path), adapter_name=name)
    return wrapped.eval().requires_grad_(False)


@torch.no_grad()
def sample(
    model: nn.Module, labels: Sequence[int], settings: DiffusionSettings, seed: int
) -> Tensor:
    """Pictures (n, 1, SIZE, SIZE) in [-1, 1] of the labels, by DDIM; the seed decides the noise.

    Calls the model once per step; guided, with the labels and without in one batch.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule = scheduler()
    schedule.set_timesteps(settings.sampling_steps)
    shape = len(labels), PATCH**2, SIZE // PATCH, SIZE // PATCH
    pictures = torch.randn(shape, generator=generator)
    guided = settings.guidance != 1
    wanted = torch.tensor([*labels, *[NOTHING] * len(labels) * guided])
    for time in schedule.timesteps:
        inputs = torch.cat([pictures, pictures]) if guided else pictures
        velocity = model(inputs, time, class_labels=wanted).sample
        if guided:
            own, free = velocity.chunk(2)
            velocity = free + settings.guidance * (own - free)
        pictures = schedule.step(velocity, time, pictures).prev_sample
    return pixel_shuffle(pictures, PATCH).clamp(-1, 1)


def labels_of(task: str, count: int) -> list[int]:
    """Labels to sample from: the object's own, or the base characters in turn for a style."""
    if task_kind(task) == "object":
        return [CHARACTERS.index(task)] * count
    return [CHARACTERS.index(BASE[i % len(BASE)]) for i in range(count)]
