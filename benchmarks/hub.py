"""Putting a directory on the Hugging Face Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from merge_algorithms.errors import UserError
from merge_algorithms.hub import failures

# What an adapter, a bundle or a checkpoint is loaded from. Of an earlier upload it would be loaded
# together with the new files: heads that are no longer there, or an adapter on top of a checkpoint.
LOADED = (
    "adapter_*",
    "head*.safetensors",  # and heads/, since * matches / as well
    "osrm.json",
    "emr.safetensors",
    "pytorch_lora_weights.safetensors",
    "model*.safetensors*",
    "config.json",
    "generation_config.json",
    "modules.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.jinja",
    "preprocessor_config.json",
)


def check_repository(repository: str) -> None:
    """UserError unless it reads ORGANISATION/NAME; asks nobody whether it exists."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"'{repository}' cannot be a repository of the Hub ({error}): give ORGANISATION/NAME"
        ) from error
    if repository.count("/") != 1:
        raise UserError(f"'{repository}' names no owner: give ORGANISATION/NAME")


def push(directory: Path, repository: str, private: bool) -> str:
    """Upload a directory's files to a model repository, made if it is not there.

    They take the place of what an earlier upload left to be loaded; other files there stay.

    Args:
        directory: What to upload.
        repository: ORGANISATION/NAME.
        private: Make it private; one that exists stays as it is.

    Returns:
        Its address.

    Raises:
        UserError: No network, no token, or no right to write there; `directory` stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="Merged adapters",
            delete_patterns=list(LOADED),
        )
    except failures() as error:
        command = ["hf", "upload", repository, str(directory)]
        command += [word for pattern in LOADED for word in ("--delete", pattern)]
        command += ["--private"] * private
        raise UserError(
            f"{directory} is written, but uploading it to {repository} failed"
            f" ({type(error).__name__}: {' '.join(str(error).split())}): check the network, the"
            f" name and `hf auth login`, then `{shlex.join(command)}`"
        ) from error
    return str(url)
