"""The state of one run of the passes over one graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fusewire.fusion_passes.config import PassConfig

MATCH, SUPPORTED, PROVIDER = "match", "supported", "provider"
MERGED = "merged into"
MATRICES = "assume_replicated_residuals, matrices"
# What the passes assume to be equal on every rank, in singular and plural. A key begins with the
# option that lets them.
_ASSUMED_EQUAL = {
    "assume_replicated_residuals": ("the residual or weight of 1 operator", "the residual or weight of {} operators"),
    MATRICES: ("1 matrix", "{} matrices"),
    "assume_replicated_scales": ("1 scale", "{} scales"),
    "assume_replicated_gates": ("1 gate", "{} gates"),
}


@dataclass(frozen=True)
class Refused:
    """Why an all-reduce was not fused: the gate that refused it, and the refusal for the user."""

    gate: str
    reason: str


@dataclass(frozen=True)
class Fused:
    """How an all-reduce was fused."""

    fusion: str
    spelling: str
    provider: str = ""
    detail: str = ""


@dataclass
class RunContext:
    """The inputs and results of one run of the passes over one graph.

    All-reduces are keyed by the names of their nodes in the graph as it arrived. The pipeline hands
    what one run refused to the next (`excluded`, `unmergeable`, `unfused_second_norms`).

    Attributes:
        config: the options.
        excluded: all-reduces to leave as they are, since an earlier run refused them.
        unmergeable: all-reduces not to merge, since the merged one was not fused.
        unfused_second_norms: second norms of sandwiches to leave, since they were not fused.
        fused, refused: how each all-reduce was fused, or why it was not.
        origin: for all-reduce nodes that a pass made, the all-reduce they stand for.
        merged: all-reduces that were merged into another, with a text that names the other.
        spelling: how the norm of each canonicalized all-reduce was written.
        moved: what was moved across each all-reduce, in texts that are the same on every rank.
        second_norms: canonicalized second norms, with the names of their nodes as they arrived.
        notes: further notes for the report.
        changes: the passes that changed the graph.
        assumed: how many values were assumed to be equal on every rank, by option; matrices are
            counted apart (MATRICES).
    """

    config: PassConfig
    excluded: dict[str, Refused] = field(default_factory=dict)
    unmergeable: set[str] = field(default_factory=set)
    unfused_second_norms: set[str] = field(default_factory=set)
    fused: dict[str, Fused] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    spelling: dict[str, str] = field(default_factory=dict)
    moved: dict[str, list[str]] = field(default_factory=dict)
    second_norms: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    assumed: Counter[str] = field(default_factory=Counter)

    def next_run(self) -> RunContext:
        """Return the context of a run that starts from what this one has."""
        return RunContext(self.config, dict(self.excluded), set(self.unmergeable), set(self.unfused_second_norms))

    def merged_in_vain(self) -> set[str]:
        """Return the all-reduces that others were merged into but that were not fused."""
        targets = {text.removeprefix(f"{MERGED} ") for text in self.merged.values()}
        return {name for name in targets if name not in self.fused and name not in self.merged}

    def assumptions(self) -> list[str]:
        """Return the note on what was assumed to be equal on every rank, if anything was."""
        parts = [
            f"{(one if count == 1 else many).format(count)} ({key.split(',')[0]})"
            for key, (one, many) in _ASSUMED_EQUAL.items()
            if (count := self.assumed[key])
        ]
        return [f"taken to be equal on all ranks: {', '.join(parts)}"] if parts else []

    def refuse(self, name: str, gate: str, reason: str) -> None:
        """Record why an all-reduce is not fused; the first refusal stays."""
        if name not in self.fused:
            self.refused.setdefault(name, Refused(gate, reason))
