"""The tokenizer stage end to end, on pictures small enough for seconds."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizer_runs import (
    STEPS,
    assert_equal,
    copy_checkpoint,
    draw_pictures,
    make_config,
    rows_of,
    run_in,
    state_of,
)

from emu35.checkpoint.manager import CheckpointManager
from emu35.config import (
    IBQConfig,
    ImageDataConfig,
    LaunchConfig,
)
from emu35.config.io import write_config
from emu35.config.rules import find_problems, validate
from emu35.errors import ConfigError, DataError
from emu35.stages.ibq import stage as ibq
from emu35.stages.ibq.engine import PlainEngine
from emu35.stages.ibq.task import IBQTask
from emu35.vision.codec import load_codec
from emu35.vision.ibq.folder import read_folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished")
    run_in(run_dir, make_config(pictures))
    return run_dir


def test_a_run_leaves_a_tokenizer_and_a_picture_of_what_it_does(finished, pictures):
    codec = load_codec(finished / "vision_tokenizer")
    assert (codec.factor, codec.codebook_size) == (4, 64)
    with Image.open(finished / "reconstructions.png") as grid:
        assert grid.size == (5 * 32, 2 * 32)
        first = np.asarray(grid.convert("RGB"))[:32, :32]
    with Image.open(pictures / "00.png") as original:
        assert np.abs(first.astype(int) - np.asarray(original)).max() <= 1


@pytest.mark.usefixtures("finished")
def test_a_run_leaves_the_arithmetic_of_its_process_alone():
    # Smaller than any normal fp32 number, which the stage takes for 0 while it trains.
    assert torch.tensor(1e-39) * 0.5 > 0


def test_metrics_say_what_is_learned(finished):
    rows = rows_of(finished)
    assert set(rows) == set(range(1, STEPS + 1))
    for row in rows.values():
        assert row["loss"] == pytest.approx(
            row["loss_reconstruction"] + row["loss_quantization"], rel=1e-5
        )
    assert rows[2]["loss_quantization"] == 0.0
    assert rows[2]["codebook_usage"] == 0.0
    assert rows[3]["loss_quantization"] > 0.0
    assert 0 < rows[6]["codebook_usage"] <= 1
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    validation = next(row for row in map(json.loads, lines) if "val/psnr" in row)
    assert validation["val/pictures"] == 5
    assert validation["val/codes_used"] == pytest.approx(validation["val/codebook_usage"] * 64)


def test_reconstruction_improves(finished):
    rows = rows_of(finished)
    assert rows[STEPS]["loss_reconstruction"] < rows[1]["loss_reconstruction"]


def test_resume_is_bitwise(finished, pictures, tmp_path):
    """3 steps, stop, 3 steps equal 6 steps: weights, average, optimizer and metrics."""
    config = make_config(pictures)
    run_dir = tmp_path / "resumed"
    copy_checkpoint(finished, step=3, to=run_dir)
    run_in(run_dir, config)
    resumed, whole = rows_of(run_dir), rows_of(finished)
    for step in range(4, STEPS + 1):
        for name in ("loss", "loss_quantization", "grad_norm", "codebook_usage"):
            assert resumed[step][name] == whole[step][name], (step, name)
    assert state_of(run_dir, step=STEPS)["updates"] == STEPS
    assert_equal(state_of(run_dir, step=STEPS), state_of(finished, step=STEPS))


def test_steps_that_are_not_finite_change_neither_weights_nor_their_average(
    finished, pictures, tmp_path, monkeypatch
):
    """Steps 4 to 6 are bad: the run ends with what the good one held after step 3."""
    reduce, steps = PlainEngine.reduce, itertools.count(1)

    def spoiled(self):
        if next(steps) > 3:
            next(iter(self._weights.values())).grad.fill_(float("nan"))
        return reduce(self)

    monkeypatch.setattr(PlainEngine, "reduce", spoiled)
    run_in(tmp_path / "bad", make_config(pictures))
    assert_equal(state_of(tmp_path / "bad", step=STEPS), state_of(finished, step=3))
    assert [row["skipped_steps"] for row in rows_of(tmp_path / "bad").values()][-1] == 3


def test_micro_batches_do_not_change_the_run(finished, pictures, tmp_path):
    run_in(tmp_path / "micro", make_config(pictures, micro_batch_size=4))
    ours, theirs = rows_of(tmp_path / "micro"), rows_of(finished)
    for step in range(1, STEPS + 1):
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-4)


def test_average_is_what_is_released(finished):
    state = state_of(finished, step=STEPS)
    released = read_folder(finished / "vision_tokenizer").state_dict()
    for name, tensor in state["average"].items():
        assert torch.equal(released[name], tensor)
    assert any(
        not torch.equal(released[name], t) for name, t in state["networks"]["tokenizer"].items()
    )


def test_other_pictures_cannot_continue_a_run(finished, pictures, tmp_path):
    config = make_config(pictures)
    task = IBQTask(config, run_dir=tmp_path, device=torch.device("cpu"))
    task.pictures.files = task.pictures.files[:-1]
    with pytest.raises(DataError, match="not those that"):
        task.load(finished / "checkpoints/step_00000003")
    task.close()


def test_init_from_starts_from_the_weights(finished, pictures, tmp_path):
    config = make_config(pictures, init_from=str(finished / "vision_tokenizer"))
    task = IBQTask(config, run_dir=tmp_path, device=torch.device("cpu"))
    task.start()
    released = read_folder(finished / "vision_tokenizer").state_dict()
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, released[name])
    assert all(weight.requires_grad for weight in task.model.parameters())
    task.close()
    assert isinstance(config.model, IBQConfig)
    config.model.ch_mult = [1, 1, 2]
    task = IBQTask(config, run_dir=tmp_path, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="init_from"):
        task.start()
    task.close()


def test_rejected_pictures_are_counted_and_named(pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "05.png").write_bytes(b"GIF89a nothing")
    run_dir = tmp_path / "run"
    run_in(run_dir, make_config(folder, steps=4, quantizer_warmup=0.0))
    (row,) = [json.loads(line) for line in (run_dir / "rejects.jsonl").read_text().splitlines()]
    assert row["picture"] == str(folder / "05.png")
    assert rows_of(run_dir)[4]["rejected"] == 1


def test_file_names_that_are_no_utf8_end_no_run(pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / os.fsdecode(b"\xff" + path.name.encode())).write_bytes(path.read_bytes())
    broken = [os.fsdecode(b"\xfebroken.png"), "broken\u2028.png"]
    for name in broken:
        (folder / name).write_bytes(b"GIF89a nothing")
    run_dir = tmp_path / "run"
    config = make_config(folder, steps=4, quantizer_warmup=0.0, validate_every=2)
    run_in(run_dir, config)
    assert (run_dir / "checkpoints" / "step_00000004" / "ibq.pt").exists()
    rows = [json.loads(line) for line in (run_dir / "rejects.jsonl").read_bytes().splitlines()]
    assert [row["picture"] for row in rows] == sorted(str(folder / name) for name in broken)
    # The same command again reads both back: the pictures of the checkpoint, and the rejects.
    run_in(run_dir, config)


def test_settings_that_cannot_work_are_refused(pictures):
    config = make_config(pictures, quantizer_warmup=1.0)
    assert isinstance(config.data, ImageDataConfig)
    config.data.crop = 18
    text = "\n".join(find_problems(config))
    assert "stage.quantizer_warmup=1.0 must lie in [0, 1)" in text
    assert "data.crop=18 is not a multiple" in text
    validate(make_config(pictures))


def test_a_network_that_makes_no_pictures_is_refused(pictures):
    config = make_config(pictures, reconstruction_weight=0.0, mse_weight=0.0)
    assert isinstance(config.model, IBQConfig)
    config.model.out_ch = 1
    text = "\n".join(find_problems(config))
    assert "model.in_channels=3 and model.out_ch=1, but pictures have 3 channels" in text
    assert "nothing compares reconstructions with pictures" in text


def test_the_guard_begins_anew_where_the_objective_does(pictures, tmp_path):
    config = make_config(pictures, steps=16, quantizer_warmup=0.5, quantization_weight=20.0)
    config.guard.loss_factor, config.guard.window, config.guard.max_skipped = 2.0, 4, 16
    run_in(tmp_path, config)
    rows = rows_of(tmp_path)
    assert rows[9]["loss"] > 2 * rows[8]["loss"], "the quantizer's own loss is new, and large"
    assert rows[16]["skipped_steps"] == 0


WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from emu35.config.io import read_config
from emu35.parallel import mesh
from emu35.stages.ibq import stage as ibq
ibq.run(read_config(Path(sys.argv[1])), run_dir=Path(sys.argv[2]))
mesh.leave()
"""


@pytest.mark.multiproc
def test_two_ranks_equal_one_process(finished, pictures, tmp_path):
    config = make_config(pictures, micro_batch_size=1)
    config.launch = LaunchConfig(nproc=2)
    write_config(config, tmp_path / "config.yaml")
    (tmp_path / "worker.py").write_text(WORKER)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(tmp_path / "worker.py")]
    command += [str(tmp_path / "config.yaml"), str(run_dir)]
    root = Path(ibq.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = rows_of(run_dir), rows_of(finished)
    for step in range(1, STEPS + 1):
        for name in ("loss", "loss_reconstruction", "codebook_usage"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-4), (step, name)
    assert (run_dir / "vision_tokenizer" / "model.ckpt").exists()


def test_checkpoints_are_those_of_the_manager(finished, pictures):
    config = make_config(pictures)
    from emu35.config.io import run_identity

    manager = CheckpointManager(
        root=finished / "checkpoints",
        config=config.checkpoint,
        identity=run_identity(config),
        message=print,
    )
    newest = manager.latest()
    assert newest is not None
    assert newest.step == STEPS
