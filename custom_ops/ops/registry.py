"""Register operators, and the providers that compute them.

An operator is declared by decorating its *native* function: plain PyTorch that defines what the
operator means. Providers (a FlashInfer kernel, a Triton kernel, ...) register beside it. Each call
takes the first by priority of those that can serve it. A refusal always has a reason.

    @register_op
    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...

    @rms_norm.register_impl("triton", supported=has_triton, supports_args=fits)
    def _(x, weight, eps): ...

Each operator is registered with `torch.library` as `fusewire::<name>` and can be called from eager
code, traced by torch.compile, and rewritten by the passes. Its schema is native's, plus a last
argument `str policy=""`: the providers to try, by priority, separated by commas. A graph carries
the policy it was compiled with; "" means the process's own.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from fusewire.custom_ops._torch_private import operator_name
from fusewire.errors import ConfigError, NoProviderError, SchemaError

NATIVE = "native"
_OPS: dict[str, IrOp] = {}
_LOCK = threading.RLock()
_DEFAULT = re.compile(r'=(\[[^]]*\]|"[^"]*"|[^,)]+)')  # a parameter's default in a schema
_SCOPED: contextvars.ContextVar[Mapping[str, tuple[str, ...]]] = contextvars.ContextVar(
    "fusewire_priority", default=MappingProxyType({})
)


@dataclass(frozen=True)
class Support:
    """Whether something can serve a call and, if not, why not. Truthy exactly when it can."""

    ok: bool
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.ok and not self.reason:
            raise ValueError("a Support that says no needs a reason")

    def __bool__(self) -> bool:
        return self.ok

    @staticmethod
    def no(reason: str) -> Support:
        """Return a refusal with a reason for the user."""
        return Support(False, reason)

    @staticmethod
    def all_of(*conditions: tuple[bool, str]) -> Support:
        """Return `YES` if every condition holds, else the reason beside the first that fails."""
        return next((Support(False, reason) for holds, reason in conditions if not holds), YES)


YES = Support(True)


@dataclass(frozen=True)
class Refusal:
    """The reason why one provider was passed over."""

    provider: str
    reason: str

    def __str__(self) -> str:
        return f"{self.provider}: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """The provider that serves a call, and why those of higher priority do not."""

    provider: Provider
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator.

    Attributes:
        supported: looks at the machine (hardware, packages); called once per process.
        supports_args: looks at one call's arguments (hidden size, dtypes, devices, group), never at
            data nor at the number of tokens, which is symbolic at compile time. The passes call it
            with fake tensors.
        supports_tokens: takes the same arguments and checks the number of tokens; called at run
            time only.
        batch_invariant_form: the provider that computes the same in batch-invariant arithmetic, and
            serves for this one in that mode; "" for none.
    """

    name: str
    op_name: str
    fn: Callable[..., Any]
    supported: Callable[[], Support]
    supports_args: Callable[..., Support]
    supports_tokens: Callable[..., Support]
    batch_invariant: bool = False
    version: str = ""
    batch_invariant_form: str = ""

    def check_static(self, *args: Any) -> Support:
        """Return whether this provider could serve such a call for some number of tokens."""
        return machine_support(self) and self.supports_args(*args)

    def check(self, *args: Any) -> Support:
        """Return whether this provider can serve this very call."""
        return self.check_static(*args) and self.supports_tokens(*args)


@functools.cache
def machine_support(provider: Provider) -> Support:
    """Return whether a provider can run on this machine; its check runs once per process."""
    try:
        return provider.supported()
    except Exception as error:  # a provider's broken check must not disable the other providers
        return Support.no(f"its availability check failed: {type(error).__name__}: {error}")


def always(*_: Any, **__: Any) -> Support:
    """Return `YES`: the check of a provider that has none."""
    return YES


@dataclass
class IrOp:
    """An operator: its native semantics, its providers, and the order in which they are tried."""

    name: str
    native: Callable[..., Any]
    signature: inspect.Signature
    torch_op: Any = None
    # What torch_op does on real tensors without gradients: check, choose, call.
    run: Callable[..., Any] = always
    providers: dict[str, Provider] = field(default_factory=dict)
    default_priority: tuple[str, ...] = (NATIVE,)
    # Replaces `choose` at run time if votes or costs matter (custom_ops/dispatch/).
    selector: Callable[[IrOp, tuple[Any, ...], str], Provider] | None = None
    # The operator whose providers compute this one, and its arguments in a call of this one
    # (custom_ops/dispatch/derived_ops.py). A derived op has no priority of its own.
    derives_from: IrOp | None = None
    base_args: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple
    # Whether native may be inlined in graphs. Not if it depends on the rank: ranks share caches.
    inlines: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.torch_op(*args, **kwargs)

    def register_impl(
        self,
        provider: str,
        *,
        supported: Callable[[], Support] = always,
        supports_args: Callable[..., Support] = always,
        supports_tokens: Callable[..., Support] = always,
        batch_invariant: bool = False,
        version: str = "",
        batch_invariant_form: str = "",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as the implementation `provider` of this operator.

        It has native's parameters, in native's order; it may take the last ones as `*rest`.

        Args:
            provider: its name, as it stands in priorities and reports.
            supported: says whether this machine can run it at all; asked once.
            supports_args: takes native's arguments and says whether it can serve them, whatever the
                token count.
            supports_tokens: the same, for limits on the token count; asked at run time only.
            batch_invariant: a row's result does not depend on the other rows of the batch.
            batch_invariant_form: as in `Provider`.
            version: enters the compile cache's key, beside fusewire's own sources.

        Raises:
            SchemaError: the parameters or their annotations differ from native's, or the name is
                taken.
        """

        def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
            _check_schema(self, provider, fn)
            with _LOCK:
                if provider in self.providers:
                    raise SchemaError(f"{self.name} already has a provider {provider!r}; give this one another name")
                self.providers[provider] = Provider(
                    *(provider, self.name, fn, supported, supports_args, supports_tokens),
                    *(batch_invariant, version, batch_invariant_form),
                )
            return fn

        return decorate

    def unregister_impl(self, provider: str) -> None:
        """Forget a provider that was registered (native stays)."""
        if provider == NATIVE:
            raise SchemaError(f"native defines what {self.name} means and cannot be removed")
        with _LOCK:
            self.providers.pop(provider, None)

    @property
    def priority(self) -> tuple[str, ...]:
        """The providers to try, in order: of the innermost `ir_op_priority`, else the default."""
        return _SCOPED.get().get(self.name, self.default_priority)

    def choose(
        self,
        *args: Any,
        policy: str = "",
        static: bool = False,
        machine: bool = True,
        known: Mapping[str, Support] = MappingProxyType({}),
    ) -> Choice:
        """Return the first provider by priority that can serve a call with these arguments.

        Args:
            args: native's arguments, in order; fake tensors will do with `static`.
            policy: the providers to try; the op's own priority if empty.
            static: ignore limits on the number of tokens, as at compile time.
            machine: check this machine too; with `static`, a vote at run time can do that instead.
            known: the outcomes of the ranks' votes, by provider; these providers are not checked.

        Raises:
            NoProviderError: no provider can serve; the message has each one's reason.
            ConfigError: the policy names a provider that is not registered.
        """
        refusals: list[Refusal] = []
        for name in parse_policy(self, policy):
            provider = self.providers.get(name)
            if provider is None:
                raise ConfigError(unknown_provider(self, name))
            if name in known:
                support = known[name]
            elif static:
                support = provider.check_static(*args) if machine else provider.supports_args(*args)
            else:
                support = provider.check(*args)
            if support:
                return Choice(provider, tuple(refusals))
            if not isinstance(support, Support):
                raise SchemaError(no_without_reason(self, name, support))
            refusals.append(Refusal(name, support.reason))
        listed = "\n".join(f"  - {refusal}" for refusal in refusals) or "  (the priority list is empty)"
        raise NoProviderError(
            f"no provider of fusewire::{self.name} can serve this call; tried, by priority:\n{listed}\n"
            f"Add {NATIVE!r} to the priority list to fall back to plain PyTorch."
        )

    def set_default_priority(self, providers: Sequence[str]) -> None:
        """Set the process-wide order in which providers are tried."""
        self.default_priority = check_priority(self, providers)


def no_without_reason(op: IrOp, name: str, answer: object) -> str:
    """Return the message for a check that answers something falsy other than a `Support`."""
    return (
        f"provider {name!r} of {op.name} refuses with {answer!r}, which has no reason; its checks "
        "must return YES or Support.no(reason)"
    )


def unknown_provider(op: IrOp, name: str) -> str:
    """Return the message for a provider that is not registered."""
    return f"{op.name} has no provider {name!r}; registered: {', '.join(sorted(op.providers))}"


def check_priority(op: IrOp, providers: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple; ConfigError if one is unknown or repeated, or none."""
    if op.derives_from is not None:
        base = op.derives_from.name
        raise ConfigError(f"{op.name} is computed with the providers of {base}; set the priority of {base}")
    if isinstance(providers, str):
        raise ConfigError(f"the priority list of {op.name} is the text {providers!r}; give a list of names")
    names = tuple(providers)
    if not names:
        raise ConfigError(f"the priority list of {op.name} is empty; name at least one provider")
    for name in names:
        if name not in op.providers:
            raise ConfigError(unknown_provider(op, name))
    if len(set(names)) != len(names):
        raise ConfigError(f"the priority list of {op.name} names a provider twice: {', '.join(names)}")
    return names


@functools.lru_cache(maxsize=512)
def _split_policy(policy: str) -> tuple[str, ...]:
    return tuple(part for part in policy.split(";")[0].split(",") if part)


def parse_policy(op: IrOp, policy: str) -> tuple[str, ...]:
    """Return the providers that a policy names, else those of the op's own priority."""
    return _split_policy(policy) or op.priority


def _check_schema(op: IrOp, provider: str, fn: Callable[..., Any]) -> None:
    """Raise SchemaError unless names, order, given defaults and annotations are native's.

    A function may take the last parameters together, as `*rest`; these are then not compared.
    """
    found = list(inspect.signature(fn).parameters.values())
    wanted = list(op.signature.parameters.values())
    if found and found[-1].kind is inspect.Parameter.VAR_POSITIONAL:
        found.pop()
        wanted = wanted[: len(found)]
    got_names, want_names = [p.name for p in found], [p.name for p in wanted]
    if got_names != want_names:
        raise SchemaError(
            f"provider {provider!r} of {op.name} takes ({', '.join(got_names)}), but native takes "
            f"({', '.join(want_names)}); a provider has native's parameters, in its order"
        )
    for got, want in zip(found, wanted, strict=True):
        if got.default is not inspect.Parameter.empty and got.default != want.default:
            raise SchemaError(
                f"provider {provider!r} of {op.name} defaults {got.name} to {got.default!r}, native to {want.default!r}"
            )
    got_types, want_types = _types(fn), _types(op.native)
    if got_types not in ("", want_types):
        raise SchemaError(f"provider {provider!r} of {op.name} is annotated {got_types}, native {want_types}")


def _types(fn: Callable[..., Any]) -> str:
    """Return a function's schema without its defaults, "" if its annotations are incomplete."""
    try:
        schema = torch.library.infer_schema(fn, mutates_args=())
    except Exception:  # a provider need not be annotated
        return ""
    return _DEFAULT.sub("", schema)


def add_op(op: IrOp) -> None:
    """Let an operator be found by its name."""
    _OPS[op.name] = op


def get_op(name: str) -> IrOp:
    """Return the operator of that name. Raises ConfigError if there is none."""
    if name not in _OPS:
        raise ConfigError(f"there is no operator {name!r}; there are: {', '.join(sorted(_OPS))}")
    return _OPS[name]


def all_ops() -> dict[str, IrOp]:
    """Return every registered operator by name."""
    return dict(_OPS)


def op_of_target(target: Any) -> IrOp | None:
    """Return the operator that a graph node's target calls, or None."""
    namespace, _, name = (operator_name(target) or "").partition("::")
    return _OPS.get(name) if namespace == "fusewire" else None


@contextlib.contextmanager
def ir_op_priority(priorities: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Within the block, in this thread, try the providers of the named operators in this order.

    Raises:
        ConfigError: an operator or provider is unknown, or a list is empty or repeats itself.
    """
    checked = {name: check_priority(get_op(name), providers) for name, providers in priorities.items()}
    token = _SCOPED.set({**_SCOPED.get(), **checked})
    try:
        yield
    finally:
        _SCOPED.reset(token)


def parse_priorities(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return priorities from command-line texts such as `rms_norm=triton_batch_invariant,native`.

    Raises:
        ConfigError: a text is not of that form, or names something unknown.
    """
    parsed: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, providers = text.partition("=")
        if not equals:
            raise ConfigError(
                f"{text!r}: write OP=PROVIDER[,PROVIDER...], for example all_reduce_rms_norm=flashinfer,native"
            )
        op = get_op(name.strip())
        parsed[op.name] = check_priority(op, [part.strip() for part in providers.split(",") if part.strip()])
    return parsed
