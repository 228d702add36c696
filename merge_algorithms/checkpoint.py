"""A merge written into the checkpoint of its base model, one weight at a time.

The shards are copied as they are, and the bytes of the weights that change are replaced in the
copies: nothing else is read or rounded, and one weight and one tile are the most that is in
memory. Which weights these are is read off the model class on the meta device.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from merge_algorithms.errors import UserError
from merge_algorithms.files import check_replaceable
from merge_algorithms.formats import read_json
from merge_algorithms.hub import fetch, snapshot
from merge_algorithms.layout import Layouts
from merge_algorithms.modules import add_update, find_modules, is_transposed, nearest, own_weights
from merge_algorithms.peft_config import CONFIG_FILE
from merge_algorithms.peft_directory import pickles_or_nothing
from merge_algorithms.tiles import Update

MODEL_CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What belongs to a checkpoint besides its weights: settings, tokenizers, licences.
_COMPANIONS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.spm",
    "*.codes",
    "*.vocab",
    "*.tokenizer",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "[0-9]*_*/*",  # the further modules of sentence-transformers, which modules.json names
    "LICENSE*",
    "NOTICE*",
)
_WANTED = (*_COMPANIONS, "model*.safetensors")
_INSTEAD = "apply_to() and save_pretrained() instead"
_OTHER_BASE = "give the base that the adapters were trained on"
# The model has the module, so the file may well be of the right base.
_NOT_STORED = (
    "either transformers renames this checkpoint's weights while loading, then load the model"
    f" yourself and use {_INSTEAD}, or it was saved without the module, then leave that out of the"
    " adapters' targets"
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: `size` bytes from `start` on in `file`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A transformers checkpoint on disk.

    Attributes:
        directory: Where it is.
        files: Names of its safetensors files.
        tensors: Tensor name -> its place.
    """

    directory: Path
    files: tuple[str, ...]
    tensors: dict[str, _Stored]

    @classmethod
    def open(cls, base: str | Path) -> Checkpoint:
        """Read the headers of a local directory or, if there is none, of a Hub repository.

        Raises:
            UserError: Nothing there, no or damaged safetensors files, quantised weights.
        """
        directory = _locate(base)
        config = read_json(directory / MODEL_CONFIG)
        if config.get("quantization_config"):
            raise UserError(
                f"{directory} is quantised (quantization_config in {MODEL_CONFIG}): give the"
                " checkpoint that it was quantised from"
            )
        files = weight_files(directory)
        return cls(
            directory,
            tuple(files),
            {key: place for file in files for key, place in _header(directory / file)},
        )

    def check_output(self, path: Path, overwrite: bool) -> None:
        """UserError for an output that would replace the base, or what is no checkpoint."""
        if path.resolve() == self.directory.resolve():
            raise UserError(f"{path} is the base checkpoint itself: choose another output path")
        check_replaceable(path, overwrite, "a checkpoint directory", [SINGLE_FILE, INDEX_FILE])

    def plan(self, updates: Mapping[str, Update], layouts: Layouts) -> dict[str, tuple[str, bool]]:
        """Module name -> (tensor name, whether it is stored transposed).

        A module and a tensor go together if one's name ends with the other's: checkpoints and
        model classes differ by prefixes such as "bert.", "model." and "transformer.".

        Raises:
            UserError: A name that fits none or several, another shape or layout, a tied weight,
                or one that is not in floating point.
        """
        model = _empty_model(self.directory)
        names = _by_ending([key for key, m in model.named_modules() if hasattr(m, "weight")])
        stems = _by_ending(
            [key.removesuffix(".weight") for key in self.tensors if key.endswith(".weight")]
        )
        own = {module: self._unique(module, names, _OTHER_BASE) for module in updates}
        count, name = max((c, name) for name, c in Counter(own.values()).items())
        if count > 1:
            raise UserError(
                f"{count} modules of the merge could be {name} of {self.directory}: give the base"
                " that the adapters were trained on"
            )
        found = find_modules(
            model,
            {own[module]: update.shape for module, update in updates.items()},
            {own[module]: layout for module, layout in layouts.items()},
        )
        weights = own_weights(model, found)
        plan = {}
        for module, name in own.items():
            key = f"{self._unique(name, stems, _NOT_STORED)}.weight"
            self._check(key, weights[name])
            plan[module] = key, is_transposed(found[name])
        return plan

    def _check(self, key: str, weight: Tensor) -> None:
        stored = self.tensors[key]
        if stored.dtype not in _DTYPES:
            raise UserError(
                f"{key} in {self.directory} is of type {stored.dtype}, expected one of"
                f" {', '.join(_DTYPES)}: give a checkpoint that is not quantised"
            )
        if stored.shape != tuple(weight.shape):
            raise UserError(
                f"{key} in {self.directory} is {stored.shape} but {MODEL_CONFIG} calls for"
                f" {tuple(weight.shape)}: the two do not belong together"
            )

    def _unique(self, name: str, known: Mapping[str, list[str]], otherwise: str) -> str:
        """The one name that ends with `name`, else the one that `name` ends with.

        Where there is none, `otherwise` is what the error says last.
        """
        fitting = known.get(name) or [e for e in _endings(name) if e in known.get(e, [])[:1]]
        fitting = [name] if name in fitting[:1] else fitting
        if not fitting:
            names = [key for key, found in known.items() if found[0] == key]
            raise UserError(
                f"{self.directory} has no weight for {name}: the nearest are"
                f" {nearest(name, names)}; {otherwise}"
            )
        if len(fitting) > 1:
            raise UserError(
                f"{name} could be {' or '.join(fitting[:3])} in {self.directory}: load the model"
                f" yourself and use {_INSTEAD}"
            )
        return fitting[0]

    def write(
        self, directory: Path, updates: Mapping[str, Update], plan: Mapping[str, tuple[str, bool]]
    ) -> None:
        """Copy the checkpoint into `directory` and add the updates to its weights."""
        others = {CONFIG_FILE, INDEX_FILE} if self.files == (SINGLE_FILE,) else {CONFIG_FILE}
        for pattern in _COMPANIONS:
            for path in self.directory.glob(pattern):
                if path.is_file() and path.name not in others:
                    copy = directory / path.relative_to(self.directory)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, copy)
        for file in self.files:
            shutil.copyfile(self.directory / file, directory / file)
        for module, (key, transposed) in plan.items():
            self._add(directory, key, transposed, updates[module])

    def _add(self, directory: Path, key: str, transposed: bool, update: Update) -> None:
        place = self.tensors[key]
        with (directory / place.file).open("r+b") as file:
            file.seek(place.start)
            content = bytearray(place.size)
            file.readinto(content)
            weight = torch.frombuffer(content, dtype=_DTYPES[place.dtype]).view(place.shape)
            add_update(key.removesuffix(".weight"), weight, transposed, update)
            file.seek(place.start)
            file.write(content)


def _by_ending(names: Sequence[str]) -> dict[str, list[str]]:
    """Ending of a name, at a dot -> the names that end so; one that is all of it comes first."""
    found = {name: [name] for name in names}
    for name in names:
        for ending in _endings(name)[1:]:
            found.setdefault(ending, []).append(name)
    return found


def _endings(name: str) -> list[str]:
    """The name, and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def fetch_base(hub_id: str, revision: str | None = None) -> Path:
    """A Hub model's files, of its default branch or of the revision that adapters record."""
    return snapshot(hub_id, _WANTED, revision)


def _locate(base: str | Path) -> Path:
    directory = fetch(base, _WANTED)
    if not directory.is_dir():
        raise UserError(
            f"there is no checkpoint directory {directory}: give the base model's directory, as"
            " save_pretrained wrote it, or its Hub id"
        )
    if not (directory / MODEL_CONFIG).exists():
        raise UserError(f"{directory} has no {MODEL_CONFIG}: give a transformers checkpoint")
    if not any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise UserError(
            f"{directory} has {pickles_or_nothing(directory)}: give a checkpoint with"
            f" {SINGLE_FILE}, as save_pretrained writes it"
        )
    return directory


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files that hold the weights of a checkpoint directory.

    Where there are both a single file and an index of shards, it is the single file, which
    transformers prefers as well.

    Raises:
        UserError: An index that lists no files, or files that are not there.
        FileNotFoundError: There is neither.
    """
    files = [SINGLE_FILE]
    if not (directory / SINGLE_FILE).exists():
        files = _shards(directory / INDEX_FILE)
    for file in files:
        if Path(file).name != file or not (directory / file).is_file():
            raise UserError(f"{directory} lacks {file}: copy or download the whole checkpoint")
    return files


def _shards(index: Path) -> list[str]:
    """The names of the safetensors files that an index lists."""
    weights = read_json(index).get("weight_map")
    known = isinstance(weights, dict) and all(isinstance(file, str) for file in weights.values())
    if not known or not weights:
        raise UserError(
            f"{index} has no weight_map of tensor names to file names: copy or download the whole"
            " checkpoint"
        )
    return sorted(set(weights.values()))


def _header(path: Path) -> Iterator[tuple[str, _Stored]]:
    """The names and places of a safetensors file: 8 bytes of length, JSON, data."""
    try:
        with safe_open(path, "pt"):  # checks that the file is whole
            pass
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}): copy or download it again"
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for key, entry in header.items():
        first, last = entry["data_offsets"]
        start = 8 + length + first
        yield key, _Stored(path.name, entry["dtype"], tuple(entry["shape"]), start, last - first)


def _empty_model(directory: Path) -> nn.Module:
    """The model of a checkpoint without its weights; no code from the checkpoint is run."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"transformers cannot read {directory / MODEL_CONFIG} ({type(error).__name__}): load"
            f" the model yourself and use {_INSTEAD}"
        ) from error
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise UserError(
            f"{directory / MODEL_CONFIG} names the model class '{name}', which transformers does"
            f" not have: load the model yourself and use {_INSTEAD}"
        )
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return model
