"""Several real ranks: a save succeeds everywhere or fails everywhere."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from emu35.checkpoint.manager import CheckpointManager, find_checkpoint, list_steps
from emu35.config import CheckpointConfig
from emu35.errors import CheckpointError

RANKS = 2


class Later:
    """Files written in the background, on rank 0 slowly; ``fails``: not those of rank 1."""

    def __init__(self, place: Path, *, fails: bool) -> None:
        self.place, self.fails = place, fails

    def stage(self) -> None:
        return None

    def write(self) -> list[str]:
        if dist.get_rank() == 0:
            time.sleep(0.5)
        elif self.fails:
            raise OSError(28, "No space left on device")
        names = [f"rank{dist.get_rank()}_{number}.bin" for number in range(3)]
        for name in names:
            (self.place / name).write_bytes(name.encode() * 1000)
        return names

    def finish(self) -> None:
        dist.barrier()


def saves_and_fails(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    root = Path(folder) / "checkpoints"
    manager = CheckpointManager(
        root=root, config=CheckpointConfig(keep_last=2), identity={"a": 1}, message=str
    )

    def write(place: Path) -> None:
        for number in range(3):
            (place / f"rank{rank}_{number}.bin").write_bytes(bytes([rank, number]) * 1000)

    def fail_on_rank_1(place: Path) -> None:
        write(place)
        if rank == 1:
            raise OSError(28, "No space left on device")

    def bug_on_rank_1(place: Path) -> None:
        if rank == 1:
            raise KeyError("a bug")

    manager.save(10, write=write, extra={"cursor": 5})
    with pytest.raises(CheckpointError, match=r"rank 1: .*No space left") as caught:
        manager.save(20, write=fail_on_rank_1, extra={})
    Path(folder, f"error{rank}").write_text(str(caught.value))
    # The rank with the bug keeps its traceback, the other is told where to look.
    with pytest.raises(KeyError if rank == 1 else CheckpointError, match="a bug"):
        manager.save(20, write=bug_on_rank_1, extra={})

    def write_together(place: Path) -> None:
        dist.barrier()
        write(place)

    # A rank that fails in its own part does not leave the other in the collective that follows.
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"rank 1: .*No space left"):
        manager.save(20, write=write_together, write_alone=fail_on_rank_1, extra={})
    assert time.monotonic() - began < 30
    # In the background as well, and the thread of the rank that succeeded is waited for.
    for fails in (True, False):
        manager.begin(
            30, write=lambda place, fails=fails: Later(place, fails=fails), extra={"cursor": 6}
        )
        assert manager.in_flight
        if fails:
            with pytest.raises(CheckpointError, match=r"rank 1: .*No space left"):
                manager.finish()
            assert list_steps(root) == [10]
        else:
            manager.finish()
        assert not manager.in_flight
    if rank == 0:
        (root / "step_00000030" / "rank1_2.bin").write_bytes(b"")
    dist.barrier()
    found = manager.latest()
    assert found is not None
    Path(folder, f"found{rank}").write_text(f"{found.step} {found.extra}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.multiproc
def test_all_ranks_alike(tmp_path: Path) -> None:
    spawn(saves_and_fails, args=(str(tmp_path),), nprocs=RANKS)
    root = tmp_path / "checkpoints"
    assert list_steps(root) == [10, 30]
    assert sorted(path.name for path in root.iterdir()) == ["step_00000010", "step_00000030"]
    errors = [(tmp_path / f"error{rank}").read_text() for rank in range(RANKS)]
    assert errors[0] == errors[1]
    found = [(tmp_path / f"found{rank}").read_text() for rank in range(RANKS)]
    assert found == ["10 {'cursor': 5}"] * RANKS
    alone = find_checkpoint(root, message=str)
    assert alone is not None
    assert len(list(alone.path.glob("rank*"))) == 3 * RANKS
