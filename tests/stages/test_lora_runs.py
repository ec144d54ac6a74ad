"""Runs that train adapters: what they keep, how they go on, and what everyone else sees of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_language_model_runs import STEPS, STOP, config, rows, shards, state
from torchrun_ranks import run_ranks

from emu35 import cli
from emu35.checkpoint.source import open_source
from emu35.config import (
    Adapter,
    EngineConfig,
    LayerSpec,
    LoRAConfig,
    LoRATarget,
    Precision,
    PretrainConfig,
    SFTConfig,
)
from emu35.config.io import read_config, write_config
from emu35.config.rules import find_problems
from emu35.model.context import AttentionContext
from emu35.model.logits import vocabulary_logits
from emu35.model.lora import attach_adapters, merge_adapters
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.stages import pretrain
from emu35.stages.release import ExportOptions, export

__all__ = ["shards"]
LORA = LoRAConfig(rank=4, alpha=8.0)
MOMENT, MASTER = "optimizer.state.exp_avg.", "optimizer.state.fp32_param."


def silent(text: str) -> None:
    del text


def train(folder: Path, *, shards: Path, **values: Any) -> Path:
    stage = PretrainConfig(steps=STEPS, global_batch_size=4, validate_every=0, **values)
    made = config(folder, shards=shards, stage=stage)
    made.log.every = 1
    write_config(made, folder)
    pretrain.run(made, run_dir=folder)
    return folder


def adapt(
    folder: Path, *, base: Path, shards: Path, lora: LoRAConfig = LORA, **values: Any
) -> Path:
    return train(
        folder, shards=shards, init_from=str(base), adapter=Adapter.lora, lora=lora, **values
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "base", shards=shards)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, base: Path, shards: Path) -> Path:
    return adapt(tmp_path_factory.mktemp("runs") / "adapted", base=base, shards=shards)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Without the optimizer's."""
    found = state(run, step=STEPS)
    return {name: found[name] for name in found if not name.startswith("optimizer.")}


@torch.no_grad()
def logits(model: Emu35Model) -> torch.Tensor:
    tokens_BS = (torch.arange(40) * 37 + 5)[None] % 200
    context = AttentionContext(
        positions_BS=torch.arange(40)[None],
        mask=AttentionMask.causal(torch.zeros_like(tokens_BS)),
    )
    hidden_SBH = model.eval()(tokens_BS, context=context)
    return vocabulary_logits(model, hidden_NH=hidden_SBH[:, 0])


def test_the_base_stays_and_the_checkpoint_stands_alone(
    base: Path, adapted: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = weights(base), weights(adapted)
    assert all(torch.equal(after[name], before[name]) for name in before)
    added = after.keys() - before.keys()
    assert len(added) == 2 * len(LoRATarget)  # layers lie in one tensor
    assert all(after[name].abs().max() > 0 for name in added)
    kept = {name for name in state(adapted, step=STEPS) if name.startswith(MOMENT)}
    assert kept == {MOMENT + name for name in added}

    # The first loss is that of the base, and it falls from there.
    whole = train(tmp_path / "whole", shards=shards, init_from=str(base))
    assert rows(adapted)[0]["loss"] == rows(whole)[0]["loss"]
    assert rows(adapted)[0]["grad_norm"] != rows(whole)[0]["grad_norm"]

    lonely = shutil.copytree(adapted, tmp_path / "lonely")
    shutil.rmtree(lonely / "checkpoints" / f"step_{STEPS:08d}")
    moved = read_config(lonely)
    base.rename(base.with_name("away"))
    try:
        capsys.readouterr()
        pretrain.run(moved, run_dir=lonely)
    finally:
        base.with_name("away").rename(base)
    assert rows(lonely) == rows(adapted)
    numbers = [sum(t.numel() for t in held) for held in ([after[n] for n in added], after.values())]
    assert f"training {numbers[0]:,} of {numbers[1]:,} parameters" in capsys.readouterr().out


def test_resume_with_dropout_is_bitwise(base: Path, shards: Path, tmp_path: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8.0, dropout=0.3)
    whole = adapt(tmp_path / "whole", base=base, shards=shards, lora=lora)
    halves = shutil.copytree(whole, tmp_path / "halves")
    shutil.rmtree(halves / "checkpoints" / f"step_{STEPS:08d}")
    pretrain.run(read_config(halves), run_dir=halves)
    assert rows(halves) == rows(whole)
    ours, theirs = state(halves, step=STEPS), state(whole, step=STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain = adapt(tmp_path / "plain", base=base, shards=shards)
    assert rows(plain)[-1]["loss"] != rows(whole)[-1]["loss"]


def test_whoever_opens_the_run_sees_merged_weights(
    base: Path, adapted: Path, shards: Path, tmp_path: Path
) -> None:
    merged = open_source(adapted, message=silent).model
    assert not any("adapter" in name for name in dict(merged.named_parameters()))
    model = open_source(base, message=silent).model
    without = logits(model)
    attach_adapters(model, config=LORA)
    held = weights(adapted)
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            parts = name.split(".")
            assert parts[:2] == ["decoder", "layers"]
            whole = held[".".join(parts[:2] + parts[3:])]
            parameter.data.copy_(whole[int(parts[2])])
    with_adapters = logits(model)
    torch.testing.assert_close(logits(merged), with_adapters, rtol=1e-5, atol=1e-5)
    assert (with_adapters - without).abs().max() > 0.01

    release = export(ExportOptions(run=adapted, out=tmp_path / "release"), message=silent)
    assert torch.equal(logits(open_source(release, message=silent).model), logits(merged))
    words = ["--release", str(release), "--against", str(adapted)]
    assert cli.main(["convert", "verify", *words]) == 0

    # A run that starts from it stands on the merged weights, with adapters of its own.
    other = LoRAConfig(rank=2, alpha=2.0, targets=[LoRATarget.linear_proj])
    child = adapt(tmp_path / "child", base=adapted, shards=shards, lora=other)
    opened = dict(merged.named_parameters())
    found = weights(child)
    for name, parameter in opened.items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            tensor = found[".".join(parts[:2] + parts[3:])][int(parts[2])]
        else:
            tensor = found[name]
        assert torch.equal(tensor, parameter), name
    assert {n for n in found if "adapter" in n} == {
        f"decoder.layers.self_attention.linear_proj.adapter.{name}" for name in "ab"
    }


def test_a_release_is_adapted_like_the_run_it_was_made_of(
    base: Path, adapted: Path, shards: Path, tmp_path: Path
) -> None:
    release = export(ExportOptions(run=base, out=tmp_path / "release"), message=silent)
    run = adapt(tmp_path / "run", base=release, shards=shards)
    assert rows(run) == rows(adapted)
    ours, theirs = state(run, step=STEPS), state(adapted, step=STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_tensor_parallel_ranks_train_what_one_trains(
    base: Path, adapted: Path, tmp_path: Path
) -> None:
    """From the base into two ranks with sequence parallelism and ZeRO-1, through the worker."""
    made = read_config(adapted)
    two = tmp_path / "two"
    two.mkdir()
    made.run_dir = str(two)
    made.launch.nproc, made.parallel.tp = 2, 2
    made.parallel.sp = made.parallel.zero1 = True
    write_config(made, two)
    run_ranks(["-m", "emu35.run.worker", str(two)], ranks=2, timeout=280)
    for ours, theirs in zip(rows(two), rows(adapted), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    pair = [logits(open_source(run, message=silent).model) for run in (two, adapted)]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-3, atol=1e-3)


def test_bf16_and_resharding_keep_adapters_apart(base: Path, shards: Path, tmp_path: Path) -> None:
    run = adapt(tmp_path / "bf16", base=base, shards=shards, precision=Precision.bf16)
    kept = state(run, step=STOP)
    masters = {name for name in kept if name.startswith(MASTER)}
    adapters = {name for name in weights(run) if ".adapter." in name}
    assert masters == {MASTER + name for name in adapters}
    wide, again = tmp_path / "fp32", tmp_path / "again"
    words = ["--step", str(STOP), "--dtype", "fp32", "parallel.zero1=true"]
    assert cli.main(["convert", "reshard", "--run", str(run), "--out", str(wide), *words]) == 0
    words = ["--dtype", "bf16", "parallel.zero1=false"]
    assert cli.main(["convert", "reshard", "--run", str(wide), "--out", str(again), *words]) == 0
    ours = state(again, step=STOP)
    assert ours.keys() == kept.keys()
    assert all(torch.equal(ours[name], kept[name]) for name in kept)
    pretrain.run(read_config(again), run_dir=again)
    assert rows(again) == [row for row in rows(run) if row["step"] > STOP]
    # Without the optimizer it still opens as the merged model.
    words = ["--out", str(tmp_path / "alone"), "--weights-only"]
    assert cli.main(["convert", "reshard", "--run", str(run), *words]) == 0
    one, two = (open_source(path, message=silent).model for path in (run, tmp_path / "alone"))
    assert torch.equal(logits(one), logits(two))


def test_merging_in_bf16_rounds_once(base: Path) -> None:
    model = open_source(base, precision=Precision.bf16, message=silent).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    attach_adapters(model, config=LORA)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    parts = {n: p.clone() for n, p in model.named_parameters() if "adapter" in n}
    merge_adapters(model)
    for name, parameter in model.named_parameters():
        stem = name.removesuffix("weight") + "adapter."
        if f"{stem}a" not in parts:
            assert torch.equal(parameter, before[name])
            continue
        a, b = parts[f"{stem}a"].double(), parts[f"{stem}b"].double()
        exact = before[name].double() + LORA.alpha / LORA.rank * b @ a
        # Half a unit in the last of bf16's eight places.
        assert ((parameter.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_a_run_opened_in_bf16_is_its_merged_weights_rounded(adapted: Path) -> None:
    """Which are not the sum of what was rounded before."""
    wide = dict(open_source(adapted, message=silent).model.named_parameters())
    narrow = open_source(adapted, precision=Precision.bf16, message=silent).model
    for name, parameter in narrow.named_parameters():
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, wide[name].bfloat16()), name


@pytest.mark.parametrize(
    ("values", "layers", "told"),
    [
        ({"init_from": None}, LayerSpec.local, "stage.init_from names none"),
        ({"init_from": "runs/base"}, LayerSpec.te, "use engine.layers=local"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    values: dict[str, Any], layers: LayerSpec, told: str, shards: Path, tmp_path: Path
) -> None:
    stage = SFTConfig(steps=1, adapter=Adapter.lora, **values)
    made = config(tmp_path / "run", shards=shards)
    made.stage, made.engine = stage, EngineConfig(layers=layers)
    (problem,) = (text for text in find_problems(made) if "adapter" in text)
    assert told in problem
