"""Stock PEFT directories of LoRA adapters: what is in them, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_algorithms.errors import UserError
from merge_algorithms.layout import Layout

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
HEADS_DIRECTORY = "heads"
INFO_FILE = "osrm.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
EMR_FILE = "emr.safetensors"
PREFIX = "base_model.model."
KEPT = "peft"
"""Entry of osrm.json beside several heads: what PEFT's configuration is to say of one alone."""

_ADAPTER_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    HEAD_FILE,
    f"{HEADS_DIRECTORY}/*.safetensors",
    INFO_FILE,
    DIFFUSERS_FILE,
)
_FACTOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.default)?(?:\.weight)?")
_BASE_COPY = re.compile(r"(.+)\.base_layer\.(weight|bias)")
_HEAD_NAME = re.compile(r"\w[\w.+-]*")
_HUB_ADAPTER = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Of the oldest models without an organisation, as gpt2; 96 characters at most.
_HUB_MODEL = re.compile(r"(?!.{97})[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MODIFIES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What the algebra of dW = s B A does not cover: configuration key -> what it is.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on the LoRA factors",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "layer replication",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


class Factors(NamedTuple):
    """One module's update dW = scale * b @ a, b (d_out, r) and a (r, d_in) in the file's dtype."""

    b: Tensor
    a: Tensor
    layout: Layout
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number r of rows of a."""
        return len(self.a)


def fetch(source: str | Path, wanted: Sequence[str]) -> Path:
    """The local path `source` or, if there is none and it is a Hub id, a snapshot of that."""
    path = Path(source)
    # A mistyped path below a folder that exists is no Hub id.
    if path.exists() or not _HUB_ADAPTER.fullmatch(str(source)) or path.parent.is_dir():
        return path
    return snapshot(str(source), wanted)


def is_hub_id(name: str) -> bool:
    """Whether it can name a model of the Hub: it reads so, and is no path that is there."""
    return _HUB_MODEL.fullmatch(name) is not None and not Path(name).exists()


def snapshot(hub_id: str, wanted: Sequence[str], revision: str | None = None) -> Path:
    """Where the wanted files of a Hub repository lie, of its default branch or of a revision."""
    import huggingface_hub

    logger.info("fetching %s from the Hugging Face Hub", hub_id)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=list(wanted)
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no local directory {hub_id}, and fetching it from the Hugging Face Hub"
            f" failed ({type(error).__name__}): check the path or the id, and the network"
        ) from error


def locate(source: str | Path) -> Path:
    """The PEFT directory or diffusers file of an adapter; fetched if `source` is a Hub id."""
    path = fetch(source, _ADAPTER_FILES)
    try:
        return _adapter_at(path)
    except UserError as error:
        if path == Path(source):
            raise
        raise UserError(f"{source} on the Hugging Face Hub: {error}") from error


def _adapter_at(path: Path) -> Path:
    if path.is_file():
        return _locate_file(path)
    if not path.is_dir():
        raise UserError(
            f"there is no adapter directory {path}: give the directory that PEFT's"
            " save_pretrained wrote, or a Hub id like org/name"
        )
    if not (path / CONFIG_FILE).exists():
        if (path / DIFFUSERS_FILE).exists():
            return path / DIFFUSERS_FILE
        if (path / EMR_FILE).exists():
            raise UserError(
                f"{path} is an EMR bundle, which has a model for each task and is no adapter: score"
                " it with `osrm eval`, or take one task's model with EmrBundle.load(path).merged()"
            )
        found = "it is empty" if not any(path.iterdir()) else f"it has no {CONFIG_FILE}"
        raise UserError(
            f"{path} is not a PEFT adapter ({found}): give the directory that PEFT's"
            f" save_pretrained wrote, or one with diffusers' {DIFFUSERS_FILE}"
        )
    if not (path / WEIGHTS_FILE).exists():
        raise UserError(
            f"{path} has {pickles_or_nothing(path)}: save the adapter again with"
            f" safe_serialization=True, which writes {WEIGHTS_FILE}"
        )
    return path


def pickles_or_nothing(directory: Path) -> str:
    """What an error says of a directory that has no safetensors file."""
    pickles = sorted(file.name for file in directory.glob("*.bin"))
    return f"only the pickle {pickles[0]}, which is never loaded" if pickles else "no weights"


def _locate_file(path: Path) -> Path:
    if path.suffix != ".safetensors" or path.name == WEIGHTS_FILE:
        raise UserError(
            f"{path} is a file, and the only ones that hold a whole adapter are diffusers'"
            " .safetensors: give the directory that PEFT's save_pretrained wrote"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): write the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, if it describes a LoRA that factors alone describe."""
    path = directory / CONFIG_FILE
    config = read_json(path)
    check_config(path, config)
    return config


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what factors alone do not describe in a LoRA configuration that `path` holds."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path} describes a {kind} adapter: only LoRA adapters can be merged")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise UserError(
                f"{path} uses {what} ({key}), which low-rank factors alone do not describe: train"
                f" the adapter without {key}"
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{path} has bias={config['bias']!r}, trained biases that factors do not describe:"
            " train the adapter with bias='none'"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MODIFIES_BASE):
        raise UserError(
            f"{path} was initialised with {init!r}, which changes the base weights: convert it to"
            " a plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise UserError(f"{path} has {key}={config.get(key)!r}, expected a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not (isinstance(pattern, Mapping) and all(map(_is_positive, pattern.values()))):
            raise UserError(
                f"{path} has {key}={pattern!r}, expected positive numbers by module name"
            )
        for name in pattern:
            try:
                re.compile(name)
            except re.error as error:
                raise UserError(
                    f"{path} has the module name '{name}' in {key}, which is no regular expression"
                    f" ({error}): correct it"
                ) from error


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, known to be finite."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}): copy or save it again"
        ) from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:  # float8, which torch only stores
            tensor = tensors[key] = tensor.float()
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{path} has NaN or infinite values in {key}: its training diverged, so train the"
                " adapter again"
            )
    return tensors


def read_weights(
    directory: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The factors by module, and the tensors of the modules that PEFT saved whole (the head)."""
    path = directory / WEIGHTS_FILE
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for full_key, tensor in read_tensors(path).items():
        key = full_key.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(key):
            if not tensor.is_floating_point():
                raise UserError(
                    f"{path} has {full_key} in {tensor.dtype}, which are no numbers of an update:"
                    " save the adapter again in a floating-point type"
                )
            factors.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[key] = tensor
    if not factors:
        raise UserError(f"{path} has no LoRA factors: save the adapter again with PEFT")
    head = _head(path, others, config, factors)
    found = {m: matrices(path, m, sides) for m, sides in sorted(factors.items())}
    return {m: f._replace(scale=scale_of(path, m, config, f.rank)) for m, f in found.items()}, head


def _head(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], adapted: Container[str]
) -> dict[str, Tensor]:
    head = {}
    for key, tensor in tensors.items():
        if _saved_whole(key, config):
            head[key] = tensor
        elif (match := _BASE_COPY.fullmatch(key)) and match[1] in adapted:
            # PEFT saves the frozen tensors of embeddings and heads that it adapts, in case they
            # were resized.
            logger.warning(
                "%s: the copy %s of a base weight is left out: if the vocabulary was resized, keep"
                " the rows of its new tokens with the base model",
                path,
                key,
            )
        else:
            raise UserError(
                f"{path} has {key}, which is neither a LoRA factor nor part of modules_to_save:"
                " save the adapter again with PEFT, by save_pretrained(...,"
                " save_embedding_layers=False) if the vocabulary of its base model was resized"
            )
    return head


def _saved_whole(key: str, config: Mapping[str, Any]) -> bool:
    return any(f"{module}." in key for module in config.get("modules_to_save") or [])


def embeds(heads: Mapping[str, Iterable[str]], config: Mapping[str, Any]) -> bool:
    """Whether PEFT's own file holds the head: the only one, all of it in modules_to_save."""
    keys = [key for head in heads.values() for key in head]
    return len(heads) == 1 and bool(keys) and all(_saved_whole(key, config) for key in keys)


def matrices(path: Path, module: str, sides: Mapping[str, Tensor]) -> Factors:
    """The two factors of one module as matrices, from what `path` stores of them."""
    embedding = all(side.startswith("embedding_") for side in sides)
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for name, other in (names, names[::-1]):
        if name not in sides:
            raise UserError(
                f"{path} has lora_{other} of {module} but no lora_{name}: save it again"
            )
    a, b = (sides[name] for name in names)
    if not a.numel() or not b.numel():
        raise UserError(
            f"{path} has empty factors, {tuple(b.shape)} and {tuple(a.shape)}, for {module}: leave"
            " the module out and save the file again"
        )
    if a.ndim == b.ndim == 2:
        return Factors(b, a, Layout("embedding" if embedding else "linear"))
    if a.ndim != b.ndim or not 3 <= a.ndim <= 5 or math.prod(b.shape[2:]) != 1:
        raise UserError(
            f"{path} has factors of shapes {tuple(b.shape)} and {tuple(a.shape)} for {module}:"
            " expected two matrices, or two kernels of which that of B is 1 x 1"
        )
    if b.shape[1] != a.shape[0]:
        raise UserError(
            f"{path} has LoRA on a grouped convolution ({module}), whose factors do not multiply"
            " to an update of its weight: train the adapter without it in target_modules"
        )
    return Factors(b.flatten(1), a.flatten(1), Layout("convolution", tuple(a.shape[2:])))


def scale_of(path: Path, module: str, config: Mapping[str, Any], rank: int) -> float:
    """Alpha / r, or alpha / sqrt(r) with rsLoRA; UserError if `config` gives another r."""
    expected = _from_pattern(config.get("rank_pattern"), module, config["r"])
    if rank != expected:
        raise UserError(
            f"{path} has factors of rank {rank} for {module} but the configuration says"
            f" {expected}: the two do not belong together"
        )
    alpha = _from_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _from_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regular expression, ends the name at a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def factor_tensors(module: str, factors: Factors) -> dict[str, Tensor]:
    """The factors of one module, of scale 1, under PEFT's names and in float32."""
    b, a = factors.layout.stored(factors.b.float(), factors.a.float())
    if factors.layout.kind == "embedding":
        return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def read_heads(directory: Path, name: str) -> dict[str, dict[str, Tensor]]:
    """The heads in files of their own: the adapter's, called `name`, or a bundle's."""
    single = directory / HEAD_FILE
    heads = {name: read_tensors(single)} if single.exists() else {}
    bundle = sorted((directory / HEADS_DIRECTORY).glob("*.safetensors"))
    return heads | {path.stem: read_tensors(path) for path in bundle}


def check_head_names(heads: Iterable[str]) -> None:
    """UserError for a head whose name cannot be a file's."""
    for name in heads:
        if not _HEAD_NAME.fullmatch(name):
            raise UserError(
                f"head '{name}' cannot be a file name: use letters, digits, '.', '_', '+', '-'"
            )


def write_heads(directory: Path, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write every head to heads/<name>.safetensors."""
    (directory / HEADS_DIRECTORY).mkdir()
    for name, head in heads.items():
        write_tensors(directory / HEADS_DIRECTORY / f"{name}.safetensors", head)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors that share memory are written as separate ones."""
    stored: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; a copy of every one would double it.
        stored[key] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    save_file(stored, path)
