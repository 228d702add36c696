"""Which modules are meant: names inside the base model, with or without PEFT around it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.pytorch_utils import Conv1D

from merge_algorithms.errors import UserError, suggest
from merge_algorithms.modules import unwrapped

# Wrappers that put themselves between a module and its child, under these names.
_TRANSPARENT = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")

OUTPUTS = "outputs"
"""A target that stands for the output projections of attention and feed-forward blocks."""
# What those are called; the first line that a model has all of, at two places of a block or more,
# counts: a name that both blocks use may belong to one of them only, as MPNet's output.dense does.
_OUTPUTS = (
    ("attn.o", "output.dense"),  # MPNet
    ("output.dense",),  # BERT, RoBERTa, ELECTRA, DeBERTa: of both blocks
    ("o_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma, Phi-3
    ("o_proj", "fc2"),  # ViT
    ("self_attn.output", "out_proj", "fc2"),  # LED, BigBird-Pegasus: encoder's, decoder's, of both
    ("out_proj", "fc2"),  # OPT, BART, CLIP
    ("out_proj", "fc_out"),  # GPT-J
    ("c_proj",),  # GPT-2: of both
    ("out_proj", "c_proj"),  # GPT-Neo
    ("o_proj", "c_proj"),  # StarCoder2
    ("o", "wo"),  # T5
    ("out_lin", "lin2"),  # DistilBERT
    ("Wo",),  # ModernBERT: of both
    ("attention.dense", "ffn_output"),  # ALBERT
    ("attention.dense", "dense_4h_to_h"),  # GPT-NeoX
    ("self_attention.dense", "dense_4h_to_h"),  # BLOOM, Falcon
    ("self_attn.dense", "fc2"),  # Phi
)
_IN_BLOCK = re.compile(r"\.\d+\.|^\d+\.")  # blocks are numbered; a classifier's head is not in one


def base_model(model: nn.Module) -> nn.Module:
    """The model that names count from: inside torch.compile, PEFT, DP, DDP and FSDP, or itself."""
    model = unwrapped(model)
    if isinstance(model, FullyShardedDataParallel):
        return base_model(model.module)
    if isinstance(model, PeftModel):
        return base_model(model.get_base_model())
    if isinstance(model, PeftMixedModel):
        return base_model(model.base_model)
    return model.model if isinstance(model, BaseTuner) else model


def runnable(model: nn.Module) -> nn.Module:
    """What to call to run `base_model(model)`.

    DDP is left aside: it would synchronise the ranks in every call, and they may have different
    numbers of batches. So is DataParallel, which would run copies. FSDP is not: it gathers the
    weights.
    """
    inner = unwrapped(model)
    return inner if is_sharded(inner) else base_model(inner)


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of the weights each, so that they have to run together."""
    return any(isinstance(m, FullyShardedDataParallel | FSDPModule) for m in model.modules())


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of `model` by its name inside the base model.

    nn.Linear, Conv1D, and whatever a quantisation has put in their place: layers without children
    that have in_features and out_features. A layer that PEFT has wrapped appears once, under the
    name it had before, as its wrapper: a forward hook there sees the layer's input.
    """
    return dict(_linear_modules(base_model(model), "", set()))


def _linear_modules(
    module: nn.Module, name: str, seen: set[int]
) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _linear_modules(module.original_module, name, seen)
        return
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if _is_linear(inner):
        yield name, module
    elif inner is module:
        for child_name, child in module.named_children():
            parts = [name, "" if child_name in _TRANSPARENT else child_name]
            yield from _linear_modules(child, ".".join(filter(None, parts)), seen)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | Conv1D):
        return True
    sizes = (getattr(module, size, None) for size in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and not any(module.children())


def input_width(module: nn.Module) -> int:
    """d_in of a linear layer, wrapped by PEFT or not."""
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    width = inner.weight.shape[0] if isinstance(inner, Conv1D) else inner.in_features
    assert isinstance(width, int)
    return width


def matches(name: str, target: str) -> bool:
    """Whether PEFT would apply `target` to the module `name`: the full name or its last parts."""
    return name == target or name.endswith(f".{target}")


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that `targets` select, in the order of the model.

    Args:
        model: A model, bare or wrapped by PEFT.
        targets: Full names, or last parts of names such as "query", as in PEFT's target_modules;
            "outputs" is the output projections of attention and feed-forward blocks, as the
            architecture calls them, if it is one of those that are known.

    Raises:
        UserError: a target selects no linear layer (the message lists what there is).
    """
    if isinstance(targets, str) or not targets:
        raise UserError(
            f"the target modules are {targets!r}: give a list of module names, such as ['query']"
        )
    names = list(linear_modules(model))
    blocks = [name for name in names if _IN_BLOCK.search(name)] or names
    selected: set[str] = set()
    for target in targets:
        if target == OUTPUTS and (outputs := _outputs(blocks)):
            selected |= outputs
            continue
        found = {name for name in names if matches(name, target)}
        selected |= found
        if not found:
            candidates = {name.rpartition(".")[2] for name in names}
            raise UserError(
                f"the target module '{target}' matches no linear layer of"
                f" {type(base_model(model)).__name__}; {suggest(target, candidates)}"
            )
    return [name for name in names if name in selected]


def _outputs(names: Sequence[str]) -> set[str]:
    """Those of the names that an architecture calls the output projections of its blocks.

    They are at two places of a block at least, but for FNet's, which has no attention to adapt.
    """
    least = 2 if any("att" in name.lower() for name in names) else 1
    for line in _OUTPUTS:
        found = [{name for name in names if matches(name, target)} for target in line]
        outputs = set().union(*found)
        places = {_IN_BLOCK.split(name)[-1] for name in outputs}
        if all(found) and len(places) >= least:
            return outputs
    return set()


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every layer that PEFT has put a LoRA on, by module name in the base model."""
    return {
        ".".join(part for part in name.split(".") if part not in _TRANSPARENT): module
        for name, module in base_model(model).named_modules()
        if isinstance(module, LoraLayer)
    }


def lora_factors(
    model: nn.Module, adapter_name: str = "default"
) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """The layers (A, B) of the adapter, with live weights, by module name in the base model.

    Raises:
        UserError: no module carries the adapter, or one is not a plain linear LoRA layer, or DoRA.
    """
    layers = lora_layers(model)
    factors = {}
    for name, layer in layers.items():
        if adapter_name in layer.lora_embedding_A:
            raise _not_linear(adapter_name, f"on the embedding {name}")
        if adapter_name in layer.lora_A:
            if isinstance(layer, ParamWrapper):
                bare = f"{name}.{layer.parameter_name}"
                raise _not_linear(adapter_name, f"on the bare parameter {bare} (target_parameters)")
            a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            if not (isinstance(a, nn.Linear) and isinstance(b, nn.Linear)):
                raise _not_linear(adapter_name, f"a {type(a).__name__} at {name}")
            if layer.use_dora.get(adapter_name):
                raise UserError(
                    f"the adapter '{adapter_name}' uses DoRA (use_dora) at {name}, which low-rank"
                    " factors alone do not describe: make it without use_dora"
                )
            factors[name] = a, b
    if not factors:
        known = {adapter for layer in layers.values() for adapter in layer.lora_A}
        raise UserError(
            f"no LoRA layer of the model carries the adapter '{adapter_name}';"
            f" {suggest(adapter_name, known)}"
        )
    return factors


def _not_linear(adapter_name: str, what: str) -> UserError:
    return UserError(
        f"the adapter '{adapter_name}' is {what}: only linear layers have an input covariance,"
        " leave it out of the targets"
    )


def lora_a(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """A copy of the adapter's current A, (r, d_in) on the CPU, for every module it is on."""
    return {
        name: torch.clone(a.weight.detach().cpu())
        for name, (a, _) in lora_factors(model, adapter_name).items()
    }
