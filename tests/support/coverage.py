"""What fuses in each model of the zoo, as a table: `docs/coverage.md` is what this command wrote.

    python -m tests.support.coverage                             # print it
    python -m tests.support.coverage --write docs/coverage.md    # refresh the documentation
    python -m tests.support.coverage --models llama,gemma2       # some models only
    python -m tests.support.coverage --write docs/coverage.md --also DIRECTORY      # and with another transformers

Each model runs one forward pass in bfloat16, as rank 0 of two over torch's fake process group: it is compiled up to
Inductor's post-grad passes, where fusewire works, without generating code. Graph breaks are allowed and counted.

DIRECTORY is one that pip filled, `pip install --target DIRECTORY transformers==5.0.0`; --also may be given several times.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

import fusewire
from fusewire.fusion_passes.backend import FusewirePass
from fusewire.fusion_passes.context import MERGED

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.distributed import fake_group
from support.zoo import LAYER_NORM, MODELS, ModelSpec, count_all_reduces, forward_logits

WORLD_SIZE, BATCH, TOKENS = 2, 2, 8


@dataclass
class Coverage:
    """What became of one model's all-reduces.

    Attributes:
        all_reduces: those in the compiled graphs, counted without fusewire's help; `reported` are those that its
            report accounts for.
        merged: fused ones that are no collective of their own any more (a sum of two all-reduces became one).
        reasons: why all-reduces were refused, with the number of them.
        graph_breaks: why Dynamo broke the graph, with how often.
        failed: why the model could not be run; "" if it could.
    """

    spec: ModelSpec
    all_reduces: int = 0
    reported: int = 0
    fused: int = 0
    merged: int = 0
    reduce_scatters: int = 0
    graphs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    graph_breaks: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    failed: str = ""

    @property
    def sums(self) -> int:
        """All-reduces, and reduce-scatters in their place."""
        return self.all_reduces + self.reduce_scatters

    @property
    def fusible(self) -> int | None:
        """How many may be fused; None where the zoo's numbers are of other versions and the outcome does not tell."""
        if self.spec.counted:
            return self.spec.fusible
        if self.sums in (self.fused, 0):
            return self.sums
        return 0 if self.spec.note.endswith(LAYER_NORM) else None


def measure(name: str) -> Coverage:
    """Compile a model of the zoo as rank 0 of two, with graph breaks allowed, and take stock."""
    spec = MODELS[name]
    found = Coverage(spec, failed=spec.skip_reason)
    if found.failed:
        return found
    fusewire.clear_report()
    counters["graph_break"].clear()
    with fake_group(WORLD_SIZE), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = torch.compile(spec.build(torch.bfloat16), backend=_backend(found), dynamic=False)
            forward_logits(model, spec.inputs(BATCH, TOKENS))
        except Exception:
            torch._dynamo.reset()
            why = _why_not(spec)
            if not why:
                raise
            return Coverage(spec, failed=why)
    report = fusewire.report()
    found.reported, found.fused, found.graphs = report.found, report.fused, len(report.graphs)
    found.merged = sum(entry.fusion.startswith(MERGED) for entry in report.entries)
    found.reasons = Counter(_reason(entry.reason) for entry in report.entries if entry.status != "fused")
    found.graph_breaks = Counter(counters["graph_break"])
    notes = [note for graph in report.graphs for note in graph.notes]
    found.notes = [note for note in notes if not note.startswith("taken to be equal on all ranks")]
    return found


def _why_not(spec: ModelSpec) -> str:
    """Why the versions installed here cannot run a model without fusewire, or "" if they can."""
    for how in ("as it is", 'under torch.compile(backend="eager")'):
        try:
            model = spec.build(torch.bfloat16)
            run = model if how == "as it is" else torch.compile(model, backend="eager", dynamic=False)
            forward_logits(run, spec.inputs(BATCH, TOKENS))
        except Exception as error:
            said = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")
            return f"fails {how}, without fusewire: {_first_line(said)}"
    return ""


def _backend(found: Coverage) -> Callable[..., Any]:
    """A torch.compile backend that stops where fusewire has run, counts what it met, and interprets the graph."""
    ours = FusewirePass()

    def count_and_run(graph: torch.fx.Graph) -> None:
        found.all_reduces += count_all_reduces(graph)
        scatter = torch.ops._c10d_functional.reduce_scatter_tensor.default
        found.reduce_scatters += len(graph.find_nodes(op="call_function", target=scatter))
        ours(graph)

    def inner(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        mode = detect_fake_mode(example_inputs) or FakeTensorMode()  # a graph may have no inputs
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(gm, is_inference=bool(kwargs.get("is_inference")))
        gm.recompile()

        def boxed(arguments: Any) -> Any:
            return gm.forward(*arguments)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        patches = {"post_grad_custom_post_pass": count_and_run, "force_disable_caches": True}
        with inductor_config.patch(patches):
            return compile_fx(gm, example_inputs, inner_compile=inner)

    return backend


def _reason(reason: str) -> str:
    """A reason without the names of single nodes, so that the same reason counts as the same."""
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", reason)


# --- As Markdown --------------------------------------------------------------------------------------------

_HEAD = """# Coverage

Which all-reduces fuse in which model. Each model (tiny, with random weights, {layers} layers) is
compiled as one rank of {world}, over a process group that communicates with nobody. So this needs
no GPU and only one process. Written on {date} by

```
python -m tests.support.coverage --write docs/coverage.md{also}
```

Run it again after changing a pass, a pattern or a model of `tests/support/zoo.py`, and with other
versions.

- **all-reduces**: in the compiled graphs of one forward pass, counted without fusewire.
  Reduce-scatters of sequence parallelism count too.
- **fusible**: those that mathematics allows to fuse with an RMSNorm. `tests/support/zoo_hf.py` says
  for each model why not all are. `?`: not known for these versions.
- **fused**: by fusewire. In brackets: how many of these are gone, since a sum of two all-reduces
  became one.
- **breaks**: graph breaks in the model's forward pass under torch.compile, without `fullgraph`.
"""
_ALSO = " --also DIRECTORY"
_ELSEWHERE = (
    "The zoo's numbers are of transformers 5.24.\nHere a model's all-reduces count as fusible if all of them were "
    "fused,\nand as not fusible if every norm is a LayerNorm."
)
_COLUMNS = "| model | all-reduces | fusible | fused | breaks | remarks |\n|---|--:|--:|--:|--:|---|"


def as_markdown(rows: Iterable[Coverage], others: Iterable[str] = ()) -> str:
    """The page of the documentation; `others` are sections made with other versions."""
    sections = [as_section(rows), *others]
    head = _HEAD.format(
        date=datetime.date.today().isoformat(), layers=2, world=WORLD_SIZE, also=_ALSO * (len(sections) - 1)
    )
    return "\n".join([head, *sections])


def as_section(rows: Iterable[Coverage]) -> str:
    """The table and what belongs to it, for the versions installed here."""
    kept = list(rows)
    ran = [row for row in kept if not row.failed]
    known = [row for row in ran if row.fusible is not None]
    complete = sum(row.fused == row.fusible for row in known)
    total = {key: sum(getattr(row, key) for row in ran) for key in ("sums", "fused")}
    lines = [
        f"## transformers {_version('transformers')}, torch {torch.__version__}, fusewire {fusewire.__version__}",
        "",
        f"{len(ran)} models have {total['sums']} all-reduces, of which {total['fused']} fused.\nFor {len(known)} models it "
        f"is known for these versions which are fusible: {sum(row.fusible or 0 for row in known)}, of which "
        f"{sum(row.fused for row in known)} fused.\n{complete} of these models fuse all.",
        *([] if all(row.spec.counted for row in ran) else [_ELSEWHERE]),
        "",
        _COLUMNS,
        *(_line(row) for row in ran),
        "",
        "### Refused, and why",
        "",
        *_refusals(ran),
        *_breaks(ran),
    ]
    skipped = [row for row in kept if row.failed]
    if skipped:
        lines += ["", "### Not run", "", *(f"- {row.spec.name}: {row.failed}" for row in skipped)]
    return "\n".join(lines) + "\n"


def _line(row: Coverage) -> str:
    # What the zoo notes of a model explains the zoo's numbers; elsewhere it may not be so.
    noted = row.spec.note and (row.spec.counted or row.fused < row.sums)
    remarks = [row.spec.note] if noted else []
    if row.reduce_scatters:
        remarks.append(f"sequence parallelism: {row.reduce_scatters} of them are reduce-scatters")
    if row.reported != row.sums:
        remarks.append(f"fusewire's report knows {row.reported} of the {row.sums} only")
    fusible = "?" if row.fusible is None else str(row.fusible)
    if row.fusible is not None and row.fused < row.fusible:
        remarks.append(f"**{row.fusible - row.fused} fusible ones are not fused**")
    remarks += row.notes
    gone = f" ({row.merged})" if row.merged else ""
    breaks = sum(row.graph_breaks.values())
    cells = (row.spec.name, row.sums, fusible, f"{row.fused}{gone}", breaks, "; ".join(remarks))
    return "| " + " | ".join(map(str, cells)) + " |"


def _refusals(rows: list[Coverage]) -> list[str]:
    models: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        for reason, count in row.reasons.items():
            models.setdefault(reason, []).append(f"{row.spec.name} {count}")
            counts[reason] += count
    return [f"- {count} x {reason}: {', '.join(models[reason])}" for reason, count in counts.most_common()] or [
        "Nothing was refused."
    ]


def _breaks(rows: list[Coverage]) -> list[str]:
    broken = [row for row in rows if row.graph_breaks]
    if not broken:
        return []
    lines = ["", "### Graph breaks", ""]
    for row in broken:
        lines += [f"- {row.spec.name}: {count} x {_first_line(text)}" for text, count in row.graph_breaks.items()]
    return lines


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def with_other_packages(directory: Path, names: str) -> str:
    """The section that this file writes where the packages in `directory` come first."""
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, __file__, "--section", "--models", names]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the page to this file")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names; all by default")
    parser.add_argument(
        "--also",
        metavar="DIRECTORY",
        type=Path,
        action="append",
        default=[],
        help="add a section made with the packages in this directory, which come before those installed",
    )
    parser.add_argument("--section", action="store_true", help="print one section, without the head of the page")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the models are {', '.join(MODELS)}")
    if absent := [str(path) for path in arguments.also if not path.is_dir()]:
        parser.error(f"no directory: {', '.join(absent)}")
    rows = []
    for name in names:
        rows.append(measure(name))
        row = rows[-1]
        print(f"{name}: {row.failed or f'{row.fused} of {row.sums} fused'}", file=sys.stderr)
    others = [with_other_packages(path.absolute(), arguments.models) for path in arguments.also]
    page = as_section(rows) if arguments.section else as_markdown(rows, others)
    if arguments.write:
        arguments.write.write_text(page, encoding="utf-8")
    else:
        print(page, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
