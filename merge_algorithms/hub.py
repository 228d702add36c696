"""Files of the Hugging Face Hub, for ids that are no local path."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from merge_algorithms.errors import UserError

logger = logging.getLogger(__name__)

_HUB_ADAPTER = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Of the oldest models without an organisation, as gpt2; 96 characters at most.
_HUB_MODEL = re.compile(r"(?!.{97})[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def fetch(source: str | Path, wanted: Sequence[str]) -> Path:
    """The local path `source` or, if there is none and it is a Hub id, a snapshot of that.

    Raises:
        UserError: It cannot be fetched, or is not even looked up: below a local folder it is rather
            a mistyped path than the id of an organisation that is called the same.
    """
    path = Path(source)
    if path.exists() or not _HUB_ADAPTER.fullmatch(str(source)):
        return path
    if path.parent.is_dir():
        raise UserError(
            f"there is no {source}, and it was not looked up on the Hugging Face Hub because there"
            f" is a folder {path.parent} here: check the path or, if it is a Hub id, work in"
            " another directory"
        )
    return snapshot(str(source), wanted)


def is_hub_id(name: str) -> bool:
    """Whether it can name a model of the Hub: it reads so, and is no path that is there."""
    return _HUB_MODEL.fullmatch(name) is not None and not Path(name).exists()


def failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for an id, a right or a network that is not there."""
    from huggingface_hub.errors import HfHubHTTPError

    # Failures to connect are not HfHubHTTPError but its base, whose home depends on the release.
    http_error = HfHubHTTPError.__mro__[1]
    assert issubclass(http_error, Exception)
    return OSError, ValueError, http_error


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
    except failures() as error:
        raise UserError(
            f"there is no local directory {hub_id}, and fetching it from the Hugging Face Hub"
            f" failed ({type(error).__name__}): check the path or the id, and the network"
        ) from error
