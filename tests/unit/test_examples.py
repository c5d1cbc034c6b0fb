"""The short examples run on two ranks, and everything in them fuses."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path

import pytest
from torch._inductor import config as inductor_config

from support.compiles import WITHOUT_CODE
from support.distributed import shared_pool

EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(name):
    """Run an example's main() on this rank; return what it prints, and its counts of all-reduces."""
    import fusewire

    fusewire.clear_report()
    sys.path.insert(0, str(EXAMPLES))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), inductor_config.patch(WITHOUT_CODE):
        importlib.import_module(name).main()
    entries = fusewire.report().entries
    return printed.getvalue(), len(entries), sum(entry.status == "fused" for entry in entries)


@pytest.mark.parametrize(
    ("name", "all_reduces", "line"),
    [
        ("quickstart", 5, "All ranks "),
        ("dtensor", 2, "largest difference to the model without torch.compile: "),
        ("gpt_fast", 2, "largest difference to the model without torch.compile: "),
    ],
)
def test_an_example_fuses_all_and_prints_the_report(name, all_reduces, line, tmp_path):
    if name == "quickstart":
        pytest.importorskip("transformers", minversion="5.17", reason="quickstart.py needs transformers 5.17")
    (printed, *counts), *others = shared_pool(2).run(_run, name, cache_dir=tmp_path)
    assert counts == [all_reduces, all_reduces]
    assert printed.startswith(line)
    assert f"{all_reduces} of {all_reduces} all-reduces fused" in printed
    if not line.startswith("All"):
        assert float(printed.splitlines()[0].removeprefix(line)) < 1e-5
    assert others == [("", *counts)]  # rank 0 alone prints


def test_the_examples_are_in_the_readme():
    names = {path.name for path in EXAMPLES.glob("*.py")} - {"demo.py", "smollm2.py"}
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert {name for name in names if f"examples/{name}" not in readme} == set()
