"""Read environment variables (switches, choices, seconds), and set variables temporarily."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fusewire.errors import ConfigError

# Policies and options of this process are batch-invariant.
BATCH_INVARIANT_VARIABLE = "FUSEWIRE_BATCH_INVARIANT"
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}
_LOCK = threading.Lock()


def env_flag(name: str) -> bool:
    """Return whether a variable is on. Raises ConfigError if its value is neither on nor off."""
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigError(f"{name}={value!r} is neither on (1, true, yes, on) nor off (0, false, no, off, unset)")


def env_choice(name: str, choices: tuple[str, ...]) -> str:
    """Return a variable's value, by default the first choice; ConfigError for others."""
    value = os.environ.get(name, "").strip().lower() or choices[0]
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is none of {', '.join(choices)}")
    return value


def parse_seconds(name: str, text: str) -> float | None:
    """Return a variable's text as seconds, None if it is empty.

    Raises:
        ConfigError: it is not a positive, finite number.
    """
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={text!r} is not a positive number of seconds")
    return value


@dataclass
class _Change:
    before: str | None
    inside: str
    blocks: int = 0


_CHANGES: dict[str, _Change] = {}


@contextmanager
def scoped_variable(name: str, change: Callable[[str | None], str | None]) -> Iterator[None]:
    """Set an environment variable for the whole process inside the block, then restore it.

    Thread-safe: overlapping blocks count as one. The first to begin sets the variable and the last
    to end restores it, unless other code has set it meanwhile. So all blocks for one name must ask
    for the same change.

    Args:
        name: the variable's name.
        change: returns the value inside the block, given the value before (None: unset); None
            leaves the variable as it is.
    """
    with _LOCK:
        current = _CHANGES.get(name)
        if current is None:
            before = os.environ.get(name)
            inside = change(before)
            if inside is not None:
                current = _CHANGES[name] = _Change(before, inside)
                os.environ[name] = inside
        if current is not None:
            current.blocks += 1
    try:
        yield
    finally:
        if current is not None:
            with _LOCK:
                current.blocks -= 1
                if not current.blocks:
                    del _CHANGES[name]
                    _restore(name, current)


def _restore(name: str, change: _Change) -> None:
    if os.environ.get(name) != change.inside:
        return
    if change.before is None:
        del os.environ[name]
    else:
        os.environ[name] = change.before
