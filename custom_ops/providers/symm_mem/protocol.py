"""What the ranks of a group must have alike for `symm_mem`'s kernels to understand each other, as facts for their vote.

A kernel finds what a peer has written by computing where that peer put it. So both must have the same layout of the
buffers, the same limits between protocols, the same sources, and plan their launches by the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusewire.custom_ops.providers.symm_mem.launch_config import MAX_PROGRAMS, MAX_SLICES
from fusewire.custom_ops.providers.symm_mem.workspace import CTL_WORDS, LINE, Layout

_DIGITS = 12  # of a digest


def protocol(probe: Layout, triton_version: str) -> dict[str, Any]:
    """What must be equal on every rank, by the name under which a refusal speaks of it. JSON types.

    Args:
        probe: a layout with room for the most tokens of each protocol, of sizes that are the same on every rank.
    """
    return {
        "the version of fusewire": _fusewire_version(),
        "the version of Triton": triton_version,
        "the digest of symm_mem's sources": _sources(),
        "the most tokens of the one-shot protocol": probe.one_shot_tokens,
        "the most tokens of the data-as-flag protocol": probe.data_tokens,
        "MAX_SLICES": MAX_SLICES,
        "MAX_PROGRAMS": MAX_PROGRAMS,
        "LINE": LINE,
        "CTL_WORDS": CTL_WORDS,
        "the digest of the buffers' layout": _digest(repr((probe.offsets, probe.sizes, probe.ones)).encode()),
    }


def differences(facts: Sequence[Mapping[str, Any]]) -> str:
    """What of the protocol differs between ranks, and who has what; empty if nothing does. Pure.

    Args:
        facts: of each rank, with its `protocol` and its global number `rank`.
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
    """The number of multiprocessors by which every rank plans its launches: the least of all ranks' GPUs. Pure."""
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
    """A digest of the kernels' sources and of the host's that launch them, as they are on disk."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return _digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:_DIGITS]
