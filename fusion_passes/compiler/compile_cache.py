"""Count hits of Inductor's compile cache, switch it off, and save files along with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch._functorch.config
import torch._inductor.config
from torch._dynamo.utils import counters
from torch.compiler._cache import CacheArtifactManager

from fusewire.fusion_passes.compiler.cache_artifact import GraphReportArtifact


def take_along(name: str, text: str) -> None:
    """Have torch.compiler.save_cache_artifacts save `text` as this file of `cache_folder()`."""
    CacheArtifactManager.record_artifact(GraphReportArtifact.type(), name, text.encode())


def hits() -> int:
    """Return how many compiled graphs this process has taken from the cache."""
    return int(counters["inductor"]["fxgraph_cache_hit"])


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Within the block, take no compiled graph from any cache and store none."""
    inductor = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    autograd = {"enable_autograd_cache": False, "enable_remote_autograd_cache": False}
    with torch._inductor.config.patch(inductor), torch._functorch.config.patch(autograd):
        yield
