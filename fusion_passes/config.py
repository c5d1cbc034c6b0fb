"""The options of the passes. Every field enters the compile cache's key."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fusewire.custom_ops.ops.registry import all_ops, check_priority, get_op
from fusewire.errors import ConfigError

DISABLE_VARIABLE = "FUSEWIRE_DISABLE"
BATCH_INVARIANT_VARIABLE = "FUSEWIRE_BATCH_INVARIANT"
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}


def env_flag(name: str) -> bool:
    """Whether an environment variable switches something on; ConfigError if its value is neither yes nor no."""
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigError(f"{name}={value!r} is neither on (1, true, yes, on) nor off (0, false, no, off, unset)")


def disabled_by_environment() -> bool:
    """Whether FUSEWIRE_DISABLE switches every pass off."""
    return env_flag(DISABLE_VARIABLE)


def _doc(default: Any, text: str) -> Any:
    metadata = {"doc": text}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _FrozenMapping(Mapping[str, tuple[str, ...]]):
    """A mapping that cannot be changed, and unlike types.MappingProxyType can be copied and pickled."""

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
    """What the passes do. Immutable; names are vLLM's where vLLM has the same toggle.

    `PassConfig.describe()` prints every field with its meaning.

    Raises:
        ConfigError: a value cannot be used; the message says which would do.
    """

    fuse_allreduce_rms: bool = _doc(True, "Fuse all_reduce -> [add ->] rms_norm into fusewire::all_reduce_rms_norm.")
    fuse_sandwich_norms: bool = _doc(
        True,
        "Fuse the residual add and the second norm of sandwich norms (all_reduce -> rms_norm -> add -> rms_norm) too.",
    )
    fuse_sequence_parallel: bool = _doc(
        True, "Fuse reduce_scatter -> [add ->] rms_norm -> all_gather, as sequence parallelism has it."
    )
    shard_residual: bool = _doc(
        False,
        "Keep the residual sharded by rows between fused operators, so that each rank adds and normalises its own rows "
        "only; for prefill of many tokens. Right only if residual and weights are the same on every rank (see "
        "assume_replicated_residuals).",
    )
    output_in_place: bool = _doc(
        False,
        "Hand out a fused operator's result in the symmetric buffer where it arrives, without a copy, where the graph "
        "proves that it is read before the buffer is written again; takes memory for two more buffers.",
    )
    eliminate_noops: bool = _doc(True, "Drop views, reshapes and casts that change nothing, before matching.")
    fi_allreduce_fusion_max_size_mb: float | None = _doc(
        None,
        "Largest input, in MiB, that goes to FlashInfer's kernels; above it the next provider by priority serves. "
        "None: the measured table of this GPU decides.",
    )
    ir_op_priority: Mapping[str, tuple[str, ...]] = _doc(
        {}, "Per operator the providers to try, in order, e.g. {'rms_norm': ('triton', 'native')}."
    )
    batch_invariant: bool = _doc(
        False,
        "Only providers whose result for a row does not depend on the other rows; also switched on by "
        f"{BATCH_INVARIANT_VARIABLE}=1.",
    )
    inline_native: bool = _doc(
        True,
        "Where only native can serve a fused operator, write its arithmetic into the graph, so that Inductor fuses "
        "it with its neighbours; False keeps the call of the operator.",
    )
    allow_reassociation: bool = _doc(
        True,
        "Let a bias or a scale between the all-reduce and the norm move across the sum, which rounds elsewhere (in "
        "float16 not where that could pass the largest number); and let norms that divide by a root or by the hidden size, "
        "which round elsewhere by a unit of float32, count as RMSNorm.",
    )
    merge_allreduces: bool = _doc(
        True,
        "Replace a sum of two all-reduces over one group by the all-reduce of the sum (one collective fewer); rounds "
        "elsewhere, so it needs allow_reassociation.",
    )
    assume_replicated_scales: bool = _doc(
        True,
        "Take a one-element parameter, buffer or input that multiplies an all-reduced value (Gemma's embedding scale) "
        "to be the same on every rank, so that it can move before the all-reduce.",
    )
    assume_replicated_gates: bool = _doc(
        False,
        "Take a gate (one number a token, as of a shared expert) that is computed from all-reduced values, inputs and "
        "parameters to be the same on every rank, so that it can move before the all-reduce. The graph does not prove "
        "that the parameters are.",
    )
    assume_replicated_residuals: bool = _doc(
        True,
        "Take the residual that is added after an all-reduce, and the norm's weight, to be the same on every rank. "
        "Kernels (every provider but native and rank_ordered) and shard_residual need it: there the rank that owns a row "
        "adds its own residual for all ranks. False: where the graph does not prove it, only native serves, which adds "
        "each rank's own as the model does, and the residual is not sharded.",
    )
    expect_fused: int | str | None = _doc(
        None,
        "Fail the compilation of a graph that has all-reduces, with the report, unless this many of them were fused "
        "('all': every one).",
    )
    compile_alone: bool = _doc(
        False,
        "Do not wait for the group's other ranks while compiling: for a process that compiles what all of them load. They "
        "compare what they run at its first call.",
    )
    disabled_passes: tuple[str, ...] = _doc((), "Names of registered passes to leave out.")
    dump_graphs: str | None = _doc(None, "Directory to write each graph to, before and after every pass.")

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
            if isinstance(item.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{item.name} is {value!r}; it must be True or False")
        self._check_type("fi_allreduce_fusion_max_size_mb", (int, float, type(None)), "a number >= 0, or None")
        self._check_type("expect_fused", (int, str, type(None)), "a count, 'all' or None")
        self._check_type("dump_graphs", (str, type(None)), "the path of a directory, or None")
        self._check_type("disabled_passes", (list, tuple), "a list of names of passes")
        if not all(isinstance(name, str) for name in self.disabled_passes):
            raise ConfigError(f"disabled_passes is {self.disabled_passes!r}; it must be a list of names of passes")
        self._check_type("ir_op_priority", (Mapping,), "a mapping of operators to lists of providers")
        for name, providers in self.ir_op_priority.items():
            if isinstance(providers, str) or not isinstance(providers, Iterable):
                raise ConfigError(f"ir_op_priority[{name!r}] is {providers!r}; it must be a list of providers")

    def _check_type(self, name: str, types: tuple[type, ...], wanted: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, types) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; it must be {wanted}")

    def __hash__(self) -> int:
        return hash(self.key())

    def key(self) -> str:
        """All fields as text; equal exactly for equal configurations."""
        return repr([(item.name, getattr(self, item.name)) for item in fields(self)])

    def policy(self, op_name: str) -> str:
        """The policy that graphs compiled with this configuration carry in calls of the operator.

        Providers by priority, then `;` and the options of the choice between them. See fusewire.custom_ops.ops.registry.
        """
        op = all_ops()[op_name]
        if op.base is not None:
            return self.policy(op.base.name)
        names = list(self.ir_op_priority.get(op_name, op.priority))
        if self.batch_invariant:
            kept = [name for name in names if op.providers[name].batch_invariant]
            names = kept + [n for n, p in op.providers.items() if p.batch_invariant and n not in kept]
            if not names:
                raise ConfigError(
                    f"batch_invariant=True, but no provider of {op_name} is batch-invariant; register one with "
                    "register_impl(..., batch_invariant=True)"
                )
        text = ",".join(names)
        if op_name == "all_reduce_rms_norm" and self.fi_allreduce_fusion_max_size_mb is not None:
            text += f";max_size_mb={self.fi_allreduce_fusion_max_size_mb:g}"
        return text

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(item.name for item in fields(cls))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> PassConfig:
        """A configuration from a mapping; an unknown name is an error that suggests the nearest one.

        Raises:
            ConfigError: a name is unknown or a value cannot be used.
        """
        for name in options:
            if name not in cls.field_names():
                raise ConfigError(unknown_option(name, cls.field_names()))
        return cls(**options)

    @classmethod
    def describe(cls) -> str:
        """Every option with its default and meaning, one paragraph each."""
        lines = []
        for item in fields(cls):
            default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
            lines.append(f"{item.name} (default {default!r}): {item.metadata['doc']}")
        return "\n".join(lines)


def unknown_option(name: str, known: tuple[str, ...]) -> str:
    """The message for an option that does not exist, with the nearest that does."""
    return f"{unknown_name('option', name, known)} (PassConfig.describe() lists fusewire's options)"


def unknown_name(kind: str, name: str, known: tuple[str, ...]) -> str:
    """The message for a name that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint}"
