"""Which ranks drop the same units: dropout streams by place in the layout, on four real ranks."""

import itertools
import json
from pathlib import Path

import pytest
from torchrun_ranks import run_ranks

WORKER = Path(__file__).with_name("seeds_worker.py")

pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    result = tmp_path_factory.mktemp("seeds") / "drawn.json"
    run_ranks([str(WORKER), str(result)], ranks=4, timeout=200)
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
