"""The plugin in vLLM's real sources: configurations, passes and groups, without a server.

Runs where vLLM is installed: `make test-serving`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "plugin"))  # before vLLM looks for platforms
vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-serving")

import torch  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_sum, resolve_group  # noqa: E402
from fusewire.integrations import vllm as plugin  # noqa: E402
from fusewire.integrations.vllm_options import KEY, VARIABLE  # noqa: E402

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    for name in (VARIABLE, "FUSEWIRE_DISABLE", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    plugin._say_once.cache_clear()
    return str(tmp_path)


@pytest.fixture
def lines(monkeypatch):
    """What the plugin says; vLLM's loggers do not pass it on."""
    found = []
    monkeypatch.setattr(plugin.log, "handle", lambda record: found.append(record.getMessage()))
    return found


def configuration(model, **arguments):
    load_general_plugins()
    compilation = arguments.pop("compilation_config", {"mode": 3})
    defaults = {"tensor_parallel_size": 2, "skip_tokenizer_init": True, "max_model_len": 128}
    engine = EngineArgs(model=model, compilation_config=compilation, **{**defaults, **arguments})
    return engine.create_engine_config()


def pass_names(config):
    from vllm.utils.import_utils import resolve_obj_by_qualname

    manager = resolve_obj_by_qualname(current_platform.get_pass_manager_cls())()
    with set_current_vllm_config(config):
        manager.configure(config)
    return [type(item).__name__ for item in manager.passes], manager


def test_switched_off_nothing_changes(model, lines):
    config = configuration(model)
    assert config.additional_config == {}
    assert "FusewirePass" not in pass_names(config)[0]
    assert lines == []


@pytest.mark.parametrize("way", ["variable", "configuration"])
def test_switched_on(model, lines, monkeypatch, way):
    # vLLM's CPU build cannot have its own fusion on where fusewire does not switch it off.
    arguments = {"compilation_config": {"mode": 3, "pass_config": {"fuse_allreduce_rms": True}}}
    if way == "variable":
        monkeypatch.setenv(VARIABLE, '{"output_in_place": true}')
    else:
        arguments["additional_config"] = {"fusewire": {"output_in_place": True}}
    config = configuration(model, **arguments)
    assert not config.compilation_config.pass_config.fuse_allreduce_rms
    assert lines == [
        "fusewire replaces vLLM's own fusion of all-reduces with norms: fuse_allreduce_rms is off",
        "fusewire is on with {'output_in_place': True}",
    ]
    names, manager = pass_names(config)
    assert names[names.index("FusewirePass") - 1] == "NoOpEliminationPass"
    assert manager.passes[names.index("FusewirePass")].config.output_in_place


def test_vllms_hash_knows_fusewire(model, monkeypatch):
    plain = configuration(model).compute_hash()
    monkeypatch.setenv(VARIABLE, "1")
    on = configuration(model)
    assert on.compute_hash() != plain
    assert configuration(model).compute_hash() == on.compute_hash()
    monkeypatch.setenv(VARIABLE, '{"output_in_place": true}')
    assert configuration(model).compute_hash() != on.compute_hash()
    monkeypatch.setenv("FUSEWIRE_DISABLE", "1")
    off = configuration(model)
    assert KEY not in off.additional_config


def test_the_manager_has_a_uuid_with_fusewire_in_it(model, monkeypatch):
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config.utils import Range

    monkeypatch.setenv(VARIABLE, "1")
    names, manager = pass_names(configuration(model))
    with pass_context(Range(1, 64)):
        uuid = manager.uuid()
        manager.passes.pop(names.index("FusewirePass"))
        assert manager.uuid() != uuid


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tensor_parallel_size": 1}, "fusewire stays out: tensor_parallel_size is 1"),
        ({"enforce_eager": True}, "vLLM compiles nothing (--enforce-eager)"),
        ({"compilation_config": {"mode": 0}}, "The compilation mode is NONE"),
    ],
)
def test_it_stays_out_and_says_why(model, lines, monkeypatch, arguments, says):
    monkeypatch.setenv(VARIABLE, "1")
    config = configuration(model, **arguments)
    assert KEY not in config.additional_config
    assert any(says in line for line in lines)
    assert "fusewire is on" not in lines


def test_wrong_options_stop_the_start(model, monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"fuse": true}')
    with pytest.raises(ValueError, match="unknown option 'fuse'; did you mean"):  # pydantic wraps a ConfigError
        configuration(model)


def test_an_unknown_version_stays_as_it_is(monkeypatch, lines):
    load_general_plugins()
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setenv(VARIABLE, "1")
    before = current_platform.check_and_update_config
    plugin.register()
    assert lines == ["fusewire stays out: it knows vLLM 0.26 to 0.33, and this is 0.99.0"]
    assert current_platform.check_and_update_config == before


def test_vllms_groups_have_vllms_names_and_its_all_reduce(model):
    """One process; vLLM's all-reduce is watched, not run."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    load_general_plugins()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:

        class Coordinator:
            world_size, unique_name, device_group = 2, "tp:7", dist.group.WORLD

        plugin._name_group(Coordinator)
        assert resolve_group("tp:7") is dist.group.WORLD
        with pytest.raises(AssertionError, match="Group tp:7 is not found"):  # vLLM's own message
            all_reduce_sum(torch.ones(2, 4), "tp:7")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["execute_model", "sample_tokens"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_call_fails_the_step(monkeypatch, method, asynchronous):
    """The step's output must not leave the worker."""
    from vllm.v1.outputs import AsyncModelRunnerOutput
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from fusewire.custom_ops import api
    from fusewire.errors import PeerTimeoutError

    load_general_plugins()

    class Output(AsyncModelRunnerOutput):
        other = "of the output"

        def get_output(self):
            return "tokens"

    class Worker:
        def execute_model(self, scheduled):
            return Output() if asynchronous else "tokens"

        sample_tokens = execute_model

    wrapper = WorkerWrapperBase.__new__(WorkerWrapperBase)
    wrapper.worker, wrapper.mm_receiver_cache = Worker(), None

    def step():
        output = getattr(wrapper, method)(object())
        if not asynchronous:
            return output
        assert isinstance(output, AsyncModelRunnerOutput)
        assert output.other == "of the output"
        return output.get_output()

    assert step() == "tokens"

    def fail():
        raise PeerTimeoutError("rank 1 did not take part")

    monkeypatch.setattr(api, "check", fail)
    with pytest.raises(PeerTimeoutError, match="rank 1"):
        step()
