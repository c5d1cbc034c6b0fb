"""The files beside Inductor's cache, as `torch.compiler.save_cache_artifacts` takes them along.

Imported with fusewire itself, so that `torch.compiler.load_cache_artifacts` knows this kind of artifact.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from torch.compiler._cache import CacheArtifact, CacheArtifactFactory


def write_file(file: Path, text: str) -> None:
    """Write a file in one step, so that nobody reads half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    temporary.write_text(text)
    temporary.replace(file)


def cache_folder() -> Path:
    """Return the folder for fusewire's files beside Inductor's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "fusewire"


@CacheArtifactFactory.register
class GraphReportArtifact(CacheArtifact):
    """One file, by its name."""

    def populate_cache(self) -> None:
        write_file(cache_folder() / Path(self.key).name, self.content.decode())

    @staticmethod
    def type() -> str:
        return "fusewire"
