"""Ranks for the scripts of this folder: forked, each with a limit, and reporting as they go.

The parent imports torch and forks, so that a rank starts in a fraction of a second. It never
touches CUDA.

With FUSEWIRE_SHARED_GPU=1 all ranks are processes on one GPU. Kernels, mappings, faults and CUDA
graphs are then real; the links are that GPU's own memory, and collectives of the program run on
gloo, since NCCL takes a GPU for one rank only. Without CUDA's MPS the ranks' kernels take turns, so
a call lasts milliseconds.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta

# Multicast objects are not for tests: one that goes wrong takes the machine's GPUs out of service.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

import torch
import torch.distributed as dist

import fusewire
from fusewire.custom_ops.providers.flashinfer import provider as flashinfer
from fusewire.custom_ops.providers.symm_mem import provider as symm_mem
from fusewire.custom_ops.providers.symm_mem.layout import CTL_LIMIT_NS
from fusewire.custom_ops.workspaces.provider import device_facts
from fusewire.custom_ops.workspaces.registry import REGISTRY

SHARED_GPU = os.environ.get("FUSEWIRE_SHARED_GPU") == "1"
BACKEND = "gloo" if SHARED_GPU else "cpu:gloo,cuda:nccl"
SCALE = "scale_then_round"


def say(**fields):
    print(json.dumps(fields), flush=True)


def run_ranks(job, size, *args, limit_s=18.0, gpu=True, environment=None):
    """Run job(rank, *args) on forked ranks, each with a GPU of its own; return each rank's exit
    status.

    A negative status is the signal that ended the rank, -9 also if it was killed after `limit_s`.
    Its answers are the lines that it prints.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _child(job, rank, size, args, port, gpu, limit_s, environment or {})
        children[pid] = rank
    statuses, end = [None] * size, time.monotonic() + limit_s
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[children.pop(pid)] = os.waitstatus_to_exitcode(status)
            end = min(end, time.monotonic() + limit_s / 3)  # others may be left in a collective of the program's own
        elif time.monotonic() > end:
            for left in children:
                os.kill(left, signal.SIGCONT)
                os.kill(left, signal.SIGKILL)
            end += 5.0
        else:
            time.sleep(0.01)
    return statuses


def _child(job, rank, size, args, port, gpu, limit_s, environment):
    status = 1
    try:
        os.environ.update(environment)
        faulthandler.dump_traceback_later(limit_s - 1.0, exit=True)
        if gpu:
            choose_gpu(rank)
        store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=limit_s))
        dist.init_process_group(
            BACKEND if gpu else "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=limit_s)
        )
        job(rank, *args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def choose_gpu(rank):
    """Make a rank's GPU the current one; ranks on one GPU look like ranks with their own."""
    torch.cuda.set_device(0 if SHARED_GPU else rank)
    if SHARED_GPU:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # else torch refuses to map
        symm_mem.device_facts = flashinfer.device_facts = lambda device: {
            **device_facts(device),
            "uuid": f"rank {rank}",
        }


def join(timeout_s):
    """Choose this rank's GPU and join the group, under torchrun."""
    faulthandler.enable()
    choose_gpu(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(BACKEND, timeout=timedelta(seconds=timeout_s))


def shorten_kernels(seconds):
    """Let the kernels of all workspaces give up after so many seconds from now on."""
    for workspace in REGISTRY.made():
        if hasattr(workspace, "made"):
            workspace.made.timeout_s = seconds
            workspace.made.ctl[CTL_LIMIT_NS] = int(seconds * 1e9)
    torch.cuda.synchronize()


def all_reduce_norm(x, residual, weight, policy):
    return fusewire.all_reduce_rms_norm(
        x, residual, weight, 1e-6, 0.0, SCALE, dist.group.WORLD.group_name, policy=policy
    )


def eighths(tokens, hidden, seed, dtype, device):
    """Pseudo-random multiples of 1/8, of which sums over ranks are exact in every dtype."""
    index = torch.arange(tokens * hidden, device=device).view(tokens, hidden)
    return ((index * (2 * seed + 1) + seed * 7) % 9 - 4).to(dtype) / 8


def _meet():
    """On a shared GPU, wait for all ranks: what they hold is counted together."""
    if SHARED_GPU and dist.is_initialized():
        dist.barrier()


def held():
    """What this process holds: bytes of GPU memory, open files, resident bytes."""
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    gpu = 0
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        _meet()
        free, total = torch.cuda.mem_get_info()
        gpu = total - free
        _meet()
    return {"gpu": gpu, "files": len(os.listdir("/proc/self/fd")), "resident": resident}
