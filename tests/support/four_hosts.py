"""The example of 4 nodes with 8 processes each, as four hosts on this machine.

    sudo python tests/support/four_hosts.py [--steps 4] [--kill-host] [--loopback]

Each host is a network namespace with an address of its own on one virtual switch, and a host name
that nobody can resolve; on each runs torchrun with 8 forked processes. Then one process trains the
same, and the two logs are compared. ``--kill-host``: once the first steps are done, the processes
of one host are killed, and all must come back by themselves. Without the rights to make namespaces
(or with ``--loopback``) the hosts are 127.0.0.1 to 127.0.0.4, which lacks what a network adds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "training/nemo")]

from support.examples import ALONE, QUICK, header_overrides  # noqa: E402
from support.forked import FORK_WORKERS, Started, children, is_running  # noqa: E402
from support.launchers import log_distance, tensor_distance  # noqa: E402
from support.micro_runs import MicroRuns  # noqa: E402

EXAMPLE = "deepseek_v3_32gpu"
PORT = 29533
MEGABYTES_PER_PROCESS = 200
"""What a forked process has for itself. Measured: 6.3 GB for all of a run."""
TOLERANCE = 1e-5
CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000


@dataclass(frozen=True)
class Host:
    """One of the machines."""

    name: str
    address: str
    namespace: str | None
    """None: a loopback address of this machine."""
    interface: str
    """The one that has the address."""

    @property
    def enter(self) -> str:
        """Python with which a process becomes one of this host."""
        if self.namespace is None:
            return ""
        here = f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
        here += "from support import four_hosts\n"
        return here + f"four_hosts.enter({self.namespace!r}, {self.name!r})\n"


def enter(namespace: str, name: str) -> None:
    """Move this process, and what it starts, into a network namespace, under another host name."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        for failed in (
            libc.setns(file.fileno(), CLONE_NEWNET),
            libc.unshare(CLONE_NEWUTS),
            libc.sethostname(name.encode(), len(name)),
        ):
            if failed:
                raise OSError(ctypes.get_errno(), f"entering {namespace}")


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """Hosts on a switch that lies in a namespace of its own; gone afterwards, whatever happens.

    Raises:
        PermissionError: this needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN).
    """
    stem = f"deepseek{os.getpid()}"
    switch = f"{stem}switch"
    made: list[str] = []

    def make(name: str) -> None:
        run("ip", "netns", "add", name)
        made.append(name)
        run("ip", "-n", name, "link", "set", "lo", "up")

    try:
        make(switch)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        hosts = []
        for number in range(count):
            name, address = f"{stem}host{number}", f"10.77.0.{number + 1}"
            make(name)
            plug = f"port{number}"
            # An interface of each host has another name, as on grown clusters.
            ends = ["ip", "-n", switch, "link", "add", plug, "type", "veth", "peer"]
            run(*ends, "name", f"net{number}", "netns", name)
            run("ip", "-n", switch, "link", "set", plug, "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", f"net{number}")
            run("ip", "-n", name, "link", "set", f"net{number}", "up")
            hosts.append(Host(f"host{number}", address, name, f"net{number}"))
        yield hosts
    finally:
        for name in made:  # its interfaces go with it
            subprocess.run(["ip", "netns", "delete", name], check=False)


def run(*command: str) -> None:
    """Run one command of ``ip``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError(f"{command[0]} is not installed (package iproute2)") from error
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def loopback(count: int) -> Iterator[list[Host]]:
    """Hosts that are addresses of this machine."""
    yield [Host(f"host{n}", f"127.0.0.{n + 1}", None, "lo") for n in range(count)]


def start(runs: MicroRuns, hosts: list[Host], words: list[object], restarts: int) -> list[Started]:
    """torchrun on every host; the first host's agent serves the rendezvous."""
    agents = []
    for number, host in enumerate(hosts):
        torchrun = ["--nnodes", len(hosts), "--nproc-per-node", 8, "--max-restarts", restarts]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-id", "four_hosts"]
        torchrun += ["--rdzv-endpoint", f"{hosts[0].address}:{PORT}"]
        torchrun += ["--rdzv-conf", f"is_host={int(number == 0)},join_timeout=300"]
        torchrun += ["--local-addr", host.address, "--monitor-interval", "0.3", "-m", "deepseek"]
        before = host.enter + FORK_WORKERS
        # Nobody can resolve the host's own name, by which gloo would find its interface.
        env = {"GLOO_SOCKET_IFNAME": host.interface}
        agents.append(runs.cli.start(*torchrun, *words, before=before, program="torchrun", env=env))
    return agents


def train_on(
    runs: MicroRuns, hosts: list[Host], name: str, settings: list[str], kill_host: bool
) -> None:
    """Train on the hosts, perhaps with a loss on the way."""
    words = runs.words(name, *settings, config=EXAMPLE)
    agents = start(runs, hosts, words, restarts=2 if kill_host else 0)
    log = runs.folder / name / "metrics.jsonl"
    seen = [""]

    def show() -> None:
        texts = [agent.out.read_text() for agent in agents]
        new = max(texts, key=len)  # rank 0 may be on any host
        if new != seen[0]:
            print(new[len(seen[0]) :], end="", flush=True)
            seen[0] = new

    if kill_host:
        while not log.exists() or log.read_bytes().count(b"\n") < 2:
            assert all(is_running(agent.pid) for agent in agents), agents[0].err.read_text()
            show()
            time.sleep(0.1)
        victims = children(agents[2].pid)
        print(f"killing the {len(victims)} processes of {hosts[2].name}", flush=True)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
    while any(is_running(agent.pid) for agent in agents):
        show()
        time.sleep(0.2)
    show()
    rans = [agent.wait() for agent in agents]
    if any(ran.code for ran in rans):
        for host, ran in zip(hosts, rans, strict=True):
            print(f"{host.name} ended with exit code {ran.code}:\n{told(ran.err)}")
        sys.exit("training failed")


def told(text: str) -> str:
    """Our processes' own words, without what torchrun and torch's C++ add."""
    noise = re.compile(r"\[?[WE]\d{4} |frame #|<omitting|Exception raised from|\s*$")
    return "\n".join(line for line in text.splitlines() if not noise.match(line))[:6000]


def available_megabytes() -> int:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise AssertionError("Linux says MemAvailable")


def main() -> None:
    """Make the hosts, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kill-host", action="store_true")
    parser.add_argument("--loopback", action="store_true")
    options = parser.parse_args()
    needed, free = 32 * MEGABYTES_PER_PROCESS + 1000, available_megabytes()
    if free < needed:
        sys.exit(f"32 processes need about {needed} MB of memory, {free} MB are available")
    settings = header_overrides(EXAMPLE)
    settings += [*QUICK, "trainer.devices=8", "trainer.num_nodes=4"]
    settings += [
        f"trainer.max_steps={options.steps}",
        f"trainer.val_check_interval={options.steps}",
    ]
    settings += ["exp_manager.checkpoint_callback_params.every_n_train_steps=2"]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            hosts = stack.enter_context(loopback(4) if options.loopback else namespaces(4))
        except PermissionError as error:
            print(f"no network namespaces, so four loopback addresses instead: {error}")
            hosts = stack.enter_context(loopback(4))
        kind = "network namespaces" if hosts[0].namespace else "loopback addresses"
        print(f"{EXAMPLE}: 4 hosts ({kind}) of 8 processes", flush=True)
        runs = MicroRuns(folder / "runs")
        stack.callback(runs.cli.close)
        began = time.monotonic()
        train_on(runs, hosts, "hosts", settings, options.kill_host)
        print(f"4 hosts: {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        words = runs.words("alone", *settings, *ALONE, config=EXAMPLE)
        runs.cli.start(*words).wait().assert_done()
        print(f"1 process: {time.monotonic() - began:.0f} s")
        if options.kill_host:  # repeated steps stand in the log twice
            log = runs.folder / "hosts" / "metrics.jsonl"
            keep_last_rows(log)
        rows = log_distance(runs, "alone", "hosts")
        weights, worst = tensor_distance(runs, "alone", "hosts")
        print(f"largest relative difference: log {rows:.1e}, tensors {weights:.1e} ({worst})")
        if rows > TOLERANCE or weights > TOLERANCE:
            sys.exit(f"more than {TOLERANCE:g}")


def keep_last_rows(log: Path) -> None:
    """Of rows with the same step and kind, the later one counts."""
    import json

    rows = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        rows[row["step"], "val_loss" in row, row.get("event")] = line
    ordered = sorted(rows, key=lambda key: (key[0], key[1]))
    log.write_text("".join(rows[key] + "\n" for key in ordered))


if __name__ == "__main__":
    main()
