"""The command line, on a machine without a GPU: doctor, prebuild, what they say when something is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from fusewire import __main__ as cli
from fusewire.cli import doctor, prebuild
from fusewire.cli import tune as tune_command
from fusewire.custom_ops.dispatch import table_store
from fusewire.custom_ops.providers.flashinfer import library as flashinfer_library
from fusewire.errors import ConfigError, WorkspaceError

from support.fake_flashinfer import fake_flashinfer


def fusewire(*arguments, timeout=120, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fusewire", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


def test_every_command_has_help_and_a_module():
    for name, command in cli.COMMANDS.items():
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code == 0
        assert command.help


def test_a_clone_that_is_not_installed_says_so():
    """In a clone `python -m fusewire` finds the clone's folder, which holds only a part of the packages."""
    clone = Path(__file__).parents[2]
    command = [sys.executable, "-S", "-m", "fusewire", "doctor", "--help"]  # with -S: no editable installs
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "run `pip install -e .`" in done.stderr


def test_tests_are_no_part_of_the_package():
    assert importlib.util.find_spec("fusewire.tests") is None


def test_a_wrong_call_ends_with_two(capsys):
    for arguments in ([], ["nothing"], ["doctor", "--nothing"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


# --- doctor -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_doctor_without_a_gpu():
    done = fusewire("doctor")
    assert done.returncode == 0, done.stderr
    for said in (
        "Versions",
        f"torch {' ' * 8}{torch.__version__}",
        "GPUs\n  none",
        "FlashInfer",
        "Operator all_reduce_rms_norm, tried in the order symm_mem, flashinfer, native",
        "FlashInfer's kernels run on NVIDIA GPUs",
        "Plan for 2 ranks, hidden size 8192, bfloat16\n  1 tokens and more  native",
    ):
        assert said in done.stdout, said


def test_doctor_as_json():
    done = fusewire("doctor", "--json", "--ir-op-priority", "all_reduce_rms_norm=rank_ordered", NCCL_NVLS_ENABLE="0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["environment"]["NCCL_NVLS_ENABLE"] == "0"
    assert found["operators"]["all_reduce_rms_norm"]["priority"] == ["rank_ordered"]
    assert found["operators"]["all_reduce_sandwich_norm"]["computed_with"] == "all_reduce_rms_norm"
    assert {row["provider"] for plan in found["plans"] for row in plan["rows"]} == {"rank_ordered"}
    assert found["versions"]["torch"] == torch.__version__


def test_doctor_names_an_unknown_operator():
    done = fusewire("doctor", "--ir-op-priority", "nothing=native")
    assert done.returncode == 1
    assert "no operator 'nothing'" in done.stderr
    assert "Traceback" not in done.stderr


def machine_with_gpus(count):
    """Patches under which this machine seems to have H200s."""
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=141 << 30, multi_processor_count=132, uuid="u"
    )
    return mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        device_count=lambda: count,
        get_device_properties=lambda index: properties,
        get_device_capability=lambda *_: (9, 0),
        get_device_name=lambda *_: "NVIDIA H200",
        can_device_access_peer=lambda a, b: (a, b) != (0, 1),
        nccl=SimpleNamespace(version=lambda: (2, 28, 9)),
    )


def test_doctor_on_a_machine_with_gpus(monkeypatch):
    monkeypatch.setattr(doctor, "_ask", lambda *command: "GPU0 X NV18" if "topo" in command else "580.1")
    with fake_flashinfer(), machine_with_gpus(4):
        text = doctor.as_text(doctor.examine())
    assert "0: NVIDIA H200, compute capability 9.0, 141.0 GiB, 132 multiprocessors" in text
    assert "Peer access (row reads column)\n  yes  no yes yes" in text
    assert "GPU0 X NV18" in text
    assert "prebuilt: /nowhere/trtllm_comm/trtllm_comm.so" in text
    assert "Plan for 4 ranks, hidden size 8192, bfloat16\n  1 to " in text
    if importlib.util.find_spec("triton"):
        assert "symm_mem/oneshot  3.3 us (symm_mem/twoshot 3.9, flashinfer/oneshot 6.3, native 13.9); measured" in text
    else:
        assert "flashinfer/oneshot  6.3 us (native 13.9); measured on 4 H200s" in text
    assert "Plan for 8 ranks" not in text


def test_doctor_says_that_kernels_are_not_compiled():
    with fake_flashinfer(kernels="missing"):
        assert "python -m fusewire prebuild" in doctor._flashinfer()["kernels"]


def test_doctor_lives_with_what_does_not_answer(monkeypatch):
    def hangs(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", hangs)
    assert doctor._ask("nvidia-smi", "topo", "-m") == ""
    assert "did not answer" in doctor._driver()


def test_doctor_says_which_tuned_table_serves(monkeypatch, tmp_path):
    monkeypatch.setenv(table_store.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(doctor, "_ask", lambda *command: "")
    with fake_flashinfer(), machine_with_gpus(4):
        assert f"Tuned tables, in {tmp_path}/tables\n  none (`python -m fusewire tune" in doctor.as_text(
            doctor.examine()
        )
        key = table_store.local_key(4, 6144, torch.bfloat16)
        times = {"native": ((1, 20.0), (64, 30.0)), "flashinfer/oneshot": ((1, 5.0), (64, 90.0))}
        here = table_store.Table(key, times, "then", 9.0, {"symm_mem/twoshot": "wrong"})
        elsewhere = dataclasses.replace(here, key=dataclasses.replace(key, driver="1.2"))
        on_cpu = dataclasses.replace(here, key=dataclasses.replace(key, device="cpu"))
        for table in (here, elsewhere, on_cpu):
            table_store.save(table)
        (table_store.folder() / "x.json").write_text("{}")
        found = doctor.examine()
    text = doctor.as_text(found)
    serving = [table for table in found["tuned_tables"]["tables"] if table["serves"]]
    assert [table["path"] for table in serving] == [str(table_store.folder() / key.file_name)]
    assert f"serves    {key.file_name}; symm_mem/twoshot is left out: wrong" in text
    assert f"{elsewhere.key.file_name}: driver 1.2, here unknown" in text
    assert f"{on_cpu.key.file_name}: times of CPU ranks, which serve nobody" in text
    assert "x.json is ignored: it is not a table of fusewire's" in text
    rows = text.split("Plan for 4 ranks, hidden size 6144, bfloat16\n")[1].split("\n\n")[0]
    assert "flashinfer/oneshot  5.0 us (native 20.0); tuned on this machine, then" in rows
    assert "tuned" not in text.split("Plan for 4 ranks, hidden size 8192")[1]


# --- tune ---------------------------------------------------------------------------------------------------


def tune(*arguments, folder):
    return fusewire("tune", "--cpu", "--hidden", "64", *arguments, timeout=400, FUSEWIRE_CACHE_DIR=str(folder))


def test_tune_on_cpu_ranks(tmp_path):
    picture = tmp_path / "a.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    done = tune("32", "--tokens", "1", "4", "8", "--json", *plot, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    tables = json.loads(done.stdout)["tables"]
    assert [table["key"]["hidden"] for table in tables] == [64, 32]
    for table in tables:
        assert set(table["times"]) == {"native", "rank_ordered"}
        assert table["key"]["device"] == "cpu"
        assert table_store.read(Path(table["path"])).table == table_store.table_from_json(table)
        assert Path(table["path"]).parent == tmp_path / "tables"
    assert picture.exists() == bool(plot)
    assert "never serves GPUs" in done.stderr
    assert "tuning hidden size 64, bfloat16, 2 ranks: 1/3 1 tokens: " in done.stderr  # lines, since this is no terminal


def test_tune_tells_what_a_rank_could_not(tmp_path):
    done = tune("--tokens", "1", "--seconds", "-1", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("fusewire: tune(hidden=64")
    assert "Traceback" not in done.stderr


def test_tune_dry_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(table_store.CACHE_VARIABLE, str(tmp_path))
    assert cli.main(["tune", "--cpu", "--hidden", "64", "--max-tokens", "8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 ranks, hidden size 64, bfloat16\n  tokens: 1 2 4 8\n  native: all of them\n  rank_ordered: all" in said
    assert f"table: {tmp_path}/tables" in said
    with fake_flashinfer(), machine_with_gpus(4):
        assert cli.main(["tune", "--hidden", "64", "--max-tokens", "8", "--dry-run"]) == 0
    assert "not flashinfer/twoshot: FlashInfer 0.6.18's two-shot barrier can let" in capsys.readouterr().out
    with fake_flashinfer("0.7.2"), machine_with_gpus(4):
        assert cli.main(["tune", "--hidden", "64", "--max-tokens", "8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 ranks, hidden size 64" in said
    assert "flashinfer/oneshot: 1 2 4 8\n  flashinfer/twoshot: 8\n  native: all of them" in said
    assert "table: " in said
    assert "now there: nothing" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world-size", "1"], "all-reduces need at least two"),
        (["--max-tokens", "0"], "at least 1"),
        (["--plot", "x.jpg"], "ends in .png"),
        (["--plot", "/no/such/folder/x.png"], "a folder that exists"),
    ],
)
def test_tune_refuses_before_it_starts_ranks(arguments, said, capsys):
    installed = mock.patch.object(tune_command.importlib.util, "find_spec", return_value=True)
    with installed, mock.patch.object(tune_command, "_start_ranks", side_effect=AssertionError):
        assert cli.main(["tune", "--cpu", "--hidden", "64", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_tune_without_gpus_or_with_too_few(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--hidden", "64"]) == 1
    assert "--cpu" in capsys.readouterr().err
    with machine_with_gpus(4):
        assert cli.main(["tune", "--hidden", "64", "--world-size", "8"]) == 1
    assert "there are 4 GPUs here" in capsys.readouterr().err


def test_tune_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(tune_command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["tune", "--cpu", "--hidden", "64", "--plot", "a.png"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_tune_under_torchrun_takes_its_world_size(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["tune", "--cpu", "--hidden", "64", "--dry-run"]) == 0
    assert "3 ranks, hidden size 64" in capsys.readouterr().out
    assert cli.main(["tune", "--cpu", "--hidden", "64", "--world-size", "2"]) == 1
    assert "torchrun started 3 ranks" in capsys.readouterr().err


# --- prebuild -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_architecture(monkeypatch):
    monkeypatch.delenv(prebuild.ARCHITECTURES, raising=False)


@pytest.mark.parametrize("arch", ["8.0", "9", "9.0b", "hopper", "11.0a"])
def test_architectures_without_kernels_are_refused(arch, no_architecture):
    with pytest.raises(ConfigError, match="such as 9"):
        prebuild.choose_architectures(["9.0a", arch])
    assert prebuild.ARCHITECTURES not in os.environ


def test_architectures_reach_flashinfer(no_architecture):
    prebuild.choose_architectures(["9.0a", "10.0a"])
    assert os.environ[prebuild.ARCHITECTURES] == "9.0a 10.0a"
    prebuild.choose_architectures([])  # what the environment names will do


def test_without_gpu_or_architecture_prebuild_asks_for_one(monkeypatch, no_architecture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="name an architecture"):
        prebuild.choose_architectures([])


def run_prebuild(monkeypatch, tmp_path, kernels, build=lambda: None, **flashinfer):
    """The command with a fake FlashInfer; returns the state of the kernels it left."""
    monkeypatch.setenv(prebuild.ARCHITECTURES, "9.0a")
    monkeypatch.setattr(prebuild, "build", build)
    monkeypatch.setattr(prebuild, "cache_folder", lambda: tmp_path)
    states = iter(kernels)
    with fake_flashinfer(kernels=lambda: flashinfer_library.Kernels(next(states), tmp_path / "x.so"), **flashinfer):
        return cli.main(["prebuild"])


def test_prebuild_compiles_and_says_where(monkeypatch, tmp_path, capsys):
    assert run_prebuild(monkeypatch, tmp_path, ["missing", "cached"]) == 0
    said = capsys.readouterr()
    assert f"kernels: {tmp_path / 'x.so'}" in said.out
    assert "compiled for 9.0a" in said.out
    assert f"into {tmp_path}" in said.err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_prebuild_says_how_far_it_is(monkeypatch, tmp_path):
    """Each line of the progress, at each step of a fake build: ninja and two compilers below it."""
    details, said = [], []

    @contextlib.contextmanager
    def log_progress(text, *, after_s, detail):
        details.append(detail)
        yield

    def build():
        names = ["csrc_one.cuda.o", "csrc_two.cuda.o", "csrc_three.o"]
        (tmp_path / "build.ninja").write_text("".join(f"build {tmp_path / name}: compile x.cu\n" for name in names))
        said.append(details[0]())
        compilers = "".join(f"sh -c 'echo; read line <&3' nvcc -o {tmp_path / name} & " for name in names[:2])
        arguments = ["ninja", "-c", f"exec 3<&0; {compilers}wait", "ninja", "-f", str(tmp_path / "build.ninja")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(arguments, executable="/bin/sh", **pipes) as run:
            for _ in names[:2]:
                run.stdout.readline()  # they run
            (tmp_path / names[2]).touch()
            (tmp_path / names[0]).touch()  # not done yet
            said.append(details[0]())  # the compilers end with the input
        (tmp_path / names[1]).touch()
        said.append(details[0]())

    monkeypatch.setattr(flashinfer_library, "log_progress", log_progress)
    (tmp_path / "csrc_old.o").touch()  # of an earlier build
    assert run_prebuild(monkeypatch, tmp_path, ["missing", "cached"], build) == 0
    assert said[0] == "; 0 of 3 objects done"
    during = re.fullmatch(
        r"; 1 of 3 objects done, compiling csrc_one.cuda.o, csrc_two.cuda.o; "
        r"the compilers have used (\d+) s of processor time",
        said[1],
    )
    assert during is not None, said[1]
    assert said[2] == "; 3 of 3 objects done"


def test_prebuild_leaves_prebuilt_kernels(monkeypatch, tmp_path, capsys):
    def never():
        raise AssertionError

    assert run_prebuild(monkeypatch, tmp_path, ["prebuilt"], never) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_prebuild_that_leaves_nothing_fails(monkeypatch, tmp_path, capsys):
    assert run_prebuild(monkeypatch, tmp_path, ["missing", "missing"]) == 1
    assert "there is no" in capsys.readouterr().err


def test_prebuild_without_a_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert run_prebuild(monkeypatch, tmp_path, ["missing"]) == 1
    assert f"no nvcc in CUDA_HOME={tmp_path}" in capsys.readouterr().err


def test_prebuild_with_an_old_flashinfer(monkeypatch, tmp_path, capsys):
    assert run_prebuild(monkeypatch, tmp_path, [], version="0.6.9") == 1
    assert "0.6.9 is too old" in capsys.readouterr().err


def test_a_failed_compilation_shows_the_compilers_last_words():
    class Spec:
        def build(self, verbose, need_lock):
            raise RuntimeError("Ninja build failed. Ninja output:\n" + "noise\n" * 100 + "fatal error: no cuda.h")

    comm = SimpleNamespace(gen_trtllm_comm_module=Spec)
    modules = {
        "flashinfer": SimpleNamespace(),
        "flashinfer.jit": SimpleNamespace(),
        "flashinfer.jit.comm": comm,
    }
    with mock.patch.dict(sys.modules, modules), pytest.raises(WorkspaceError) as failed:
        prebuild.build()
    assert str(failed.value).endswith("fatal error: no cuda.h")
    assert len(str(failed.value).splitlines()) < 40


def test_the_toolkit_behind_a_script_on_path_is_found(monkeypatch, tmp_path):
    home, scripts = tmp_path / "cuda", tmp_path / "bin"
    for folder in (home / "bin", home / "include", scripts):
        folder.mkdir(parents=True)
    (home / "include/cuda.h").write_text("")
    for path, text in (
        (home / "bin/nvcc", f"#!/bin/sh\necho '#$ TOP={home}/bin/..' >&2\n"),
        (scripts / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n'),
    ):
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("FLASHINFER_NVCC", raising=False)
    monkeypatch.setenv("PATH", str(scripts), prepend=os.pathsep)
    assert flashinfer_library.cuda_home(flashinfer_library.find_nvcc()) == home
    with flashinfer_library.toolkit():
        assert os.environ["CUDA_HOME"] == str(home)
    assert "CUDA_HOME" not in os.environ


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_missing_driver_library_is_stood_in_for(monkeypatch):
    monkeypatch.setattr(prebuild, "_links_cuda", lambda compiler: False)
    monkeypatch.setenv("LIBRARY_PATH", "/somewhere")
    with prebuild.cuda_library():
        folder = Path(os.environ["LIBRARY_PATH"].split(os.pathsep)[0])
        built = (folder / "libcuda.so").read_bytes()
        assert b"libcuda.so.1" in built
        # The linker takes it: that is what it is for.
        linked = subprocess.run(["c++", "-shared", "-Wl,--no-as-needed", "-lcuda", "-o", folder / "a.so"], check=False)
        assert linked.returncode == 0
    assert os.environ["LIBRARY_PATH"] == "/somewhere"
    assert not folder.exists()


def test_a_machine_without_a_linker_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(WorkspaceError, match="C\\+\\+ compiler"), prebuild.cuda_library():
        pass
