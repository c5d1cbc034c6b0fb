"""What one run of the passes over one graph knows and finds out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fusewire.fusion_passes.config import PassConfig

MATCH, SUPPORTED, PROVIDER = "match", "supported", "provider"
MERGED = "merged into"
# By the option that allows it, what was taken to be the same on every rank; for one and for several.
_TAKEN_TO_BE_EQUAL = {
    "assume_replicated_residuals": ("the residual or weight of 1 operator", "the residual or weight of {} operators"),
    "assume_replicated_scales": ("1 scale", "{} scales"),
    "assume_replicated_gates": ("1 gate", "{} gates"),
}


@dataclass(frozen=True)
class Refused:
    """Why an all-reduce was not fused: the gate that said no, and its reason for the user."""

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
    """The account of one run. All-reduces are keyed by the names of their nodes in the graph as it arrived.

    Attributes:
        config: the options of this run.
        excluded: all-reduces to leave as they are, refused by an earlier run over a copy of this graph.
        apart: all-reduces not to merge, since merged they were not fused.
        plain: names of norms after a residual add that are not to be raised, since raised they became no epilogue.
        fused, refused: the verdicts so far.
        origin: for nodes made by the raise pass, the all-reduce they stand for.
        merged: all-reduces that are no more, since they became one with another; with which one.
        spelling: per raised all-reduce, how its norm was written.
        moved: per all-reduce, what was moved across it, in words that are the same on every rank.
        seconds: raised second norms, by their nodes' names, with the names of the norms in the graph as it arrived.
        notes: what else the user should know.
        changes: the passes that changed the graph.
        assumed: by the option that allows it, how often something was taken to be the same on every rank that the
            graph does not prove to be.
    """

    config: PassConfig
    excluded: dict[str, Refused] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    plain: set[str] = field(default_factory=set)
    fused: dict[str, Fused] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    spelling: dict[str, str] = field(default_factory=dict)
    moved: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    assumed: Counter[str] = field(default_factory=Counter)

    def merged_in_vain(self) -> set[str]:
        """The all-reduces that another was merged into and that were not fused all the same."""
        targets = {text.removeprefix(f"{MERGED} ") for text in self.merged.values()}
        return {name for name in targets if name not in self.fused and name not in self.merged}

    def assumptions(self) -> list[str]:
        """The note on what was taken to be the same on every rank; none if nothing was."""
        parts = [
            f"{(one if count == 1 else many).format(count)} ({option})"
            for option, (one, many) in _TAKEN_TO_BE_EQUAL.items()
            if (count := self.assumed[option])
        ]
        return [f"taken to be equal on all ranks: {', '.join(parts)}"] if parts else []

    def refuse(self, name: str, gate: str, reason: str) -> None:
        """Record the first reason for which an all-reduce is not fused."""
        if name not in self.fused:
            self.refused.setdefault(name, Refused(gate, reason))
