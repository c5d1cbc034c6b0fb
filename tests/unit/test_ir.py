"""Operators and their providers: registration, choice; what native norms and the fused operator compute."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewire.custom_ops.ops import registry as ir
from fusewire.custom_ops.ops.registration import register_op
from fusewire.custom_ops.ops.registry import (
    NATIVE,
    YES,
    Support,
    all_ops,
    get_op,
    ir_op_priority,
    op_of_target,
    parse_policy,
    parse_priorities,
)
from fusewire.errors import (
    ArgumentError,
    ConfigError,
    FusewireError,
    NoProviderError,
    SchemaError,
)

_NUMBERS = itertools.count()


def _check_factor(x: Tensor, factor: float) -> None:
    if factor == 13:
        raise ArgumentError("13 is not a factor")


@pytest.fixture
def scale(request):
    """An operator of one test's own, `x * factor`, forgotten afterwards."""

    def native(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    native.__name__ = f"scale_{next(_NUMBERS)}"
    op = register_op(check=_check_factor)(native)
    yield op
    ir._OPS.pop(op.name)


def _answers(op: Any, provider: str, answer: float, **options: Any) -> None:
    """Register a provider whose result is `answer` everywhere."""

    def impl(x: Tensor, factor: float) -> Tensor:
        return torch.full_like(x, answer)

    op.register_impl(provider, **options)(impl)


# Registration


def test_an_operator_is_registered_with_torch(scale):
    """Its schema is native's and a policy; it is found by name and by a graph node's target."""
    assert str(scale.torch_op._schema) == f'fusewire::{scale.name}(Tensor x, float factor=2., str policy="") -> Tensor'
    assert get_op(scale.name) is scale
    assert all_ops()[scale.name] is scale
    assert op_of_target(scale.torch_op) is scale
    assert op_of_target(torch.ops.aten.add.Tensor) is None
    assert op_of_target("relu") is None
    assert list(scale.providers) == [NATIVE]
    assert torch.equal(getattr(torch.ops.fusewire, scale.name)(torch.ones(2)), torch.full((2,), 2.0))


def test_register_op_without_options():
    """As a bare decorator, also without parameters."""

    def constant() -> Tensor:
        return torch.ones(3)

    constant.__name__ = f"constant_{next(_NUMBERS)}"
    op = register_op(constant)
    try:
        assert str(op.torch_op._schema) == f'fusewire::{constant.__name__}(str policy="") -> Tensor'
        assert torch.equal(op(), torch.ones(3))
        assert torch.equal(op(policy=NATIVE), torch.ones(3))
    finally:
        ir._OPS.pop(op.name)


def test_an_operator_is_registered_once(scale):
    """A second of the same name is refused."""
    with pytest.raises(SchemaError, match=f"fusewire::{scale.name} is registered already"):
        register_op(scale.native)


def test_unknown_operator_names_those_that_exist():
    """The error lists the operators."""
    with pytest.raises(ConfigError, match=r"no operator 'rmsnorm'; there are: .*fused_add_rms_norm.*rms_norm"):
        get_op("rmsnorm")


def _whole_factor(x: Tensor, factor: int) -> Tensor:
    return x


def _two_results(x: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
    return x, x


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        (lambda x: x, r"'p' of scale_\d+ takes \(x\), but native takes \(x, factor\)"),
        (lambda factor, x: x, r"takes \(factor, x\), but native"),
        (lambda x, scale: x, r"takes \(x, scale\), but native"),
        (lambda factor, *rest: rest[0], r"takes \(factor\), but native takes \(x\);"),
        (lambda x, factor, more, *rest: x, r"takes \(x, factor, more\), but native"),
        (lambda x, factor, more=1: x, r"takes \(x, factor, more\), but native"),
        (lambda x, factor=3.0: x, r"'p' of scale_\d+ defaults factor to 3.0, native to 2.0"),
        (
            _whole_factor,
            r"'p' of scale_\d+ is annotated \(Tensor x, SymInt factor\) -> Tensor, native \(Tensor x, float f",
        ),
        (_two_results, r"is annotated \(Tensor x, float factor\) -> \(Tensor, Tensor\), native "),
    ],
)
def test_a_provider_has_natives_parameters(scale, impl, message):
    """Names, order, count, and defaults where it has any."""
    with pytest.raises(SchemaError, match=message):
        scale.register_impl("p")(impl)
    assert "p" not in scale.providers


def test_a_provider_may_repeat_natives_default(scale):
    """The function itself comes back, so that it can be used directly."""

    def impl(x: Tensor, factor: float = 2.0) -> Tensor:
        return x

    assert scale.register_impl("p", batch_invariant=True, version="7")(impl) is impl
    provider = scale.providers["p"]
    assert (provider.op_name, provider.batch_invariant, provider.version) == (scale.name, True, "7")


def test_a_provider_may_take_the_last_parameters_together(scale):
    scale.register_impl("p")(lambda x, *rest: x * rest[0] + 1)
    assert scale(torch.ones(1), 3.0, policy="p").tolist() == [4.0]


def test_provider_names_are_unique(scale):
    """Until one is forgotten; native cannot be."""
    _answers(scale, "p", 1)
    with pytest.raises(SchemaError, match="already has a provider 'p'; give this one another name"):
        _answers(scale, "p", 2)
    with pytest.raises(SchemaError, match="already has a provider 'native'"):
        _answers(scale, NATIVE, 2)
    scale.unregister_impl("p")
    scale.unregister_impl("p")
    _answers(scale, "p", 3)
    with pytest.raises(SchemaError, match=r"native defines what .* cannot be removed"):
        scale.unregister_impl(NATIVE)


# Support


def test_support_is_a_yes_or_a_reason():
    """A no without a reason cannot be made."""
    assert YES
    assert not Support.no("too wide")
    assert Support.no("too wide").reason == "too wide"
    with pytest.raises(ValueError, match="needs a reason"):
        Support(False)
    with pytest.raises(ValueError, match="needs a reason"):
        Support.no("")


def test_support_all_of_gives_the_first_reason():
    """The order of the conditions is the order of the checks."""
    assert Support.all_of() is YES
    assert Support.all_of((True, "a"), (True, "b")) is YES
    assert Support.all_of((True, "a"), (False, "b"), (False, "c")).reason == "b"


def test_a_bare_false_is_not_a_refusal(scale):
    """It has no reason, so whoever returns one is told what to return."""
    _answers(scale, "p", 1, supports_args=lambda x, factor: False)
    with pytest.raises(SchemaError, match=r"'p' of scale_\d+ refuses with False.* return YES or Support.no"):
        scale(torch.ones(1), policy="p,native")


def test_the_machine_is_asked_once(scale):
    """`supported` may be slow; a probe that breaks is a no and not an error."""
    asked = []

    def supported() -> Support:
        asked.append(1)
        raise OSError("no driver")

    _answers(scale, "p", 1, supported=supported)
    for _ in range(3):
        choice = scale.choose(torch.ones(1), 2.0, policy="p,native")
        assert choice.provider.name == NATIVE
        assert [str(r) for r in choice.refusals] == ["p: its availability check failed: OSError: no driver"]
    assert len(asked) == 1


def test_limits_on_tokens_are_for_run_time(scale):
    """At compile time the number of tokens is not known."""
    few = {"supports_tokens": lambda x, factor: Support.all_of((len(x) < 3, "more than 2 tokens"))}
    _answers(scale, "p", 1, **few)
    x = torch.ones(3)
    assert scale.choose(x, 2.0, policy="p,native", static=True).provider.name == "p"
    choice = scale.choose(x, 2.0, policy="p,native")
    assert (choice.provider.name, choice.refusals[0].reason) == (NATIVE, "more than 2 tokens")
    assert scale.choose(x[:2], 2.0, policy="p,native").provider.name == "p"


def test_arguments_are_asked_after_the_machine(scale):
    """Nobody looks at the arguments of what cannot run at all."""
    _answers(scale, "p", 1, supported=lambda: Support.no("no GPU"), supports_args=lambda *_: 1 / 0)
    assert scale.providers["p"].check(torch.ones(1), 2.0).reason == "no GPU"


# Priorities and dispatch


def test_priority_default_scope_and_policy(scale):
    """A policy beats the innermost scope, which beats the process-wide default, which is native."""
    _answers(scale, "one", 1)
    _answers(scale, "three", 3)
    x = torch.ones(1)
    assert scale(x) == 2
    scale.set_default_priority(["one", NATIVE])
    assert scale(x) == 1
    with ir_op_priority({scale.name: ["three"]}):
        assert scale(x) == 3
        with ir_op_priority({scale.name: [NATIVE], "rms_norm": [NATIVE]}):
            assert scale(x) == 2
            assert scale(x, 2.0, "three,one") == 3
            assert scale(x, policy="one") == 1
        assert scale(x) == 3
        with ir_op_priority({"rms_norm": [NATIVE]}):
            assert scale(x) == 3
        with contextlib.suppress(ZeroDivisionError), ir_op_priority({scale.name: ["one"]}):
            raise ZeroDivisionError
        assert scale(x) == 3
    assert scale(x) == 1
    assert scale.priority == ("one", NATIVE)


def test_a_scope_is_its_threads_own(scale):
    """Another thread does not see it."""
    _answers(scale, "one", 1)
    seen = []
    with ir_op_priority({scale.name: ["one"]}):
        thread = threading.Thread(target=lambda: seen.append(scale.priority))
        thread.start()
        thread.join()
    assert seen == [(NATIVE,)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"the priority list of scale_\d+ is empty"),
        (["fast"], r"scale_\d+ has no provider 'fast'; registered: native, p"),
        (["p", NATIVE, "p"], "names a provider twice: p, native, p"),
        ("native", "is the text 'native'; give a list of names"),
    ],
)
def test_bad_priorities(scale, names, message):
    """Refused alike as default and as scope, before anything changes."""
    _answers(scale, "p", 1)
    with pytest.raises(ConfigError, match=message):
        scale.set_default_priority(names)
    with pytest.raises(ConfigError, match=message), ir_op_priority({scale.name: names}):
        pass
    assert scale.priority == (NATIVE,)


def test_bad_policy_and_scope(scale):
    """Unknown names are errors wherever they stand."""
    with pytest.raises(ConfigError, match=r"has no provider 'fast'; registered: native"):
        scale(torch.ones(1), policy="fast,native")
    with pytest.raises(ConfigError, match="no operator 'scales'"), ir_op_priority({"scales": [NATIVE]}):
        pass


def test_parse_policy(scale):
    """Options after the semicolon are not providers; no providers means the operator's own."""
    assert parse_policy(scale, "p,q;max_size_mb=2") == ("p", "q")
    assert parse_policy(scale, ";max_size_mb=2") == (NATIVE,)
    assert parse_policy(scale, "") == (NATIVE,)


def test_parse_priorities(scale):
    """What a command line says."""
    _answers(scale, "p", 1)
    texts = [f"{scale.name}=p, native", " rms_norm = native"]
    assert parse_priorities(texts) == {scale.name: ("p", NATIVE), "rms_norm": (NATIVE,)}
    assert parse_priorities([]) == {}
    for text, message in (
        ("rms_norm", r"'rms_norm': write OP=PROVIDER\[,PROVIDER...\]"),
        ("norm=native", "no operator 'norm'"),
        ("rms_norm=fast", "rms_norm has no provider 'fast'"),
        ("rms_norm=", "priority list of rms_norm is empty"),
        ("rms_norm=native,native", "twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_priorities([text])


def test_calls_in_every_spelling(scale):
    """Positions, keywords, both, defaults; through the operator and through torch.ops."""
    x = torch.ones(2)
    three = torch.full((2,), 3.0)
    _answers(scale, "p", 7)
    for call in (scale, scale.torch_op):
        assert torch.equal(call(x), x * 2)
        assert torch.equal(call(x, 3.0), three)
        assert torch.equal(call(x, factor=3), three)
        assert torch.equal(call(factor=3.0, x=x), three)
        assert torch.equal(call(x, 3.0, policy=NATIVE), three)
        assert torch.equal(call(x, policy=NATIVE, factor=3.0), three)
        assert torch.equal(call(x, 3.0, "p"), torch.full((2,), 7.0))
    with pytest.raises(RuntimeError, match="missing value for argument 'x'"):
        scale()


def test_no_provider_lists_every_reason(scale):
    """By priority, with what to do."""
    _answers(scale, "p", 1, supported=lambda: Support.no("no GPU"))
    _answers(scale, "q", 1, supports_args=lambda x, factor: Support.no("hidden 3 is odd"))
    with pytest.raises(NoProviderError) as caught:
        scale(torch.ones(3), policy="q,p")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"no provider of fusewire::{scale.name} can serve this call")
    assert lines[1:3] == ["  - q: hidden 3 is odd", "  - p: no GPU"]
    assert "Add 'native' to the priority list" in lines[3]
    assert isinstance(caught.value, FusewireError)


def test_bad_arguments_are_refused_before_any_provider(scale):
    """In eager calls and with fake tensors alike."""
    _answers(scale, "p", 1, supports_args=lambda *_: 1 / 0)
    for x in (torch.ones(1), torch.ones(1, device="meta")):
        with pytest.raises(ArgumentError, match="13 is not a factor"):
            scale(x, 13.0, policy="p")


def test_a_selector_chooses_instead(scale):
    """It sees all arguments, defaults included, and the policy."""
    seen = []
    _answers(scale, "p", 5)

    def select(op: Any, arguments: tuple[Any, ...], policy: str) -> Any:
        seen.append((op.name, len(arguments), arguments[1], policy))
        return op.providers["p"]

    scale.selector = select
    assert scale(torch.ones(1), policy="native;max_size_mb=1") == 5
    assert seen == [(scale.name, 2, 2.0, "native;max_size_mb=1")]


def test_compiled_graphs_carry_the_operator(scale):
    """One call, with its policy, for any number of tokens; which provider serves is settled at run time."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: scale(x + 1, 3.0, policy="p,native"), backend=backend, dynamic=True)
    _answers(scale, "p", 7, supports_tokens=lambda x, factor: Support.all_of((len(x) > 4, "few")))
    assert compiled(torch.ones(3)).tolist() == [6.0] * 3
    assert compiled(torch.ones(5)).tolist() == [7.0] * 5
    (graph,) = graphs
    (node,) = [n for n in graph.graph.nodes if op_of_target(n.target) is scale]
    assert "p,native" in (*node.args, *node.kwargs.values())
    torch._dynamo.reset()
