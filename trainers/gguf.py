"""GGUF files: one file with quantised weights and a tokenizer, as llama.cpp reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from merge_algorithms import UserError


def unpack_gguf(file: str | Path, directory: str | Path) -> None:
    """Write a GGUF language model as a plain transformers directory: float32 safetensors.

    The weights are what the quantised blocks stand for, exactly; the tokenizer is the file's own.
    Reading a GGUF file takes tens of times as long as reading the directory, hence once.

    Args:
        file: A .gguf file of an architecture that transformers knows (Llama, Qwen, GPT-2, ..).
        directory: An existing directory to write into; float32 takes up to ten times the space.

    Raises:
        UserError: No such file, not a GGUF file, or an unknown architecture.
    """
    file, directory = Path(file), Path(directory)
    if not file.is_file():
        raise UserError(f"there is no GGUF file {file}: give the path of one")
    disable_progress_bar()
    folder, name = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{file} cannot be read as a GGUF model ({reason}): expected a complete file of an"
            " architecture that transformers supports"
        ) from error
    # What was read counts as quantised, which cannot be saved: the same weights in a plain model.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _forget_origin(directory / "config.json")


def _forget_origin(path: Path) -> None:
    """Drop the conversion's own marks: the same file gives the same configuration."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
