"""LoRA adapters as low-rank factors, read from and written to stock PEFT directories."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_algorithms.errors import UserError
from merge_algorithms.files import atomic_directory
from merge_algorithms.peft_directory import (
    CONFIG_FILE,
    HEAD_FILE,
    HEADS_DIRECTORY,
    INFO_FILE,
    PREFIX,
    WEIGHTS_FILE,
    locate,
    read_config,
    read_heads,
    read_json,
    read_weights,
    write_json,
    write_tensors,
)
from merge_algorithms.precision import full_precision

_HEAD_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class LowRank:
    """One update dW = b @ a of a linear module's weight, the LoRA scale already folded into b.

    Attributes:
        b: (d_out, r), float32 or float64 (half precision is widened to float32).
        a: (r, d_in), same dtype.
    """

    b: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise UserError(
                f"LoRA factors of shapes {tuple(self.b.shape)} and {tuple(self.a.shape)} do not"
                " multiply: expected (d_out, r) and (r, d_in)"
            )
        dtype = torch.promote_types(torch.promote_types(self.b.dtype, self.a.dtype), torch.float32)
        object.__setattr__(self, "b", self.b.detach().to(dtype))
        object.__setattr__(self, "a", self.a.detach().to(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of dW."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """The number r of columns of b, an upper bound of the rank of dW."""
        return self.b.shape[1]

    def dense(self) -> Tensor:
        """DW as one (d_out, d_in) tensor."""
        return self.rows(0, len(self.b))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of dW, (stop - start, d_in)."""
        with full_precision(self.b.device):
            return self.b[start:stop] @ self.a

    def scaled(self, factor: float) -> LowRank:
        """Factor * dW."""
        return LowRank(self.b * factor, self.a)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LowRank:
        """The same update on `device`, in `dtype` (never narrower than float32)."""
        return LowRank(self.b.to(device, dtype), self.a.to(device, dtype))


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: an update per module, the task heads, and where it came from.

    Attributes:
        name: Unique among the adapters that are merged together.
        updates: Module name inside the base model -> its update.
        heads: Task name -> {tensor name: tensor}. One adapter has at most one head of its own;
            merged bundles hold several.
        config: PEFT's adapter_config.json.
        info: osrm.json (task, seed, provenance), empty for adapters that plain PEFT saved.
    """

    name: str
    updates: dict[str, LowRank]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, source: str | Path, name: str | None = None) -> Adapter:
        """Read a PEFT LoRA adapter; alpha / r (rsLoRA: alpha / sqrt(r)) is folded into b.

        Args:
            source: A local directory, or a Hugging Face Hub id ("org/name") if there is no such
                local path.
            name: Name of the adapter; default: the task in osrm.json, else the directory's name.

        Raises:
            UserError: Nothing there, no safetensors file, damaged or non-finite tensors, or an
                adapter that factors alone do not describe (DoRA, biases, PiSSA and the like).
        """
        directory = locate(source)
        config = read_config(directory)
        factors, own_head = read_weights(directory, config)
        info = read_json(directory / INFO_FILE) if (directory / INFO_FILE).exists() else {}
        path = Path(source)
        name = name or info.get("task") or (path.resolve().name if path.exists() else path.name)
        heads = read_heads(directory, name)
        if own_head and name in heads:
            raise UserError(f"{directory} has two heads, one in {WEIGHTS_FILE}: remove one")
        if own_head:
            heads[name] = own_head
        updates = {m: LowRank(f.b, f.a).scaled(f.scale) for m, f in factors.items()}
        return cls(name, updates, heads, config, info)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a directory that `PeftModel.from_pretrained` loads, complete or not at all.

        The scale is in the factors, so the file says lora_alpha = r, with a rank_pattern where
        ranks differ by module. A single head goes where its trainer left it: into PEFT's own file
        if the configuration has modules_to_save, else into head.safetensors. Several heads go
        into heads/<name>.safetensors, and PEFT then loads the backbone's adapter only.

        Raises:
            UserError: `path` holds something already (and `overwrite` is false, or it is not an
                adapter), nothing to save, or non-finite factors.
        """
        path = Path(path)
        self._check(path, overwrite)
        embed = bool(self.config.get("modules_to_save")) and len(self.heads) == 1
        tensors: dict[str, Tensor] = {}
        for module, update in self.updates.items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = update.a.float()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = update.b.float()
        if embed:
            (head,) = self.heads.values()
            tensors |= {f"{PREFIX}{key}": tensor for key, tensor in head.items()}
        with atomic_directory(path, overwrite) as directory:
            write_json(directory / CONFIG_FILE, self._stock_config(embed))
            write_tensors(directory / WEIGHTS_FILE, tensors)
            if len(self.heads) == 1 and not embed:
                (head,) = self.heads.values()
                write_tensors(directory / HEAD_FILE, head)
            elif len(self.heads) > 1:
                (directory / HEADS_DIRECTORY).mkdir()
                for name, head in self.heads.items():
                    write_tensors(directory / HEADS_DIRECTORY / f"{name}.safetensors", head)
            if self.info:
                write_json(directory / INFO_FILE, self.info)

    def head_info(self, head: str) -> dict[str, Any] | None:
        """What osrm.json says of a head; None for heads that plain PEFT saved.

        An adapter of one task may have been loaded under another name than the task's.
        """
        tasks: dict[str, dict[str, Any]] = self.info.get("tasks", {})
        only = len(tasks) == len(self.heads) == 1
        return next(iter(tasks.values())) if only else tasks.get(head)

    def to(self, device: torch.device | str) -> Adapter:
        """The same adapter with its factors on `device`; merging then happens there."""
        updates = {module: update.to(device) for module, update in self.updates.items()}
        return Adapter(self.name, updates, self.heads, self.config, self.info)

    def check_finite(self) -> None:
        """Raise UserError naming the first module whose factors hold NaN or infinity."""
        for module, update in self.updates.items():
            if not (update.a.isfinite().all() and update.b.isfinite().all()):
                raise UserError(
                    f"adapter '{self.name}' has NaN or infinite values in the factors of {module}:"
                    " its training diverged, so train it again with a lower learning rate"
                )

    def _check(self, path: Path, overwrite: bool) -> None:
        if not self.updates:
            raise UserError(f"adapter '{self.name}' has no update to save")
        self.check_finite()
        for name in self.heads:
            if not _HEAD_NAME.fullmatch(name):
                raise UserError(
                    f"head '{name}' cannot be a file name: use letters, digits, '.', '_', '+', '-'"
                )
        foreign = path.is_dir() and any(path.iterdir()) and not (path / CONFIG_FILE).exists()
        if overwrite and (foreign or path.is_file()):
            raise UserError(
                f"{path} is not an adapter directory, so it is not overwritten: choose another"
                " output path"
            )

    def _stock_config(self, embed: bool) -> dict[str, Any]:
        ranks = {module: update.rank for module, update in sorted(self.updates.items())}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        # '^' makes a pattern the full name, whatever other names end the same way.
        pattern = {f"^{re.escape(m)}": r for m, r in ranks.items() if r != rank}
        keep_task = embed or (len(self.heads) < 2 and not self.config.get("modules_to_save"))
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self.config.get("base_model_name_or_path"),
            "revision": self.config.get("revision"),
            "auto_mapping": self.config.get("auto_mapping"),
            "task_type": self.config.get("task_type") if keep_task else None,
            "modules_to_save": self.config["modules_to_save"] if embed else None,
            "target_modules": list(ranks),
            "fan_in_fan_out": bool(self.config.get("fan_in_fan_out")),
            "r": rank,
            "rank_pattern": pattern,
            "lora_alpha": rank,
            "alpha_pattern": pattern,
            "use_rslora": False,
            "init_lora_weights": True,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }


def base_models(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The different base_model_name_or_path in `configs`; unknown ones (None, "") are left out."""
    named = (config.get("base_model_name_or_path") for config in configs)
    return list(dict.fromkeys(name for name in named if name))
