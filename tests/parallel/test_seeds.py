"""Which ranks drop the same units: dropout streams by place in the layout, on four real ranks."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

WORKER = Path(__file__).with_name("seeds_worker.py")

pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    result = tmp_path_factory.mktemp("seeds") / "drawn.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, str(WORKER), str(result)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            # Ranks have sessions of their own: a signal to torchrun's group would miss them.
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.communicate()
    assert process.returncode == 0, output
    return json.loads(result.read_text())


@pytest.mark.parametrize("layout", ["tp2-dp2", "tp2-cp2", "cp2-dp2", "pp2-dp2", "dp4"])
def test_only_tensor_parallel_ranks_share_and_only_outside_the_tracker(
    drawn: dict[str, list[dict]], layout: str
) -> None:
    ranks = drawn[layout]
    assert len(ranks) == 4
    for one, other in itertools.combinations(ranks, 2):
        same_replica = all(one[name] == other[name] for name in ("pp", "cp", "dp"))
        # Replicated activations: every tensor-parallel rank must drop the same units of them.
        assert (one["outside"] == other["outside"]) == same_replica
        # Each holds other heads and columns: with one stream they would drop alike.
        assert one["inside"] != other["inside"]
    # What is inside is no repetition of what is outside, on any rank.
    assert not any(a["inside"] == b["outside"] for a in ranks for b in ranks)
