"""``emu35 convert tokenizer``: an image tokenizer from one layout of its folder to the other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from emu35.checkpoint.release_folder import VISION_FOLDER
from emu35.errors import ReleaseError
from emu35.stages.output import appearing, refuse_nonempty
from emu35.vision.codec import load_codec, weights_digest
from emu35.vision.ibq.folder import Layout, layout_of, read_folder, write_folder
from emu35.vision.ibq.hf_folder import write_hf_folder
from emu35.vision.ibq.model import IBQ
from emu35.vision.plugged import is_plugged

_PROBE_GRID = (4, 6)
"""Rows and columns of codes of the picture that both folders are compared with."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ConvertTokenizerOptions:
    """``source`` is the folder of an IBQ tokenizer in either layout, or a run of stage=ibq or a
    release that holds one; ``out`` the folder to make, in ``layout``."""

    source: Path
    out: Path
    layout: Layout


def convert_tokenizer(
    options: ConvertTokenizerOptions, *, message: Callable[[str], object] = print
) -> Path:
    """Write the tokenizer of ``source`` in a layout; ``out`` appears only when what was written was
    read again and found the same: the weights bit for bit, and the codes of a picture.

    Raises:
        ReleaseError: ``source`` holds no IBQ tokenizer or a damaged one, ``out`` is not empty or
            cannot be written.
    """
    refuse_nonempty(options.out)
    source = options.source
    if (source / VISION_FOLDER).is_dir():
        source = source / VISION_FOLDER
    if is_plugged(source):
        raise ReleaseError(
            f"{source} is a tokenizer of another package; only IBQ has these layouts: copy it"
        )
    model, digest = read_folder(source), weights_digest(source)
    _refuse_diverged(model, source=source)
    write = write_hf_folder if options.layout is Layout.hf else write_folder
    with appearing(options.out) as folder:
        write(model, folder=folder, digest=digest)
        _check_same(model, folder=folder, out=options.out)
        _check_codes(source, folder=folder, out=options.out)
    parameters = sum(weight.numel() for weight in model.parameters())
    message(
        f"{options.out}: the tokenizer of {source} ({layout_of(source).value}) in the layout "
        f"{options.layout.value}, read again and compared: {parameters:,} parameters bit-equal, "
        f"same codes; shards know it as {digest[:12]}"
    )
    return options.out


def _refuse_diverged(model: IBQ, *, source: Path) -> None:
    for name, weight in model.state_dict().items():
        if not bool(weight.isfinite().all()):
            raise ReleaseError(
                f"{source}: {name} holds NaN or infinity: the tokenizer diverged; train it again "
                "with a lower optim.lr, or convert another one"
            )


def _check_same(model: IBQ, *, folder: Path, out: Path) -> None:
    again = read_folder(folder)
    state, written = model.state_dict(), again.state_dict()
    different = [name for name, tensor in state.items() if not torch.equal(tensor, written[name])]
    if different or again.config != model.config:
        what = different[0] if different else "the config"
        raise ReleaseError(
            f"{out}: {what} is not what was written; the disk may be failing: try another folder"
        )


def _check_codes(source: Path, *, folder: Path, out: Path) -> None:
    ours, theirs = load_codec(source), load_codec(folder)
    rows, columns = _PROBE_GRID
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, rows * ours.factor, columns * ours.factor)
    pixels_B3HW = torch.rand(shape, generator=generator) * 2 - 1
    if not torch.equal(ours.encode(pixels_B3HW), theirs.encode(pixels_B3HW)):
        raise ReleaseError(f"{out}: the codes of a picture differ; write it again")
