"""One of the processes of test_distributed.py: python ranks_worker.py DIRECTORY RANK SIZE.

Runs every scenario and leaves DIRECTORY/<scenario>.<rank>.safetensors, or .error with the type
and the message of what was raised, and the reference of one process alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.bert.modeling_bert import BertLayer

from osrm import collect_covariance

TARGETS = ["query", "value", "intermediate.dense"]
Batches = list[dict[str, torch.Tensor]]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def adapted() -> nn.Module:
    return get_peft_model(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))


def fsdp1(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({BertLayer})
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device)


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, BertLayer):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        lengths = torch.randint(3, 10, (4, 1), generator=generator)
        mask = (torch.arange(9) < lengths).long()
        made.append(
            {
                "input_ids": torch.randint(2, 50, (4, 9), generator=generator) * mask,
                "attention_mask": mask,
            }
        )
    return made


class Sharing(nn.Module):
    """Two layers that read the same tensor, or copies of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, copy: bool) -> torch.Tensor:
        return self.first(x) + self.second(x.clone() if copy else x)


def broken(model: nn.Module) -> nn.Module:
    """Its input becomes NaN at token 49."""
    with torch.no_grad():
        model.get_input_embeddings().weight[49] = float("nan")
    return model


def poisoned(data: Batches) -> Batches:
    data[1]["input_ids"][0, 0] = 49
    return data


def clean(data: Batches) -> Batches:
    for batch in data:
        batch["input_ids"].clamp_(max=48)
    return data


def scenarios(rank: int) -> dict[str, Callable[[], Any]]:
    """Of 5 batches rank 0 has the first 4, or all; rank 1 the last, or none."""
    data = batches(5)
    mine = [data[:4], data[4:]][rank]
    all_or_none = [data, []][rank]
    bad = [clean(batches(4)), poisoned(clean(batches(2)))][rank]

    def collect(model: nn.Module, data: Any, **options: Any) -> Any:
        return collect_covariance(model, data, TARGETS, meta={"task": "a"}, **options)

    def sharing() -> Any:
        batch = {"x": torch.ones(1, 2, 4), "copy": bool(rank)}
        return collect_covariance(Sharing(), [batch], ["first", "second"])

    return {
        "plain": lambda: collect(bert(), mine),
        "empty": lambda: collect(bert(), all_or_none),
        "float64": lambda: collect(bert(), mine, dtype=torch.float64),
        "spilled": lambda: collect(bert(), mine, spill=True),
        "sketch-empty": lambda: collect(bert(), all_or_none, sketch=20),
        "sketch": lambda: collect(bert(), mine, sketch=20),
        "ddp": lambda: collect(DistributedDataParallel(bert()), mine),
        "ddp-peft": lambda: collect(DistributedDataParallel(adapted()), mine),
        "fsdp1": lambda: collect(fsdp1(bert()), mine),
        "fsdp2": lambda: collect(fsdp2(bert()), mine),
        "fsdp2-peft": lambda: collect(fsdp2(adapted()), mine),
        "no-data": lambda: collect(bert(), []),
        "nan": lambda: collect(broken(bert()), bad),
        "nan-fsdp2": lambda: collect(fsdp2(broken(bert())), bad),
        "empty-fsdp2": lambda: collect(fsdp2(bert()), all_or_none),
        "no-mapping": lambda: collect(bert(), [data, [3]][rank]),
        "sharing": sharing,
    }


def main(directory: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        for name, options in (("", {}), ("-sketch", {"sketch": 20})):
            reference = collect_covariance(bert(), batches(5), TARGETS, **options)
            reference.save(directory / f"reference{name}.safetensors")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    for name, scenario in scenarios(rank).items():
        try:
            scenario().save(directory / f"{name}.{rank}.safetensors")
        except Exception as error:  # all of them are looked at by the test
            text = f"{type(error).__name__}: {error}"
            (directory / f"{name}.{rank}.error").write_text(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
