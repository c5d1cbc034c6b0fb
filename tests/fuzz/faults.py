"""Faults to plant in the passes: the fuzzer must notice each of them."""

from __future__ import annotations

import dataclasses
import operator

import torch

from fusewire.custom_ops.ops.registry import YES, Support
from fusewire.fusion_passes.analysis import graph, norm_arithmetic, norm_reader, paths
from fusewire.fusion_passes.analysis.graph import aten, getitem_users
from fusewire.fusion_passes.passes import (
    eliminate_noops,
    merge_all_reduces,
    place_outputs,
    raise_ops,
    shard_residual,
)
from fusewire.fusion_passes.passes.fuse_all_reduce import AllReduceFuser
from fusewire.fusion_passes.passes.fuse_sequence_parallel import SequenceFuser
from fusewire.patterns import norms

from fuzz import ranks as fuzz_ranks


def yes(*_, **__):
    return YES


def without_clause(name, fuser=AllReduceFuser):
    return [(fuser, "clauses", tuple(c for c in fuser.clauses if c.__name__ != name))]


def without_refusal(words):
    """A raise pass that goes on where it refuses with these words."""
    real = raise_ops.site_refusals

    def refusals(*site):
        return (case for case in real(*site) if words not in case[1])

    return [(raise_ops, "site_refusals", refusals)]


def swapped_outputs(graph, node, index):
    item = graph.call_function(operator.getitem, (node, 1 - index))
    item.meta["val"] = node.meta["val"][1 - index]
    return item


def forgets_weight_bias(user, value, hidden):
    found = real_weight_of(user, value, hidden)
    return None if found is None else dataclasses.replace(found, bias=0.0)


def rounded_sum_unrounded(user, value, hidden):
    """Reads `1 + w`, rounded in the weight's dtype, as Gemma's `1 + w` in fp32."""
    found = real_weight_of(user, value, hidden)
    if found is None or found.bias:
        return found
    operands = graph.plain_add(found.node)
    if operands is None or not graph.is_number(operands[1]):
        return found
    return dataclasses.replace(found, node=operands[0], bias=operands[1])


def scale_not_moved(path, *kinds):
    return tuple(step for step in path.steps if step.kind in kinds and step.kind != paths.SCALE)


def only_scales_moved(path, call):
    x = path.all_reduce.x
    for step in path.of_kind(paths.SCALE):
        x = call(aten.mul.Tensor, (x, step.value), {}, step.node)
    return x


def same_group_only(captures):
    """A gather of this group, for however many ranks."""
    return Support.all_of((captures["group"] == captures["gathered_group"], "another group"))


def handed_over_by_anyone(op):
    """As `_handed_over`, over whatever groups."""
    residual = op.args[1]
    if not isinstance(residual, torch.fx.Node) or residual.target is not operator.getitem or residual.args[1] != 1:
        return None
    source = residual.args[0]
    return source if source.target in shard_residual._FUSED else None


def without_inner_norm(node):
    arguments = real_positional(node)
    return arguments if len(arguments) == 8 else [*arguments[:6], *arguments[-2:]]


def rows_of_the_norm(graph, node, index):
    """The sharded operator's norm, taken for this rank's rows of the residual."""
    return real_getitem(graph, node, 0 if index == 1 else index)


def gathered_over_another(graph, target, args, kwargs, origin):
    """A gather of the residual over another group of the same ranks."""
    if target is shard_residual.gather_rows.torch_op:
        names = {fuzz_ranks.GROUPS["WORLD_NAME"], fuzz_ranks.GROUPS["OTHER_NAME"]}
        args = (*args[:2], *(names - {args[2]}))
    return real_new_call(graph, target, args, kwargs, origin)


def flipped_rows(graph, target, args, kwargs, origin):
    """The residual that a chain begins with, of which every rank takes other rows than its own."""
    if target is shard_residual.shard_rows.torch_op:
        args = (real_new_call(graph, aten.flip.default, (args[0], [0]), {}, origin), args[1])
    return real_new_call(graph, target, args, kwargs, origin)


def readers_but_the_output(call):
    """As `_readers`, to which the graph's output is no reader."""
    found, pending = [], [item for index, item in getitem_users(call) if index == place_outputs._PLACED[call.target]]
    seen = set(pending)
    while pending:
        for user in pending.pop().users:
            if user.op == "call_function" and place_outputs._materializes(user):
                found.append(user)
            elif user.op == "call_function" and place_outputs.writes_in_place(user):
                return None
            elif user.op == "call_function" and user not in seen:
                seen.add(user)
                pending.append(user)
    return found


def a_workspace_each(call):
    return call.name


real_new_call = shard_residual.new_call
real_getitem = shard_residual.getitem
real_positional = shard_residual.positional
real_weight_of = norm_reader.weight_of
# By name: the programs that must notice it (see `holds`), and what is replaced where.
FAULTS = {
    "any reduction is a sum": ("other reduction", without_clause("check_reduction")),
    "one rank is enough": ("group of one rank", without_clause("check_group")),
    "any weight": ("wide weight", without_clause("check_weight")),
    "any residual": ("wide residual", without_clause("check_residual")),
    "broadcast residual": ("broadcast residual", without_clause("check_residual")),
    "any epsilon": ("negative epsilon", without_clause("check_epsilon")),
    "further readers ignored": ("all-reduce also read", [(AllReduceFuser, "check_readers", yes)]),
    "order ignored": ("collective between", [(AllReduceFuser, "check_order", yes)]),
    "own result added": ("doubled", without_refusal("computed from that result")),
    "steps also read": ("step also read", without_refusal("is also read elsewhere")),
    "weight of the sum": ("weight of the sum", without_refusal("the norm's weight")),
    "epsilon of the sum": ("epsilon of the sum", without_refusal("the norm's eps")),
    "strides ignored": ("strided residual", without_refusal("is not contiguous")),
    # Both refuse it: with either alone nothing goes wrong.
    "broadcast sum": (
        "broadcast all-reduce",
        [*without_refusal("broadcast"), *without_clause("check_residual")],
    ),
    "outputs swapped": ("", [(raise_ops, "getitem", swapped_outputs)]),
    "weight bias lost": ("", [(norm_reader, "weight_of", forgets_weight_bias)]),
    "rounding of 1 + w lost": ("", [(norm_reader, "weight_of", rounded_sum_unrounded)]),
    "rounding order lost": ("", [(norm_reader, "tail_form", lambda steps: norms.SCALE_THEN_ROUND)]),
    "rounding order turned": ("", [(norm_reader, "tail_form", lambda steps: norms.ROUND_THEN_SCALE)]),
    "any dimension": (
        "mean over tokens",
        [
            (norm_arithmetic, "_over_last_dimension", lambda mean: True),
            (norm_reader, "reaches_every_row", lambda node, wide: True),
            (norm_arithmetic, "_is_per_row", lambda node, wide: True),
        ],
    ),
    "any sum": ("sum of squares", [(norm_arithmetic.Row, "is_mean", True)]),
    "another tensor scaled": ("another tensor scaled", [(norm_reader, "same_input", lambda *_: True)]),
    "any product": ("product, not square", [(norm_arithmetic, "_squared", lambda node: node.args[0])]),
    "any mean": ("sum of squares", [(norm_arithmetic, "_is_mean", lambda node: node.op == "call_function")]),
    "alpha ignored": ("alpha", [(norm_reader, "addends_of", lambda node: tuple(node.args[:2]))]),
    "narrow arithmetic": (
        "narrow arithmetic",
        [(norm_reader, "_computed_in", norm_reader.dtype_of)],
    ),
    "double arithmetic": ("double arithmetic", [(norm_reader, "_computed_in", lambda node: torch.float64)]),
    "scales dropped": ("", [(paths.Path, "of_kind", scale_not_moved)]),
    "views dropped": ("", [(paths.Path, "moved_input", only_scales_moved)]),
    "relu is a view": ("relu", [(paths, "VIEWS", paths.VIEWS | {aten.relu.default})]),
    "slice is a view": ("slice", [(paths, "VIEWS", paths.VIEWS | {aten.slice.Tensor})]),
    "any group merges": ("two all-reduces", [(merge_all_reduces, "_same_reduction", lambda a, b: True)]),
    "copies are no-ops": ("", [(eliminate_noops, "_same_layout", lambda node, source: True)]),
    # Sequence parallelism
    "rows: any reduction": ("scatter: other reduction", without_clause("check_reduction", SequenceFuser)),
    "rows: one rank is enough": ("scatter: group of one rank", without_clause("check_group", SequenceFuser)),
    "rows: any group gathers": ("gather: other group", without_clause("check_gather", SequenceFuser)),
    "rows: any world size": (
        "gather: other world size",
        [(SequenceFuser, "clauses", (*SequenceFuser.clauses[:2], same_group_only))],
    ),
    "rows: hidden dimension": ("scatter: flat", without_clause("check_rows", SequenceFuser)),
    "rows: any weight": ("sequence: wide weight", without_clause("check_weight", SequenceFuser)),
    "rows: wide residual": ("rows: wide residual", [(SequenceFuser, "check_residual", yes)]),
    "rows: broadcast residual": ("rows: broadcast residual", [(SequenceFuser, "check_residual", yes)]),
    "rows: readers ignored": ("rows: also read", [(SequenceFuser, "check_readers", yes)]),
    "rows: order ignored": ("rows: collective between", [(SequenceFuser, "check_order", yes)]),
    "rows: scales ignored": ("rows: scaled", without_refusal("a view, a scale or a sum stands between")),
    # Sharded residuals
    "any group hands over": ("chain", [(shard_residual, "_handed_over", handed_over_by_anyone)]),
    "other readers forgotten": ("chain", [(shard_residual, "_other_readers", lambda op: iter(()))]),
    "norm for the residual": ("chain", [(shard_residual, "getitem", rows_of_the_norm)]),
    "inner norm lost": ("chain: w_inner", [(shard_residual, "positional", without_inner_norm)]),
    "gathered over another group": ("chain", [(shard_residual, "new_call", gathered_over_another)]),
    "rows of another rank": ("chain", [(shard_residual, "new_call", flipped_rows)]),
    # Results in place
    "readers not waited for": ("chain", [(place_outputs._Needs, "all_read", lambda self, before, call: True)]),
    "outputs may stay": ("chain", [(place_outputs, "_readers", readers_but_the_output)]),
    "writes may read late": ("chain: .copy_(", [(place_outputs, "writes_in_place", lambda node: False)]),
    "cheap values are kept": ("chain", [(place_outputs, "_materializes", lambda node: True)]),
    "a workspace for each call": ("chain", [(place_outputs, "_workspace", a_workspace_each)]),
}


def holds(program, what):
    """Whether a program has this miss, or ("sequence: ...") has it after a reduce-scatter, or is a chain whose source
    has this text ("chain: ...")."""
    kind, _, rest = what.partition(": ")
    if kind == "chain":
        return program.kind == kind and rest in program.source
    if kind == "sequence":
        return any(site.miss == rest and site.collective == "reduce_scatter" for site in program.sites)
    return any(site.miss == what for site in program.sites)
