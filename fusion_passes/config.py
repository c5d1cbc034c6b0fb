"""Define the options of the passes. All that change what runs enter the compile cache's key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fusewire.custom_ops.environment import BATCH_INVARIANT_VARIABLE, env_flag
from fusewire.custom_ops.ops.registry import all_ops, check_priority, get_op
from fusewire.errors import ConfigError

DISABLE_VARIABLE = "FUSEWIRE_DISABLE"


def disabled_by_environment() -> bool:
    """Return whether FUSEWIRE_DISABLE switches every pass off."""
    return env_flag(DISABLE_VARIABLE)


_REPORTS = "reports"
# The groups of options, in the order in which describe() prints them.
GROUPS = {
    "fusions": "what the passes rewrite",
    "numerics": "where results are rounded, and which providers compute them",
    "assumptions": "what is taken to hold for all ranks",
    _REPORTS: "what is checked and written; no part of the compile cache's key",
}


def _option(group: str, default: Any, doc: str) -> Any:
    """Return a dataclass field with its group and its description."""
    metadata = {"group": group, "doc": doc}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_fusion, _numeric, _assumption, _report = (functools.partial(_option, group) for group in GROUPS)


class _FrozenMapping(Mapping[str, tuple[str, ...]]):
    """An immutable mapping that, unlike types.MappingProxyType, can be copied and pickled."""

    def __init__(self, values: Mapping[str, tuple[str, ...]]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class PassConfig:
    """The options of the passes. Immutable. Options that vLLM has too have vLLM's names.

    `PassConfig.describe()` prints every option with its default and meaning, by group.

    Raises:
        ConfigError: a value cannot be used; the message says which values can.
    """

    fuse_allreduce_rms: bool = _fusion(True, "Fuse all_reduce -> [add ->] rms_norm into fusewire::all_reduce_rms_norm.")
    fuse_sandwich_norms: bool = _fusion(
        True,
        "Fuse also the residual add and the second norm of sandwich norms (all_reduce -> rms_norm -> add -> rms_norm).",
    )
    fuse_sequence_parallel: bool = _fusion(
        True, "Fuse reduce_scatter -> [add ->] rms_norm -> all_gather, the form of sequence parallelism."
    )
    fuse_quantization: bool = _fusion(
        True,
        "Fuse also the quantisation of the norm to FP8 (static, for each token, or for each 128 "
        "values), in the program's own arithmetic. With a sharded residual, FP8 rows travel.",
    )
    merge_allreduces: bool = _fusion(
        True,
        "Replace the sum or difference of two all-reduces over one group by one all-reduce of it, also "
        "where a matrix multiplies one of them (LoRA). This rounds elsewhere, so it needs "
        "allow_reassociation.",
    )
    shard_residual: bool = _fusion(
        False,
        "Keep the residual sharded by rows between fused operators: each rank adds and normalises "
        "its own rows. Meant for prefill of many tokens. Residual and weights must be equal on "
        "every rank (see assume_replicated_residuals).",
    )
    output_in_place: bool = _fusion(
        False,
        "Return a fused operator's result in the symmetric buffer where it arrives, without a "
        "copy, where the graph proves that it is read before the buffer is written again. Takes "
        "the memory of two more buffers.",
    )
    eliminate_noops: bool = _fusion(
        True, "Drop views, reshapes and casts that change nothing before the graph is matched."
    )
    disabled_passes: tuple[str, ...] = _fusion((), "Names of registered passes that do not run.")
    allow_reassociation: bool = _numeric(
        True,
        "Move a bias or a scale between the all-reduce and the norm across the sum, and accept "
        "norms that divide by a root or by the hidden size. Both round elsewhere: the norms by "
        "one unit of float32; L2 norms round their weight divided by the root of the hidden size. "
        "In float16 nothing moves that could exceed the largest number.",
    )
    batch_invariant: bool = _numeric(
        False,
        "Use only providers whose result for a row does not depend on the other rows. "
        f"{BATCH_INVARIANT_VARIABLE}=1 switches it on too.",
    )
    inline_native: bool = _numeric(
        True,
        "Where only native can serve a fused operator, write its arithmetic into the graph, where "
        "Inductor fuses it with its neighbours. False keeps the call of the operator.",
    )
    ir_op_priority: Mapping[str, tuple[str, ...]] = _numeric(
        {}, "For an operator, the providers to try, in order, e.g. {'all_reduce_rms_norm': ('flashinfer', 'native')}."
    )
    fi_allreduce_fusion_max_size_mb: float | None = _numeric(
        None,
        "Largest input, in MiB, that FlashInfer's kernels serve; larger ones go to the next "
        "provider by priority. None: the measured table of this GPU decides.",
    )
    assume_replicated_scales: bool = _assumption(
        True,
        "Assume that a one-element parameter, buffer or input that multiplies an all-reduced "
        "value (Gemma's embedding scale), or a scale computed from such ones alone, is equal on "
        "every rank, so that it can move before the all-reduce.",
    )
    assume_replicated_gates: bool = _assumption(
        False,
        "Assume that a gate (one number a token, as of a shared expert) is equal on every rank if "
        "it is computed from all-reduced values, inputs and parameters, so that it can move "
        "before the all-reduce. The graph does not prove that the parameters are equal.",
    )
    assume_replicated_residuals: bool = _assumption(
        True,
        "Assume that the residual added after an all-reduce, the norm's weight, and the scale of a "
        "static quantisation are equal on every rank. Kernels (every provider but native and "
        "rank_ordered) and shard_residual need it, since the rank that owns a row adds its own "
        "residual for all ranks. A matrix that makes what is added (LoRA's second) moves before "
        "the all-reduce. False: where the graph does not prove it, native serves, which adds each "
        "rank's own, the residual is not sharded, and no matrix moves.",
    )
    compile_alone: bool = _assumption(
        False,
        "Do not wait for the group's other ranks while compiling. Meant for a process that "
        "compiles what all of them load; they compare what they run at its first call.",
    )
    expect_fused: int | str | None = _report(
        None,
        "Number of all-reduces that must be fused in each graph that has any. 'all': every one, "
        "also those that are operators of their own, which no pass reads. Otherwise the "
        "compilation fails with the report. Where the program is known to be whole, one must "
        "have been fused.",
    )
    dump_graphs: str | None = _report(
        None,
        "Directory to write each graph to, before and after every pass. A graph from the compile cache goes through none.",
    )

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "disabled_passes", tuple(self.disabled_passes))
        limit = self.fi_allreduce_fusion_max_size_mb
        if limit is not None:
            if not limit >= 0:
                raise ConfigError(f"fi_allreduce_fusion_max_size_mb is {limit!r}; it must be a number >= 0, or None")
            object.__setattr__(self, "fi_allreduce_fusion_max_size_mb", float(limit))
        expected = self.expect_fused
        if isinstance(expected, str) and expected != "all":
            raise ConfigError(f"expect_fused is {expected!r}; it must be a count, 'all' or None")
        if isinstance(expected, int) and expected < 0:
            raise ConfigError(f"expect_fused is {expected}; a count cannot be negative")
        checked = {
            name: check_priority(get_op(name), tuple(providers))
            for name, providers in sorted(self.ir_op_priority.items())
        }
        object.__setattr__(self, "ir_op_priority", _FrozenMapping(checked))
        if env_flag(BATCH_INVARIANT_VARIABLE):
            object.__setattr__(self, "batch_invariant", True)

    def _check_types(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            types, wanted = _ACCEPTED.get(item.name, ((bool,), "True or False"))
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ConfigError(f"{item.name} is {value!r}; it must be {wanted}")
        if not all(isinstance(name, str) for name in self.disabled_passes):
            raise ConfigError(f"disabled_passes is {self.disabled_passes!r}; it must be a list of names of passes")
        for name, providers in self.ir_op_priority.items():
            if isinstance(providers, str) or not isinstance(providers, Iterable):
                raise ConfigError(f"ir_op_priority[{name!r}] is {providers!r}; it must be a list of providers")

    def __hash__(self) -> int:
        return hash(self.key())

    def key(self) -> str:
        """Return, for the compile cache's key, the options that the passes' result depends on."""
        kept = (item for item in fields(self) if item.metadata["group"] != _REPORTS)
        return repr([(item.name, getattr(self, item.name)) for item in kept])

    def policy(self, op_name: str) -> str:
        """Return the policy that compiled graphs carry in calls of the operator.

        It lists providers by priority, then `;` and options (fusewire.custom_ops.ops.registry).
        """
        op = all_ops()[op_name]
        if op.derives_from is not None:
            return self.policy(op.derives_from.name)
        names = list(self.ir_op_priority.get(op_name, op.priority))
        if self.batch_invariant:
            names = [op.providers[name].batch_invariant_form or name for name in names]
            kept = [name for name in dict.fromkeys(names) if op.providers[name].batch_invariant]
            forms = {provider.batch_invariant_form for provider in op.providers.values()}
            names = kept + [n for n, p in op.providers.items() if p.batch_invariant and n not in {*kept, *forms}]
            if not names:
                raise ConfigError(
                    f"batch_invariant=True, but no provider of {op_name} is batch-invariant; "
                    "register one with register_impl(..., batch_invariant=True)"
                )
        text = ",".join(names)
        if op_name == "all_reduce_rms_norm" and self.fi_allreduce_fusion_max_size_mb is not None:
            text += f";max_size_mb={self.fi_allreduce_fusion_max_size_mb:g}"
        return text

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of all options."""
        return tuple(item.name for item in fields(cls))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> PassConfig:
        """Return a configuration from a mapping.

        Raises:
            ConfigError: a name is unknown or a value cannot be used.
        """
        for name in options:
            if name not in cls.field_names():
                raise ConfigError(unknown_option(name, cls.field_names()))
        return cls(**options)

    @classmethod
    def describe(cls) -> str:
        """Return a text of every option with its default and meaning, one line each, by group."""
        lines = []
        for group, about in GROUPS.items():
            lines.append(f"{group}: {about}")
            for item in fields(cls):
                if item.metadata["group"] == group:
                    default = (
                        item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
                    )
                    lines.append(f"  {item.name} (default {default!r}): {item.metadata['doc']}")
        return "\n".join(lines)


# The types of the options that are not booleans, and their description in messages.
_ACCEPTED: dict[str, tuple[tuple[type, ...], str]] = {
    "fi_allreduce_fusion_max_size_mb": ((int, float, type(None)), "a number >= 0, or None"),
    "expect_fused": ((int, str, type(None)), "a count, 'all' or None"),
    "dump_graphs": ((str, type(None)), "the path of a directory, or None"),
    "disabled_passes": ((list, tuple), "a list of names of passes"),
    "ir_op_priority": ((Mapping,), "a mapping of operators to lists of providers"),
}


def unknown_option(name: str, known: tuple[str, ...]) -> str:
    """Return the message for an unknown option, with the nearest known one."""
    return f"{unknown_name('option', name, known)} (PassConfig.describe() lists fusewire's options)"


def unknown_name(kind: str, name: str, known: tuple[str, ...]) -> str:
    """Return the message for an unknown name, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint}"
