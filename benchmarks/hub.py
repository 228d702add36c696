"""Putting a directory on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from merge_algorithms.errors import UserError


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
    from huggingface_hub.errors import HfHubHTTPError

    # Failures to connect are not HfHubHTTPError but its base, whose home depends on the release.
    http_error = HfHubHTTPError.__mro__[1]
    assert issubclass(http_error, Exception)
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Merged adapters"
        )
    except (OSError, ValueError, http_error) as error:
        raise UserError(
            f"{directory} is written, but uploading it to {repository} failed"
            f" ({type(error).__name__}: {' '.join(str(error).split())}): check the network, the"
            f" name and `hf auth login`, then `hf upload {repository} {directory}"
            f"{' --private' * private}`"
        ) from error
    return str(url)
