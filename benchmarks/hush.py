"""What libraries announce to each other's authors is nothing that a user can act on."""

from __future__ import annotations

import logging
import warnings


def hush() -> None:
    """Leave it out, in this process."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT imports it wherever it is installed; it then tells of a kernel that nobody asked for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
