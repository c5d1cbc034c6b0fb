"""The provider `symm_mem_batch_invariant`: `symm_mem` with bits that depend on the row alone.

Its calls use the workspaces of `symm_mem` and give the bits of `rank_ordered_batch_invariant`,
which serves where they cannot. Costs are those of `symm_mem`.
"""

from __future__ import annotations

from fusewire.custom_ops.dispatch.dispatcher import served_by
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.providers.symm_mem import provider as symm_mem
from fusewire.custom_ops.providers.symm_mem import self_test
from fusewire.custom_ops.workspaces.provider import PROVIDERS, Workspace

PROVIDER = f"{symm_mem.PROVIDER}_batch_invariant"


class InvariantProvider(symm_mem.SymmMemProvider):
    """The batch-invariant kernels as a provider."""

    name = PROVIDER
    batch_invariant = True

    @property
    def workspace_name(self) -> str:
        return symm_mem.PROVIDER

    def refusal(self, workspace: Workspace) -> str:
        assert isinstance(workspace, symm_mem.HeldWorkspace)
        kind = self_test.kind_of(False, False, True)
        return "" if workspace.passes(kind) else f"{kind} calls did not pass their test (the log says why)"


all_reduce_rms_norm.register_impl(
    PROVIDER, supported=symm_mem.supported, supports_args=symm_mem.supports_args, batch_invariant=True
)(served_by(PROVIDER))
PROVIDERS[PROVIDER] = InvariantProvider()
