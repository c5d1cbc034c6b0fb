"""A provider of workspaces that does nothing but take part in all votes; tests derive theirs from
it.
"""

from __future__ import annotations

from fusewire.custom_ops.ops.registry import YES
from fusewire.custom_ops.workspaces.provider import Workspace, WorkspaceProvider


class PlainWorkspace(Workspace):
    def release(self):
        pass


class PlainProvider(WorkspaceProvider):
    name, variants = "plain", ()
    limits = token_limit = bind = None

    def machine(self, group, device):
        return {}

    def validate(self, facts):
        return YES

    def max_tokens(self, hidden, dtype, world_size):
        return 64

    def nbytes(self, hidden, dtype, world_size, tokens):
        return 0

    def create(self, request, channel):
        return PlainWorkspace(request.key, request.max_tokens, 0, request.device)

    def self_test(self, made, stage):
        pass
