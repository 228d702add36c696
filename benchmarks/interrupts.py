"""What a signal's handler raises gets through, even where Python would drop it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PAUSE = 0.05  # seconds until the next try: the destructor that was in the way has returned


@contextmanager
def handled(
    number: signal.Signals, handler: Callable[..., object], kind: type[BaseException]
) -> Iterator[None]:
    """Handle a signal by an exception that nothing loses.

    A signal that comes while garbage is collected is handled in the next `__del__`, and Python
    only prints what a `__del__` raises: the work would go on as if nobody had asked it to stop.
    Here the signal is sent again until its exception arrives.

    Args:
        number: The signal.
        handler: Raises the exception.
        kind: The exception.
    """
    signal_before, hook_before = signal.getsignal(number), sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, kind):
            signal.signal(number, handler)
            # To this very thread, so that whatever it waits for is interrupted.
            again = (threading.get_ident(), number)
            threading.Timer(PAUSE, signal.pthread_kill, again).start()
        else:
            hook_before(dropped)

    signal.signal(number, handler)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        signal.signal(number, signal_before)
