"""One of several ranks that start from a folder in one layout after the other; run under torchrun.

Usage: start_worker.py FOLDER LAYOUT... [--runs RUNS NAME...] -- FOLDER holds ``qwen3`` and
``whole.pt``, what one process has after starting from it: every parameter of a rank must be the
very slice of a whole one, new rows included, the text logits those of transformers, and what was
read the rank's own parts. Then the runs configured in RUNS/NAME are trained; ``NAME+`` trains that
run again from its first checkpoint, with what it started from moved away.
"""

import shutil
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_qwen3 import TEXT_ROWS, TOKENIZER, model_of
from tp_load_worker import cut

from emu35.checkpoint.safetensor_files import SafetensorFolder
from emu35.checkpoint.source import load_into
from emu35.checkpoint.start import describe_start
from emu35.config import LMConfig, ParallelConfig
from emu35.config.io import read_config
from emu35.config.stage import NewRows, NewRowsConfig
from emu35.model.build import build_chunks
from emu35.model.context import AttentionContext
from emu35.model.logits import vocabulary_logits
from emu35.model.mask import AttentionMask
from emu35.model.names import weights_by_name
from emu35.model.transformer import Emu35Model
from emu35.parallel.collectives import barrier, is_main, rank, world_size
from emu35.parallel.mesh import current_mesh, init_mesh, leave
from emu35.stages import pretrain
from emu35.tokens.vocabulary import vocabulary_of

MODEL = model_of(hidden=64, layers=4)
TOKENS_S = (torch.arange(40) * 3777 + 5) % TEXT_ROWS
LAYOUTS = {
    "tp2": ParallelConfig(tp=2),
    "tp2-sp-zero1": ParallelConfig(tp=2, sp=True, zero1=True),
    "pp2-uneven": ParallelConfig(pp=2, pp_layers=[3, 1]),
    "pp2-vpp2": ParallelConfig(pp=2, vpp=2),
    "cp2": ParallelConfig(cp=2),
    "tp2-pp2": ParallelConfig(tp=2, pp=2),
    "tp2-pp2-vpp2-sp": ParallelConfig(tp=2, sp=True, pp=2, vpp=2),
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Elements that are read of every stored tensor meanwhile."""
    found: Counter[str] = Counter()
    part, whole = SafetensorFolder.part, SafetensorFolder.__getitem__

    def count(self: SafetensorFolder, name: str, **where: int) -> torch.Tensor:
        read = part(self, name, **where)
        found[name] += read.numel()
        return read

    def count_whole(self: SafetensorFolder, name: str) -> torch.Tensor:
        found[name] += 10**9
        return whole(self, name)

    SafetensorFolder.part, SafetensorFolder.__getitem__ = count, count_whole  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        SafetensorFolder.part, SafetensorFolder.__getitem__ = part, whole  # type: ignore[method-assign]


def start(
    folder: Path, *, parallel: ParallelConfig, model: LMConfig = MODEL
) -> tuple[list[Emu35Model], dict[str, Counter[str]]]:
    """This rank's chunks, filled as a run fills them, and what was read for it."""
    init_mesh(parallel, seed=0, timeout=120)
    chunks = build_chunks(model, vocabulary_size=vocabulary_of(TOKENIZER).size, parallel=parallel)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    with counted() as described:
        found = describe_start(
            folder,
            config=model,
            tokenizer=TOKENIZER,
            new_rows=NewRowsConfig(policy=NewRows.mean, std=0.05),
            seed=7,
            message=lambda text: None,
        )
    with counted() as loaded:
        load_into(chunks, described=found)
    return chunks, {"described": described, "loaded": loaded}


@torch.no_grad()
def text_logits(chunks: list[Emu35Model]) -> torch.Tensor | None:
    """Logits [S, text ids] of one document, stage after stage; None off the last stage."""
    mesh = current_mesh()
    tokens_BS = TOKENS_S[None]
    context = AttentionContext(
        positions_BS=torch.arange(len(TOKENS_S))[None],
        mask=AttentionMask.causal(torch.zeros_like(tokens_BS)),
    )
    hidden_SBH = torch.empty(len(TOKENS_S), 1, MODEL.hidden_size)
    for chunk_index in range(len(chunks)):
        for stage in range(mesh.pp_size):
            if stage == mesh.pp_rank:
                chunk = chunks[chunk_index].eval()
                chunk.set_input_tensor(hidden_SBH)
                hidden_SBH = chunk(tokens_BS, context=context).contiguous()
            dist.broadcast(hidden_SBH, group=mesh.pp_group, group_src=stage)
    if mesh.pp_rank != mesh.pp_size - 1:
        return None
    return vocabulary_logits(chunks[-1], hidden_NH=hidden_SBH[:, 0])[:, :TEXT_ROWS]


def check_layout(name: str, *, folder: Path, whole: dict[str, Any]) -> None:
    parallel = LAYOUTS[name]
    chunks, read = start(folder / "qwen3", parallel=parallel)
    tp_rank, tp = current_mesh().tp_rank, parallel.tp
    held = {name: value for chunk in chunks for name, value in weights_by_name(chunk).items()}
    for parameter_name, parameter in held.items():
        expected = cut(whole["parameters"][parameter_name], parameter_name, rank=tp_rank, tp=tp)
        assert torch.equal(parameter, expected), (name, parameter_name, rank())
    if not parallel.sp and parallel.cp == 1:
        logits_SV = text_logits(chunks)
        if logits_SV is not None:
            gap = (logits_SV - whole["hf_logits"]).abs().max().item()
            assert gap < 1e-5, (name, gap)
    check_read(read, held=held, tp_rank=tp_rank, tp=tp, where=name)
    # Every layer somewhere, none twice: the stages together are the model.
    every: list[list[str] | None] = [None] * world_size()
    dist.all_gather_object(every, sorted(held))
    assert {each for names in every for each in names or []} == set(whole["parameters"])


def check_read(
    read: dict[str, Counter[str]],
    *,
    held: dict[str, torch.nn.Parameter],
    tp_rank: int,
    tp: int,
    where: str,
) -> None:
    """A rank reads as many stored numbers as it holds, new rows not counted, and for the mean its
    share of the text rows."""
    expected = 0
    for name, parameter in held.items():
        if "embedding" in name or "output_layer" in name:
            rows = max(0, min(len(parameter), TEXT_ROWS - tp_rank * len(parameter)))
            expected += rows * MODEL.hidden_size
        else:
            expected += parameter.numel()
    assert sum(read["loaded"].values()) == expected, (where, rank(), read["loaded"], expected)
    share = TEXT_ROWS * MODEL.hidden_size * 2 / world_size()
    averaged = sum(read["described"].values())
    assert abs(averaged - share) <= 2 * 2048 * MODEL.hidden_size, (where, averaged, share)


def train(name: str, *, folder: Path) -> None:
    run_dir = folder / name.removesuffix("+")
    if name.endswith("+"):
        if is_main():
            shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
            origin = Path(str(read_config(run_dir).stage.init_from))
            origin.rename(origin.with_name("moved"))
        barrier()
    pretrain.run(read_config(run_dir), run_dir=run_dir)
    barrier()


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("layouts", nargs="*")
    parser.add_argument("--runs", nargs="+", default=["."])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    whole = torch.load(arguments.folder / "whole.pt", weights_only=True)
    for name in arguments.layouts:
        check_layout(name, folder=arguments.folder, whole=whole)
    for name in arguments.runs[1:]:
        train(name, folder=Path(arguments.runs[0]))
    leave()


if __name__ == "__main__":
    main()
