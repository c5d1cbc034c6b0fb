"""Workspaces of which only the error word is real: memory of this process that a kernel would
write."""

from __future__ import annotations

import ctypes

import torch

from fusewire.custom_ops.providers.symm_mem.layout import CTL_WORDS
from fusewire.custom_ops.providers.symm_mem.provider import HeldWorkspace
from fusewire.custom_ops.providers.symm_mem.workspace import SymmMemWorkspace
from fusewire.custom_ops.workspaces.provider import Request, WorkspaceKey
from fusewire.custom_ops.workspaces.registry import REGISTRY, WorkspaceEntry

from support.plain_provider import PlainProvider

CPU = torch.device("cpu")


class WordWorkspace(SymmMemWorkspace):
    """A rank's workspace without buffers."""

    nbytes, freed = 0, False

    def __init__(self, rank=0, world_size=2, hidden=16):
        self.rank, self.world_size, self.hidden, self.dtype = rank, world_size, hidden, torch.bfloat16
        self.group_name, self.timeout_s, self.device = "group", 2.0, CPU
        self._host_error = torch.zeros(1, dtype=torch.int64)
        self._error_word = ctypes.c_int64.from_address(self._host_error.data_ptr())
        self.ctl, self._limit_ns = torch.zeros(CTL_WORDS, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        self._limit_stream = None

    def give_up(self, kind=1, rank=1, call=17):
        """What a kernel writes."""
        self._error_word.value = call << 16 | kind << 8 | rank + 1

    def close(self):
        self.freed = True


def held(provider="symm_mem", hidden=16):
    """A workspace as the registry has it; its `made` gives up."""
    key = WorkspaceKey(provider, "group", torch.bfloat16, hidden)
    return HeldWorkspace(Request(key, None, CPU, 64), WordWorkspace(hidden=hidden))


def register(workspace):
    REGISTRY.entries[workspace.key] = WorkspaceEntry(workspace.key, lambda: None, workspace)


class WordProvider(PlainProvider):
    """Makes such workspaces, with all the votes of a real provider."""

    name = "words"

    def create(self, request, channel):
        channel.barrier()
        return HeldWorkspace(request, WordWorkspace(request.group.rank(), request.group.size(), request.key.hidden))

    def self_test(self, made, stage):
        made.made.check()
