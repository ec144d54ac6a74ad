"""What a row of metrics says about speed, and which rank holds the others up.

All figures are means since the previous row, but ``memory_gib``, the most so far. ``tflops`` is
what one device achieves in model FLOPs (see :mod:`emu35.model.flops`) while it trains; validating
and saving are left out, as in ``tokens_per_s``. ``mfu`` is its share of the device's peak.
``data_starved`` is the share of a step that the rank which waits longest for its data spends so.
"""

import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from statistics import median_low

from emu35.checkpoint.agree import gather
from emu35.config import LogConfig
from emu35.parallel.collectives import numbers_of_ranks, world_size
from emu35.parallel.device import known_peak_tflops, peak_memory_bytes
from emu35.train.clock import Phase, StepClock

FLOPS = "flops"
"""The metric by which a task tells the model FLOPs of its step, over all ranks."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Straggler:
    """The slowest rank: ``seconds`` of own work a step, ``ratio`` to the median of its peers."""

    rank: int
    seconds: float
    ratio: float


def slowest(own_seconds: Mapping[int, float], *, peers: Mapping[int, int]) -> Straggler:
    """The rank that is slowest beside its peers.

    Args:
        own_seconds: rank -> seconds of its own work.
        peers: rank -> a number that ranks with the same work share.
    """
    found: list[Straggler] = []
    for rank, seconds in own_seconds.items():
        others = [own_seconds[other] for other in own_seconds if peers[other] == peers[rank]]
        # The lower median: of two ranks, the slower one is measured by the faster.
        usual = max(median_low(others), 1e-9)
        found.append(Straggler(rank=rank, seconds=seconds, ratio=seconds / usual))
    return max(found, key=lambda straggler: straggler.ratio)


class Meter:
    """Turns the marks of a clock into metrics.

    Args:
        clock: marked by the task; what it has measured so far is dropped.
        config: thresholds and the peak, where the user knows better.
    """

    def __init__(self, *, clock: StepClock, config: LogConfig) -> None:
        self._clock = clock
        self._threshold, self._starved = config.straggler_ratio, config.starved_share
        self._peak_tflops = config.peak_tflops or known_peak_tflops(clock.device)
        self._flops = 0.0
        self._warm = False
        clock.take()

    def count(self, metrics: MutableMapping[str, float]) -> None:
        """Take the FLOPs of one step out of its metrics."""
        self._flops += metrics.pop(FLOPS, 0.0)

    def row(self) -> tuple[dict[str, float], list[str]]:
        """Metrics since the last row, and what should be said of slow ranks and of waiting for
        data. Collective.

        The first row of an attempt names nobody: its step builds caches and compiles.
        """
        times = self._clock.take()
        metrics = times.metrics()
        if self._flops:
            seconds = times.total * times.steps * world_size()
            metrics["tflops"] = self._flops / max(seconds, 1e-9) / 1e12
            if self._peak_tflops:
                metrics["mfu"] = metrics["tflops"] / self._peak_tflops
        self._flops = 0.0
        memory = peak_memory_bytes(self._clock.device) / 2**30
        waited = times.seconds[Phase.data]
        ranks = numbers_of_ranks([times.own, memory, self._clock.peers, waited])
        metrics["memory_gib"] = max(row[1] for row in ranks)
        starved = max(range(len(ranks)), key=lambda rank: ranks[rank][3])
        metrics["data_starved"] = min(ranks[starved][3] / max(times.total, 1e-9), 1.0)
        messages: list[str] = []
        if self._warm and 0 < self._starved < metrics["data_starved"]:
            messages.append(self._explain_starved(starved, seconds=ranks[starved][3]))
        if len(ranks) > 1:
            straggler = slowest(
                {rank: row[0] for rank, row in enumerate(ranks)},
                peers={rank: int(row[2]) for rank, row in enumerate(ranks)},
            )
            metrics["slowest_ratio"] = straggler.ratio
            if self._warm and self._threshold and straggler.ratio > self._threshold:
                messages.append(self._explain(straggler))
        self._warm = True
        return metrics, messages

    def _explain_starved(self, rank: int, *, seconds: float) -> str:
        host = gather(socket.gethostname())[rank]
        return (
            f"training waits for data: {seconds:.3g} s of every step on rank {rank} ({host}), more "
            f"than log.starved_share={self._starved} of it; raise data.prefetch_steps, or read "
            "from faster storage"
        )

    def _explain(self, straggler: Straggler) -> str:
        host = gather(socket.gethostname())[straggler.rank]
        return (
            f"rank {straggler.rank} on {host} is slow: its own work takes {straggler.seconds:.3g} "
            f"s a step, {straggler.ratio:.2f} times the median of its peers "
            f"(log.straggler_ratio={self._threshold}); every step waits for it"
        )
