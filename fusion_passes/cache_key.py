"""Compute the passes' part of the compile cache's key."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path

import fusewire
from fusewire import custom_ops, fusion_passes, patterns
from fusewire.custom_ops._torch_private import process_groups
from fusewire.custom_ops.ops.registry import all_ops, machine_support, parse_policy
from fusewire.fusion_passes.config import PassConfig, disabled_by_environment
from fusewire.fusion_passes.registry import registered_passes
from fusewire.fusion_passes.spmd.fingerprint import has_peers


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """Return a hash of fusewire's own Python files."""
    digest = hashlib.sha256()
    for package in (fusewire, custom_ops, patterns, fusion_passes):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def static_key(config: PassConfig) -> str:
    """Return a hash of what the passes' result depends on, without graph, groups and machine.

    It is the same in processes without GPUs and process groups, for example in a serving engine's
    front end.
    """
    parts = [source_hash(), config.key(), str(disabled_by_environment())]
    parts += [f"{item.name}:{item.source}" for item in registered_passes()]
    for op in all_ops().values():
        parts.append(f"{op.name}={','.join(op.priority)}")
        parts += [f"{p.name}:{p.version}:{p.batch_invariant}" for p in op.providers.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cache_key(config: PassConfig, *, groups: bool = True) -> str:
    """Return a hash of everything besides the graph that the passes' result depends on.

    Args:
        config: the options.
        groups: False leaves the process groups out, for a cache whose own key holds their sizes.
    """
    # What some of vLLM's operators compute depends on its version (analysis/norm_quant_forms.py).
    parts = [static_key(config), f"vLLM {getattr(sys.modules.get('vllm'), '__version__', '')}"]
    for op in all_ops().values():
        if op.selector is None:
            # A graph compiled without a provider must not be found where the provider exists.
            names = parse_policy(op, config.policy(op.name))
            parts += [f"{name} here: {machine_support(op.providers[name])}" for name in names]
    return hashlib.sha256("\n".join([*parts, *(_groups() if groups else ())]).encode()).hexdigest()


def _groups() -> list[str]:
    """Return what checks read of this process's groups, and graphs do not hold.

    Groups of one rank are left out: engines make one for each rank, under different names.
    """
    # Graphs compiled for torch's fake group compare nothing between ranks. Real ranks need others.
    return sorted(
        f"{group.group_name}: {group.size()} ranks, peers: {has_peers(group.group_name)}"
        for group in process_groups()
        if group.size() > 1
    )
