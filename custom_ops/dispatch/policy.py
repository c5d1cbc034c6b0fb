"""Read a policy: the providers for a call of `all_reduce_rms_norm`, by priority, and options.

A policy is a text such as "flashinfer,native;max_size_mb=4":

- Providers after `native` are never used, since native serves everything. A policy of one provider
  forces it.
- `output` is the number of the workspace's output buffer for a result without a copy (see
  fusewire.fusion_passes.passes.place_outputs). -1: none, on a workspace that has such buffers.
- `max_size_mb` replaces FlashInfer's measured costs: it serves inputs up to that many MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusewire.custom_ops.ops.registry import NATIVE, IrOp, parse_policy
from fusewire.errors import ConfigError

_LIMITED_BY_SIZE = "flashinfer"
_OPTIONS: dict[str, Callable[[str], float]] = {"max_size_mb": float, "output": int}


@dataclass(frozen=True)
class Policy:
    """A parsed policy. `names` ends with the first provider that serves everything."""

    names: tuple[str, ...]
    max_size_mb: float | None = None
    output: int | None = None

    @property
    def slot(self) -> int | None:
        """The output buffer for the call's result, or None."""
        return None if self.output is None or self.output < 0 else self.output

    @property
    def forced(self) -> bool:
        """Whether the policy forces one provider."""
        return len(self.names) == 1

    def max_bytes(self, provider: str) -> float | None:
        """Return the most bytes of x that the options allow a provider, or None."""
        limited = self.max_size_mb is not None and provider == _LIMITED_BY_SIZE
        return self.max_size_mb * 2**20 if limited and self.max_size_mb is not None else None


def read_policy(op: IrOp, policy: str) -> Policy:
    """Return the policy's providers and options.

    Raises:
        ConfigError: an option is unknown or not a number.
    """
    names = parse_policy(op, policy)
    if NATIVE in names:
        names = names[: names.index(NATIVE) + 1]
    options: dict[str, float] = {}
    for option in policy.split(";")[1:]:
        key, _, value = option.strip().partition("=")
        if key not in _OPTIONS:
            known = ", ".join(_OPTIONS)
            raise ConfigError(f"the policy {policy!r} has an unknown option {key!r}; there are {known}")
        try:
            options[key] = _OPTIONS[key](value)
        except ValueError:
            raise ConfigError(f"the policy {policy!r}: {key}={value!r} is not a number") from None
    return Policy(names, **options)  # type: ignore[arg-type]
