"""Linux namespaces that stand for hosts: each with a network, a host name, a boot id and shared
memory of its own.

Needs Linux, the programs `unshare`, `nsenter` and `ip`, and a user who may make namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_NAMESPACES = {"net": 0x40000000, "uts": 0x04000000, "mnt": 0x00020000}  # the mount namespace changes the paths: last
# Holds the namespaces until its input ends, thus also when the process of the test is killed.
_HOLD = """
hostname {name} && ip link set lo up
mount --bind {boot_id} /proc/sys/kernel/random/boot_id && mount -t tmpfs fusewire /dev/shm && echo ready
read _
"""


class NoHostsError(RuntimeError):
    """Namespaces cannot be made here; the message says which command failed, and how."""


@dataclass(frozen=True)
class Host:
    """One such host, held by the process `holder`."""

    holder: int
    address: str
    interface: str = "eth0"

    def enter(self) -> None:
        """Move this process, which must have one thread only, to the host."""
        opened = [(os.open(f"/proc/{self.holder}/ns/{name}", os.O_RDONLY), kind) for name, kind in _NAMESPACES.items()]
        library = ctypes.CDLL(None, use_errno=True)
        for handle, kind in opened:
            if library.setns(handle, kind):
                raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
            os.close(handle)


@contextlib.contextmanager
def two_hosts() -> Iterator[Sequence[Host]]:
    """Make two hosts whose networks a cable joins; they are gone when the block ends.

    Raises:
        NoHostsError: this machine or this user cannot.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fusewire-hosts-")))
        hosts = [Host(stack.enter_context(_namespaces(folder, n)), f"10.83.0.{n + 1}") for n in range(2)]
        ends = [[host.interface, "netns", str(host.holder)] for host in hosts]
        _run("ip", "link", "add", "name", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for host in hosts:
            inside = ("nsenter", "-t", str(host.holder), "-n", "ip")
            _run(*inside, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _run(*inside, "link", "set", host.interface, "up")
        yield hosts


@contextlib.contextmanager
def _namespaces(folder: Path, number: int) -> Iterator[int]:
    boot_id = folder / f"boot_id{number}"
    boot_id.write_text(f"{number:08}-0000-4000-8000-000000000000\n")
    script = _HOLD.format(name=f"host{number}", boot_id=boot_id)
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", script]
    pipe = subprocess.PIPE
    try:
        holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise NoHostsError(f"unshare: {error}") from error
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        said = holder.stdout.readline().strip()
        if said != "ready":
            raise NoHostsError(said or "unshare failed")
        yield holder.pid
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NoHostsError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise NoHostsError(f"{' '.join(command)}: {done.stderr.strip()}")
