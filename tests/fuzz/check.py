"""What must hold of a program after the passes: results, graphs and verdicts."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

import fusewire
from fusewire.custom_ops.ops.sharded_norm import gather_rows
from fusewire.fusion_passes.config import PassConfig
from fusewire.fusion_passes.context import MERGED
from fusewire.fusion_passes.report.model import Entry

from fuzz.execute import FUSED_OP, LEFT_IN_BUFFER, SANDWICH_OP, SHARDED_OP, Compiled, Outcome
from fuzz.program import ALL_REDUCE, CHAIN, EITHER, FUSED, REDUCE_SCATTER, REFUSED, SEQUENCE, Program, Site
from fuzz.ranks import BUFFERED, ELSEWHERE, Ranks

_SHARDING = ("sharded", "sharded calls", "sharded in place")  # with the residual in another form on its way
_IN_PLACE = ("in place", "sharded in place")
_NO_NOTE_OF = ("shard_residual: ", "output_in_place: ", "taken to be equal on all ranks: ")


def configurations(program: Program) -> dict[str, PassConfig]:
    """The configurations a program is compiled with: some always, the others in turn."""
    elsewhere = dict.fromkeys(("rms_norm", "fused_add_rms_norm"), (ELSEWHERE, "native"))
    buffered = {"output_in_place": True, "ir_op_priority": {"all_reduce_rms_norm": (BUFFERED,)}}
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
    if program.kind == SEQUENCE and turn == 3:
        configs["sequence off"] = PassConfig(fuse_sequence_parallel=False)
    chain, turn = program.kind == CHAIN, program.seed % 5
    if program.replicated and (chain or turn == 0):
        name = "sharded calls" if turn < 3 else "sharded"
        configs[name] = PassConfig(shard_residual=True, inline_native=turn >= 3)
    if chain or turn in (1, 2):
        configs["in place"] = PassConfig(**buffered)
    if (chain and program.replicated) or (turn == 3 and program.kind == SEQUENCE):
        configs["sharded in place"] = PassConfig(shard_residual=program.replicated, **buffered)
    return configs


def check(program: Program, ranks: Ranks, seen: Counter[str] | None = None) -> list[str]:
    """Everything that is wrong with how the passes treat a program, in words; empty if nothing is.

    Args:
        program: what to check.
        ranks: where to execute it.
        seen: if given, gets a count of what the passes did.
    """
    fusewire.clear_report()
    compiled = Compiled(program, configurations(program), ranks)
    try:
        problems = [*_check_results(compiled), *_check_texts(compiled), *_check_verdicts(compiled)]
        problems += _check_sharded(compiled)
        if seen is not None:
            _count(compiled, seen)
        return problems if problems or not program.dynamic else _check_other_sizes(compiled)
    except Exception as error:
        if compiled.selected == "before" and _refused_by_torch(program, error):
            if seen is not None:
                seen["refused by torch itself"] += 1
            return []
        return [f"{compiled.selected}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"]


def _refused_by_torch(program: Program, error: Exception) -> bool:
    """torch 2.15 makes one wait of two and puts it behind its readers (test_canaries.py, waited for twice)."""
    told = "used before it has been defined" in str(error)
    twice = any(site.miss == "gather: waited for twice" for site in program.sites)
    return told and twice and TorchVersion(torch.__version__) >= (2, 15)


def _check_results(compiled: Compiled) -> Iterator[str]:
    want = compiled.execute("before")
    for outcome in want:
        for problem in outcome.wrong:
            yield f"before: {problem}"
    for name in compiled.configs:
        if name != "again":
            yield from _compare_ranks(compiled, name, want)
            if compiled.variants[name].late is not None:
                yield from _compare_ranks(compiled, name, want, late=True)


def _check_other_sizes(compiled: Compiled) -> list[str]:
    """The same graphs with another number of tokens."""
    tokens = compiled.program.other_tokens
    if compiled.recompiles(tokens):
        return []
    want = compiled.execute("before", tokens=tokens)
    names = [name for name in compiled.configs if name in ("default", "operator", *_SHARDING, *_IN_PLACE)]
    return [problem for name in names for problem in _compare_ranks(compiled, name, want, tokens)]


def _compare_ranks(
    compiled: Compiled, name: str, want: list[Outcome], tokens: int = 0, late: bool = False
) -> Iterator[str]:
    limit = _limit(compiled.program, compiled.configs[name])
    label = name + (f", {tokens} tokens" if tokens else "") + (", computed late" if late else "")
    for rank, (before, after) in enumerate(zip(want, compiled.execute(name, tokens, late), strict=True)):
        ordered = compiled.program.ordered
        problems = compare(before, after, limit, ordered, sharded=name in _SHARDING, aliases=not late)
        for problem in problems:
            yield f"{label}, rank {rank}: {problem}"


def _limit(program: Program, config: PassConfig) -> float:
    """How far the results may be from the program's own: 0, unless a rounding may move."""
    moves = program.may_move and config.allow_reassociation and config.fuse_allreduce_rms
    return _LIMITS[next(iter(program.inputs.values())).dtype] if moves else 0.0


# Largest difference, in units of the output's mean magnitude, where a bias or a scale rounds elsewhere.
_LIMITS = {torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.6}


def compare(
    want: Outcome, got: Outcome, limit: float, ordered: bool = True, sharded: bool = False, aliases: bool = True
) -> Iterator[str]:
    """What differs.

    Args:
        want, got: the program's own outcome, and that of the graph after the passes.
        limit: how far results may be apart (see `_limit`).
        ordered: the collectives must be as many, and come in the same order.
        sharded: reduce-scatters and all-gathers may stand for all-reduces.
        aliases: the same outputs and inputs must share memory.
    """
    yield from got.wrong
    for kind, a, b in (("output", want.outputs, got.outputs), ("input", want.inputs, got.inputs)):
        if len(a) != len(b):
            yield f"{len(b)} {kind}s for {len(a)}"
        for index, (x, y) in enumerate(zip(a, b, strict=False)):
            if problem := _unequal(x, y, limit):
                yield f"{kind} {index}: {problem}"
    if aliases and _aliases(want) != _aliases(got):
        yield f"which outputs and inputs share memory: {_aliases(got)}, before {_aliases(want)}"
    yield from _compare_collectives(want, got, limit, ordered, sharded)


def _compare_collectives(want: Outcome, got: Outcome, limit: float, ordered: bool, sharded: bool) -> Iterator[str]:
    before, after = want.collectives, got.collectives
    if sharded:
        # A sum of padded rows may be added up in another order, so what is summed tells nothing.
        before, after = ([(c[0], c[1], 0.0) for c in calls if c[1] != "gather"] for calls in (before, after))
    if not ordered:
        before, after = sorted({*map(str, before)}), sorted({*map(str, after)})
    # As text, so that one NaN equals another.
    if sorted(map(str, before)) != sorted(map(str, after)) and not limit:
        yield f"collectives {after}, before {before}"
    if len(after) > len(before):
        yield f"{len(after)} collectives, before {len(before)}"
    for group in {c[0] for c in before} if ordered else ():
        first, second = ([str(c) for c in calls if c[0] == group] for calls in (before, after))
        if first != second and not limit:
            yield f"collectives of group {group} in another order: {second}, before {first}"


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


def _without_comparison(text: str) -> str:
    """A graph's text without what only real process groups have: the ranks' comparison, which reads one tensor more."""
    read = re.findall(r"fusewire\.rendezvous\.default\]\(args = \(%(\w+),", text)
    lines = [line for line in text.splitlines() if "fusewire.rendezvous" not in line]
    for name in read:
        at = next(i for i, line in enumerate(lines) if line.lstrip().startswith(f"%{name} "))
        lines[at] = re.sub(r"num_users=(\d+)", lambda users: f"num_users={int(users[1]) - 1}", lines[at])
    return "\n".join(lines)


def _check_texts(compiled: Compiled) -> Iterator[str]:
    variants = compiled.variants
    if "again" in variants and variants["again"].text != variants["operator"].text:
        yield "two runs of the passes gave different graphs"
    for name, baseline in (("default", "off"), ("operator", "off"), ("exact", "off"), ("untouched", "before")):
        if name not in variants:
            continue
        report = variants[name].report
        refused = all(entry.status == REFUSED for entry in report.entries)
        lowered = "fusewire." in variants["before"].text  # the program's own calls are lowered, whatever is refused
        texts = [_without_comparison(variants[which].text) for which in (name, baseline)]
        if refused and not lowered and texts[0] != texts[1]:
            yield f"{name}: every all-reduce was refused, and yet the graph changed"


def _check_verdicts(compiled: Compiled) -> Iterator[str]:
    program = compiled.program
    for name, variant in compiled.variants.items():
        if variant.report is None:
            continue
        entries = list(variant.report.entries)
        notes = [note for note in variant.report.notes if not note.startswith(_NO_NOTE_OF)]
        if notes:
            yield f"{name}: {'; '.join(notes)}"
        if len(program.sites) != len(entries):
            yield f"{name}: {len(entries)} collectives in the report, {len(program.sites)} in the program"
            continue
        for kind in (ALL_REDUCE, REDUCE_SCATTER):
            mine = [entry for entry in entries if entry.collective == kind]
            yield from _check_entries(program, name, kind, mine, _moved(program, entries))
        fused = sum(entry.status == FUSED and not entry.fusion.startswith(MERGED) for entry in entries)
        calls = sum(node.target in (FUSED_OP, SANDWICH_OP, SHARDED_OP) for node in variant.module.graph.nodes)
        if name in ("operator", "sharded calls", *_IN_PLACE) and fused != calls:
            yield f"{name}: {fused} fused in the report, {calls} calls of the fused operator"


def _check_entries(program: Program, name: str, kind: str, entries: list[Entry], moved: bool) -> Iterator[str]:
    sites = [site for site in program.sites if site.collective == kind]
    if len(sites) != len(entries):
        yield f"{name}: {len(entries)} of {kind} in the report, {len(sites)} in the program"
        return
    for site, entry in zip(sites, _in_program_order(entries), strict=True):
        wanted = _expected(site, name)
        if moved and wanted == FUSED:
            wanted = EITHER  # another collective may now stand between this one and what its norm needs
        if wanted != EITHER and entry.status != wanted:
            yield f"{name}: {entry.node} is {entry.status} ({entry.reason}), must be {wanted} ({site.miss})"
        if entry.status == REFUSED and not (entry.reason and entry.gate):
            yield f"{name}: {entry.node} is refused without a reason"


def _moved(program: Program, entries: list[Entry]) -> bool:
    """Whether Inductor has put collectives into another order than the program's."""
    kinds = [entry.collective for entry in entries] != [site.collective for site in program.sites]
    mine = ([entry for entry in entries if entry.collective == kind] for kind in (ALL_REDUCE, REDUCE_SCATTER))
    return kinds or any(_in_program_order(of_kind) != of_kind for of_kind in mine)


def _in_program_order(entries: Sequence[Entry]) -> list[Entry]:
    """Collectives of one kind as the program has them: Inductor moves operators. Their lines tell, or else their names."""
    lines = [entry.location.rpartition(":")[2] for entry in entries]
    if all(line.isdigit() for line in lines):
        return sorted(entries, key=lambda entry: int(entry.location.rpartition(":")[2]))
    numbers = [re.fullmatch(r"(?:all_reduce|reduce_scatter_tensor)(?:_(\d+))?", entry.node) for entry in entries]
    places = [i for i, number in enumerate(numbers) if number is not None]
    ordered = list(entries)
    numbered = sorted(places, key=lambda i: int(numbers[i][1] or 0))
    for place, source in zip(places, numbered, strict=True):
        ordered[place] = entries[source]
    return ordered


def _expected(site: Site, variant: str) -> str:
    if variant in ("off", "everywhere off"):
        return REFUSED
    if site.collective == REDUCE_SCATTER and variant == "sequence off":
        return REFUSED
    if site.carried and variant in ("exact", "everywhere"):
        return REFUSED
    if variant == "untouched" and site.expect == FUSED:
        return EITHER  # what stands in the way may be one of the no-ops
    return site.expect


def _check_sharded(compiled: Compiled) -> Iterator[str]:
    """Every chain of fused operators must be sharded, and no other operator."""
    for name in ("sharded calls", "sharded in place"):
        if name not in compiled.variants or not compiled.configs[name].shard_residual:
            continue
        linked = _linked(compiled.variants["operator"].module.graph)
        already = _number_of(compiled, "operator", SHARDED_OP)
        if 0 not in compiled.program.inputs["x"].shape and len(linked) + already != _number_of(
            compiled, name, SHARDED_OP
        ):
            got = _number_of(compiled, name, SHARDED_OP) - already
            yield f"{name}: {got} operators have a sharded residual, {len(linked)} are linked by theirs"


def _linked(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """The fused operators that hand a residual to another one over the same group, or get theirs so."""
    linked = set()
    for node in graph.nodes:
        if node.target not in (FUSED_OP, SANDWICH_OP) or not isinstance(node.args[1], torch.fx.Node):
            continue
        source = node.args[1].args[0] if node.args[1].op == "call_function" else None
        if node.args[1].args[1:] != (1,) or getattr(source, "target", None) not in (FUSED_OP, SANDWICH_OP):
            continue
        shapes = [n.args[0].meta["val"].shape for n in (node, source)]
        if source.args[-2] == node.args[-2] and shapes[0] == shapes[1]:
            linked |= {source, node}
    return linked


def _number_of(compiled: Compiled, name: str, target: Any) -> int:
    return sum(node.target is target for node in compiled.variants[name].module.graph.nodes)


def _count(compiled: Compiled, seen: Counter[str]) -> None:
    for name, variant in compiled.variants.items():
        for node in variant.module.graph.nodes:
            if node.target in LEFT_IN_BUFFER and ";output=" in str(node.args[-1]) and "=-1" not in str(node.args[-1]):
                seen["results in place"] += 1
            if node.target is gather_rows.torch_op:
                seen["residuals gathered"] += 1
        if name == "operator":
            seen["reduce-scatters fused"] += _number_of(compiled, name, SHARDED_OP)
        elif name in _SHARDING:
            seen["sharded operators"] += _number_of(compiled, name, SHARDED_OP)
