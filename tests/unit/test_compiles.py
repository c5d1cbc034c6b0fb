"""What keeps the compilations of the tests cheap (support/compiles.py, support/preloaded.py) is in
force."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import torch._logging
from torch._dynamo import guards, trace_rules
from torch._inductor import config

from support.distributed import RankPool, fake_group


def test_torch_writes_no_graph_as_text():
    written = []
    torch._logging.trace_structured("artifact", payload_fn=lambda: written.append("a graph"), expect_trace_id=False)
    assert not written


def test_guards_are_not_timed():
    assert "profile_guard_manager(" in inspect.getsource(guards)
    assert guards.profile_guard_manager(None, None, 1) == 0.0


def test_a_new_process_group_forgets_no_rules():
    rules = trace_rules.get_torch_obj_rule_map()
    with fake_group(2):
        assert trace_rules.get_torch_obj_rule_map() is rules


def _cpp_is_loaded():
    return "torch._inductor.codegen.cpp" in sys.modules, config.compile_threads


@pytest.mark.skipif(
    bool(torch.version.cuda), reason="ranks that use CUDA start from a process that has compiled nothing"
)
def test_ranks_start_from_a_process_that_has_compiled():
    with RankPool(1) as pool:
        assert pool.run(_cpp_is_loaded) == [(True, 1)]
