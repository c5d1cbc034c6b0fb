"""Operators whose semantics are kept apart from the providers that compute them.

An operator is declared by decorating its *native* function: plain PyTorch that defines what the operator means.
Providers (a FlashInfer kernel, a Triton kernel, ...) register beside it and are chosen call by call, by priority,
among those that say they can serve. A "no" always carries its reason.

    @register_op
    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor: ...

    @rms_norm.register_impl("triton", supported=has_triton, supports_args=fits)
    def _(x, weight, eps): ...

Each operator is registered with `torch.library` as `fusewire::<name>` and can be called from eager code, traced by
torch.compile, and rewritten by the passes. Its schema is native's, plus a last argument `str policy=""`: the providers
to try, by priority, separated by commas. A graph carries the policy it was compiled with; "" means the process's own.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, overload

import torch
from torch._library.autograd import make_autograd_impl

from fusewire.errors import ConfigError, NoProviderError, SchemaError

NATIVE = "native"
_LIBRARY = torch.library.Library("fusewire", "DEF")
_OPS: dict[str, IrOp] = {}
_LOCK = threading.RLock()
_KERNELS = frozenset({torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA})
_SCOPED: contextvars.ContextVar[Mapping[str, tuple[str, ...]]] = contextvars.ContextVar(
    "fusewire_priority", default=MappingProxyType({})
)


@dataclass(frozen=True)
class Support:
    """Whether something can serve and, if not, why not. Truthy exactly when it can."""

    ok: bool
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.ok and not self.reason:
            raise ValueError("a Support that says no needs a reason")

    def __bool__(self) -> bool:
        return self.ok

    @staticmethod
    def no(reason: str) -> Support:
        """A refusal, with the reason the user will read."""
        return Support(False, reason)

    @staticmethod
    def all_of(*conditions: tuple[bool, str]) -> Support:
        """`YES` if every condition holds, else a refusal with the reason beside the first that does not."""
        for holds, reason in conditions:
            if not holds:
                return Support(False, reason)
        return YES


YES = Support(True)


@dataclass(frozen=True)
class Refusal:
    """Why one provider was passed over."""

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

    `supported` looks at the machine (hardware, packages) and is asked once per process. `supports_args` looks at one
    call's arguments (hidden size, dtypes, devices, group), never at data nor at the number of tokens, which is
    symbolic at compile time; it is asked by the passes with fake tensors too. `supports_tokens` takes the same
    arguments and is asked at run time only: limits on the number of tokens belong there.
    """

    name: str
    op_name: str
    fn: Callable[..., Any]
    supported: Callable[[], Support]
    supports_args: Callable[..., Support]
    supports_tokens: Callable[..., Support]
    batch_invariant: bool = False
    version: str = ""

    def check_static(self, *args: Any) -> Support:
        """Whether this provider could serve such a call for some number of tokens (args: native's, in order)."""
        return _machine_support(self) and self.supports_args(*args)

    def check(self, *args: Any) -> Support:
        """Whether this provider can serve this very call."""
        return self.check_static(*args) and self.supports_tokens(*args)


@functools.cache
def _machine_support(provider: Provider) -> Support:
    try:
        return provider.supported()
    except Exception as error:  # a provider whose probe breaks must not take the others with it
        return Support.no(f"its availability check failed: {type(error).__name__}: {error}")


def _always(*_: Any, **__: Any) -> Support:
    return YES


def checks_nothing(check: Callable[..., Support]) -> bool:
    """Whether a provider was registered without this check, so that it says yes on every rank."""
    return check is _always


@dataclass
class IrOp:
    """An operator: its native semantics, its providers, and the order in which they are tried."""

    name: str
    native: Callable[..., Any]
    signature: inspect.Signature
    torch_op: Any = None
    # What torch_op does on real tensors without gradients: check, choose, call.
    run: Callable[..., Any] = _always
    providers: dict[str, Provider] = field(default_factory=dict)
    default_priority: tuple[str, ...] = (NATIVE,)
    # Chooses at run time instead of `choose`, where more than "the first that can" is at stake (custom_ops/dispatch.py).
    selector: Callable[[IrOp, tuple[Any, ...], str], Provider] | None = None
    # The operator whose providers this one is computed with, and its arguments in a call of this one
    # (custom_ops/extended.py); such an operator has no priority of its own.
    base: IrOp | None = None
    base_args: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple
    # Whether native may be written into graphs. Not if it depends on the rank: ranks share compile caches.
    inlines: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.torch_op(*args, **kwargs)

    def register_impl(
        self,
        provider: str,
        *,
        supported: Callable[[], Support] = _always,
        supports_args: Callable[..., Support] = _always,
        supports_tokens: Callable[..., Support] = _always,
        batch_invariant: bool = False,
        version: str = "",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as the implementation `provider` of this operator.

        Args:
            provider: its name, as it stands in priorities and reports.
            supported: says whether this machine can run it at all; asked once.
            supports_args: takes native's arguments and says whether it can serve them, whatever the token count.
            supports_tokens: the same, for limits on the token count; asked at run time only.
            batch_invariant: a row's result does not depend on the other rows of the batch.
            version: enters the compile cache's key, beside fusewire's own sources.

        Raises:
            SchemaError: the parameters differ from native's, or the name is taken.
        """

        def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
            _check_schema(self, provider, fn)
            with _LOCK:
                if provider in self.providers:
                    raise SchemaError(f"{self.name} already has a provider {provider!r}; give this one another name")
                self.providers[provider] = Provider(
                    provider, self.name, fn, supported, supports_args, supports_tokens, batch_invariant, version
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
        """The providers to try, in order: the innermost `ir_op_priority(...)`, else the process-wide default."""
        return _SCOPED.get().get(self.name, self.default_priority)

    def choose(
        self,
        *args: Any,
        policy: str = "",
        static: bool = False,
        machine: bool = True,
        known: Mapping[str, Support] = MappingProxyType({}),
    ) -> Choice:
        """The first provider by priority that can serve a call with these arguments.

        Args:
            args: native's arguments, in order; fake tensors will do with `static`.
            policy: the providers to try; the op's own priority if empty.
            static: leave limits on the number of tokens aside, as at compile time.
            machine: ask what this machine has, too; with `static` it can be left to a vote at run time.
            known: answers of providers that are not to be asked, since the ranks have voted on them.

        Raises:
            NoProviderError: none can; the message gives each one's reason.
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
    return (
        f"provider {name!r} of {op.name} refuses with {answer!r}, which has no reason; its checks "
        "must return YES or Support.no(reason)"
    )


def unknown_provider(op: IrOp, name: str) -> str:
    return f"{op.name} has no provider {name!r}; registered: {', '.join(sorted(op.providers))}"


def check_priority(op: IrOp, providers: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple, or ConfigError if one is unknown, repeated, or the list is empty."""
    if op.base is not None:
        raise ConfigError(
            f"{op.name} is computed with the providers of {op.base.name}; set the priority of {op.base.name}"
        )
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
    """The providers named by a policy, by priority (a policy with options alone means the op's own priority)."""
    return _split_policy(policy) or op.priority


def _check_schema(op: IrOp, provider: str, fn: Callable[..., Any]) -> None:
    found = list(inspect.signature(fn).parameters.values())
    wanted = list(op.signature.parameters.values())
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


@overload
def register_op(fn: Callable[..., Any], /) -> IrOp: ...


@overload
def register_op(
    *,
    fake: Callable[..., Any] | None = ...,
    check: Callable[..., None] | None = ...,
    extends: tuple[IrOp, Callable[[tuple[Any, ...]], tuple[Any, ...]]] | None = ...,
    inlines: bool = ...,
    batch_invariant: bool = ...,
) -> Callable[[Callable[..., Any]], IrOp]: ...


def register_op(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    fake: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    extends: tuple[IrOp, Callable[[tuple[Any, ...]], tuple[Any, ...]]] | None = None,
    inlines: bool = True,
    batch_invariant: bool = False,
) -> IrOp | Callable[[Callable[..., Any]], IrOp]:
    """Declare an operator; the decorated function is its native semantics and its provider `native`.

    Args:
        fn: native, with annotated parameters (torch.library infers the schema from them).
        fake: computes the outputs' shapes and dtypes from fake tensors; native itself by default.
        check: raises ArgumentError for arguments that no provider could take; called before every dispatch.
        extends: the operator whose providers compute this one, and what makes that operator's arguments of this one's.
        inlines: False keeps native out of graphs, as it must be where native depends on the rank.
        batch_invariant: whether native is, as in `register_impl`.

    Raises:
        SchemaError: an operator of that name exists.
    """
    options: dict[str, Any] = {
        "fake": fake,
        "check": check,
        "extends": extends,
        "inlines": inlines,
        "batch_invariant": batch_invariant,
    }
    if fn is None:
        return functools.partial(_register, **options)
    return _register(fn, **options)


def _register(
    fn: Callable[..., Any],
    *,
    fake: Callable[..., Any] | None,
    check: Callable[..., None] | None,
    extends: tuple[IrOp, Callable[[tuple[Any, ...]], tuple[Any, ...]]] | None,
    inlines: bool,
    batch_invariant: bool,
) -> IrOp:
    name = fn.__name__
    if name in _OPS:
        raise SchemaError(f"fusewire::{name} is registered already")
    op = IrOp(name, fn, inspect.signature(fn), inlines=inlines)
    if extends is not None:
        op.base, op.base_args = extends
    schema = torch.library.infer_schema(fn, mutates_args=())
    head, arrow, returns = schema.rpartition(" -> ")
    separator = "" if head.endswith("()") else ", "
    _LIBRARY.define(f'{name}{head[:-1]}{separator}str policy=""){arrow}{returns}')

    def dispatch(*args: Any, policy: str = "") -> Any:
        if len(args) > n_params:
            args, policy = args[:n_params], args[n_params]
        bound = args + defaults[len(args) :]
        if check is not None:
            check(*bound)
        if op.selector is not None:
            return op.selector(op, bound, policy).fn(*bound)
        return op.choose(*bound, policy=policy).provider.fn(*bound)

    def fake_dispatch(*args: Any, policy: str = "") -> Any:
        bound = args[:n_params]
        bound = bound + defaults[len(bound) :]
        if check is not None:
            check(*bound)
        return (fake or fn)(*bound)

    n_params = len(op.signature.parameters)
    defaults = tuple(p.default for p in op.signature.parameters.values())
    op.run = _keywords_to_positions(op, dispatch)
    _LIBRARY.impl(name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusewire::{name}", _keywords_to_positions(op, fake_dispatch), lib=_LIBRARY)
    op.torch_op = getattr(torch.ops.fusewire, name).default
    op.providers[NATIVE] = Provider(NATIVE, name, fn, _always, _always, _always, batch_invariant)
    _OPS[name] = op
    return op


@dataclass
class _Autograd:
    """The two functions of an operator's derivative, by the names that torch.library has for them."""

    _backward_fn: Callable[..., Any] | None
    _setup_context_fn: Callable[..., None] | None


def register_autograd(op: IrOp, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
    """As `torch.library.register_autograd`, at half the host time of a call that needs no gradient.

    torch's own goes through the dispatcher a second time; where grad mode is off, and nothing but the backend's kernel
    is left to dispatch to (no tracing, no subclass), this calls that kernel.
    """
    with_gradient = make_autograd_impl(op.torch_op, _Autograd(backward, setup_context))
    below, kernels, run = torch._C._after_autograd_keyset, _KERNELS, op.run

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and (keyset & below).highestPriorityTypeId() in kernels:
            return run(*args, **kwargs)
        return with_gradient(keyset, *args, **kwargs)

    _LIBRARY.impl(op.name, autograd, "Autograd", with_keyset=True)


def _keywords_to_positions(op: IrOp, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let `fn`, which takes positions, be called with any mix of positions and keywords."""
    parameters = op.signature.parameters

    def call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs:
            return fn(*args)
        policy = kwargs.pop("policy", "")
        rest = (kwargs.get(p.name, p.default) for p in list(parameters.values())[len(args) :])
        return fn(*args, *rest, policy=policy)

    return call


def get_op(name: str) -> IrOp:
    """The operator of that name, or ConfigError naming those that exist."""
    if name not in _OPS:
        raise ConfigError(f"there is no operator {name!r}; there are: {', '.join(sorted(_OPS))}")
    return _OPS[name]


def all_ops() -> dict[str, IrOp]:
    """Every registered operator by name."""
    return dict(_OPS)


def op_of_target(target: Any) -> IrOp | None:
    """The operator that a graph node's target calls, or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "fusewire":
        return _OPS.get(target._schema.name.partition("::")[2])
    return None


@contextlib.contextmanager
def ir_op_priority(priorities: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Within the block, try the providers of the named operators in this order.

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
    """Priorities from command-line texts such as `rms_norm=triton,native`.

    Raises:
        ConfigError: a text is not of that form, or names something unknown.
    """
    parsed: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, providers = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: write OP=PROVIDER[,PROVIDER...], for example rms_norm=triton,native")
        op = get_op(name.strip())
        parsed[op.name] = check_priority(op, [part.strip() for part in providers.split(",") if part.strip()])
    return parsed
