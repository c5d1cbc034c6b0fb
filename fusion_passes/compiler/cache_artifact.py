"""Register files beside Inductor's cache for `torch.compiler.save_cache_artifacts`.

fusewire imports this at once, so that `torch.compiler.load_cache_artifacts` knows these files.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from torch.compiler._cache import CacheArtifact, CacheArtifactFactory


def write_file(file: Path, text: str) -> None:
    """Write a file atomically, so that no process reads half of it."""
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
    """One file of `cache_folder()`; its key is the file's name."""

    def populate_cache(self) -> None:
        write_file(cache_folder() / Path(self.key).name, self.content.decode())

    @staticmethod
    def type() -> str:
        return "fusewire"
