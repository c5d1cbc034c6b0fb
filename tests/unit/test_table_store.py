"""Tables of measured times: on disk, their keys, and the plan that one gives."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from fusewire.custom_ops.dispatch import cost_model, cost_tables, table_store
from fusewire.custom_ops.dispatch.table_store import TableKey

from support.tables import BF16, HIDDEN, KEY, TABLE

pytestmark = pytest.mark.usefixtures("cache")


def test_a_table_is_read_back_as_it_was(cache):
    path = table_store.save(TABLE)
    assert path.parent == cache / "tables" == table_store.folder()
    assert "NVIDIA-H200-2-ranks-hidden-64-bfloat16" in path.name
    found = table_store.load(KEY)
    assert found == (path, TABLE, "")
    assert found.table.digest == TABLE.digest
    assert [each.table for each in table_store.all_files()] == [TABLE]


def test_a_table_is_replaced_only_where_it_differs():
    path = table_store.save(TABLE)
    before = path.stat().st_ino
    table_store.save(TABLE)
    assert path.stat().st_ino == before
    table_store.save(dataclasses.replace(TABLE, seconds=1.0))
    assert table_store.load(KEY).table.seconds == 1.0


def test_where_tables_lie(monkeypatch):
    monkeypatch.delenv(table_store.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert table_store.folder() == Path("/somewhere/fusewire/tables")
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert table_store.folder() == Path("/home/someone/.cache/fusewire/tables")


def damaged(**changes):
    return json.dumps({**TABLE.as_json(), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("\udcff", "damaged"),
        ("[1, 2]", "not a table of fusewire's"),
        ('{"times": {}}', "not a table of fusewire's"),
        (damaged(fusewire_table=99), "version 99"),
        (damaged(times={}), "no times"),
        (damaged(times={"native": []}), "do not grow"),
        (damaged(times={"native": [[4, 1.0], [1, 2.0]]}), "do not grow"),
        (damaged(times={"native": [[0, 1.0]]}), "do not grow"),
        (damaged(times={"native": [[1.5, 1.0]]}), "do not grow"),
        (damaged(times={"native": [[1, -1.0]]}), "not a positive number"),
        (damaged(times={"native": [[1, float("nan")]]}), "not a positive number"),
        (damaged(times={"native": [[1, "fast"]]}), "damaged"),
        (damaged(times={"native": 3}), "damaged"),
        (damaged(times=[1]), "damaged"),
        (damaged(notes=None), "damaged"),
        (damaged(rejected=[]), "damaged"),
        (damaged(seconds="long"), "damaged"),
        (damaged(link_rate=-1), "damaged"),
        (damaged(key={"gpu": "x"}), "damaged"),
        (damaged(key={**dataclasses.asdict(KEY), "dtype": "nothing"}), "dtype 'nothing'"),
        (damaged(key={**dataclasses.asdict(KEY), "dtype": "nn"}), "dtype 'nn'"),
        (damaged(key={**dataclasses.asdict(KEY), "hidden": "64"}), "damaged"),
        (damaged(key={**dataclasses.asdict(KEY), "driver": "1.0"}), "another machine (driver 1.0, here 580.1)"),
        (damaged(key={**dataclasses.asdict(KEY), "device": "cpu"}), "another machine (device cpu, here cuda)"),
        (" " * (2 << 20), "too large"),
    ],
)
def test_a_file_that_is_no_table_is_ignored_with_a_reason(text, said):
    path = table_store.save(TABLE)
    path.write_bytes(text.encode(errors="surrogateescape"))
    found = table_store.load(KEY)
    assert found.table is None
    assert said in found.reason
    assert str(path) in found.reason


def test_what_is_no_file_is_ignored_too():
    path = table_store.save(TABLE)
    path.unlink()
    assert table_store.load(KEY) == (path, None, "")
    path.mkdir()
    assert "ignored" in table_store.load(KEY).reason


def test_a_failed_write_leaves_the_table_before_it():
    table_store.save(TABLE)
    with mock.patch.object(os, "replace", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        table_store.save(dataclasses.replace(TABLE, seconds=1.0))
    assert table_store.load(KEY).table == TABLE
    assert len(list(table_store.folder().iterdir())) == 1


def test_a_process_killed_while_writing_leaves_the_table_before_it():
    table_store.save(TABLE)
    code = (
        "import dataclasses, os\nfrom fusewire.custom_ops.dispatch import table_store\n"
        "old = table_store.all_files()[0].table\n"
        "os.fsync = lambda file: os.kill(os.getpid(), 9)\n"
        "table_store.save(dataclasses.replace(old, seconds=1.0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert len(list(table_store.folder().iterdir())) == 2  # what was being written is still there
    assert [found.table for found in table_store.all_files()] == [TABLE]
    assert table_store.load(KEY).table == TABLE


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TableKey)])
def test_a_table_serves_nothing_but_its_own_key(name):
    value = getattr(KEY, name)
    other = {"torch": "2.14.0"} if name == "versions" else value * 2
    asked = dataclasses.replace(KEY, **{name: other})
    table_store.save(TABLE)
    assert table_store.load(asked).table is None
    assert (name if name != "versions" else "torch 2.13.0, here 2.14.0") in KEY.differences(asked)
    # Not even if someone renames the file.
    table_store.load(KEY).path.rename(table_store.load(asked).path)
    assert "another machine" in table_store.load(asked).reason


def facts(uuid, **changes):
    versions = {"torch": "2.13.0", **changes.pop("versions", {})}
    found = {"device": "cuda", "gpu": "G", "host": "h", "uuid": uuid, "driver": "1", "links": "NVLink 5 x 18, NVSwitch"}
    return {**found, **changes, "versions": versions}


def test_a_key_is_the_same_whichever_rank_makes_it():
    ranks = [facts("a", gpu="A", versions={"triton": "3"}), facts("b", gpu="B")]
    key = table_store.key_of(ranks, 64, BF16)
    assert key == table_store.key_of(ranks[::-1], 64, BF16)
    assert (key.gpu, key.versions["triton"], key.world_size) == ("A + B", "3 + none", 2)


def test_behind_a_switch_it_does_not_matter_which_gpus():
    def links(first, second, **changes):
        return table_store.key_of([facts(first, **changes), facts(second, **changes)], 64, BF16).links

    assert links("a", "b") == links("c", "d") == "NVLink 5 x 18, NVSwitch"
    assert links("a", "b", links="PCIe 5 x 16") == links("b", "a", links="PCIe 5 x 16")
    assert links("a", "b", links="PCIe 5 x 16") != links("a", "c", links="PCIe 5 x 16")
    assert "2 hosts" in table_store.key_of([facts("a", host="x"), facts("b", host="y")], 64, BF16).links


def fake_nvml(active, remote=2):
    class Failed(Exception):
        pass

    def state(gpu, link):
        if link >= 12:
            raise Failed
        return link < active

    return types.SimpleNamespace(
        NVMLError=Failed, NVML_NVLINK_MAX_LINKS=18, NVML_NVLINK_DEVICE_TYPE_SWITCH=2,
        nvmlDeviceGetNvLinkState=state, nvmlDeviceGetNvLinkVersion=lambda gpu, link: 4,
        nvmlDeviceGetNvLinkRemoteDeviceType=lambda gpu, link: remote,
        nvmlDeviceGetMaxPcieLinkWidth=lambda gpu: 16, nvmlDeviceGetMaxPcieLinkGeneration=lambda gpu: 5,
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlSystemGetDriverVersion=lambda: b"580.1.2",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
    )  # fmt: skip


def test_links_are_read():
    for nvml, said in (
        (fake_nvml(12), "12 NVLinks of NVML's version 4, NVSwitch"),
        (fake_nvml(4, remote=1), "4 NVLinks of NVML's version 4"),
        (fake_nvml(0), "PCIe 5 x 16"),
    ):
        properties = types.SimpleNamespace(name="G", major=9, minor=0, uuid="u")
        with (
            mock.patch.dict(sys.modules, {"pynvml": nvml}),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        ):
            table_store._driver_and_links.cache_clear()
            found = table_store.machine_facts(torch.device("cuda", 0))
        assert (found["driver"], found["links"]) == ("580.1.2", said)
    table_store._driver_and_links.cache_clear()


def test_nccl_settings_are_part_of_its_version(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert "NCCL_ALGO=Ring" in table_store._nccl()


def test_without_nvml_links_are_unknown():
    table_store._driver_and_links.cache_clear()
    with mock.patch.dict(sys.modules, {"pynvml": None}):
        assert table_store._driver_and_links(torch.device("cuda", 5))[1] == "unknown"
    table_store._driver_and_links.cache_clear()


def test_a_table_as_a_plan():
    plan = TABLE.cost_model()
    assert plan.cost("native", 1) == 10.0
    assert plan.cost(cost_tables.ONE_SHOT, 8) == 50.0
    assert "tuned on this machine, 2026-11-20" in plan.source
    assert cost_model.find_cost_model("any", 2, HIDDEN, BF16, plan) is plan


def test_the_floor_is_what_must_leave_a_gpu():
    # 8 ranks, 1024 tokens of 8192 in 2 bytes: 16 MiB, of which 2 * 7 / 8 leave, at 450 GB/s.
    table = dataclasses.replace(TABLE, key=dataclasses.replace(KEY, world_size=8, hidden=8192), link_rate=450e9)
    assert table.floor(1024) == pytest.approx(65.2, abs=0.1)
    assert dataclasses.replace(table, link_rate=None).floor(1024) is None
