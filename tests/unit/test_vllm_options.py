"""How fusewire is switched on in vLLM, and the names of groups. Needs no vLLM."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import fusewire
from fusewire import PassConfig
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_sum, resolve_group
from fusewire.errors import ArgumentError, ConfigError, ProcessGroupError
from fusewire.fusion_passes.cache_key import cache_key, static_key
from fusewire.integrations import vllm as plugin
from fusewire.integrations import vllm_options

from support.distributed import fake_group, shared_pool


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in (vllm_options.VARIABLE, "FUSEWIRE_DISABLE", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(name, raising=False)


def options(**additional):
    return vllm_options.read_options(SimpleNamespace(additional_config=additional))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("", None),
        ("0", None),
        ("off", None),
        ("1", {}),
        ("true", {}),
        ("{}", {}),
        ('{"output_in_place": true}', {"output_in_place": True}),
    ],
)
def test_the_variable(monkeypatch, value, found):
    monkeypatch.setenv(vllm_options.VARIABLE, value)
    assert options() == found


def test_the_configuration_goes_before_the_variable(monkeypatch):
    assert options() is None
    assert options(fusewire={}) == options(fusewire=True) == {}
    assert options(fusewire={"batch_invariant": True}) == {"batch_invariant": True}
    monkeypatch.setenv(vllm_options.VARIABLE, "1")
    assert options(fusewire=False) is None
    assert options(fusewire={"output_in_place": True}) == {"output_in_place": True}


def test_a_configuration_that_was_completed_stays_as_it_is():
    """vLLM copies its configuration, for a drafting model for example, and completes the copy
    again."""
    first = options(fusewire={"output_in_place": True})
    assert options(fusewire=first, fusewire_key="a hash") == first


def test_disabled_by_its_own_variable(monkeypatch):
    monkeypatch.setenv(vllm_options.VARIABLE, "1")
    monkeypatch.setenv("FUSEWIRE_DISABLE", "1")
    assert options() is options(fusewire={}) is None


def test_vllms_batch_invariant_mode_is_fusewires(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert options() is None
    assert options(fusewire={}) == {"batch_invariant": True}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("yes please", "is neither on"),
        ("{", "neither on .1., nor off .0, unset., nor JSON"),
        ('{"outputinplace": true}', "did you mean 'output_in_place'"),
        ('{"output_in_place": 3}', "output_in_place is 3"),
        ('{"max_autotune": true}', "max_autotune"),
    ],
)
def test_wrong_options_are_errors(monkeypatch, value, says):
    monkeypatch.setenv(vllm_options.VARIABLE, value)
    with pytest.raises(ConfigError, match=says):
        options()


def test_options_in_the_configuration_must_be_an_object():
    with pytest.raises(ConfigError, match="must be an object"):
        options(fusewire="on")


def test_a_platforms_own_additional_config(monkeypatch):
    config = SimpleNamespace(additional_config=object())
    assert vllm_options.read_options(config) is None
    monkeypatch.setenv(vllm_options.VARIABLE, "1")
    with pytest.raises(ConfigError, match="needs a dictionary"):
        vllm_options.read_options(config)


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.26.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1rc2", True),
        ("0.25.1", False),
        ("0.34.0", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_known_versions(version, known):
    assert plugin._is_known(version) is known


# Names of groups


def test_a_name_is_resolved_to_its_newest_group():
    with fake_group(2) as group:
        with pytest.raises(ProcessGroupError, match="tp:0"):
            resolve_group("tp:0")
        fusewire.name_group("tp:0", group)
        assert resolve_group("tp:0") is group
        other = dist.new_group([0, 1])
        fusewire.name_group("tp:0", other)
        assert resolve_group("tp:0") is other


def test_native_sums_with_the_engines_all_reduce():
    with fake_group(2) as group:
        given = []
        fusewire.name_group("tp:0", group, lambda x: given.append(x) or x * 10)
        x = torch.ones(4, 6)[:, ::2]
        assert torch.equal(all_reduce_sum(x, "tp:0"), x * 10)
        assert given[0].is_contiguous()
        fusewire.name_group("tp:0", group)  # without one the name is the group's again
        all_reduce_sum(x, "tp:0")
        assert len(given) == 1


@pytest.mark.parametrize(
    ("name", "group", "all_reduce", "says"),
    [
        ("", None, None, "at least one character"),
        (3, None, None, "at least one character"),
        ("tp:0", None, None, "takes a torch.distributed process group"),
        ("tp:0", dist.GroupMember.NON_GROUP_MEMBER, None, "that this rank belongs to"),
    ],
)
def test_wrong_names_and_groups(name, group, all_reduce, says):
    with pytest.raises(ArgumentError, match=says):
        fusewire.name_group(name, group, all_reduce)


def test_an_all_reduce_that_is_no_function():
    with fake_group(2) as group, pytest.raises(ArgumentError, match="must be a function"):
        fusewire.name_group("tp:0", group, "sum")


# Keys


def _keys():
    group = dist.new_group([0, 1])
    own = [dist.new_group([rank]) for rank in range(2)]  # an engine's groups of one rank
    del group, own
    return cache_key(PassConfig()), cache_key(PassConfig(), groups=False), static_key(PassConfig())


def test_keys_are_equal_on_all_ranks():
    (one, other) = shared_pool(2).run(_keys)
    assert one == other
    # And in a process without groups; one of its own, since tests register operators in this one.
    configs = 'PassConfig(), PassConfig(output_in_place=True), PassConfig(dump_graphs="/tmp/x")'
    imports = "from fusewire import PassConfig; from fusewire.fusion_passes.cache_key import static_key"
    program = f"{imports}; print(*map(static_key, ({configs})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    plain, in_place, dumped = done.stdout.split()
    assert plain == one[2] == dumped
    assert in_place != plain
