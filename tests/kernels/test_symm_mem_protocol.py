"""What the ranks must have alike for `symm_mem`'s kernels: told in the vote on the machines, compared, and named if not."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton", reason="Triton is not installed")

from fusewire.custom_ops import api
from fusewire.custom_ops.ops.registry import YES
from fusewire.custom_ops.providers.symm_mem import layout
from fusewire.custom_ops.providers.symm_mem import protocol as symm_mem_protocol
from fusewire.custom_ops.providers.symm_mem import provider as symm_mem_provider
from fusewire.custom_ops.providers.symm_mem import workspace as spaces
from fusewire.custom_ops.providers.symm_mem.protocol import differences, least_multiprocessors
from fusewire.custom_ops.workspaces import registry as workspace
from fusewire.errors import ArgumentError, ConfigError

from support.distributed import shared_pool
from support.plain_provider import PlainProvider

BF16 = torch.bfloat16
CPU = torch.device("cpu")


def gpu(multiprocessors):
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    return mock.patch.object(torch.cuda, "get_device_properties", return_value=properties)


def facts_of(rank, multiprocessors=132, world_size=4, timeouts=None):
    """The facts of a rank with a GPU, as they arrive at the others."""
    provider, group = symm_mem_provider.SymmMemProvider(), SimpleNamespace(size=lambda: world_size)
    if timeouts:
        group._device_types = [torch.device(kind) for kind in timeouts]
        group._get_backend = lambda device: SimpleNamespace(
            options=SimpleNamespace(_timeout=timedelta(seconds=timeouts[device.type]))
        )
    with (
        gpu(multiprocessors),
        mock.patch.object(symm_mem_provider, "supported", return_value=YES),
        mock.patch.object(dist, "get_rank", return_value=rank),
    ):
        return dict(provider.machine(group, CPU))


def judge(facts):
    return symm_mem_provider.SymmMemProvider().validate(facts)


def test_ranks_that_are_alike_fit():
    facts = [facts_of(rank) for rank in range(4)]
    assert judge(facts)
    assert differences(facts) == ""
    assert len({str(fact["protocol"]) for fact in facts}) == 1
    assert "rank" in facts[0]


def test_kernels_that_give_up_after_different_times_are_an_error(monkeypatch):
    monkeypatch.delenv("FUSEWIRE_TIMEOUT_S", raising=False)
    one = facts_of(0)
    monkeypatch.setenv("FUSEWIRE_TIMEOUT_S", "1200")
    with pytest.raises(ConfigError, match=r"rank 0 900 s, rank 1 1800 s\. Set FUSEWIRE_TIMEOUT_S"):
        judge([one, facts_of(1)])


def test_a_kernel_gives_up_on_no_rank_for_which_nccl_waits(monkeypatch):
    monkeypatch.delenv("FUSEWIRE_TIMEOUT_S", raising=False)
    assert facts_of(0)["kernel_timeout_s"] == 900
    assert facts_of(0, timeouts={"cpu": 1800.0, "cuda": 7200.0})["kernel_timeout_s"] == 7200
    assert facts_of(0, timeouts={"cpu": 1800.0, "cuda": 600.0})["kernel_timeout_s"] == 900


def test_the_number_of_multiprocessors_may_differ_and_the_least_counts():
    facts = [facts_of(rank, count) for rank, count in enumerate((132, 78, 114))]
    assert judge(facts)
    assert least_multiprocessors(facts) == 78


@pytest.mark.parametrize("name", facts_of(0)["protocol"])
def test_every_part_is_named_with_who_has_what(name):
    facts = [facts_of(rank) for rank in (4, 5, 6)]
    usual = facts[0]["protocol"][name]
    facts[2] = {**facts[2], "protocol": {**facts[2]["protocol"], name: "another"}}
    support = judge(facts)
    assert not support
    assert f"{name} is {usual} on ranks 4, 5 and another on rank 6" in support.reason
    assert "install the same fusewire" in support.reason
    assert differences(facts).count(" is ") == 1


def test_a_part_that_a_rank_does_not_know_differs():
    facts = [facts_of(rank) for rank in range(2)]
    del facts[1]["protocol"]["MAX_SLICES"]
    assert "MAX_SLICES is 8 on rank 0 and missing on rank 1" in judge(facts).reason


PATCHES = {
    "the most tokens of the one-shot protocol": [(symm_mem_provider, "ONE_SHOT_TOKENS", 64)],
    "the most tokens of the data-as-flag protocol": [(symm_mem_provider, "data_tokens", lambda world_size: 256)],
    "MAX_SLICES": [(symm_mem_protocol, "MAX_SLICES", 4), (layout, "MAX_SLICES", 4)],
    "CACHE_LINE_BYTES": [(symm_mem_protocol, "CACHE_LINE_BYTES", 64), (layout, "CACHE_LINE_BYTES", 64)],
    "the digest of symm_mem's sources": [(symm_mem_protocol, "_sources", lambda: "another")],
    "the digest of the buffers' layout": [(layout, "_ALIGN", 512)],
}


@pytest.mark.parametrize("name", PATCHES)
def test_what_is_changed_on_a_rank_changes_its_facts(name, monkeypatch):
    usual = facts_of(0)
    for module, attribute, value in PATCHES[name]:
        monkeypatch.setattr(module, attribute, value)
    reason = judge([usual, facts_of(1)]).reason
    assert f"{name} is " in reason
    assert "on rank 0 and " in reason


def test_the_sources_are_those_of_all_modules(tmp_path, monkeypatch):
    """One byte in any of them is another digest."""
    folder = tmp_path / "symm_mem"
    (folder / "kernels").mkdir(parents=True)
    monkeypatch.setattr(symm_mem_protocol, "__file__", str(folder / "protocol.py"))
    digests = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("kernels/b.py", ""), ("../other.py", "3")):
        (folder / name).write_text(text)
        digests.append(symm_mem_protocol._sources.__wrapped__())
    assert len(set(digests[:3])) == 3
    assert digests[2] == digests[3]


def test_a_workspace_plans_by_the_number_that_it_is_given():
    ws = object.__new__(spaces.SymmMemWorkspace)
    ws.device, ws.world_size, ws._group, ws.timeout_s = CPU, 2, None, 5.0
    theirs = [5.0]

    def gather(found, own, group):
        found[:] = [own, (78, theirs[0])]

    with gpu(132), mock.patch.object(dist, "all_gather_object", gather):
        assert ws._common_multiprocessors(100) == 100
        assert ws._common_multiprocessors(None) == 78  # the ranks tell each other
        theirs[0] = 6.0
        with pytest.raises(ConfigError, match="rank 0 5 s, rank 1 6 s"):
            ws._common_multiprocessors(None)
        for wrong in (0, 133):
            with pytest.raises(ArgumentError, match="all blocks must fit"):
                ws._common_multiprocessors(wrong)


# --- On ranks -----------------------------------------------------------------------------------------------


def job_machines():
    tokens = 128 << dist.get_rank()
    with (
        gpu(132 - dist.get_rank()),
        mock.patch.object(symm_mem_provider, "supported", return_value=YES),
        mock.patch.object(symm_mem_provider, "ONE_SHOT_TOKENS", tokens),
    ):
        entry = workspace.REGISTRY.machine(symm_mem_provider.SymmMemProvider(), dist.group.WORLD, CPU)
        return entry.refusal, least_multiprocessors(entry.facts)


def test_the_ranks_refuse_together():
    for reason, least in shared_pool(2).run(job_machines):
        assert "the most tokens of the one-shot protocol is 128 on rank 0 and 256 on rank 1" in reason
        assert least == 131


class Provider(PlainProvider):
    """Makes nothing and remembers what was asked for."""

    def __init__(self):
        self.requests = []

    def create(self, request, channel):
        self.requests.append(request)
        return super().create(request, channel)


def job_sizes():
    provider, rank = Provider(), dist.get_rank()
    workspace.REGISTRY.open(provider, dist.group.WORLD, BF16, 64, CPU, lambda _: 8 + rank, outputs=2 * rank)
    api.close()
    return [(request.max_tokens, request.outputs) for request in provider.requests]


def test_all_ranks_make_a_workspace_of_one_size():
    """Output buffers that only one rank has would be written to by peers that have none."""
    assert shared_pool(2).run(job_sizes) == [[(8, 0)]] * 2
