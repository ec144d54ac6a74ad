"""Where the time of a step goes, utilisation, and which rank is called slow."""

import time

import pytest
import torch

from emu35.config import LogConfig
from emu35.parallel.device import PEAK_TFLOPS, peak_by_name, peak_memory_bytes
from emu35.train.clock import Phase, StepClock
from emu35.train.measure import Meter, slowest


def test_seconds_are_charged_to_the_innermost_phase_and_sum_to_the_step() -> None:
    clock = StepClock()
    clock.take()
    for step in (1, 2):
        clock.begin(step)
        with clock.marked(Phase.data):
            time.sleep(0.02)
        with clock.marked(Phase.forward_backward):
            with clock.own():
                time.sleep(0.03)
            with clock.marked(Phase.reduction):
                time.sleep(0.05)
    with clock.marked(Phase.validating), clock.marked(Phase.forward_backward), clock.own():
        time.sleep(0.5)
    times = clock.take()
    assert times.steps == 2
    seconds = times.seconds
    assert 0.02 <= seconds[Phase.data] < 0.25
    assert 0.03 <= seconds[Phase.forward_backward] < 0.25
    assert 0.05 <= seconds[Phase.reduction] < 0.25
    assert 0.05 <= times.own < seconds[Phase.data] + seconds[Phase.forward_backward] + 1e-3
    assert times.metrics()["time/step"] == pytest.approx(sum(seconds.values()))
    assert clock.take().total < 0.1


def test_a_phase_ends_with_an_error_too() -> None:
    clock = StepClock()
    with pytest.raises(ValueError, match="bad"), clock.marked(Phase.saving):
        raise ValueError("bad")
    assert clock.phase is Phase.other


def test_utilisation_is_flops_a_second_over_the_peak_that_the_user_gave() -> None:
    clock = StepClock()
    meter = Meter(clock=clock, config=LogConfig(peak_tflops=2.0))
    for step in (1, 2):
        clock.begin(step)
        metrics = {"loss": 1.0, "flops": 1e11}
        meter.count(metrics)
        assert metrics == {"loss": 1.0}
        time.sleep(0.1)
    row, remarks = meter.row()
    assert not remarks
    assert 0.2 <= 2 * row["time/step"] < 2.0
    assert row["tflops"] == pytest.approx(0.2 / (2 * row["time/step"]))
    assert row["mfu"] == pytest.approx(row["tflops"] / 2.0)
    clock.begin(3)
    assert "tflops" not in meter.row()[0]


def test_waiting_for_data_is_measured_and_said() -> None:
    clock = StepClock()
    meter = Meter(clock=clock, config=LogConfig(starved_share=0.3))
    for step, seconds in ((1, 0.1), (2, 0.0), (3, 0.1)):
        clock.begin(step)
        with clock.marked(Phase.data):
            time.sleep(seconds)
        with clock.marked(Phase.forward_backward):
            time.sleep(0.1)
        row, remarks = meter.row()
        # The first step of an attempt reads its first data: nobody could have read ahead.
        assert bool(remarks) == (step == 3)
        assert (row["data_starved"] > 0.3) == bool(seconds)
        if remarks:
            assert "training waits for data" in remarks[0]
            assert "log.starved_share=0.3" in remarks[0]


def test_a_cpu_has_no_known_peak_but_memory() -> None:
    meter = Meter(clock=StepClock(), config=LogConfig())
    meter.count({"flops": 1e9})
    row, _ = meter.row()
    assert "tflops" in row
    assert "mfu" not in row
    held = torch.ones(2**26, dtype=torch.uint8)
    assert peak_memory_bytes(held.device) > held.nbytes
    assert 0.05 < row["memory_gib"] < 1024


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 0.0),
        ("NVIDIA GeForce RTX 4090", 0.0),
    ],
)
def test_peaks_are_found_by_the_names_that_drivers_report(name: str, peak: float) -> None:
    assert peak_by_name(name) == peak
    assert peak in (0.0, *PEAK_TFLOPS.values())


def test_the_slowest_is_measured_by_those_with_the_same_work() -> None:
    seconds = {0: 1.0, 1: 1.1, 2: 4.0, 3: 4.4, 4: 1.0, 5: 4.1}
    stages = {0: 0, 1: 0, 2: 1, 3: 1, 4: 0, 5: 1}
    found = slowest(seconds, peers=stages)
    assert (found.rank, found.seconds) == (1, 1.1)
    assert found.ratio == pytest.approx(1.1)
    assert slowest({0: 2.0, 1: 1.0}, peers={0: 0, 1: 0}).ratio == pytest.approx(2.0)
