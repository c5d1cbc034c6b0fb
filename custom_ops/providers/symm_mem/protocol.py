"""Facts that must be equal on all ranks of a group for `symm_mem`'s kernels, for their vote.

A kernel computes where a peer put its data. So all ranks need the same buffer layout, the same
limits between protocols, the same sources, and the same number of multiprocessors in launch
configurations.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusewire.custom_ops.providers.symm_mem.launch_config import MAX_PROGRAMS, MAX_SLICES
from fusewire.custom_ops.providers.symm_mem.layout import CACHE_LINE_BYTES, CTL_WORDS, Layout

_DIGITS = 12  # hexadecimal digits of a digest


def protocol(probe: Layout, triton_version: str) -> dict[str, Any]:
    """Return the facts that must be equal on every rank, by their names in refusals. JSON types.

    Args:
        probe: a layout of the same sizes on every rank, with each protocol's most tokens.
    """
    return {
        "the version of fusewire": _fusewire_version(),
        "the version of Triton": triton_version,
        "the digest of symm_mem's sources": _sources(),
        "the most tokens of the one-shot protocol": probe.one_shot_tokens,
        "the most tokens of the data-as-flag protocol": probe.data_tokens,
        "MAX_SLICES": MAX_SLICES,
        "MAX_PROGRAMS": MAX_PROGRAMS,
        "CACHE_LINE_BYTES": CACHE_LINE_BYTES,
        "CTL_WORDS": CTL_WORDS,
        "the digest of the buffers' layout": _digest(repr((probe.offsets, probe.sizes, probe.ones)).encode()),
    }


def differences(facts: Sequence[Mapping[str, Any]]) -> str:
    """Return a text of the facts that differ between ranks, with the ranks; empty if none do.

    Args:
        facts: of each rank, with its `protocol` and its global rank `rank`.
    """
    found = []
    protocols = [fact.get("protocol") or {} for fact in facts]
    for name in dict.fromkeys(name for each in protocols for name in each):
        holders: dict[str, list[str]] = {}
        for place, (fact, each) in enumerate(zip(facts, protocols, strict=True)):
            holders.setdefault(str(each.get(name, "missing")), []).append(str(fact.get("rank", place)))
        if len(holders) > 1:
            shown = " and ".join(f"{value} on rank{_s(ranks)} {', '.join(ranks)}" for value, ranks in holders.items())
            found.append(f"{name} is {shown}")
    return "; ".join(found)


def least_multiprocessors(facts: Sequence[Mapping[str, Any]]) -> int:
    """Return the least number of multiprocessors of all ranks' GPUs."""
    return min(int(fact["multiprocessors"]) for fact in facts)


def _s(several: Sequence[str]) -> str:
    return "s" if len(several) > 1 else ""


@functools.cache
def _fusewire_version() -> str:
    try:
        return importlib.metadata.version("fusewire")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _sources() -> str:
    """Return a digest of the sources on disk of the kernels and of their host code."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return _digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:_DIGITS]
