"""What one run of the passes over one graph knows and finds out."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusewire.fusion_passes.config import PassConfig

MATCH, SUPPORTED, PROVIDER = "match", "supported", "provider"
MERGED = "merged into"


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
        seconds: raised second norms, by their nodes' names, with the names of the norms in the graph as it arrived.
        notes: what else the user should know.
        changes: the passes that changed the graph.
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
    seconds: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def merged_in_vain(self) -> set[str]:
        """The all-reduces that another was merged into and that were not fused all the same."""
        targets = {text.removeprefix(f"{MERGED} ") for text in self.merged.values()}
        return {name for name in targets if name not in self.fused and name not in self.merged}

    def refuse(self, name: str, gate: str, reason: str) -> None:
        """Record the first reason for which an all-reduce is not fused."""
        if name not in self.fused:
            self.refused.setdefault(name, Refused(gate, reason))
