"""A random program as the fuzzer knows it: its source, its arguments, and what must become of its collectives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

HIDDEN = 16
FUSED, REFUSED, EITHER = "fused", "refused", "either"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NARROW = ("bf16", "fp16")
ALL_REDUCE, REDUCE_SCATTER = "all_reduce", "reduce_scatter"  # what a site's collective is called in reports
PLAIN, SEQUENCE, CHAIN = "plain", "sequence", "chain"  # kinds of programs


@dataclass(frozen=True)
class Miss:
    """What keeps a site from fusing. `residual`: it needs one (True), must have none (False), or either (None)."""

    expect: str
    residual: bool | None = None
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    ends_chain: bool = False


MISSES = {
    # The collective
    "other reduction": Miss(REFUSED),
    "group of one rank": Miss(REFUSED),
    "read before the wait": Miss(REFUSED),
    "waited for twice": Miss(REFUSED),
    "coalesced": Miss(EITHER),
    "reduced in another dtype": Miss(EITHER),
    # Between it and the sum
    "relu": Miss(REFUSED),
    "number added": Miss(EITHER),
    "tensor scale": Miss(EITHER),
    "vector scale": Miss(EITHER),
    "division": Miss(EITHER),
    "negation": Miss(EITHER),
    "bias of another dtype": Miss(EITHER),
    "bias row": Miss(EITHER),
    "bias of the all-reduce": Miss(EITHER),
    "scale after bias": Miss(EITHER),
    "transpose": Miss(EITHER, residual=False, ends_chain=True),
    "slice": Miss(REFUSED, residual=False, ends_chain=True),
    "heads": Miss(REFUSED, residual=False, ends_chain=True),
    # The sum
    "all-reduce also read": Miss(REFUSED, residual=True),
    "step also read": Miss(REFUSED, residual=True),
    "alpha": Miss(EITHER, residual=True),
    "broadcast residual": Miss(REFUSED, residual=True),
    "broadcast all-reduce": Miss(REFUSED, residual=True, ends_chain=True),
    "wide residual": Miss(EITHER, residual=True, dtypes=NARROW),
    "doubled": Miss(EITHER, residual=True),
    "residual of the all-reduce": Miss(REFUSED, residual=True),
    "subtraction": Miss(EITHER, residual=True),
    "two residuals": Miss(EITHER, residual=True),
    "two all-reduces": Miss(EITHER, residual=True),
    # The chain ends, since collectives of strided tensors are a matter of their own.
    "strided residual": Miss(EITHER, residual=True, ends_chain=True),
    "sum changed before the norm": Miss(EITHER),
    "collective between": Miss(EITHER),
    # The norm
    "mean over tokens": Miss(REFUSED),
    "mean over everything": Miss(REFUSED),
    "mean of rows put back": Miss(EITHER),
    "sum of squares": Miss(REFUSED),
    "L2": Miss(EITHER),
    "layer norm": Miss(REFUSED),
    "product, not square": Miss(REFUSED),
    "another tensor scaled": Miss(REFUSED),
    "epsilon is a tensor": Miss(REFUSED),
    "epsilon per token": Miss(REFUSED),
    "epsilon of the sum": Miss(REFUSED),
    "negative epsilon": Miss(EITHER),
    "divided by the root": Miss(EITHER),
    "wide weight": Miss(REFUSED, dtypes=NARROW),
    "narrow arithmetic": Miss(REFUSED, dtypes=NARROW),
    "double arithmetic": Miss(REFUSED),
    "weight row": Miss(EITHER),
    "weight of the sum": Miss(EITHER),
    "weight of the all-reduce": Miss(EITHER, residual=False),
    "weights of each other": Miss(EITHER, residual=False),
    "result kept wide": Miss(EITHER, dtypes=NARROW),
    # No norm
    "no norm": Miss(REFUSED),
    "result unused": Miss(REFUSED),
}
# Of sequence parallelism: reduce-scatter, [add,] norm of the rows, all-gather.
SEQUENCE_MISSES = {
    # The reduce-scatter
    "scatter: other reduction": Miss(REFUSED),
    "scatter: group of one rank": Miss(REFUSED, residual=False),
    "scatter: read before the wait": Miss(REFUSED),
    "scatter: hidden dimension": Miss(EITHER, residual=False, ends_chain=True),
    "scatter: flat": Miss(REFUSED, residual=False, ends_chain=True),
    "scatter: other world size": Miss(REFUSED, residual=False, ends_chain=True),
    # Between it and the norm
    "rows: scaled": Miss(REFUSED),
    "rows: relu": Miss(REFUSED),
    "rows: viewed": Miss(REFUSED, residual=False),
    "rows: biased": Miss(EITHER, residual=True),
    "rows: biased, no residual": Miss(REFUSED, residual=False),
    "rows: also read": Miss(REFUSED, residual=True),
    "rows: broadcast residual": Miss(REFUSED, residual=True),
    "rows: wide residual": Miss(EITHER, residual=True, dtypes=NARROW),
    "rows: residual of the rows": Miss(REFUSED, residual=True),
    "rows: alpha": Miss(REFUSED, residual=True),
    "rows: weight of the rows": Miss(REFUSED, residual=True),
    "rows: changed before the norm": Miss(EITHER),
    "rows: collective between": Miss(REFUSED),
    "rows: collective of another group between": Miss(EITHER),
    # The norm and the all-gather
    "rows: not normed": Miss(REFUSED),
    "gather: none": Miss(REFUSED, ends_chain=True),
    "gather: other group": Miss(REFUSED),
    "gather: other dimension": Miss(EITHER, ends_chain=True),
    "gather: other world size": Miss(REFUSED, ends_chain=True),
    "gather: something between": Miss(REFUSED),
    "gather: norm also read": Miss(REFUSED),
    "gather: waited for twice": Miss(REFUSED),
    "gather: twice": Miss(EITHER),
    "gather: over both groups": Miss(REFUSED),
}
NORM_MISSES = frozenset(list(MISSES)[list(MISSES).index("mean over tokens") : list(MISSES).index("no norm")])
# Norms that keep rows from fusing, too.
SEQUENCE_MISSES |= {
    name: miss
    for name, miss in MISSES.items()
    if name in NORM_MISSES
    and miss.expect == REFUSED
    and miss.residual is None
    and name not in ("epsilon per token", "mean over everything")
}
_ROWS_OF_OTHER_RANKS = ("scatter: other world size", "gather: other world size")
# Of these a fusion may round elsewhere, where allow_reassociation lets it.
_ROUNDING = frozenset(
    ["tensor scale", "vector scale", "division", "negation", "number added", "scale after bias", "subtraction", "alpha"]
    + [name for name in MISSES if name.startswith(("bias ", "two "))]
    + [
        "doubled",
        "L2",
        "divided by the root",
        "sum changed before the norm",
        "rows: biased",
        "rows: changed before the norm",
    ]
)
# Whose collectives the fused graph may have fewer of, or in another order.
_UNORDERED = ("coalesced", "gather: twice")
TAILS = ("L", "L'", "M", "M'", "F", "G", "g", "weightless")


@dataclass(frozen=True)
class Site:
    """One all-reduce or reduce-scatter of a program.

    `carried`: a bias or a scale stands before the norm; to fuse it moves a rounding.
    """

    layer: int
    expect: str
    miss: str = ""
    carried: bool = False
    collective: str = ALL_REDUCE

    @property
    def may_move(self) -> bool:
        """Whether a fusion of this site may round elsewhere than the program does."""
        return self.carried or self.miss in _ROUNDING


@dataclass(frozen=True)
class Input:
    """How an argument of a program is made; only `partial` ones differ between ranks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "normal"  # normal, partial, weight, index, epsilon; or "same as" or "view of" another one


@dataclass
class Program:
    """Source of a function, its arguments, and what is known of its collectives.

    Attributes:
        tokens: the size of the dimension that is dynamic, if the program is.
        replicated: whether the residual is the same on every rank, as tensor parallelism has it.
    """

    seed: int
    layers: tuple[int, ...]
    dynamic: bool
    kind: str = PLAIN
    tokens: int = 0
    replicated: bool = True
    source: str = ""
    inputs: dict[str, Input] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    @property
    def may_move(self) -> bool:
        return any(site.may_move for site in self.sites)

    @property
    def ordered(self) -> bool:
        """Whether collectives must keep their order and number; the tensors of a coalesced one are reduced at once."""
        return not any(site.miss in _UNORDERED for site in self.sites)

    @property
    def runs_on_ranks(self) -> bool:
        """Whether real processes agree on it: no read before the wait, which is a race, and no world size but theirs."""
        unfit = ("read before the wait", "scatter: read before the wait", *_ROWS_OF_OTHER_RANKS)
        return not any(site.miss in unfit for site in self.sites)

    @property
    def other_tokens(self) -> int:
        """Another number of tokens for a dynamic program: odd where its own is even, but rows that are divided stay so."""
        if self.kind == SEQUENCE:
            return 12
        return 9 if self.tokens % 2 == 0 or self.kind == PLAIN else 10

    def __str__(self) -> str:
        expected = [f"# layer {s.layer}: {s.expect}" + (f" ({s.miss})" if s.miss else "") for s in self.sites]
        arguments = [f"#   {name}: {i.kind} {i.dtype} {list(i.shape)}" for name, i in self.inputs.items()]
        numbers = [f"#   self.{name} = {value!r}" for name, value in self.numbers.items()]
        head = f"# seed {self.seed}, layers {list(self.layers)}, dynamic={self.dynamic}, {self.kind}"
        return "\n".join([head, *expected, *arguments, *numbers, self.source])


def make_arguments(program: Program, rank: int, tokens: int = 0) -> list[Tensor]:
    """The program's arguments, the same for the same seed and rank; `tokens` replaces a dynamic program's own count."""
    made = []
    for number, spec in enumerate(program.inputs.values()):
        seed = program.seed * 1000 + number * 10 + (rank if spec.kind == "partial" else 0)
        generator = torch.Generator().manual_seed(seed)
        if spec.kind == "index":
            made.append(torch.randperm(spec.shape[0] + 4, generator=generator)[: spec.shape[0]])
            continue
        if spec.kind.startswith(("same as ", "view of ")):
            other = made[list(program.inputs).index(spec.kind[8:])]
            made.append(other if spec.kind.startswith("same") else other[...])
            continue
        sizes = {program.tokens: tokens}
        if program.kind == SEQUENCE:
            sizes[program.tokens // 2] = tokens // 2
        shape = [sizes.get(size, size) if tokens else size for size in spec.shape]
        value = torch.randn(shape, generator=generator)
        if spec.kind == "weight":
            value = value * 0.3 + 1
        elif spec.kind == "epsilon":
            value = value.abs() * 1e-3 + 1e-5
        made.append(value.to(spec.dtype))
    return made
