"""PassConfig: what it takes, what it says to what it does not take, and the policies that it gives graphs."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

import fusewire
from fusewire import PassConfig
from fusewire.custom_ops.ops.registry import NATIVE, get_op
from fusewire.errors import ConfigError, FusewireError
from fusewire.fusion_passes import backend, config
from fusewire.fusion_passes.config import GROUPS
from fusewire.fusion_passes.pipeline import run_passes

DEFAULTS = {
    "fuse_allreduce_rms": True,
    "fuse_sandwich_norms": True,
    "fuse_sequence_parallel": True,
    "fuse_quantization": True,
    "shard_residual": False,
    "output_in_place": False,
    "eliminate_noops": True,
    "fi_allreduce_fusion_max_size_mb": None,
    "ir_op_priority": {},
    "batch_invariant": False,
    "inline_native": True,
    "allow_reassociation": True,
    "assume_replicated_scales": True,
    "assume_replicated_gates": False,
    "assume_replicated_residuals": True,
    "merge_allreduces": True,
    "expect_fused": None,
    "compile_alone": False,
    "disabled_passes": (),
    "dump_graphs": None,
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.delenv(config.BATCH_INVARIANT_VARIABLE, raising=False)
    monkeypatch.delenv(config.DISABLE_VARIABLE, raising=False)


@pytest.fixture
def providers():
    """Two more providers of rms_norm, one of them batch-invariant; returns the operator."""
    op = get_op("rms_norm")
    for name, invariant in (("test_fast", False), ("test_steady", True)):
        op.register_impl(name, batch_invariant=invariant)(
            lambda x, weight, eps, weight_bias, form: op.native(x, weight, eps, weight_bias, form)
        )
    priority = op.default_priority
    yield op
    op.default_priority = priority
    for name in ("test_fast", "test_steady"):
        op.unregister_impl(name)


@pytest.mark.parametrize("name", DEFAULTS)
def test_default(name):
    assert getattr(PassConfig(), name) == DEFAULTS[name]


def test_names_of_vllms_toggles():
    names = PassConfig.field_names()
    assert {"fuse_allreduce_rms", "fi_allreduce_fusion_max_size_mb", "eliminate_noops"} <= set(names)
    assert set(DEFAULTS) == set(names)


@pytest.mark.parametrize("field", dataclasses.fields(PassConfig), ids=lambda field: field.name)
def test_every_field_is_documented(field):
    text = field.metadata["doc"]
    assert text[0].isupper()
    assert text.endswith(".")
    assert len(text.split()) > 4
    assert field.metadata["group"] in GROUPS
    shown = [line for line in PassConfig.describe().splitlines() if line.startswith(f"  {field.name} (default ")]
    assert len(shown) == 1
    assert text in shown[0]
    assert f"(default {getattr(PassConfig(), field.name)!r})" in shown[0]


def test_describe_lists_each_field_once_in_order_under_its_group():
    lines = PassConfig.describe().splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == list(GROUPS)
    starts = tuple(line.split()[0] for line in lines if line.startswith(" "))
    assert starts == PassConfig.field_names()


def test_is_frozen():
    chosen = PassConfig(ir_op_priority={"rms_norm": (NATIVE,)})
    for field in dataclasses.fields(PassConfig):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(chosen, field.name, getattr(chosen, field.name))
    with pytest.raises(TypeError):
        chosen.ir_op_priority["rms_norm"] = ("other",)


def test_does_not_follow_changes_of_what_it_was_made_from():
    names, priorities = ["lower_ops"], {"rms_norm": [NATIVE]}
    chosen = PassConfig(disabled_passes=names, ir_op_priority=priorities)
    names.append("raise_ops")
    priorities["rms_norm"].append("other")
    priorities["fused_add_rms_norm"] = [NATIVE]
    assert chosen.disabled_passes == ("lower_ops",)
    assert chosen.ir_op_priority == {"rms_norm": (NATIVE,)}


def test_equal_configurations_are_one_key():
    one = PassConfig(
        ir_op_priority={"rms_norm": [NATIVE], "fused_add_rms_norm": [NATIVE]},
        fi_allreduce_fusion_max_size_mb=64,
    )
    other = PassConfig(
        ir_op_priority={"fused_add_rms_norm": (NATIVE,), "rms_norm": (NATIVE,)},
        fi_allreduce_fusion_max_size_mb=64.0,
    )
    assert one == other
    assert hash(one) == hash(other)
    assert one.key() == other.key()
    assert {one: "found"}[other] == "found"


@pytest.mark.parametrize(
    "change",
    [
        {"fuse_allreduce_rms": False},
        {"fuse_sandwich_norms": False},
        {"fuse_sequence_parallel": False},
        {"fuse_quantization": False},
        {"shard_residual": True},
        {"output_in_place": True},
        {"eliminate_noops": False},
        {"fi_allreduce_fusion_max_size_mb": 1.5},
        {"ir_op_priority": {"rms_norm": (NATIVE,)}},
        {"batch_invariant": True},
        {"inline_native": False},
        {"allow_reassociation": False},
        {"assume_replicated_scales": False},
        {"assume_replicated_gates": True},
        {"assume_replicated_residuals": False},
        {"merge_allreduces": False},
        {"expect_fused": 3},
        {"compile_alone": True},
        {"disabled_passes": ("lower_ops",)},
        {"dump_graphs": "graphs"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_that_changes_what_runs_changes_the_key(change):
    assert PassConfig(**change) != PassConfig()
    only_reports = change.keys() <= {"expect_fused", "dump_graphs"}
    assert (PassConfig(**change).key() == PassConfig().key()) == only_reports


def test_the_list_above_has_every_field():
    (mark,) = test_every_field_that_changes_what_runs_changes_the_key.pytestmark
    assert {name for change in mark.args[1] for name in change} == set(PassConfig.field_names())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(copied):
    """Inductor copies and pickles its configuration, and with it ours."""
    chosen = PassConfig(ir_op_priority={"rms_norm": (NATIVE,)}, expect_fused="all")
    assert copied(chosen) == chosen
    assert hash(copied(chosen)) == hash(chosen)


BOOLEANS = [f.name for f in dataclasses.fields(PassConfig) if isinstance(f.default, bool)]


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("value", [1, "yes", None], ids=repr)
def test_a_switch_is_a_bool(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; it must be True or False"):
        PassConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("fi_allreduce_fusion_max_size_mb", -1, "is -1; it must be a number >= 0, or None"),
        ("fi_allreduce_fusion_max_size_mb", float("nan"), "is nan; it must be a number >= 0, or None"),
        ("fi_allreduce_fusion_max_size_mb", "64", "is '64'; it must be a number >= 0, or None"),
        ("fi_allreduce_fusion_max_size_mb", True, "is True; it must be a number >= 0, or None"),
        ("expect_fused", "some", "is 'some'; it must be a count, 'all' or None"),
        ("expect_fused", True, "is True; it must be a count, 'all' or None"),
        ("expect_fused", 2.5, "is 2.5; it must be a count, 'all' or None"),
        ("expect_fused", -1, "is -1; a count cannot be negative"),
        ("dump_graphs", 3, "is 3; it must be the path of a directory, or None"),
        ("disabled_passes", "lower_ops", "is 'lower_ops'; it must be a list of names of passes"),
        (
            "ir_op_priority",
            [("rms_norm", "native")],
            "it must be a mapping of operators to lists of providers",
        ),
    ],
)
def test_bad_value(name, value, says):
    with pytest.raises(ConfigError) as error:
        PassConfig(**{name: value})
    assert str(error.value).startswith(f"{name} is ")
    assert says in str(error.value)
    assert isinstance(error.value, FusewireError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("priorities", "says"),
    [
        ({"rms_nrom": ["native"]}, "there is no operator 'rms_nrom'"),
        ({"rms_norm": ["turbo"]}, "rms_norm has no provider 'turbo'; registered: "),
        ({"rms_norm": []}, "the priority list of rms_norm is empty"),
        ({"rms_norm": ["native", "native"]}, "names a provider twice"),
        ({"rms_norm": "native"}, "ir_op_priority['rms_norm'] is 'native'; it must be a list of providers"),
        ({"rms_norm": 1}, "ir_op_priority['rms_norm'] is 1; it must be a list of providers"),
    ],
)
def test_bad_priority(priorities, says):
    with pytest.raises(ConfigError) as error:
        PassConfig(ir_op_priority=priorities)
    assert says in str(error.value)


@pytest.mark.parametrize("limit", [0, 64, 1.5])
def test_sizes_that_will_do(limit):
    assert PassConfig(fi_allreduce_fusion_max_size_mb=limit).fi_allreduce_fusion_max_size_mb == limit


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("fuse_all_reduce_rms", "fuse_allreduce_rms"),
        ("expected_fused", "expect_fused"),
        ("eliminate_noop", "eliminate_noops"),
        ("batch_invariance", "batch_invariant"),
    ],
)
def test_unknown_option_suggests_the_nearest(given, nearest):
    says = f"unknown option {given!r}; did you mean {nearest!r}?"
    for make in (PassConfig.from_options, backend.split_options):
        with pytest.raises(ConfigError) as error:
            make({given: True})
        assert says in str(error.value)
        assert "PassConfig.describe()" in str(error.value)


def test_unknown_option_that_is_like_none():
    with pytest.raises(ConfigError) as error:
        PassConfig.from_options({"qqq": 1})
    assert "unknown option 'qqq' (" in str(error.value)
    assert "did you mean" not in str(error.value)


def test_nearest_of_inductors_options_is_suggested_too():
    with pytest.raises(ConfigError, match="did you mean 'max_autotune'"):
        backend.split_options({"max_autotun": True})


def test_unknown_pass_suggests_the_nearest():
    import torch

    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    with pytest.raises(ConfigError, match="disabled_passes: unknown pass 'lower_op'; did you mean 'lower_ops'"):
        run_passes(graph, PassConfig(disabled_passes=("lower_op",)))


def test_options_are_sorted_into_ours_and_inductors():
    chosen, rest = backend.split_options(
        {
            "expect_fused": "all",
            "inline-native": False,
            "triton.cudagraphs": True,
            "max-autotune": True,
            "force_disable_caches": True,  # an alias: it stands for another configuration's option
        }
    )
    assert chosen == PassConfig(expect_fused="all", inline_native=False)
    assert rest == {"triton.cudagraphs": True, "max_autotune": True, "force_disable_caches": True}
    assert backend.split_options(None) == (PassConfig(), {})


@pytest.mark.parametrize("name", ["os", "patch", "triton", "_config"])
def test_what_inductors_configuration_merely_contains_is_no_option(name):
    with pytest.raises(ConfigError, match=f"unknown option {name!r}"):
        backend.split_options({name: True})


def test_inductors_option_of_another_type():
    with pytest.raises(ConfigError, match="max_autotune is 'yes'; Inductor's option must be of type bool"):
        backend.split_options({"max_autotune": "yes"})


# Policies


def test_policy_is_the_operators_own_priority(providers):
    assert PassConfig().policy("rms_norm") == ",".join(providers.default_priority)
    providers.set_default_priority(("test_fast", NATIVE))
    assert PassConfig().policy("rms_norm") == f"test_fast,{NATIVE}"
    with fusewire.ir_op_priority({"rms_norm": (NATIVE,)}):
        assert PassConfig().policy("rms_norm") == NATIVE


def test_priority_of_the_configuration_wins(providers):
    chosen = PassConfig(ir_op_priority={"rms_norm": ("test_steady", "test_fast")})
    with fusewire.ir_op_priority({"rms_norm": (NATIVE,)}):
        assert chosen.policy("rms_norm") == "test_steady,test_fast"


def test_batch_invariant_mode_takes_the_form_of_a_provider_for_it():
    """In its place in the priority, and not where the priority leaves the provider out."""
    assert PassConfig().policy("all_reduce_rms_norm") == "symm_mem,flashinfer,native"
    in_mode = PassConfig(batch_invariant=True)
    assert in_mode.policy("all_reduce_rms_norm") == "symm_mem_batch_invariant,rank_ordered_batch_invariant"
    assert in_mode.policy("all_reduce_sandwich_norm") == in_mode.policy("all_reduce_rms_norm")
    without = PassConfig(batch_invariant=True, ir_op_priority={"all_reduce_rms_norm": ("flashinfer", NATIVE)})
    assert without.policy("all_reduce_rms_norm") == "rank_ordered_batch_invariant"
    named = PassConfig(ir_op_priority={"all_reduce_rms_norm": ("symm_mem_batch_invariant", "symm_mem")})
    assert dataclasses.replace(named, batch_invariant=True).policy("all_reduce_rms_norm") == (
        "symm_mem_batch_invariant,rank_ordered_batch_invariant"
    )


def test_batch_invariant_keeps_invariant_providers_alone(providers):
    invariant = {name for name, p in providers.providers.items() if p.batch_invariant}
    assert "test_steady" in invariant
    named = PassConfig(batch_invariant=True, ir_op_priority={"rms_norm": ("test_fast", "test_steady", NATIVE)})
    first, *others = named.policy("rms_norm").split(",")
    assert first == "test_steady"
    assert {first, *others} == invariant
    unnamed = PassConfig(batch_invariant=True).policy("rms_norm").split(",")
    assert set(unnamed) == invariant
    assert len(unnamed) == len(invariant)


def test_largest_size_is_part_of_the_fused_operators_policy_alone():
    limited = PassConfig(
        fi_allreduce_fusion_max_size_mb=1.5,
        ir_op_priority={"all_reduce_rms_norm": (NATIVE,), "rms_norm": (NATIVE,)},
    )
    assert limited.policy("all_reduce_rms_norm") == f"{NATIVE};max_size_mb=1.5"
    assert limited.policy("rms_norm") == NATIVE
    whole = PassConfig(fi_allreduce_fusion_max_size_mb=64, ir_op_priority={"all_reduce_rms_norm": (NATIVE,)})
    assert whole.policy("all_reduce_rms_norm") == f"{NATIVE};max_size_mb=64"


# The environment


@pytest.mark.parametrize(
    ("value", "on"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        (" on ", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("", False),
    ],
)
def test_environment_switches(monkeypatch, value, on):
    monkeypatch.setenv(config.BATCH_INVARIANT_VARIABLE, value)
    monkeypatch.setenv(config.DISABLE_VARIABLE, value)
    assert PassConfig().batch_invariant is on
    assert config.disabled_by_environment() is on


def test_environment_does_not_switch_batch_invariance_off(monkeypatch):
    monkeypatch.setenv(config.BATCH_INVARIANT_VARIABLE, "0")
    assert PassConfig(batch_invariant=True).batch_invariant


def test_names_of_the_variables():
    assert config.BATCH_INVARIANT_VARIABLE == "FUSEWIRE_BATCH_INVARIANT"
    assert config.DISABLE_VARIABLE == "FUSEWIRE_DISABLE"


@pytest.mark.parametrize("value", ["2", "maybe", "nope"])
def test_environment_value_that_is_neither(monkeypatch, value):
    says = f"='{value}' is neither on (1, true, yes, on) nor off (0, false, no, off, unset)"
    monkeypatch.setenv(config.BATCH_INVARIANT_VARIABLE, value)
    with pytest.raises(ConfigError) as error:
        PassConfig()
    assert str(error.value) == config.BATCH_INVARIANT_VARIABLE + says
    monkeypatch.setenv(config.DISABLE_VARIABLE, value)
    with pytest.raises(ConfigError) as error:
        config.disabled_by_environment()
    assert str(error.value) == config.DISABLE_VARIABLE + says
