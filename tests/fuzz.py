"""Random tensor-parallel programs, and what must hold of each one after fusewire's passes.

    python -m tests.fuzz --graphs 10000 --gloo 500 --seed 0     what runs every night
    python -m tests.fuzz --seed 1234 --show                     one program again, with its source and its graphs

A seed makes a program: Python source of one to four layers, each an all-reduce with what follows it. More than half of
the layers hold a *miss*, one thing that keeps the all-reduce from being fused or that must at least not change the
result; the others must fuse. `check` compiles a program once, up to the post-grad graph, runs the passes with several
configurations over copies of that graph, and executes every copy operator by operator: the results must be the same
bit for bit.

In one process the process groups are torch's fake ones, whose all-reduce returns its input. The executor multiplies
that input first, by a factor for each group and reduction, as if the other ranks held multiples of this rank's tensor:
what stands on the wrong side of an all-reduce, or goes to the wrong group, then gives another result.
"""

from __future__ import annotations

import argparse
import contextlib
import linecache
import multiprocessing
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # ranks and workers import this file as `fuzz`, and so must what is sent to them
    sys.path.insert(0, str(Path(__file__).parent))
    from fuzz import main

    sys.exit(main())

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor

import fusewire
from fusewire.custom_ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ir import Support
from fusewire.custom_ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.sandwich_norm import all_reduce_sandwich_norm
from fusewire.fusion_passes.backend import specialize_epsilons
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import MERGED
from fusewire.fusion_passes.manager import run_passes
from fusewire.fusion_passes.report import Entry, GraphAccount
from fusewire.patterns.all_reduce import ALL_REDUCE

from distributed import RankPool, fake_group

HIDDEN = 16
FUSED, REFUSED, EITHER = "fused", "refused", "either"
COALESCED = torch.ops._c10d_functional.all_reduce_coalesced.default
FUSED_OP = all_reduce_rms_norm.torch_op
SANDWICH_OP = all_reduce_sandwich_norm.torch_op
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ELSEWHERE = "fuzz_elsewhere"  # a provider that never serves: it makes the passes raise norms without an all-reduce


# --- Programs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Miss:
    """What keeps a site from fusing. `residual`: it needs one (True), must have none (False), or either (None)."""

    expect: str
    residual: bool | None = None
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    ends_chain: bool = False


_NARROW = ("bf16", "fp16")
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
    "number added": Miss(REFUSED),
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
    "alpha": Miss(REFUSED, residual=True),
    "broadcast residual": Miss(REFUSED, residual=True),
    "broadcast all-reduce": Miss(REFUSED, residual=True, ends_chain=True),
    "wide residual": Miss(REFUSED, residual=True, dtypes=_NARROW),
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
    "layer norm": Miss(REFUSED),
    "product, not square": Miss(REFUSED),
    "another tensor scaled": Miss(REFUSED),
    "epsilon is a tensor": Miss(REFUSED),
    "epsilon per token": Miss(REFUSED),
    "epsilon of the sum": Miss(REFUSED),
    "negative epsilon": Miss(EITHER),
    "divided by the root": Miss(EITHER),
    "wide weight": Miss(REFUSED, dtypes=_NARROW),
    "narrow arithmetic": Miss(REFUSED, dtypes=_NARROW),
    "double arithmetic": Miss(REFUSED),
    "weight row": Miss(EITHER),
    "weight of the sum": Miss(EITHER),
    "weight of the all-reduce": Miss(EITHER, residual=False),
    "weights of each other": Miss(EITHER, residual=False),
    "result kept wide": Miss(EITHER, dtypes=_NARROW),
    # No norm
    "no norm": Miss(REFUSED),
    "result unused": Miss(REFUSED),
}
# Of these a fusion may round elsewhere, where allow_reassociation lets it.
_ROUNDING = frozenset(
    ["tensor scale", "vector scale", "division", "negation", "number added", "scale after bias", "subtraction", "alpha"]
    + [name for name in MISSES if name.startswith(("bias ", "two "))]
    + ["doubled", "sum changed before the norm"]
)
_DYNAMIC_TOKENS = (3, 5, 7)  # sizes that no other dimension has
TAILS = ("L", "L'", "M", "M'", "F", "G", "g", "weightless")


@dataclass(frozen=True)
class Site:
    """One all-reduce of a program. `carried`: a bias or a scale stands before the norm; to fuse it moves a rounding."""

    layer: int
    expect: str
    miss: str = ""
    carried: bool = False

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
    """Source of a function, its arguments, and what is known of its all-reduces."""

    seed: int
    layers: tuple[int, ...]
    dynamic: bool
    source: str = ""
    inputs: dict[str, Input] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)

    @property
    def may_move(self) -> bool:
        return any(site.may_move for site in self.sites)

    @property
    def ordered(self) -> bool:
        """Whether collectives must keep their order; the tensors of a coalesced one are reduced at once."""
        return not any(site.miss == "coalesced" for site in self.sites)

    def __str__(self) -> str:
        expected = [f"# layer {s.layer}: {s.expect}" + (f" ({s.miss})" if s.miss else "") for s in self.sites]
        arguments = [f"#   {name}: {i.kind} {i.dtype} {list(i.shape)}" for name, i in self.inputs.items()]
        numbers = [f"#   self.{name} = {value!r}" for name, value in self.numbers.items()]
        head = f"# seed {self.seed}, layers {list(self.layers)}, dynamic={self.dynamic}"
        return "\n".join([head, *expected, *arguments, *numbers, self.source])


def generate(seed: int, only: Sequence[int] | None = None) -> Program:
    """The program of a seed, or of some of its layers: each layer draws from a generator of its own."""
    rng = random.Random(seed)
    count = rng.choice((1, 1, 2, 2, 2, 3, 3, 4))
    layers = tuple(range(count)) if only is None else tuple(only)
    program = Program(seed, layers, dynamic=rng.random() < 0.2)
    writer = _Writer(program, rng)
    for index in layers:
        _Layer(writer, index).write()
    writer.finish()
    return program


class _Writer:
    """The source so far, and the two values that run through the layers: activations `n` and residual `h`."""

    def __init__(self, program: Program, rng: random.Random) -> None:
        self.program = program
        self.dtype = rng.choice(("bf16", "bf16", "fp16", "fp32", "fp32"))
        tokens = rng.choice((1, 3, 5, 7, HIDDEN)) if not program.dynamic else rng.choice(_DYNAMIC_TOKENS)
        self.shape = rng.choice(((tokens, HIDDEN), (tokens, HIDDEN), (2, tokens, HIDDEN)))
        if not program.dynamic and rng.random() < 0.04:
            self.shape = rng.choice(((HIDDEN,), (0, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1, HIDDEN)))
        self.lines: list[str] = []
        self.outputs: list[str] = []
        self.modules: list[str] = []
        self.n = self.input("x", self.shape, kind="partial")
        # Sometimes the very tensor that is reduced is the residual too.
        kind = rng.choice(("same as x", "view of x")) if rng.random() < 0.06 else "normal"
        self.h = self.n if rng.random() < 0.12 else self.input("r", self.shape, kind=kind)

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, kind: str = "normal") -> str:
        self.program.inputs[name] = Input(shape, dtype if dtype is not None else DTYPES[self.dtype], kind)
        return name

    def finish(self) -> None:
        outputs = list(dict.fromkeys([*self.outputs, self.n, self.h]))
        arguments = "".join(f", {name}" for name in self.program.inputs)
        body = "".join(f"    {line}\n" for line in self.lines)
        self.program.source = f"def forward(self{arguments}):\n{body}    return ({', '.join(outputs)},)\n"


class _Layer:
    """Writes one layer: partial sums, all-reduce, what stands between, residual add, norm, and further readers."""

    def __init__(self, writer: _Writer, index: int) -> None:
        self.writer, self.index = writer, index
        self.rng = random.Random(f"{writer.program.seed}.{index}")
        self.dtype = writer.dtype
        self.rank = len(writer.shape)
        self.tokens = 1
        for size in writer.shape[:-1]:
            self.tokens *= size
        self.residual = self.rng.random() < 0.65
        self.miss = self._choose_miss()
        self.carried = self.viewed = self.sandwich = False
        self.outer: tuple[str, str] | None = None  # what follows instead of the norm and the sum
        self.expect = MISSES[self.miss].expect if self.miss else FUSED
        self.spare: list[str] = []  # values that may be read elsewhere without harm
        self.count = 0

    def _choose_miss(self) -> str:
        if self.rng.random() < 0.45:
            return ""
        fitting = [name for name, m in MISSES.items() if self.dtype in m.dtypes and self._shape_allows(name)]
        miss = self.rng.choice(fitting)
        if MISSES[miss].residual is not None:
            self.residual = bool(MISSES[miss].residual)
        return miss

    def _shape_allows(self, miss: str) -> bool:
        if self.writer.program.dynamic and miss in ("slice", "heads", "transpose", "broadcast all-reduce"):
            return False
        if self.rank == 1 or 0 in self.writer.shape:
            return miss in ("other reduction", "group of one rank", "relu", "all-reduce also read", "alpha", "no norm")
        # With one token a mean over the tokens is over nothing, and a row broadcasts to nothing.
        few = self.writer.shape[-2] == 1
        return not (few and miss in ("broadcast residual", "slice", "mean over tokens", "epsilon per token"))

    # Writing

    def let(self, expression: str, tag: str) -> str:
        self.count += 1
        name = f"{tag}{self.index}_{self.count}"
        self.writer.lines.append(f"{name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        self.writer.lines.append(statement)

    def output(self, expression: str) -> None:
        self.writer.outputs.append(self.let(expression, "out"))

    def input(self, tag: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, kind: str = "normal") -> str:
        return self.writer.input(f"{tag}{self.index}", shape, dtype, kind)

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def write(self) -> None:
        partial = self._partial()
        if self.miss == "result unused":
            self.do(f"functional.all_reduce({partial}, 'sum', WORLD)")
        else:
            self._write_rest(partial, self._reduce(partial))
        site = Site(self.index, self.expect, self.miss, self.carried)
        self.writer.program.sites += [site] * self._all_reduces()

    def _write_rest(self, partial: str, reduced: str) -> None:
        if self.miss == "no norm":
            self.output(self.pick(f"{reduced} * {reduced}", f"{reduced} @ {self._matrix()}", f"{reduced}.clone()"))
            return
        value = self._between(reduced)
        self.viewed = value != reduced
        if self.miss == "collective between":
            self.output(self._plain_reduce(self.let(f"torch.sin({self.writer.n})", "p")))
        total = self._add(value)
        normed = self._norm(total, reduced)
        self._extras(partial, value, total, normed)
        if self.miss and MISSES[self.miss].ends_chain:
            self.writer.outputs += [total, normed]
            return
        if self.outer is not None:
            self.writer.n, self.writer.h = self.outer
            return
        self.writer.n = self.let(f"{normed}.to({DTYPES[self.dtype]})", "n")
        if self.residual:
            follows = self.miss not in ("wide residual", "strided residual", "bias of another dtype")
        else:
            follows = not self.miss and self.rng.random() < 0.5
        if follows:
            self.writer.h = total

    def _all_reduces(self) -> int:
        """How many entries of the report this layer has."""
        return 2 if self.miss in ("two all-reduces", "weights of each other", "collective between", "coalesced") else 1

    # The collective

    def _matrix(self) -> str:
        return self.input("m", (HIDDEN, HIDDEN))

    def _partial(self) -> str:
        n = self.writer.n
        forms = [f"{n} * 0.75", f"torch.tanh({n})", f"F.silu({n} * 2)", n]
        if self.rank > 1:
            forms += [f"{n} @ {self._matrix()}" if self.rng.random() < 0.5 else f"{n} * 1.5"]
        expression = self.rng.choice(forms)
        if self.rank == 3 and self.rng.random() < 0.3:  # experts and row-parallel layers reduce flat
            flat = self.pick(f".reshape(-1, {HIDDEN})", ".flatten(0, 1)", ".unsqueeze(0)")
            return self.let(f"({expression}){flat}", "p")
        return self.let(expression, "p")

    def _reduce(self, p: str) -> str:
        if self.miss == "other reduction":
            op = self.pick("max", "min", "avg", "product")
            if self.rng.random() < 0.3:
                copy = self.let(f"{p}.clone()", "a")
                self.do(f"dist.all_reduce({copy}, op=dist.ReduceOp.{op.upper()})")
                return copy
            return self.let(f"functional.all_reduce({p}, {op!r}, WORLD)", "a")
        if self.miss == "group of one rank":
            return self.let(f"functional.all_reduce({p}, 'sum', ALONE)", "a")
        if self.miss in ("read before the wait", "waited for twice"):
            raw = self.let(f"ops.all_reduce({p}, 'sum', WORLD_NAME)", "raw")
            first = self.let(f"ops.wait_tensor({raw})", "a")
            second = f"ops.wait_tensor({raw})" if self.miss == "waited for twice" else f"{raw} * 2"
            self.output(second)
            return first
        if self.miss == "coalesced":
            both = self.let(f"ops.all_reduce_coalesced([{p}, {p} + 1], 'sum', WORLD_NAME)", "both")
            self.output(f"ops.wait_tensor({both}[1])")
            return self.let(f"ops.wait_tensor({both}[0])", "a")
        if self.miss == "reduced in another dtype":
            other = "torch.float32" if self.dtype != "fp32" else "torch.bfloat16"
            reduced = self.let(f"functional.all_reduce({p}.to({other}), 'sum', WORLD)", "a")
            return self.let(f"{reduced}.to({DTYPES[self.dtype]})", "a")
        return self._plain_reduce(p)

    def _plain_reduce(self, p: str) -> str:
        spelling = self.pick(
            "functional", "functional", "name", "other", "list", "operator", "in place", "async", "opaque"
        )
        if spelling == "in place":
            copy = self.let(f"{p}.clone()", "a")
            self.do(f"dist.all_reduce({copy}{self.pick('', ', group=OTHER', ', op=dist.ReduceOp.SUM')})")
            return copy
        return self.let(
            {
                "functional": f"functional.all_reduce({p}, 'sum', WORLD)",
                "name": f"functional.all_reduce({p}, 'SUM', {self.pick('WORLD_NAME', 'OTHER_NAME')})",
                "other": f"functional.all_reduce({p}, 'sum', OTHER)",
                "list": f"functional.all_reduce({p}, 'sum', [0, 1])",
                "operator": f"ops.wait_tensor(ops.all_reduce({p}, 'sum', OTHER_NAME))",
                "opaque": f"torch.ops.vllm.all_reduce({p}, WORLD_NAME)",
                "async": f"functional.wait_tensor(functional.all_reduce({p}, 'sum', WORLD))",
            }[spelling],
            "a",
        )

    # Between the all-reduce and the sum

    def _between(self, a: str) -> str:
        shaped = self._reshaped(a)
        if not self.miss:
            shaped = self._carried_steps(shaped)
        steps = {
            "relu": "F.relu({a})",
            "number added": "{a} + 1.0",
            "tensor scale": "{a} * {scalar}",
            "vector scale": "{a} * {vector}",
            "division": "{a} / 3.0",
            "negation": "-{a}",
            "bias of another dtype": "{a} + {foreign}",
            "bias row": "{a} + {row}",
            "bias of the all-reduce": "{a} + {a}.reshape(-1, {hidden})[0]",
            "scale after bias": "({a} + {vector}) * 0.5",
            "slice": "{a}[:-1]",
            "heads": "{a}.reshape(-1, 2, {hidden} // 2)",
        }
        if self.miss == "transpose":
            return self.let(f"{shaped}.transpose(0, {self.rng.choice((self.rank - 1, self.rank - 2))})", "v")
        if self.miss not in steps:
            return shaped
        values = {"a": shaped, "hidden": str(HIDDEN)}
        if "{scalar}" in steps[self.miss]:
            values["scalar"] = self.input("scale", (), kind="weight")
        if "{vector}" in steps[self.miss]:
            values["vector"] = self.input("bias", (HIDDEN,))
        if "{row}" in steps[self.miss]:
            values["row"] = self.input("bias", (1,) * (self.rank - 1) + (HIDDEN,))
        if "{foreign}" in steps[self.miss]:
            foreign = torch.float32 if self.dtype != "fp32" else torch.bfloat16
            values["foreign"] = self.input("bias", (HIDDEN,), foreign)
        return self.let(steps[self.miss].format(**values), "v")

    def _reshaped(self, a: str) -> str:
        """The all-reduce's value in the shape of the residual stream, by way of a few views."""
        shape = ", ".join(map(str, self.writer.shape)) if not self.writer.program.dynamic else None
        target = f"{a}.view({shape})" if shape else f"{a}.view({self.writer.h}.shape)"
        value = a
        if self.rng.random() < 0.15 and self.rank > 1:
            value = self.let(self.pick(f"{a}.unsqueeze(0)", f"{a}.reshape(1, -1, {HIDDEN})", f"{a}.unsqueeze(-2)"), "v")
            target = target.replace(a, value, 1)
            return self.let(target, "v")
        # `_partial` may have flattened it; a view that changes nothing is harmless.
        return self.let(target, "v") if self.rank == 3 or self.miss == "step also read" else value

    def _carried_steps(self, value: str) -> str:
        if self.rng.random() < 0.12:
            value = self.let(self.pick(f"{value} * 0.37", f"0.25 * {value}", f"{value} * -3"), "v")
            self.carried = True
        if self.rng.random() < 0.12 and self.rank > 1:
            bias = self.input("bias", (HIDDEN,))
            value = self.let(self.pick(f"{value} + {bias}", f"{bias} + {value}"), "v")
            self.carried = True
        return value

    # The sum

    def _add(self, v: str) -> str:
        h = self.writer.h
        if not self.residual:
            return v
        if self.miss == "alpha":
            return self.let(self.pick(f"torch.add({h}, {v}, alpha=2)", f"torch.add({v}, {h}, alpha=0.5)"), "t")
        if self.miss == "broadcast residual":
            h = self.input("row", (*self.writer.shape[:-2], 1, HIDDEN))
        elif self.miss == "broadcast all-reduce":
            h = self.input("wide", (2, *self.writer.shape))
        elif self.miss == "wide residual":
            h = self.let(f"{h}.to(torch.float32)", "h")
        elif self.miss == "doubled":
            h = v
        elif self.miss == "residual of the all-reduce":
            h = self.let(self.pick(f"torch.tanh({v})", f"{v} * {v}", f"{self.writer.h} * {v}"), "h")
        elif self.miss == "subtraction":
            return self.let(self.pick(f"{h} - {v}", f"{v} - {h}"), "t")
        elif self.miss == "two residuals":
            v = self.let(f"{v} + {self.input('r', self.writer.shape)}", "t")
        elif self.miss == "two all-reduces":
            other = self._plain_reduce(self.let(f"torch.sin({self.writer.n})", "p"))
            h = other
        elif self.miss == "strided residual":
            strided = self.input("strided", self.writer.shape[::-1])
            h = self.let(f"{strided}.permute({', '.join(map(str, reversed(range(self.rank))))})", "h")
        if self.miss == "all-reduce also read":
            self.output(f"torch.exp(-{v}.abs())")
        if self.miss == "step also read":
            self.output(self.pick(f"{v} * 2", f"{v}.float()", f"{v}.sum(-1)"))
        return self.let(self.pick(f"{h} + {v}", f"{v} + {h}", f"torch.add({h}, {v})"), "t")

    # The norm

    def _epsilon(self) -> str:
        value = self.rng.choice((1e-5, 1e-6, 1e-12, 0.125, 1, 3e-4, 1e-8, 0.3))
        if self.rng.random() < 0.3:
            name = f"eps{self.index}"
            self.writer.program.numbers[name] = float(value)
            return f"self.{name}"
        return repr(value)

    def _norm(self, t: str, a: str) -> str:
        if self.miss == "sum changed before the norm":
            self.do(self.pick(f"{t}.mul_(2.0)", f"{t} += 0.5"))
        if self.miss == "layer norm":
            vector = self.input("w", (HIDDEN,), kind="weight")
            return self.let(f"F.layer_norm({t}.float(), ({HIDDEN},), {vector}.float(), None, 1e-5).to({t}.dtype)", "o")
        odd = self.miss and self.miss in _NORM_MISSES
        whole = self.rng.random()
        if not odd and whole < 0.3 and self.miss not in ("heads", "transpose", "wide residual"):
            return self._whole_norm(t)
        return self._decomposed_norm(t, a)

    def _whole_norm(self, t: str) -> str:
        """A norm that is one call in the source."""
        eps, w = self._epsilon(), self.input("w", (HIDDEN,), kind="weight")
        forms = [
            f"F.rms_norm({t}, ({HIDDEN},), {w}, {eps})",
            f"F.rms_norm({t}, ({HIDDEN},), None, {eps})",
            f"F.rms_norm({t}, ({HIDDEN},), {w})",
            f"F.rms_norm({t}.float(), ({HIDDEN},), {w}.float(), {eps}).to({t}.dtype)",
            f"fusewire.rms_norm({t}, {w}, {eps}, {self.rng.choice((0.0, 1.0))}, "
            f"{self.rng.choice(('scale_then_round', 'round_then_scale'))!r})",
            f"fusewire.rms_norm({t}, None, {eps})",
            f"torch.ops.vllm_ir.rms_norm({t}, {w}, {eps})",
        ]
        if "self." in eps:  # an epsilon that dynamic=True made an input cannot be a number of the operator's schema
            forms = forms[:2]
        elif self.rng.random() < 0.3:
            self.writer.modules.append(w)
            self.writer.program.numbers.setdefault(f"eps{self.index}", 1e-5)
        return self.let(self.rng.choice(forms), "o")

    def _decomposed_norm(self, t: str, a: str) -> str:
        miss, d = self.miss, f"{t}.dtype"
        hidden = f"{HIDDEN} // 2" if miss == "heads" else str(HIDDEN)
        wide = "torch.float32"
        if miss == "double arithmetic":
            wide = "torch.float64"
        x = t if miss == "narrow arithmetic" else self.let(self.pick(f"{t}.to({wide})", f"{t}.type({wide})"), "wide")
        square = self.let(self._squared(x), "sq")
        mean = self.let(self._mean(square, hidden), "mean")
        root = self._root(mean, t)
        scaled_one = f"torch.roll({x}, 1, -1)" if miss == "another tensor scaled" else x
        if miss == "divided by the root":
            n = self.let(f"{scaled_one} / {root}", "n")
        else:
            n = self.let(self.pick(f"{scaled_one} * {root}", f"{root} * {scaled_one}"), "n")
        self.spare += [x, square, mean, root, n]
        weight, tail = self._weight(t, a, hidden), self.rng.choice(TAILS)
        if tail == "weightless" and "weight" in miss:
            tail = "M"
        if miss == "result kept wide":
            return self.let(self.pick(f"{n} * {weight}", f"{n} * {weight}.float()"), "o")
        return self._tail(tail, n, weight, d)

    def _squared(self, x: str) -> str:
        if self.miss == "product, not square":
            return f"{x} * torch.sigmoid({x})"
        return self.pick(f"{x}.pow(2)", f"{x} * {x}", f"{x} ** 2", f"torch.square({x})")

    def _mean(self, square: str, hidden: str) -> str:
        if self.miss == "mean over tokens":
            return f"{square}.mean(0, keepdim=True)" if self.rank == 2 else f"{square}.mean(-2, keepdim=True)"
        if self.miss == "mean over everything":
            return f"{square}.mean()"
        if self.miss == "mean of rows put back":
            return self.pick(f"{square}.mean(-1).unsqueeze(-1)", f"{square}.mean(-1)[..., None]")
        if self.miss == "sum of squares":
            return f"{square}.sum(-1, keepdim=True)"
        return self.pick(
            f"{square}.mean(-1, keepdim=True)",
            f"torch.mean({square}, dim={square}.dim() - 1, keepdim=True)",
            f"{square}.mean((-1,), True)",
        )

    def _root(self, mean: str, t: str) -> str:
        eps = self._epsilon()
        if self.miss == "epsilon is a tensor":
            eps = self.input("epsilon", (), torch.float32, "epsilon")
        elif self.miss == "epsilon per token":
            eps = self.input("epsilon", (*self.writer.shape[:-1], 1), torch.float32, "epsilon")
        elif self.miss == "epsilon of the sum":
            eps = f"{t}.float().abs().mean()"
        if self.miss == "negative epsilon":
            return self.let(self.pick(f"torch.rsqrt({mean} + -1e-9)", f"torch.rsqrt({mean} - 1e-9)"), "root")
        shifted = self.let(self.pick(f"{mean} + {eps}", f"{eps} + {mean}"), "shifted")
        if self.miss == "divided by the root":
            return self.let(self.pick(f"torch.sqrt({shifted})", f"{shifted} ** 0.5"), "root")
        forms = f"torch.rsqrt({shifted})", f"{shifted} ** -0.5", f"torch.pow({shifted}, -0.5)"
        return self.let(self.pick(*forms), "root")

    def _weight(self, t: str, a: str, hidden: str) -> str:
        size = HIDDEN // 2 if self.miss == "heads" else HIDDEN
        if self.miss == "transpose":
            return self.let(f"torch.ones({t}.shape[-1], dtype={t}.dtype)", "w")
        dtype = torch.float32 if self.miss == "wide weight" else DTYPES[self.dtype]
        shape = (1,) * (self.rank - 1) + (size,) if self.miss == "weight row" else (size,)
        w = self.input("w", shape, dtype, "weight")
        if self.miss == "weight of the sum":
            return self.let(f"{w} * {t}.reshape(-1, {hidden})[0].to({dtype})", "w")
        if self.miss == "weight of the all-reduce":
            return self.let(f"{w} * {a}.reshape(-1, {hidden}).mean(0).to({dtype})", "w")
        return w

    def _tail(self, tail: str, n: str, w: str, d: str) -> str:
        bias = self.rng.choice(("1.0", "0.5", "-1", "2"))
        forms = {
            "L": f"{w} * {n}.to({d})",
            "L'": f"{n}.to({d}) * {w}",
            "M": f"({w} * {n}).to({d})",
            "M'": f"({n} * {w}).to({d})",
            "F": f"({n} * {w}.float()).to({d})",
            "G": self.pick(f"({n} * ({bias} + {w}.float())).to({d})", f"(({w}.float() + {bias}) * {n}).to({d})"),
            # The number is added in the weight's own dtype.
            "g": self.pick(f"({n} * ({w} + {bias})).to({d})", f"{n}.to({d}) * ({bias} + {w})"),
            "weightless": f"{n}.to({d})",
        }
        return self.let(forms[tail], "o")

    # Further readers, aliases and writes

    def _extras(self, partial: str, value: str, total: str, normed: str) -> None:
        if self.miss == "weights of each other":
            self._each_other(total, normed)
        for _ in range(self.rng.choice((0, 0, 1, 1, 2, 3))):
            self._extra(self.rng.randrange(15), partial, value, total, normed)

    def _each_other(self, total: str, normed: str) -> None:
        """A second all-reduce whose norm is weighted by this one's sum."""
        other = self.let(f"functional.all_reduce(torch.cos({self.writer.n}), 'sum', WORLD)", "a")
        weight = self.let(f"{total}.reshape(-1, {HIDDEN})[0]", "w")
        wide = self.let(f"{other}.float()", "wide")
        first = self.let(f"{wide} * torch.rsqrt({wide}.pow(2).mean(-1, keepdim=True) + 1e-5)", "n")
        self.output(f"{weight} * {first}.to({other}.dtype)")
        self.output(f"{normed} * {other}.reshape(-1, {HIDDEN})[0]")

    def _sandwich(self, total: str, normed: str) -> None:
        """The norm's result is added to a residual and normalised once more; where nobody else reads it, all that fuses."""
        h = self.writer.h
        again = self.let(self.pick(f"{h} + {normed}", f"{normed} + {h}"), "s")
        weight = self.pick("None", self.input("w_outer", (HIDDEN,), kind="weight"))
        second = self.let(f"F.rms_norm({again}, ({HIDDEN},), {weight}, 1e-6)", "n")
        if self.residual:
            self.writer.outputs += [second, self.let(f"{total} + {again}", "out")]
        else:
            self.outer = (second, again)

    def _extra(self, which: int, partial: str, value: str, total: str, normed: str) -> None:
        if which in (1, 5, 9) and self.viewed and not self.residual and self.expect == FUSED:
            # A view of a view becomes a view of the all-reduce itself, which the fused operator does not return.
            self.expect = EITHER
        shaped = not (self.miss and MISSES[self.miss].ends_chain)
        out = self.writer.outputs
        if which == 0:
            out += [total]
        elif which == 1:
            self.output(self.pick(f"{total}.view(-1)", f"{total}.unsqueeze(0)", f"{total} * 2") if shaped else total)
        elif which == 2:
            self.output(self.pick(f"{normed}.unsqueeze(-1)", f"{normed} + 1", f"{normed}.detach()"))
        elif which == 3 and self.spare:
            self.output(self.pick(self.rng.choice(self.spare), f"{self.rng.choice(self.spare)} * 1.5"))
        elif which == 4 and shaped and self.miss != "wide residual":
            buffer = self.input(f"buffer{self.count}_", self.writer.shape)
            self.do(self.pick(f"{buffer}.copy_({total})", f"{buffer}.add_({normed})", f"{buffer}.copy_({normed})"))
            if self.rng.random() < 0.4:
                self.writer.h = self.let(f"{buffer} * 1", "h") if self.residual else self.writer.h
        elif which == 5 and shaped and self.tokens > 0 and not self.writer.program.dynamic:
            cache = self.input(f"cache{self.count}_", (self.tokens + 4, HIDDEN))
            index = self.input(f"index{self.count}_", (self.tokens,), torch.int64, "index")
            source = self.pick(total, normed)
            self.do(f"{cache}.index_copy_(0, {index}, {source}.reshape(-1, {HIDDEN}).to({DTYPES[self.dtype]}))")
            self.output(f"{cache}.sum(0)")
        elif which == 6 and shaped and self.miss not in _NORM_MISSES:
            wide = self.let(f"{total}.float()", "wide")
            second = f"({wide} * torch.rsqrt({wide}.pow(2).mean(-1, keepdim=True) + 1e-4)).to({total}.dtype)"
            self.output(self.pick(second, f"F.rms_norm({total}, ({HIDDEN},), None, 1e-5)"))
        elif which == 7:
            out += [partial]
        elif which == 8 and "x" in self.writer.program.inputs:
            self.do(self.pick("x.add_(1)", "x.mul_(0.5)"))
        elif which == 9 and not self.residual and shaped and not self.miss:
            # Without a residual the fused operator returns the sum, so anyone may read it.
            self.output(self.pick(f"{value} * 2", f"{value}.abs()", f"{value}.view(-1)"))
        elif which == 10:
            self.output(f"{total}.clone().zero_()")
        elif which >= 12 and shaped and not self.miss and not self.sandwich:
            self.sandwich = True
            self._sandwich(total, normed)
        elif which == 11 and self.residual and shaped and "r" in self.writer.program.inputs:
            self.do("r.mul_(1.5)")


_NORM_MISSES = frozenset(list(MISSES)[list(MISSES).index("mean over tokens") : list(MISSES).index("no norm")])


# --- Compiling and executing ----------------------------------------------------------------------------------------


@dataclass
class Variant:
    """A copy of a program's graph, rewritten with one configuration."""

    module: torch.fx.GraphModule
    account: GraphAccount | None = None
    text: str = ""


@dataclass
class Outcome:
    """What one execution returned, what it left of its arguments, and the collectives it ran."""

    outputs: list[Any]
    inputs: list[Any]
    collectives: list[tuple[str, str, float]]  # (group, reduction, sum of the input, to tell them apart)
    wrong: list[str]


def copy_of(graph: torch.fx.Graph) -> torch.fx.GraphModule:
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return torch.fx.GraphModule(graph.owning_module, copied)


class Executor(torch.fx.Interpreter):
    """Executes a graph operator by operator, and compares what each gives with what its metadata says."""

    def __init__(
        self, module: torch.fx.GraphModule, factors: dict[str, float] | None, outcome: Outcome, metadata: bool = True
    ) -> None:
        super().__init__(module)
        self.factors, self.outcome, self.metadata = factors, outcome, metadata

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if self.metadata and n.op in ("call_function", "placeholder"):
            self._compare(n, n.meta.get("val"), result)
        return result

    def _compare(self, node: torch.fx.Node, said: Any, got: Any) -> None:
        if isinstance(got, (tuple, list)):
            for a, b in zip(said, got, strict=True):
                self._compare(node, a, b)
        elif isinstance(got, Tensor) and (problem := _differs(said, got)):
            self.outcome.wrong.append(f"{node.name} ({node.target}): {problem}")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target)
        if name in _COLLECTIVES:
            group, reduction = _COLLECTIVES[name](args)
            given = args[0] if target is COALESCED else [args[0]]
            self.outcome.collectives += [(group, reduction.lower(), float(t.double().sum())) for t in given]
            if self.factors is not None:
                given = [_over_ranks(t, self.factors[group], reduction.lower()) for t in given]
                args = (given if target is COALESCED else given[0], *args[1:])
        return super().call_function(target, args, kwargs)


# Group and reduction of a call, by the operator.
_COLLECTIVES: dict[str, Callable[[Any], tuple[str, str]]] = {
    str(ALL_REDUCE): lambda args: (args[2], args[1]),
    str(COALESCED): lambda args: (args[2], args[1]),
    str(FUSED_OP): lambda args: (args[6], "sum"),
    str(SANDWICH_OP): lambda args: (args[10], "sum"),
    "vllm.all_reduce.default": lambda args: (args[1], "sum"),
}


def _over_ranks(x: Tensor, factor: float, reduction: str) -> Tensor:
    """What the fake group's all-reduce is given, so that it returns what the ranks' tensors would reduce to."""
    factors = {"sum": factor, "avg": factor / 2, "max": factor + 1, "min": factor + 2, "product": factor + 3}
    return x if factor == 1 else x * factors[reduction]


def _differs(said: Any, got: Tensor) -> str:
    if not isinstance(said, Tensor):
        return f"its metadata is {said!r}"
    if said.dtype != got.dtype:
        return f"metadata says {said.dtype}, executing gives {got.dtype}"
    shape = tuple(_size(s) for s in said.shape)
    if shape != tuple(got.shape):
        return f"metadata says {list(said.shape)}, executing gives {list(got.shape)}"
    stride = tuple(_size(s) for s in said.stride())
    if got.numel() and any(n > 1 and a != b for n, a, b in zip(shape, stride, got.stride(), strict=True)):
        return f"metadata says strides {list(stride)}, executing gives {list(got.stride())}"
    return ""


def _size(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


class _Recorder(CustomGraphPass):
    def __init__(self, make: Callable[[torch.fx.Graph], None]) -> None:
        self.make = make

    def __deepcopy__(self, memo: Any) -> _Recorder:
        return self

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.make(graph)

    def uuid(self) -> Any:
        return None


class Compiled:
    """A program, compiled once; `variants` are its graphs, and `execute` runs one of them on fresh arguments."""

    def __init__(self, program: Program, configs: dict[str, PassConfig], factors: dict[str, float] | None) -> None:
        self.program, self.configs, self.factors = program, configs, factors
        self.variants: dict[str, Variant] = {}
        self.selected = ""
        self.other_sizes = self.recompiled = False
        self.outcome = Outcome([], [], [], [])
        self.module = module_of(program)
        torch._dynamo.reset()
        self.compiled = torch.compile(self.module, backend=self._backend, dynamic=program.dynamic, fullgraph=True)

    def execute(self, name: str, rank: int = 0, tokens: int = 0) -> Outcome:
        self.selected, self.other_sizes = name, tokens > 0
        arguments = make_arguments(self.program, rank, tokens)
        self.outcome = outcome = Outcome([], arguments, [], [])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome.outputs = list(self.compiled(*arguments))
        return outcome

    def _make(self, graph: torch.fx.Graph) -> None:
        assert not self.variants, "the program has more than one graph"
        self.variants["before"] = Variant(copy_of(graph), None, str(graph))
        for name, config in self.configs.items():
            module = copy_of(graph)
            account = run_passes(module.graph, config)
            module.graph.lint()
            self.variants[name] = Variant(module, account, str(module.graph))

    def _backend(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        if self.other_sizes:
            self.recompiled = True  # the program is not as dynamic as it was meant to be
            return gm.forward
        specialize_epsilons(gm)
        patches = {"post_grad_custom_post_pass": _Recorder(self._make), "force_disable_caches": True}
        with inductor_config.patch(patches):
            return compile_fx(gm, example_inputs, inner_compile=self._inner)

    def _inner(self, gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        mode = next(v.fake_mode for v in example_inputs if isinstance(v, FakeTensor))
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(gm, is_inference=bool(kwargs.get("is_inference")))

        def boxed(args: Any) -> Any:
            module = self.variants[self.selected].module
            return Executor(module, self.factors, self.outcome, not self.other_sizes).run(*args)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed


def module_of(program: Program) -> torch.nn.Module:
    """The program as a module; its epsilons may be attributes, which dynamic=True would make inputs."""
    name = f"fuzz_seed_{program.seed}_{'_'.join(map(str, program.layers))}.py"
    linecache.cache[name] = (len(program.source), None, program.source.splitlines(True), name)
    scope: dict[str, Any] = dict(
        torch=torch, F=F, dist=dist, functional=functional, fusewire=fusewire, ops=torch.ops._c10d_functional, **GROUPS
    )
    exec(compile(program.source, name, "exec"), scope)
    module = type("Program", (torch.nn.Module,), {"forward": scope["forward"]})()
    for key, value in program.numbers.items():
        setattr(module, key, value)
    return module


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
        shape = [tokens if tokens and size in _DYNAMIC_TOKENS else size for size in spec.shape]
        value = torch.randn(shape, generator=generator)
        if spec.kind == "weight":
            value = value * 0.3 + 1
        elif spec.kind == "epsilon":
            value = value.abs() * 1e-3 + 1e-5
        made.append(value.to(spec.dtype))
    return made


GROUPS: dict[str, Any] = {}


@contextlib.contextmanager
def groups() -> Iterator[dict[str, float]]:
    """Name the process groups that programs use; yields the factor of each for fake ones."""
    world = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    other = dist.new_group(list(range(size)))
    alone = [dist.new_group([r]) for r in range(size)][rank]
    GROUPS.update(WORLD=world, OTHER=other, ALONE=alone, WORLD_NAME=world.group_name, OTHER_NAME=other.group_name)
    libraries = _opaque_operators(size)
    fusewire.rms_norm.register_impl(_ELSEWHERE, supported=_nowhere)(rms_norm.native)
    fusewire.fused_add_rms_norm.register_impl(_ELSEWHERE, supported=_nowhere)(fused_add_rms_norm.native)
    try:
        yield {world.group_name: 3.0, other.group_name: 5.0, alone.group_name: 1.0}
    finally:
        fusewire.rms_norm.unregister_impl(_ELSEWHERE)
        fusewire.fused_add_rms_norm.unregister_impl(_ELSEWHERE)
        for library in libraries:
            library._destroy()
        GROUPS.clear()


def _opaque_operators(world_size: int) -> list[torch.library.Library]:
    """Operators as serving engines have them in their graphs, which fusewire knows by name."""
    engine, ir = torch.library.Library("vllm", "FRAGMENT"), torch.library.Library("vllm_ir", "FRAGMENT")
    engine.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
    ir.define("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")

    def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return torch.empty_like(tensor)
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(tensor, "sum", group_name))

    def norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        return rms_norm.native(x, weight, epsilon, 0.0, "scale_then_round")

    engine.impl("all_reduce", all_reduce, "CompositeExplicitAutograd")
    ir.impl("rms_norm", norm, "CompositeExplicitAutograd")
    return [engine, ir]


def _nowhere() -> Support:
    return Support.no("it is there to make the passes raise every norm")


def configurations(program: Program) -> dict[str, PassConfig]:
    """The configurations a program is compiled with."""
    elsewhere = dict.fromkeys(("rms_norm", "fused_add_rms_norm"), (_ELSEWHERE, "native"))
    configs = {
        "off": PassConfig(fuse_allreduce_rms=False, merge_allreduces=False),
        "default": PassConfig(),
        "operator": PassConfig(inline_native=False),
    }
    turn = program.seed % 4
    if program.may_move or turn == 0:
        configs["exact"] = PassConfig(allow_reassociation=False, inline_native=turn < 2)
    if turn == 1:
        configs["again"] = PassConfig(inline_native=False)
        configs["untouched"] = PassConfig(eliminate_noops=False, inline_native=False)
    if turn == 2:
        configs["everywhere"] = PassConfig(ir_op_priority=elsewhere, allow_reassociation=False)
    if turn == 3 and program.seed % 3 == 0:
        configs["everywhere off"] = PassConfig(
            ir_op_priority=elsewhere, fuse_allreduce_rms=False, allow_reassociation=False
        )
    return configs


# --- Checking -------------------------------------------------------------------------------------------------------


def check(program: Program, factors: dict[str, float] | None, rank: int = 0) -> list[str]:
    """Everything that is wrong with how the passes treat a program, in words; empty if nothing is."""
    fusewire.clear_report()
    compiled = Compiled(program, configurations(program), factors)
    try:
        problems = [*_check_results(compiled, rank), *_check_texts(compiled), *_check_verdicts(compiled)]
        return problems if problems or not program.dynamic else _check_other_sizes(compiled, rank)
    except Exception as error:
        return [f"{compiled.selected}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"]


def _check_results(compiled: Compiled, rank: int) -> Iterator[str]:
    want = compiled.execute("before", rank)
    for problem in want.wrong:
        yield f"before: {problem}"
    for name, config in compiled.configs.items():
        if name != "again":
            got = compiled.execute(name, rank)
            for problem in compare(want, got, _limit(compiled.program, config), compiled.program.ordered):
                yield f"{name}: {problem}"


def _check_other_sizes(compiled: Compiled, rank: int) -> list[str]:
    """The same graphs with another number of tokens."""
    problems = []
    want = compiled.execute("before", rank, tokens=9)
    for name in ("default", "operator"):
        got = compiled.execute(name, rank, tokens=9)
        if not compiled.recompiled:
            limit = _limit(compiled.program, compiled.configs[name])
            differences = compare(want, got, limit, compiled.program.ordered)
            problems += [f"{name}, 9 tokens: {problem}" for problem in differences]
    return problems


def _limit(program: Program, config: PassConfig) -> float:
    """How far the results may be from the program's own: 0, unless a rounding may move."""
    moves = program.may_move and config.allow_reassociation and config.fuse_allreduce_rms
    return _LIMITS[next(iter(program.inputs.values())).dtype] if moves else 0.0


# Largest difference, in units of the output's mean magnitude, where a bias or a scale rounds elsewhere.
_LIMITS = {torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.6}


def compare(want: Outcome, got: Outcome, limit: float, ordered: bool = True) -> Iterator[str]:
    """What differs; `ordered`: the collectives must come in the same order."""
    yield from got.wrong
    for kind, a, b in (("output", want.outputs, got.outputs), ("input", want.inputs, got.inputs)):
        if len(a) != len(b):
            yield f"{len(b)} {kind}s for {len(a)}"
        for index, (x, y) in enumerate(zip(a, b, strict=False)):
            if problem := _unequal(x, y, limit):
                yield f"{kind} {index}: {problem}"
    if _aliases(want) != _aliases(got):
        yield f"which outputs and inputs share memory: {_aliases(got)}, before {_aliases(want)}"
    # As text, so that one NaN equals another.
    if sorted(map(str, got.collectives)) != sorted(map(str, want.collectives)) and not limit:
        yield f"collectives {got.collectives}, before {want.collectives}"
    if len(got.collectives) > len(want.collectives):
        yield f"{len(got.collectives)} collectives, before {len(want.collectives)}"
    for group in {c[0] for c in want.collectives} if ordered else ():
        before, after = ([str(c) for c in o.collectives if c[0] == group] for o in (want, got))
        if before != after and not limit:
            yield f"collectives of group {group} in another order: {after}, before {before}"


def _unequal(want: Any, got: Any, limit: float) -> str:
    if not isinstance(want, Tensor):
        return "" if want == got else f"{got!r} for {want!r}"
    if want.dtype != got.dtype or want.shape != got.shape:
        return f"{got.dtype} {list(got.shape)} for {want.dtype} {list(want.shape)}"
    a, b = want.double(), got.double()
    if limit:
        scale = a.abs().nanmean().nan_to_num() + 1e-3 if a.numel() else 1.0
        worst = float(((a - b).abs().nan_to_num().max() / scale) if a.numel() else 0.0)
        return "" if worst <= limit and torch.equal(a.isnan(), b.isnan()) else f"differs by {worst:.3g} (relative)"
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return ""
    return f"{int((~same).sum())} of {same.numel()} elements differ, by up to {float((a - b).abs().max()):.3g}"


def _aliases(outcome: Outcome) -> list[tuple[int, int]]:
    tensors = [t for t in (*outcome.inputs, *outcome.outputs) if isinstance(t, Tensor) and t.numel()]
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    return [(i, j) for j in range(len(storages)) for i in range(j) if storages[i] == storages[j]]


def _check_texts(compiled: Compiled) -> Iterator[str]:
    variants = compiled.variants
    if "again" in variants and variants["again"].text != variants["operator"].text:
        yield "two runs of the passes gave different graphs"
    for name, baseline in (("default", "off"), ("operator", "off"), ("exact", "off"), ("untouched", "before")):
        if name not in variants:
            continue
        account = variants[name].account
        refused = all(entry.status == REFUSED for entry in account.entries)
        lowered = "fusewire." in variants["before"].text  # the program's own calls are lowered, whatever is refused
        if refused and not lowered and variants[name].text != variants[baseline].text:
            yield f"{name}: every all-reduce was refused, and yet the graph changed"


def _check_verdicts(compiled: Compiled) -> Iterator[str]:
    program = compiled.program
    for name, variant in compiled.variants.items():
        if variant.account is None:
            continue
        account = variant.account
        if account.notes:
            yield f"{name}: {'; '.join(account.notes)}"
        expected = program.sites
        if len(expected) != len(account.entries):
            yield f"{name}: {len(account.entries)} all-reduces in the report, {len(expected)} in the program"
            continue
        ordered = _in_program_order(account.entries)
        moved = ordered != list(account.entries)
        for site, entry in zip(expected, ordered, strict=True):
            wanted = _expected(site, name)
            if moved and wanted == FUSED:
                wanted = EITHER  # another collective may now stand between this one and what its norm needs
            if wanted != EITHER and entry.status != wanted:
                yield f"{name}: {entry.node} is {entry.status} ({entry.reason}), must be {wanted} ({site.miss})"
            if entry.status == REFUSED and not (entry.reason and entry.gate):
                yield f"{name}: {entry.node} is refused without a reason"
        fused = sum(entry.status == FUSED and not entry.fusion.startswith(MERGED) for entry in account.entries)
        calls = sum(node.target in (FUSED_OP, SANDWICH_OP) for node in variant.module.graph.nodes)
        if name == "operator" and fused != calls:
            yield f"{name}: {fused} fused in the report, {calls} calls of the fused operator"


def _in_program_order(entries: Sequence[Entry]) -> list[Entry]:
    """All-reduces as the program has them, which their names' numbers tell: Inductor moves operators in the graph."""
    places = [i for i, entry in enumerate(entries) if re.fullmatch(r"all_reduce(_\d+)?", entry.node)]
    ordered = list(entries)
    numbered = sorted((entries[i] for i in places), key=lambda e: int(e.node[len("all_reduce_") :] or 0))
    for place, entry in zip(places, numbered, strict=True):
        ordered[place] = entry
    return ordered


def _expected(site: Site, variant: str) -> str:
    if variant in ("off", "everywhere off"):
        return REFUSED
    if site.carried and variant in ("exact", "everywhere"):
        return REFUSED
    if variant == "untouched" and site.expect == FUSED:
        return EITHER  # what stands in the way may be one of the no-ops
    return site.expect


# --- Running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A program that failed, reduced to as few of its layers as still fail."""

    program: Program
    problems: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz --seed {self.program.seed} --show{' --gloo 1' * (self.where == 'gloo')}"
        return "\n".join([f"seed {self.program.seed} fails ({again})", *self.problems, str(self.program)])


def run_in_process(seeds: Iterable[int]) -> tuple[list[Failure], dict[str, int]]:
    """Check the programs of these seeds over fake process groups; returns the failures and a count of what was seen."""
    failures, seen = [], {}
    with fake_group(2), groups() as factors:
        for seed in seeds:
            program = generate(seed)
            for site in program.sites:
                seen[site.expect] = seen.get(site.expect, 0) + 1
                key = f"miss: {site.miss}" if site.miss else "no miss"
                seen[key] = seen.get(key, 0) + 1
            if problems := check(program, factors):
                failures.append(_smallest(program, problems, factors))
    return failures, seen


def _smallest(program: Program, problems: list[str], factors: dict[str, float]) -> Failure:
    """Leave out layers for as long as the program still fails."""
    layers = program.layers
    for index in program.layers:
        rest = tuple(i for i in layers if i != index)
        if rest and (fewer := check(generate(program.seed, rest), factors)):
            layers, problems = rest, fewer
    return Failure(generate(program.seed, layers), tuple(problems), "fake group")


def run_on_rank(seeds: Sequence[int]) -> list[Failure]:
    """Check the programs of these seeds within the process group that this rank belongs to."""
    failures = []
    with groups():
        for seed in seeds:
            program = generate(seed)
            if any(site.miss == "read before the wait" for site in program.sites):
                continue  # between real processes that is a race, and no two runs need to agree
            if problems := check(program, None, dist.get_rank()):
                failures.append(Failure(program, tuple(problems), "gloo"))
    return failures


def run_on_gloo(pool: RankPool, seeds: Sequence[int], timeout_s: float = 300.0) -> list[Failure]:
    """Check the programs of these seeds on the pool's ranks."""
    return [failure for rank in pool.run(run_on_rank, list(seeds), timeout_s=timeout_s) for failure in rank]


def _work(seeds: Sequence[int]) -> tuple[list[Failure], dict[str, int]]:
    torch.set_num_threads(1)
    return run_in_process(seeds)


def _in_chunks(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    return [seeds[i : i + size] for i in range(0, len(seeds), size)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the number of failing programs, at most 1 as an exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz fusewire's passes.")
    parser.add_argument("--graphs", type=int, default=1, help="programs over fake process groups (default 1)")
    parser.add_argument("--gloo", type=int, default=0, help="programs executed on 2 gloo processes (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="the first program's seed (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the fake groups (default 1)")
    parser.add_argument("--show", action="store_true", help="print each program, its graph and the rewritten graph")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    seeds = range(options.seed, options.seed + options.graphs)
    failures: list[Failure] = []
    seen: dict[str, int] = {}
    if options.show:
        _show(seeds)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as workers:
        for done, (failed, counts) in enumerate(workers.imap_unordered(_work, _in_chunks(seeds, 50))):
            for failure in failed:
                print(f"{failure}\n", flush=True)
            failures += failed
            seen = {key: seen.get(key, 0) + counts.get(key, 0) for key in {*seen, *counts}}
            print(f"{min(len(seeds), (done + 1) * 50)} of {len(seeds)} graphs, {len(failures)} failed", flush=True)
    if options.gloo:
        with RankPool(2) as pool:
            for chunk in _in_chunks(range(options.seed, options.seed + options.gloo), 20):
                failed = run_on_gloo(pool, chunk)
                for failure in failed:
                    print(f"{failure}\n", flush=True)
                failures += failed
                print(f"gloo: seeds up to {chunk[-1]}, {len(failures)} failed", flush=True)
    for key in sorted(seen):
        print(f"{seen[key]:7d} {key}")
    print(f"{len(failures)} failures in {time.perf_counter() - start:.0f} s; seeds from {options.seed}")
    return int(bool(failures))


def _show(seeds: Iterable[int]) -> None:
    with fake_group(2), groups() as factors:
        for seed in seeds:
            program = generate(seed)
            print(program)
            compiled = Compiled(program, configurations(program), factors)
            compiled.execute("before")
            for name in ("before", "operator", "default"):
                print(f"--- {name}\n{compiled.variants[name].text}")
            for entry in compiled.variants["default"].account.entries:
                print(entry)


__all__ = ("Program", "check", "generate", "main", "run_in_process", "run_on_gloo", "run_on_rank")
