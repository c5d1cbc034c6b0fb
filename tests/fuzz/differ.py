"""Random programs on two ranks that differ: every rank's results are right, or every rank raises in time.

A seed makes a plan: a program whose collectives are the same on both ranks, a few calls of it, and what a rank does
otherwise from some call on. The program's own collectives fit together, so plain Inductor is right; where a plan fails, it
runs once more with plain Inductor to make sure. Each rank first runs its program eagerly, to know what it must get.

Most programs are compiled with Inductor's fallbacks instead of generated code, so that a plan takes about two seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import fusewire
from fusewire.custom_ops.coordination import rendezvous
from fusewire.errors import FusewireError, PeerTimeoutError
from fusewire.fusion_passes import backend
from fusewire.fusion_passes import pipeline as manager
from fusewire.fusion_passes.spmd.fingerprint import AS_WRITTEN

from fuzz import compiled as fuzz_compiled
from fuzz.execute import module_of
from fuzz.generate import generate
from fuzz.program import DTYPES, Program, make_arguments
from fuzz.ranks import GROUPS, groups
from support.distributed import RankPool, RankTimeout

LIMIT_S = 6.0  # of every wait for the other rank
PATIENT_S = 25.0  # the same, to tell a slow machine from a rank that waits in vain
HANG_S = 120.0  # of a whole plan
# For each option values that one rank may have and the other not.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "fuse_allreduce_rms": (False,),
    "fuse_sandwich_norms": (False,),
    "fuse_sequence_parallel": (False,),
    "fuse_quantization": (False,),
    "shard_residual": (True,),
    "output_in_place": (True,),
    "eliminate_noops": (False,),
    "fi_allreduce_fusion_max_size_mb": (0, 1.0),
    "ir_op_priority": (
        {"all_reduce_rms_norm": ("rank_ordered", "native")},
        {"all_reduce_rms_norm": (fuzz_compiled.NAME, "native")},
    ),
    "batch_invariant": (True,),
    "inline_native": (False,),
    "allow_reassociation": (False,),
    "merge_allreduces": (False,),
    "assume_replicated_scales": (False,),
    "assume_replicated_gates": (True,),
    "assume_replicated_residuals": (False,),
    "expect_fused": (0, 1, "all"),
    "compile_alone": (True,),
    "disabled_passes": (("raise_ops",), ("lower_ops",), ("fuse_all_reduce", "fuse_sequence_parallel")),
    "dump_graphs": ("",),  # a folder that is made for it
}
# What both ranks may have.
_COMMON: tuple[dict[str, Any], ...] = (
    *({} for _ in range(6)),
    {"inline_native": False},
    {"shard_residual": True},
    {"allow_reassociation": False},
    {"compile_alone": True},
    {"ir_op_priority": {"all_reduce_rms_norm": ("rank_ordered", "native")}},
    {"ir_op_priority": {"all_reduce_rms_norm": (fuzz_compiled.NAME,)}},
    {"ir_op_priority": {"all_reduce_rms_norm": (fuzz_compiled.NAME,)}, "output_in_place": True},
)
_EAGER = ("plain call", "disable", "stance", "inductor", "recompile limit")
_NUMBERS = (0.37, 0.25, -0.75, 0.5)
_EPSILONS = (0.4, 2.0)
KINDS = {
    "option": 4,
    "reads": 3,
    "breaks": 2,
    "recompiles": 2,
    "resets": 1,
    "runs eagerly": 4,
    "late": 1,
    "cache": 1,
    "epsilon": 1,
    "scales the norm": 1,
    "number": 3,
    "disabled": 1,
}
_IN_SOURCE = ("reads", "breaks", "recompiles", "epsilon", "scales the norm", "number")
_HARMLESS = ("late", "cache", "recompiles", "resets")  # which no rank may fail for, but for a wait that was too long
_NOWHERE = "nowhere"  # the program has no place for a change
_UNFIT = ("result unused", "gather: twice")  # compiled without what is run eagerly
# After a number or a weight that differs the residual or the norm's weight is another on each rank. shard_residual takes
# them not to be.
_UNREPLICATED = ("number", "scales the norm")


@dataclass(frozen=True)
class Change:
    """What a rank does otherwise than the other in the calls from `first` up to `end`."""

    rank: int
    kind: str
    first: int
    end: int
    detail: Any = None

    def __str__(self) -> str:
        detail = "" if self.detail is None else f" ({self.detail})"
        return f"rank {self.rank}: {self.kind}{detail} in calls {list(range(self.first, self.end))}"


@dataclass(frozen=True)
class Plan:
    """A program, its calls, and how one rank differs.

    Attributes:
        program: its source takes `how`, the kinds of changes that are in force.
        calls: the number of tokens of each call; 0 for the program's own.
        options: of both ranks.
        caches: whether both ranks have compiled the program before, and keep caches of their own.
    """

    seed: int
    program: Program
    calls: tuple[int, ...]
    changes: tuple[Change, ...]
    options: Mapping[str, Any]
    kernels: bool

    @property
    def caches(self) -> bool:
        return any(change.kind == "cache" for change in self.changes)

    def active(self, rank: int, call: int) -> list[Change]:
        """The changes that are in force on a rank in a call."""
        return [c for c in self.changes if rank == c.rank and c.first <= call < c.end]

    def __str__(self) -> str:
        lines = [f"# {change}" for change in self.changes]
        calls = [f"{tokens} tokens" if tokens else "own tokens" for tokens in self.calls]
        shown = f"# both ranks: {len(calls)} calls ({', '.join(calls)}), options {dict(self.options)}"
        return "\n".join([*lines, shown + (", generated code" if self.kernels else ""), str(self.program)])


# --- From a seed to a plan ------------------------------------------------------------------------------------------


def plan_of(seed: int, layers: Sequence[int] | None = None, kept: Sequence[int] | None = None) -> Plan:
    """The plan of a seed; of these layers of its program, and with these of its changes."""
    rng = random.Random(f"differ {seed}")
    narrow = {} if rng.random() < 0.25 else dict.fromkeys(DTYPES, torch.float32)  # float32 shows more
    with mock.patch.dict(DTYPES, narrow):
        program = _program(seed, rng, layers)
    calls = rng.randint(2, 4)
    count = rng.choice((1, 1, 1, 2, 2, 3))
    kinds = dict.fromkeys(rng.choices(list(KINDS), list(KINDS.values()), k=count))
    rank, kernels = rng.choice((0, 0, 1)), rng.random() < 0.04
    options, tokens = dict(rng.choice(_COMMON)), [0] * calls
    if program.dynamic:
        tokens = [rng.choice((0, 0, program.other_tokens)) for _ in tokens]
    text = _Text(program, random.Random(f"source {seed}"))
    text.common()
    # Mostly one rank differs.
    ranks = [rank if rng.random() < 0.75 else 1 - rank for _ in kinds]
    changes = [
        _change(rank, kind, calls, text, random.Random(f"{kind} {seed}"))
        for rank, kind in zip(ranks, kinds, strict=True)
    ]
    # Now and then the other rank does the same, from another call on.
    for change in [c for c in changes if rng.random() < 0.12]:
        changes.append(dataclasses.replace(change, rank=1 - change.rank, first=rng.randrange(calls), end=calls))
    if not program.replicated or any(change.kind in _UNREPLICATED for change in changes):
        options.pop("shard_residual", None)
        changes = [c for c in changes if not (c.kind == "option" and "shard_residual" in c.detail)]
    changes = [c for i, c in enumerate(changes) if c.detail != _NOWHERE and (kept is None or i in kept)]
    return Plan(seed, text.program(), tuple(tokens), tuple(changes), options, kernels)


def _program(seed: int, rng: random.Random, layers: Sequence[int] | None) -> Program:
    """A program of at most two layers that real ranks can run, compiled or not."""
    most = rng.choice((1, 1, 2))
    attempt = seed
    while True:
        whole = generate(attempt)
        program = generate(attempt, whole.layers[:most])
        if program.runs_on_ranks and not any(site.miss in _UNFIT for site in program.sites):
            return program if layers is None else generate(attempt, layers)
        attempt += 1_000_000


def _change(rank: int, kind: str, calls: int, text: _Text, rng: random.Random) -> Change:
    first = rng.randrange(calls)
    end = rng.choice((calls, calls, first + 1))
    if kind == "option":
        name = rng.choice(list(OPTIONS))
        return Change(rank, kind, first, end, {name: rng.choice(OPTIONS[name])})
    if kind == "runs eagerly":
        how = rng.choice(_EAGER)
        return Change(rank, kind, first, calls if how == "recompile limit" else end, how)
    if kind == "cache":
        return Change(rank, kind, 0, calls, rng.choice(("cold", "warm")))
    if kind == "late":
        return Change(rank, kind, first, end, rng.choice((0.3, 1.0)))
    return Change(rank, kind, first, end, getattr(text, kind.replace(" ", "_"), lambda: None)())


_NAME = r"[a-z_]+\d+_\d+"
_COLLECTIVE = re.compile(
    rf"^([ag]\d+_\d+) = .*(all_reduce|reduce_scatter|all_gather|wait_tensor)|^dist\.\w+\(({_NAME})"
)
_SUM = re.compile(rf"^(a\d+_\d+) = .*all_reduce\(({_NAME}), 'sum', (\w+?)(_NAME)?\)")
_RAW = re.compile(r"^((?:raw|both)\d+_\d+) = ")
_EPSILON = re.compile(
    r"^(?P<before>shifted\S+ = (?:\w+ \+ )?|.*rms_norm\([^(]*, \(16,\), [^,]+, "
    r"|.*(?:fusewire|vllm_ir)\.rms_norm\(\w+, \w+, )"
    r"(?P<eps>self\.eps\d+|\d[\d.e-]*)(?P<after>.*)$"
)


class _Text:
    """A program's source, into which the changes are written; each where `how` names it."""

    def __init__(self, program: Program, rng: random.Random) -> None:
        self.original, self.rng = program, rng
        head, *lines, last = program.source.splitlines()
        self.head, self.last = head.replace("):", ", how=''):"), last.strip().removesuffix(")")
        # So that all of them are over groups that the plan has made.
        lines = [re.sub(r"(dist\.all_reduce\((?!.*group=).*)\)$", r"\1, group=WORLD)", line.strip()) for line in lines]
        self.lines = [line.replace("'sum', [0, 1])", "'sum', WORLD)") for line in lines]
        self.inserted: dict[int, list[str]] = {}

    def program(self) -> Program:
        body = ["seen = []"]
        for index, line in enumerate(self.lines):
            body += [line, *self.inserted.get(index, ())]
        body += [*self.inserted.get(len(self.lines), ()), f"{self.last} *seen)"]
        return dataclasses.replace(
            self.original, source="\n".join([self.head, *(f"    {line}" for line in body)]) + "\n"
        )

    def common(self) -> None:
        """Give both ranks something that collectives are rewritten for."""
        draw = self.rng.random()
        if draw < 0.4:
            self._after_collective(lambda a: f"{a} = {a} * {self.rng.choice(_NUMBERS)}")
        elif draw < 0.85 and (found := [(i, m) for i, line in enumerate(self.lines) if (m := _SUM.match(line))]):
            index, match = self.rng.choice(found)
            name, part, group, _ = match.groups()
            self._insert(index, f"{name} = {name} + functional.all_reduce(torch.sin({part}), 'sum', {group})")

    def reads(self) -> str:
        found = [(i, m.group(1) or m.group(3)) for i, m in self._collectives()]
        if not found or self.rng.random() < 0.4:
            names = re.compile(rf"^({_NAME}) = ")
            found += [(i, m.group(1)) for i, line in enumerate(self.lines) if (m := names.match(line))]
        found = [(i, name) for i, name in found if not _RAW.match(self.lines[i])]
        index, name = self.rng.choice(found)
        at = index if self.rng.random() < 0.5 else len(self.lines)
        self._insert(at, f"if 'reads' in how: seen.append({name}.float().abs().sum())")
        return name

    def breaks(self) -> str:
        """A graph break, not between a collective and the wait for it."""
        pending, free = set[str](), []
        for index, line in enumerate(self.lines):
            pending = {name for name in pending if f"wait_tensor({name}" not in line}
            pending |= {match.group(1)} if (match := _RAW.match(line)) else set()
            free += [] if any(name in later for name in pending for later in self.lines[index:]) else [index]
        index = self.rng.choice(free)
        self._insert(index, "if 'breaks' in how: torch._dynamo.graph_break()")
        return f"after {self.lines[index].split(' = ')[0]}"

    def recompiles(self) -> None:
        self._insert(0, "if 'recompiles' in how: pass")

    def number(self) -> str:
        """A number of the one rank, and of the other one if that has any; it may be the model's attribute."""
        mine, other = self.rng.sample(_NUMBERS, 2)
        if self.rng.random() < 0.3:
            return self._after_collective(lambda a: f"if 'number' in how: {a} = {a} * {mine}")
        if self.rng.random() < 0.3:
            self.original.numbers.update(number=other, number_here=mine)
            return self._after_collective(lambda a: f"{a} = {a} * self.number")
        return self._after_collective(lambda a: f"{a} = {a} * ({mine} if 'number' in how else {other})")

    def epsilon(self) -> str:
        found = [(i, m) for i, line in enumerate(self.lines) if (m := _EPSILON.match(line))]
        if not found:
            return _NOWHERE
        index, match = self.rng.choice(found)
        value = f"({self.rng.choice(_EPSILONS)} if 'epsilon' in how else {match['eps']})"
        self.lines[index] = f"{match['before']}{value}{match['after']}"
        return f"{match['before']}..."

    def scales_the_norm(self) -> str:
        found = [(i, m.group(1)) for i, line in enumerate(self.lines) if (m := re.match(r"^(o\d+_\d+) = ", line))]
        if not found:
            return _NOWHERE
        index, name = self.rng.choice(found)
        other = self.rng.choice(("1.0", "0.5"))
        scaled = f"{name} = {name} * (1.5 if 'scales the norm' in how else {other})"
        self._insert(index, scaled if other != "1.0" else f"if 'scales the norm' in how: {name} = {name} * 1.5")
        return name

    def _collectives(self) -> list[tuple[int, re.Match[str]]]:
        return [(i, m) for i, line in enumerate(self.lines) if (m := _COLLECTIVE.match(line))]

    def _after_collective(self, line: Callable[[str], str]) -> str:
        found = self._collectives()
        if not found:
            return _NOWHERE
        index, match = self.rng.choice(found)
        name = match.group(1) or match.group(3)
        self._insert(index, line(name))
        return name

    def _insert(self, index: int, line: str) -> None:
        self.inserted.setdefault(index, []).append(line)


# --- On a rank ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a plan on one rank.

    Attributes:
        lines: what came of each call, up to the first that raised.
        raised: "fusewire", "group" (a collective of its own failed), "other", or "".
        error: the class of what was raised.
        rewritten: how many graphs had collectives that the passes rewrote.
        strict: how many of those mix with no others.
    """

    lines: list[str] = dataclasses.field(default_factory=list)
    raised: str = ""
    error: str = ""
    rewritten: int = 0
    strict: int = 0

    @property
    def wrong(self) -> bool:
        return any("WRONG" in line for line in self.lines)


_real_look = rendezvous._Board.look


def _always_equal(self: Any, number: int, digest: int) -> tuple[list[int], list[int]]:
    return _real_look(self, number, digest)[0], []


@dataclass(frozen=True)
class Fault:
    """Something to break on both ranks. `shows`: some plan must then have wrong results; otherwise none may."""

    shows: bool
    changes: tuple[tuple[Any, str, Any], ...]


FAULTS = {
    "nobody meets": Fault(True, ((manager, "insert_rendezvous", lambda *_: None),)),
    "graphs are always equal": Fault(True, ((rendezvous._Board, "look", _always_equal),)),
    "nobody waits for agreement": Fault(
        False, ((manager, "agree", lambda *_, **__: {}), (backend, "agree", lambda *_, **__: {}))
    ),
}


def run_plan(
    plan: Plan, folder: str, phase: str = "", fault: str = "", plain: bool = False, limit_s: float = LIMIT_S
) -> Outcome:
    """Run a plan on this rank.

    Args:
        plan: what to run.
        folder: for compile caches and dumped graphs.
        phase: "before" to run it without the changes, which fills the caches.
        fault: one of FAULTS, planted.
        plain: compile with Inductor alone.
        limit_s: of every wait for the other rank.
    """
    own = Path(folder) / (f"rank{dist.get_rank()}" if plan.caches else "both")
    variables = {"FUSEWIRE_TIMEOUT_S": str(limit_s), "TORCHINDUCTOR_CACHE_DIR": str(own)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        for owner, name, value in FAULTS[fault].changes if fault else ():
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(groups())
        stack.enter_context(fuzz_compiled._provided())
        _limited_groups(limit_s)
        fusewire.clear_report()
        torch._dynamo.reset()
        return _Rank(plan, folder, phase, plain).run()


def _limited_groups(limit_s: float) -> None:
    """Put groups with short time limits in the place of those that programs use."""
    for name in ("WORLD", "OTHER"):
        group = dist.new_group(timeout=timedelta(seconds=limit_s))
        GROUPS.update({name: group, f"{name}_NAME": group.group_name})


class _Rank:
    def __init__(self, plan: Plan, folder: str, phase: str, plain: bool) -> None:
        self.plan, self.folder, self.plain = plan, folder, plain
        self.rank = dist.get_rank() if phase != "before" else -1  # which nothing changes
        self.module = module_of(plan.program)
        self.compiled: dict[str, Callable[..., Any]] = {}
        self.outcome = Outcome()

    def run(self) -> Outcome:
        plan = self.plan
        wanted = [self._call(call, self.module) for call in range(len(plan.calls))]
        dist.barrier()
        if any(change.kind == "cache" for change in plan.active(self.rank, 0)):
            self._change_cache()
        dist.barrier()
        for call, want in enumerate(wanted):
            start = time.perf_counter()
            try:
                said = _difference(plan, want, self._changed_call(call)) or "right"
            except Exception as error:
                said = self._note(error)
            self.outcome.lines.append(f"call {call} {said} ({time.perf_counter() - start:.1f} s)")
            if self.outcome.raised:
                break
        self._count()
        return self.outcome

    def _change_cache(self) -> None:
        """Empty this rank's cache, or the other's."""
        detail = next(change.detail for change in self.plan.changes if change.kind == "cache")
        cold = self.rank if detail == "cold" else 1 - self.rank
        shutil.rmtree(Path(self.folder) / f"rank{cold}", ignore_errors=True)

    def _call(self, call: int, function: Callable[..., Any]) -> list[Tensor]:
        """What a call returns and leaves of its arguments."""
        plan = self.plan
        active = (change.kind for change in plan.active(self.rank, call))
        how = ", ".join(kind for kind in active if kind in _IN_SOURCE)
        if "number" in plan.program.numbers:
            self.module.number = plan.program.numbers["number_here" if "number" in how else "number"]
        given = dataclasses.replace(plan.program, seed=plan.program.seed + 7919 * call)
        arguments = make_arguments(given, dist.get_rank(), plan.calls[call])
        with torch.no_grad():
            results = list(function(*arguments, how=how))
            return [result.clone() for result in (*results, *arguments)]

    def _changed_call(self, call: int) -> list[Tensor]:
        active = {change.kind: change.detail for change in self.plan.active(self.rank, call)}
        if "resets" in active:
            torch._dynamo.reset()
        if "late" in active:
            time.sleep(active["late"])
        eager = active.get("runs eagerly")
        with contextlib.ExitStack() as stack:
            if "disabled" in active:
                stack.enter_context(mock.patch.dict(os.environ, {"FUSEWIRE_DISABLE": "1"}))
            if eager == "stance":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if eager == "recompile limit":
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=1))
            if eager == "plain call":
                return self._call(call, self.module)
            if eager == "disable":
                return self._call(call, torch._dynamo.disable(self.module))
            changed = {**active.get("option", {}), **({"disabled": True} if "disabled" in active else {})}
            return self._call(call, self._compile(changed, self.plain or eager == "inductor"))

    def _compile(self, changed: Mapping[str, Any], plain: bool) -> Callable[..., Any]:
        key = f"{sorted(changed)} {plain}"
        if key not in self.compiled:
            options = {**self.plan.options, **changed}
            options.pop("disabled", None)
            if "dump_graphs" in options:
                options["dump_graphs"] = str(Path(self.folder) / "graphs")
            inductor = {
                "emulate_precision_casts": True,
                "compile_threads": 1,
                "fallback_by_default": not self.plan.kernels,
            }
            self.compiled[key] = torch.compile(
                self.module,
                backend="inductor" if plain else "fusewire",
                options=inductor if plain else {**options, **inductor},
                dynamic=self.plan.program.dynamic,
            )
        return self.compiled[key]

    def _note(self, error: BaseException) -> str:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, FusewireError):
            inner = getattr(inner, "inner_exception", None) or inner.__cause__
        if inner is not None:
            kind, error = "fusewire", inner
        else:
            text = str(error)
            failed = isinstance(error, RuntimeError) and re.search(
                r"gloo|[Tt]imed out|[Cc]onnection|pair closure", text
            )
            kind = "group" if failed else "other"
        self.outcome.raised, self.outcome.error = kind, type(error).__name__
        return f"raised {type(error).__name__}: {error}"[:700]

    def _count(self) -> None:
        prints = [item for graph in fusewire.report().graphs for item in graph.fingerprints]
        self.outcome.rewritten = sum(item.rewritten != AS_WRITTEN for item in prints)
        self.outcome.strict = sum(item.strict for item in prints)


# Largest difference, in units of the output's mean magnitude.
_CLOSE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def _difference(plan: Plan, want: Sequence[Tensor], got: Sequence[Tensor]) -> str:
    if len(want) != len(got):
        return f"WRONG: {len(got)} results instead of {len(want)}"
    dtype = next(iter(plan.program.inputs.values())).dtype
    limit = _CLOSE[dtype] * (20 if plan.program.may_move else 4)
    for index, (a, b) in enumerate(zip(want, got, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"WRONG: result {index} is {b.dtype} {list(b.shape)}, not {a.dtype} {list(a.shape)}"
        a, b = a.double(), b.double()
        finite = a.isfinite()
        scale = float(a[finite].abs().mean()) + 1e-3 if finite.any() else 1.0
        if not torch.allclose(b, a, rtol=0, atol=limit * scale, equal_nan=True):
            return f"WRONG: result {index} is off by {float((b - a).abs().max()) / scale:.2g} times its mean magnitude"
    return ""


# --- What must hold -------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What came of a plan on both ranks, and what is wrong with that."""

    plan: Plan
    outcomes: list[Outcome]
    problems: list[str]
    unfit: str = ""  # why the plan says nothing about fusewire

    def __str__(self) -> str:
        again = f"python -m tests.fuzz --differ 1 --seed {self.plan.seed}"
        said = [f"rank {rank}: {line}" for rank, outcome in enumerate(self.outcomes) for line in outcome.lines]
        state = "fails" if self.problems else f"is unfit: {self.unfit}" if self.unfit else "is as it must be"
        return "\n".join([f"seed {self.plan.seed} {state} ({again})", *self.problems, *said, str(self.plan)])


def run_seed(pool: RankPool, seed: int, fault: str = "") -> Result:
    """Run the plan of a seed on a pool of two ranks; where it fails, the smallest part of it that does."""
    result = _run(pool, plan_of(seed), fault)
    if result.problems and not any(outcome.wrong for outcome in result.outcomes):
        result = _run(pool, result.plan, fault, limit_s=PATIENT_S)
    if not result.problems:
        return result
    plain = _run(pool, result.plan, plain=True)
    if plain.problems or any(outcome.raised for outcome in plain.outcomes):
        said = [line for outcome in plain.outcomes for line in outcome.lines]
        result.unfit, result.problems = f"plain Inductor fails too: {plain.problems or said}", []
    return result if result.unfit or fault else _smallest(pool, result)


def _smallest(pool: RankPool, result: Result) -> Result:
    """Leave out layers, and then changes, for as long as it still fails."""
    seed, layers = result.plan.seed, result.plan.program.layers
    kept = tuple(range(len(result.plan.changes)))
    for layer in layers if len(layers) > 1 else ():
        smaller = _run(pool, plan_of(seed, [layer]))
        if smaller.problems:
            layers, result = (layer,), smaller
            break
    for index in kept if len(kept) > 1 else ():
        rest = tuple(i for i in kept if i != index)
        if rest and (smaller := _run(pool, plan_of(seed, layers, rest))).problems:
            kept, result = rest, smaller
    return result


def _run(pool: RankPool, plan: Plan, fault: str = "", plain: bool = False, limit_s: float = LIMIT_S) -> Result:
    with tempfile.TemporaryDirectory(prefix="fusewire-differ-") as folder:
        try:
            if plan.caches:
                pool.run(run_plan, plan, folder, "before", fault, plain, limit_s, timeout_s=HANG_S)
            outcomes = pool.run(run_plan, plan, folder, "", fault, plain, limit_s, timeout_s=HANG_S)
        except RankTimeout as error:
            return Result(plan, [], [f"hangs: {error}"])
        except Exception as error:
            return Result(plan, [], [f"breaks the test's own process: {error}\n{error.__cause__ or ''}"])
    return Result(plan, outcomes, list(_problems(plan, outcomes)))


def _problems(plan: Plan, outcomes: Sequence[Outcome]) -> Iterator[str]:
    raised = [outcome.raised for outcome in outcomes]
    if any(outcome.wrong for outcome in outcomes):
        yield "a rank has wrong results"
    if any(raised) and not all(raised):
        yield "a rank raises and the other does not"
    if "other" in raised:
        yield "a rank raises what is neither fusewire's nor its group's"
    late = {outcome.error for outcome in outcomes} <= {"", PeerTimeoutError.__name__, "RuntimeError"}
    if any(raised) and not late and all(change.kind in _HARMLESS for change in plan.changes):
        yield "ranks raise, and nothing is in their way"


def run_seeds(
    pool: RankPool, seeds: Sequence[int], fault: str = "", tell: Callable[[Result], None] = lambda _: None
) -> tuple[list[Result], Counter[str]]:
    """Run the plans of these seeds; returns those that fail, and a count of what was seen."""
    failed, seen = [], Counter[str]()
    for seed in seeds:
        result = run_seed(pool, seed, fault)
        tell(result)
        failed += [result] if result.problems else []
        _count(result, seen)
    return failed, seen


def _count(result: Result, seen: Counter[str]) -> None:
    if result.unfit or not result.outcomes:
        seen["plans that are unfit" if result.unfit else "plans that end early"] += 1
        return
    raised = any(outcome.raised for outcome in result.outcomes)
    seen["plans where ranks raise" if raised else "plans where all is right"] += 1
    for change in result.plan.changes:
        seen[f"{change.kind}: {'raises' if raised else 'right'}"] += 1
    seen["plans with rewritten collectives"] += any(outcome.rewritten for outcome in result.outcomes)
    seen["plans with collectives that mix with no others"] += any(outcome.strict for outcome in result.outcomes)
