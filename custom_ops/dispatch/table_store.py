"""Read and write the tuned tables that `python -m fusewire tune` measures on this machine.

A table is for one kind of machine, group and activation (`TableKey`), in one JSON file in
`folder()`. A file that is damaged, unknown or for another key is ignored with a reason; it never
raises.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusewire.custom_ops.dispatch.cost_model import CostModel, find_formula
from fusewire.custom_ops.workspaces.provider import device_facts
from fusewire.errors import FusewireError

SCHEMA = 1
CACHE_VARIABLE = "FUSEWIRE_CACHE_DIR"
_MAX_FILE_BYTES = 1 << 20
_MARK = "fusewire_table"

Times = Mapping[str, tuple[tuple[int, float], ...]]


class TableError(FusewireError):
    """A file is not a usable table; the message has the reason."""


@dataclass(frozen=True)
class TableKey:
    """The machine, group and activation of a table. GPUs' differing texts are joined by " + "."""

    device: str  # "cuda" or "cpu"
    gpu: str
    driver: str
    links: str
    world_size: int
    hidden: int
    dtype: str
    versions: Mapping[str, str]

    @property
    def file_name(self) -> str:
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", self.gpu).strip("-")[:60]
        return f"{gpu}-{self.world_size}-ranks-hidden-{self.hidden}-{self.dtype}-{_digest(asdict(self))[:12]}.json"

    def differences(self, other: TableKey) -> str:
        """Return a text of the fields that differ in `other`; empty if the keys are equal."""
        mine, theirs = _flat(self), _flat(other)
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return "; ".join(f"{name} {mine.get(name, 'none')}, here {theirs.get(name, 'none')}" for name in names)


def _flat(key: TableKey) -> dict[str, Any]:
    found = asdict(key)
    return {**{name: value for name, value in found.items() if name != "versions"}, **found["versions"]}


@dataclass(frozen=True)
class Table:
    """The slowest rank's microseconds per call by number of tokens, for each variant.

    Attributes:
        measured: the time of the measurement, in UTC.
        seconds: the duration of the measurement.
        rejected: variants that were left out because a result was wrong, with details.
        absent: providers that could not serve, with reasons.
        link_rate: bytes per second that one GPU sends over all its links at once, or None.
        notes: further remarks for a reader.
    """

    key: TableKey
    times: Times
    measured: str = ""
    seconds: float = 0.0
    rejected: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    link_rate: float | None = None
    notes: tuple[str, ...] = ()

    def cost_model(self) -> CostModel:
        """Return the table as a cost model."""
        key = self.key
        formula = find_formula(key.gpu, key.world_size, key.hidden, getattr(torch, key.dtype))
        return CostModel(f"tuned on this machine, {self.measured}", self.times, formula, only_measured=True)

    def floor(self, tokens: int) -> float | None:
        """Return a two-shot's least microseconds: 2(R-1)/R of x's bytes leave each GPU."""
        if not self.link_rate:
            return None
        key = self.key
        nbytes = tokens * key.hidden * getattr(torch, key.dtype).itemsize
        return float(2 * (key.world_size - 1) / key.world_size * nbytes / self.link_rate * 1e6)

    def as_json(self) -> dict[str, Any]:
        return {_MARK: SCHEMA, **asdict(self)}

    @property
    def digest(self) -> str:
        return _digest(self.as_json())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def table_from_json(found: Any) -> Table:
    """Return the table from a file's JSON content; raises TableError if it is not one."""
    if not isinstance(found, dict) or _MARK not in found:
        raise TableError("it is not a table of fusewire's")
    if found[_MARK] != SCHEMA:
        raise TableError(f"its format is version {found[_MARK]!r}, and this fusewire reads version {SCHEMA}")
    try:
        key = TableKey(**found["key"])
        rest = {f.name: found[f.name] for f in fields(Table) if f.name not in ("key", "times", "notes")}
        table = Table(key, _times(found["times"]), notes=tuple(map(str, found["notes"])), **rest)
        numbers = (key.world_size, key.hidden, table.seconds, *((table.link_rate,) if table.link_rate else ()))
        texts: tuple[str, ...] = (key.device, key.gpu, key.driver, key.links, key.dtype, table.measured)
        texts += tuple(text for pairs in (key.versions, table.rejected, table.absent) for text in pairs.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"it is damaged ({type(error).__name__}: {error})") from None
    if not all(map(_is_positive, numbers)) or not all(isinstance(text, str) for text in texts):
        raise TableError("it is damaged (a number or a text is something else)")
    if not isinstance(getattr(torch, key.dtype, None), torch.dtype):
        raise TableError(f"it is damaged (dtype {key.dtype!r})")
    return table


def _times(found: Mapping[str, Any]) -> Times:
    times = {}
    for variant, points in found.items():
        read = tuple((tokens, float(us)) for tokens, us in points)
        counts = [tokens for tokens, _ in read]
        if not all(type(n) is int for n in counts) or counts != sorted(set(counts)) or not counts or counts[0] < 1:
            raise ValueError(f"the token counts of {variant} do not grow")
        if not all(_is_positive(us) for _, us in read):
            raise ValueError(f"a time of {variant} is not a positive number")
        times[str(variant)] = read
    if not times:
        raise ValueError("no times")
    return times


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


# --- On disk --------------------------------------------------------------------------------------


def folder() -> Path:
    """Return the tables' folder: FUSEWIRE_CACHE_DIR's, or in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser() / "tables"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores relative paths.
    home = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))
    return home / "fusewire" / "tables"


class Found(NamedTuple):
    """The table at a path, or why it is not used; both empty if there is no file."""

    path: Path
    table: Table | None = None
    reason: str = ""


def read(path: Path) -> Found:
    """Return the table in a file. Never raises."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TableError("it is too large to be a table")
        return Found(path, table_from_json(json.loads(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return Found(path)
    except (TableError, OSError) as error:
        return Found(path, None, f"{path} is ignored: {error}")
    except (ValueError, RecursionError) as error:
        return Found(path, None, f"{path} is ignored: it is damaged ({type(error).__name__}: {error})")


def load(key: TableKey) -> Found:
    """Return the table for a key from this disk, if there is one. Never raises."""
    found = read(folder() / key.file_name)
    if found.table is not None and found.table.key != key:
        differs = found.table.key.differences(key)
        return Found(found.path, None, f"{found.path} is ignored: it is for another machine ({differs})")
    return found


def save(table: Table) -> Path:
    """Write a table atomically, replacing one for the same key. Raises OSError."""
    path = folder() / table.key.file_name
    if read(path).table == table:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(table.as_json(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    return path


def all_files() -> list[Found]:
    """Return every file that could be a table."""
    try:
        return [read(path) for path in sorted(folder().glob("*.json"))]
    except OSError as error:
        return [Found(folder(), None, f"{folder()} is ignored: {error}")]


# --- This machine ---------------------------------------------------------------------------------

# NCCL's settings that change its speed.
_NCCL_VARIABLES: tuple[str, ...] = (
    "ALGO",
    "PROTO",
    "NVLS_ENABLE",
    "CUMEM_ENABLE",
    "P2P_DISABLE",
    "P2P_LEVEL",
    "SHM_DISABLE",
)
_NCCL_VARIABLES += ("MIN_NCHANNELS", "MAX_NCHANNELS", "MIN_CTAS", "MAX_CTAS", "NTHREADS", "BUFFSIZE")
_SWITCH = "NVSwitch"


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return this rank's part of a `TableKey`, as JSON types; "unknown" where unreadable."""
    cuda = device.type == "cuda"
    driver, links = _driver_and_links(device) if cuda else ("none", "none")
    own = device_facts(device)
    return {
        "device": device.type,
        "gpu": own["gpu"] if cuda else f"CPU {platform.machine()}",
        "host": own["host"],
        "uuid": own["uuid"],
        "driver": driver,
        "links": links,
        "versions": {**_versions(), "NCCL": _nccl() if cuda else "none"},
    }


@functools.cache
def _versions() -> dict[str, str]:
    """Return the versions of libraries with timed kernels; fusewire's includes a source hash."""
    found = {"torch": str(torch.__version__)}
    for name, package in (("triton", "triton"), ("flashinfer", "flashinfer-python"), ("fusewire", "fusewire")):
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    sources = hashlib.sha256()
    for file in sorted((Path(__file__).parent.parent / "providers").rglob("*.py")):
        sources.update(file.read_bytes())
    found["fusewire"] += f" kernels {sources.hexdigest()[:8]}"
    return found


def _nccl() -> str:
    named = [f"NCCL_{name}={os.environ[f'NCCL_{name}']}" for name in _NCCL_VARIABLES if f"NCCL_{name}" in os.environ]
    try:
        version = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:
        version = "unknown"
    return " ".join([version, *named])


@functools.cache
def _driver_and_links(device: torch.device) -> tuple[str, str]:
    driver = links = "unknown"
    with contextlib.suppress(Exception):  # a container may hide any of these
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        try:
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            links = _links(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        finally:
            pynvml.nvmlShutdown()
    if driver == "unknown":
        with contextlib.suppress(OSError):
            found = re.search(r"\b\d{3,}\.\d+(\.\d+)*", Path("/proc/driver/nvidia/version").read_text())
            driver = found.group() if found else driver
    return driver, links


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _links(nvml: Any, gpu: Any) -> str:
    """Return the NVLinks' number, version and whether they reach a switch; else PCIe's version."""
    active, kinds, versions = 0, set(), set()
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(gpu, link):
                continue
        except nvml.NVMLError:  # there is no such link
            break
        active += 1
        with contextlib.suppress(nvml.NVMLError):
            versions.add(int(nvml.nvmlDeviceGetNvLinkVersion(gpu, link)))
        with contextlib.suppress(nvml.NVMLError):
            kinds.add(int(nvml.nvmlDeviceGetNvLinkRemoteDeviceType(gpu, link)))
    if active:
        switched = kinds == {nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH}
        codes = "/".join(map(str, sorted(versions))) or "unknown"
        return f"{active} NVLinks of NVML's version {codes}" + (f", {_SWITCH}" if switched else "")
    width = nvml.nvmlDeviceGetMaxPcieLinkWidth(gpu)
    return f"PCIe {nvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu)} x {width}"


def key_of(facts: Sequence[Mapping[str, Any]], hidden: int, dtype: torch.dtype) -> TableKey:
    """Return the key for a group from its ranks' facts, in any order."""

    def common(values: Sequence[Any]) -> str:
        return " + ".join(sorted(set(map(str, values))))

    links = common([fact["links"] for fact in facts])
    hosts = len({fact["host"] for fact in facts})
    if any(_SWITCH not in fact["links"] for fact in facts) and facts[0]["device"] == "cuda":
        # Without a switch some pairs of GPUs have faster links, so the choice of GPUs matters.
        links += f", GPUs {_digest(sorted(str(fact['uuid']) for fact in facts))[:8]}"
    names = {name for fact in facts for name in fact["versions"]}
    return TableKey(
        device=common([fact["device"] for fact in facts]),
        gpu=common([fact["gpu"] for fact in facts]),
        driver=common([fact["driver"] for fact in facts]),
        links=links + (f", {hosts} hosts" if hosts > 1 else ""),
        world_size=len(facts),
        hidden=hidden,
        dtype=str(dtype).removeprefix("torch."),
        versions={name: common([fact["versions"].get(name, "none") for fact in facts]) for name in sorted(names)},
    )


def local_key(world_size: int, hidden: int, dtype: torch.dtype) -> TableKey | None:
    """Return the key for this machine's first GPUs, or for more like the first, or None."""
    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    indices = range(world_size) if world_size <= count else [0] * world_size
    return key_of([machine_facts(torch.device("cuda", index)) for index in indices], hidden, dtype)
