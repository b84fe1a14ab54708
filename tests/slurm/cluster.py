"""A SLURM of two nodes on the loopback interface of this machine, for as long as a test needs it.

Each node has two GPUs, played by null devices that CUDA does not know. Needs root, and Debian's
slurmctld, slurmd and slurm-client.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdTimeout=10
KillWait=20
MinJobAge=300
ReturnToService=2
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Starts the daemons in `folder`; as a context manager, ends them and all that they started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._devices: list[Path] = []

    def __enter__(self) -> SlurmCluster:
        self.folder.mkdir(parents=True)
        (self.folder / "state").mkdir()
        port = _free_ports(3)
        conf = CONF.format(
            host=socket.gethostname(), folder=self.folder, port=port, first=port + 1, last=port + 2
        )
        (self.folder / "slurm.conf").write_text(conf)
        lines = []
        for index in range(4):
            device = self.folder / f"gpu{index}"
            os.mknod(device, 0o20666, os.makedev(1, 3))
            self._devices.append(device)
            lines.append(f"NodeName=n{1 + index // 2} Name=gpu File={device}\n")
        (self.folder / "gres.conf").write_text("".join(lines))
        try:
            self._start("slurmctld", "slurmctld", "-c", "-D")
            for node in ("n1", "n2"):
                self.start_node(node)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        steps = self._processes_of_jobs()
        for name in list(self._daemons):
            self._end(name)
        for process in {*steps, *self._processes_of_jobs()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for device in self._devices:
            device.unlink()

    def run(self, *command: str | Path) -> str:
        """Run one of SLURM's commands; its output."""
        done = subprocess.run(
            list(map(str, command)), env=self.environ, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, *arguments: str | Path) -> str:
        """Submit a job script; the job's number."""
        return self.run("sbatch", "--parsable", *arguments).strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows about a job."""
        text = self.run("scontrol", "-o", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number: str, *states: str, timeout_s: float) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{job}\n{self.logs()}"
            time.sleep(0.2)
        return job

    def start_node(self, node: str) -> None:
        """Start a node's daemon, also again."""
        self._start(node, "slurmd", "-c", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """Take a node away as a power failure would: daemon, steps and all of their processes."""
        self._end(node, signal.SIGKILL)
        for process in self._processes_of_jobs(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, name: str, program: str, *options: str) -> None:
        path = shutil.which(program) or f"/usr/sbin/{program}"
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [path, *options, "-f", str(self.folder / "slurm.conf")],
                env=self.environ, stdout=log, stderr=log,
            )  # fmt: skip

    def _end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _processes_of_jobs(self, node: str | None = None) -> list[psutil.Process]:
        """Every process of this cluster's jobs: step managers, scripts and tasks."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # A step manager has the daemon's environment, its tasks have the job's.
                environ = process.environ()
                if environ.get("SLURM_CONF") != self.environ["SLURM_CONF"]:
                    continue
                if process.pid in (os.getpid(), *(d.pid for d in self._daemons.values())):
                    continue
                here = environ.get("SLURMD_NODENAME") or _node_of_manager(process)
                if node in (None, here):
                    found.append(process)
        return found

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            done = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%N %T"],
                env=self.environ, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.stdout.split() == ["n1", "idle", "n2", "idle"]:
                return
            assert time.monotonic() < deadline, done.stdout + done.stderr + self.logs()
            time.sleep(0.2)


def _node_of_manager(process: psutil.Process) -> str | None:
    """The node of a slurmstepd, which its tasks know."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = child.environ().get("SLURMD_NODENAME")
            if name:
                return name
    return None


def _free_ports(count: int) -> int:
    """The first of so many neighbouring ports that are free on the loopback interface."""
    for first in range(17000, 19000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")
