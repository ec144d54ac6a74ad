"""Where the ranks run, and what a cluster must be told to run them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least


class LaunchKind(StrEnum):
    """``local``: processes on this host. ``torchrun`` and ``slurm``: one or several nodes."""

    local = "local"
    torchrun = "torchrun"
    slurm = "slurm"


class RendezvousKind(StrEnum):
    """How torchrun's nodes find each other.

    ``static``: every node is told its number and the address of node 0. ``c10d``: the nodes meet at
    that address under an id and agree on their numbers, again before every restart; a node whose
    torchrun was started again may join the others, which then restart their ranks.
    """

    static = "static"
    c10d = "c10d"


_WORD = re.compile(r"[\w.,:@+/-]*")
"""What accounts, partitions and the like are made of, one or several with commas between."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD)(?:_|$)", re.IGNORECASE)
"""Variables whose values must not get into a configuration, a job script or a log."""
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<hm>\d+)(?::(?P<hms>\d+))?)?"
    r"|(?P<minutes>\d+)(?::(?P<s>\d+))?|(?P<H>\d+):(?P<M>\d+):(?P<S>\d+))"
)
_MOUNT = re.compile(r"/[^:,\s]*:/[^:,\s]*(:[\w+-]+)?")
_ENDLESS = ("", "UNLIMITED", "INFINITE")
_OURS = frozenset(
    (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )
)


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """The job that ``launch=slurm`` submits; what is empty is left to the cluster's defaults.

    Attributes:
        account, partition, qos: as sbatch's options of these names.
        time: limit of the job in Slurm's forms, such as 30, 12:00:00 or 2-00:00:00.
        gpus: GPUs a node, -1 for one a rank; 0 asks for none (a CPU cluster).
        cpus: CPU cores a node for all its ranks, 0 for the cluster's default.
        save_seconds: how long before the limit the ranks are told to save and leave.
        requeue: put the job back into the queue when it was interrupted and saved.
        container: image for ``srun --container-image`` (pyxis), with ``mounts`` as SRC:DST[:FLAGS];
            the run folder is always mounted.
        prefix: words before the command of a node, such as those of another container runtime.
        python: the interpreter on the nodes; empty: the one that submits, in a container python3.
        setup: shell lines before the ranks start (``module load ...``), on the first node.
        options: more options of sbatch, each one line of the script: ``--mem=0``.
    """

    account: str = ""
    partition: str = ""
    qos: str = ""
    time: str = ""
    gpus: int = -1
    cpus: int = 0
    save_seconds: int = 120
    requeue: bool = True
    container: str = ""
    mounts: list[str] = field(default_factory=list[str])
    prefix: list[str] = field(default_factory=list[str])
    python: str = ""
    setup: list[str] = field(default_factory=list[str])
    options: list[str] = field(default_factory=list[str])

    def problems(self) -> Iterator[str]:
        yield from at_least("launch.slurm", -1, gpus=self.gpus)
        yield from at_least("launch.slurm", 0, cpus=self.cpus)
        yield from at_least("launch.slurm", 1, save_seconds=self.save_seconds)
        for name in ("account", "partition", "qos"):
            value = getattr(self, name)
            if not _WORD.fullmatch(value):
                yield f"launch.slurm.{name}={value!r} is no name; use letters, digits and .,:@+/-"
        yield from self._time_problems()
        yield from self._container_problems()
        for name in ("setup", "options", "prefix"):
            for line in getattr(self, name):
                if not line.strip() or _has_control(line):
                    yield f"launch.slurm.{name}: {line!r} must be one line of visible text"
        for line in self.options:
            if not line.startswith("-"):
                yield f"launch.slurm.options: {line!r} is no option of sbatch; as in --mem=0"
        if _has_control(self.python):
            yield f"launch.slurm.python={self.python!r} must be one line of visible text"

    def _time_problems(self) -> Iterator[str]:
        seconds = limit_seconds(self.time)
        if self.time in _ENDLESS:
            return
        if seconds is None:
            yield (
                f"launch.slurm.time={self.time!r} is no time limit; use MINUTES, HH:MM:SS, "
                "DAYS-HH:MM:SS or UNLIMITED"
            )
        elif seconds <= self.save_seconds:
            yield (
                f"launch.slurm.time={self.time} ends before a run could begin: the ranks save "
                f"launch.slurm.save_seconds={self.save_seconds} s earlier; use a longer limit"
            )

    def _container_problems(self) -> Iterator[str]:
        if re.search(r"\s", self.container) or _has_control(self.container):
            yield f"launch.slurm.container={self.container!r} is no image; spaces are not possible"
        if self.mounts and not self.container:
            yield (
                "launch.slurm.mounts belongs to launch.slurm.container; name an image, or mount "
                "with the options of your runtime in launch.slurm.prefix"
            )
        if self.container and self.prefix:
            yield (
                "launch.slurm.container and launch.slurm.prefix are two ways into a container; "
                "use one"
            )
        for mount in self.mounts:
            if not _MOUNT.fullmatch(mount):
                yield f"launch.slurm.mounts: {mount!r} must be /SRC:/DST or /SRC:/DST:FLAGS"


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """``nodes`` x ``nproc`` ranks, and how they are started.

    Attributes:
        nproc: ranks a node.
        threads: CPU threads a rank, 0 for an equal share of its node.
        timeout: seconds after which a run in which nothing moves is ended, and of the nodes'
            meeting.
        max_restarts: how often torchrun starts all ranks again after one failed; they resume from
            the newest checkpoint. Without effect on local ranks.
        rendezvous: how torchrun's nodes find each other.
        rendezvous_id: name under which they meet; empty: made from the run folder, or the job.
        env: environment variables of every rank. They are written into the run folder, so none
            may be a secret; torchrun and sbatch take the launching shell's variables along.
        slurm: the job of ``launch=slurm``.
    """

    kind: LaunchKind = LaunchKind.local
    nodes: int = 1
    nproc: int = 1
    threads: int = 0
    timeout: int = 600
    max_restarts: int = 0
    rendezvous: RendezvousKind = RendezvousKind.static
    rendezvous_id: str = ""
    env: dict[str, str] = field(default_factory=dict[str, str])
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def world_size(self) -> int:
        return self.nodes * self.nproc

    def problems(self) -> Iterator[str]:
        yield from at_least("launch", 1, nodes=self.nodes, nproc=self.nproc, timeout=self.timeout)
        yield from at_least("launch", 0, threads=self.threads, max_restarts=self.max_restarts)
        if self.kind is LaunchKind.local:
            if self.nodes != 1:
                yield f"launch.nodes={self.nodes} with launch=local; use launch=torchrun or slurm"
            if self.max_restarts:
                yield (
                    f"launch.max_restarts={self.max_restarts} with launch=local; local ranks are "
                    "not started again: use launch=torchrun"
                )
        elif self.max_restarts and self.nodes > 1 and self.rendezvous is RendezvousKind.static:
            yield (
                f"launch.max_restarts={self.max_restarts} on launch.nodes={self.nodes} needs "
                "launch.rendezvous=c10d: nodes that met statically would look for the ranks of "
                "the attempt before"
            )
        if not _WORD.fullmatch(self.rendezvous_id):
            yield (
                f"launch.rendezvous_id={self.rendezvous_id!r} is no name; use letters, digits "
                "and .,:@+/-"
            )
        for name, value in self.env.items():
            if not _NAME.fullmatch(name):
                yield f"launch.env: {name!r} is no name of a variable; use letters, digits and _"
            elif name in _OURS:
                yield f"launch.env.{name} is set by the launcher for every rank; leave it out"
            elif _SECRET.search(name):
                yield (
                    f"launch.env.{name} would be written into the run folder for all to read; "
                    "export it in the shell that launches; torchrun and sbatch take the "
                    "environment along"
                )
            if _has_control(value):
                yield f"launch.env.{name} must be one line of visible text"
        yield from self.slurm.problems()


def limit_seconds(time: str) -> int | None:
    """Seconds of a time limit in one of Slurm's forms; None where it has none, or is none."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    part = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours = 24 * part["days"] + part["h"] + part["H"]
    minutes = 60 * hours + part["hm"] + part["M"] + part["minutes"]
    return 60 * minutes + part["hms"] + part["s"] + part["S"]


def _has_control(text: str) -> bool:
    """Line ends and the like, which would become lines of their own in a job script."""
    return any(ord(letter) < 32 or ord(letter) == 127 for letter in text)
