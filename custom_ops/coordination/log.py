"""Print lines on stderr: progress of slow steps, and messages for the user."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_EVERY_S = 30.0  # between two lines of progress


def log_line(text: str) -> None:
    """Print one line on stderr."""
    print(f"[fusewire] {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_progress(text: str, *, after_s: float = 0.0, detail: Callable[[], str] = str) -> Iterator[None]:
    """Log regularly while the block runs, and log its duration at the end.

    Args:
        text: the first line; later lines have it up to the first colon.
        after_s: log nothing if the block ends within this many seconds.
        detail: returns a text to append to a line.
    """
    start, since, done, logged = time.monotonic(), time.strftime("%H:%M:%S"), threading.Event(), after_s <= 0
    if logged:
        log_line(f"{text}, since {since}{detail()}")

    def tick() -> None:
        nonlocal logged
        while not done.wait(_EVERY_S if logged else after_s):
            what = text.partition(":")[0] if logged else text
            logged = True
            log_line(f"{what}, since {since}, for {time.monotonic() - start:.0f} s{detail()}")

    ticker = threading.Thread(target=tick, name="fusewire progress", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        if logged:
            log_line(f"{text.partition(':')[0]}: ended after {time.monotonic() - start:.0f} s")
