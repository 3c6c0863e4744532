"""A SLURM cluster of this machine alone: munged, slurmctld and slurmd on ports of loopback."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hosts import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
# What launch/slurm.sbatch asks for and this machine has not.
SMALL = ("--nodes=1", "--cpus-per-task=1")

# Without control groups, accounting and a database: processes of this user on one node.
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
MessageTimeout=5
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=UNLIMITED State=UP
"""


def missing() -> str:
    """Names what is missing for a cluster, or is empty."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    return f"needs {', '.join(absent)} (Debian: slurm-wlm and munge)" if absent else ""


class SlurmCluster:
    """A cluster of one node; on leaving the context its processes are gone.

    Args:
      folder: Its files; of a short path, as sockets have.
    """

    def __init__(self, folder: Path):
        self.folder, self._running = folder, {}
        folder.chmod(0o755)  # munged asks that others reach its socket
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        self.conf = folder / "slurm.conf"
        self._environment = os.environ | {"SLURM_CONF": str(self.conf)}
        # Empty files stand for the GPUs that the script asks for.
        for number in range(8):
            (folder / f"gpu{number}").touch()
        gpus = f"AutoDetect=off\nName=gpu File={folder}/gpu[0-7]\n"
        (folder / "gres.conf").write_text(gpus)
        self.conf.write_text(
            _CONF.format(
                host=socket.gethostname().partition(".")[0],
                controller=free_port(),
                node=free_port(),
                user=subprocess.check_output(["id", "-un"], text=True).strip(),
                cores=os.cpu_count(),
                folder=folder,
            )
        )

    def __enter__(self) -> "SlurmCluster":
        try:
            munge = [f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in _MUNGE]
            self.start("munged", "--foreground", "--num-threads=2", *munge)
            wait_until((self.folder / "munge.socket").exists)
            self.start_controller()
            self.start("slurmd", "-D")
            wait_until(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._running)):
            self.stop(name)

    def start(self, name: str, *arguments: str) -> None:
        """Starts one of the programs."""
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
        program = shutil.which(name, path=path)
        assert program
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                # Should the test be killed, they do not outlive it.
                ["setpriv", "--pdeathsig=TERM", program, *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_controller(self) -> None:
        """Starts slurmctld, which goes on with the jobs that it knew."""
        self.start("slurmctld", "-D")
        wait_until(lambda: "UP" in self.ask("scontrol", "ping"))

    def stop(self, name: str) -> None:
        """Ends one of the programs."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def number(self, name: str) -> str:
        """Returns the number of the first job of a name."""
        return next(number for number, _, called in self.jobs() if called.endswith(name))

    def jobs(self) -> list[tuple[str, str, str]]:
        """Returns number, state and name of each job that SLURM knows, also of those that ended."""
        options = "--states=all --noheader --sort=i --format=%A|%T|%j".split()
        lines = [line.split("|") for line in self.ask("squeue", *options).splitlines()]
        return [(number, state, name) for number, state, name in lines]

    def ask(self, *command: str) -> str:
        """Returns what a program of SLURM prints, errors as well."""
        done = subprocess.run(
            command,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr


_MUNGE = ("key-file", "socket", "pid-file", "log-file", "seed-file")


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until a condition holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)
