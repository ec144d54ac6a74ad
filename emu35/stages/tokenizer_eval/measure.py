"""One resolution: pictures through tokenizers into records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from emu35.config.tokenizer_eval import TokenizerEvalConfig
from emu35.errors import DataError
from emu35.parallel.collectives import rank, world_size
from emu35.stages.picture_features import Picture
from emu35.stages.tokenizer_eval.gallery import batches, load
from emu35.stages.tokenizer_eval.instruments import Instruments
from emu35.stages.tokenizer_eval.reading import compare, references
from emu35.stages.tokenizer_eval.records import Findings, PictureFigures
from emu35.stages.tokenizer_eval.writing import TextSet
from emu35.vision.codec import ImageCodec
from emu35.vision.fidelity import from_levels, psnr, ssim, to_levels
from emu35.vision.frechet import Moments
from emu35.vision.lpips import Lpips
from emu35.vision.pictures import PictureFile, Rejects
from emu35.vision.wavelets import DIMENSIONS, wavelet_features

INCEPTION, WAVELETS = "inception", "wavelets"
"""Feature spaces."""

INCEPTION_DIMENSIONS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured with what."""

    stage: TokenizerEvalConfig
    codecs: Mapping[str, ImageCodec]
    instruments: Instruments
    files: Sequence[PictureFile]
    texts: TextSet
    rejects: Rejects
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """What was found at ``side`` pixels, by tokenizer and of the originals; ``enlarged`` pictures
    were smaller than that."""

    side: int
    originals: Findings
    tokenizers: Mapping[str, Findings]
    enlarged: int

    @property
    def pictures(self) -> int:
        return max((len(found.pictures) for found in self.tokenizers.values()), default=0)


def steps_of(subject: Subject) -> int:
    """How many batches this rank goes through at a resolution."""
    return len(_batches(len(subject.files), subject=subject)) + len(_text_batches(subject))


def measure(subject: Subject, *, side: int, tick: Callable[[int], None]) -> Resolution:
    """This rank's share of the pictures at ``side`` pixels; ``tick`` is told how many there were in
    each batch.

    Raises:
        DataError: a tokenizer gives something that is no picture of the same size.
    """
    originals = Findings(moments=_spaces(subject.instruments))
    tokenizers = {
        name: Findings(
            counts_K=torch.zeros(codec.codebook_size, dtype=torch.int64),
            moments=_spaces(subject.instruments),
        )
        for name, codec in subject.codecs.items()
    }
    enlarged = 0
    for numbers in _batches(len(subject.files), subject=subject):
        loaded = load(numbers, files=subject.files, side=side, rejects=subject.rejects)
        enlarged += loaded.enlarged
        if loaded.numbers:
            _measure_batch(
                loaded.levels_B3HW,
                numbers=loaded.numbers,
                subject=subject,
                originals=originals,
                tokenizers=tokenizers,
            )
        tick(len(numbers))
    for numbers in _text_batches(subject):
        _measure_text(
            numbers, side=side, subject=subject, originals=originals, tokenizers=tokenizers
        )
        tick(len(numbers))
    return Resolution(side=side, originals=originals, tokenizers=tokenizers, enlarged=enlarged)


def reconstruct(
    codec: ImageCodec, levels_B3HW: torch.Tensor, *, name: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int64 [B, h, w] of uint8 pictures, and what they decode to, uint8 [B, 3, H, W].

    Raises:
        DataError: the tokenizer ``name`` gives pictures of another size, or no finite numbers.
    """
    codes_BHW = codec.encode(from_levels(levels_B3HW.to(device)))
    pixels_B3HW = codec.decode(codes_BHW)
    if pixels_B3HW.shape != levels_B3HW.shape:
        raise DataError(
            f"tokenizer {name} decodes pictures of shape {tuple(levels_B3HW.shape)} to "
            f"{tuple(pixels_B3HW.shape)}; is its factor ({codec.factor}) what it works with?"
        )
    if not bool(pixels_B3HW.isfinite().all()):
        raise DataError(
            f"tokenizer {name} decodes to numbers that are not finite; its weights are damaged"
        )
    return codes_BHW.cpu(), to_levels(pixels_B3HW).cpu()


def _measure_batch(
    levels_B3HW: torch.Tensor,
    *,
    numbers: Sequence[int],
    subject: Subject,
    originals: Findings,
    tokenizers: Mapping[str, Findings],
) -> None:
    tools = subject.instruments
    _add_features(levels_B3HW, found=originals, tools=tools)
    decoded_TB3HW: dict[str, torch.Tensor] = {}
    for name, codec in subject.codecs.items():
        codes_BHW, decoded_B3HW = reconstruct(codec, levels_B3HW, name=name, device=subject.device)
        decoded_TB3HW[name] = decoded_B3HW
        found = tokenizers[name]
        found.counts_K += torch.bincount(codes_BHW.flatten(), minlength=codec.codebook_size)
        _add_features(decoded_B3HW, found=found, tools=tools)
    faces_TB = _face_cosines(levels_B3HW, decoded_TB3HW=decoded_TB3HW, tools=tools)
    target_B3HW = levels_B3HW.to(subject.device)
    for name, decoded_B3HW in decoded_TB3HW.items():
        own_B3HW = decoded_B3HW.to(subject.device)
        tokenizers[name].pictures += [
            PictureFigures(number=number, psnr=decibels, ssim=alike, lpips=apart, faces=cosines)
            for number, decibels, alike, apart, cosines in zip(
                numbers,
                psnr(own_B3HW, target_B3HW=target_B3HW).tolist(),
                ssim(own_B3HW, target_B3HW=target_B3HW).tolist(),
                _lpips(own_B3HW, target_B3HW=target_B3HW, lpips=tools.lpips),
                faces_TB[name],
                strict=True,
            )
        ]


def _measure_text(
    numbers: range,
    *,
    side: int,
    subject: Subject,
    originals: Findings,
    tokenizers: Mapping[str, Findings],
) -> None:
    reader = subject.instruments.reader
    assert reader is not None
    loaded = [
        (number, found)
        for number in numbers
        if (found := subject.texts.load(number, side=side, rejects=subject.rejects))
    ]
    if not loaded:
        return
    wanted = []
    for number, text in loaded:
        original = reader.lines(text.picture)
        lines = text.drawn
        if lines is None:
            lines = references(text.truth, original=original)
        wanted.append(lines)
        originals.lines += compare(lines, found=original, picture=number)
    levels_B3HW = torch.stack(
        [torch.from_numpy(text.picture.copy()).permute(2, 0, 1) for _, text in loaded]
    )
    for name, codec in subject.codecs.items():
        _, decoded_B3HW = reconstruct(codec, levels_B3HW, name=name, device=subject.device)
        for (number, _), lines, picture in zip(
            loaded, wanted, _pictures(decoded_B3HW), strict=True
        ):
            tokenizers[name].lines += compare(lines, found=reader.lines(picture), picture=number)


def _batches(count: int, *, subject: Subject) -> list[range]:
    return batches(count, size=subject.stage.batch_size, rank=rank(), ranks=world_size())


def _text_batches(subject: Subject) -> list[range]:
    count = len(subject.texts) if subject.instruments.reader else 0
    return _batches(count, subject=subject)


def _spaces(tools: Instruments) -> dict[str, Moments]:
    spaces = {WAVELETS: Moments(DIMENSIONS)}
    if tools.inception is not None:
        spaces[INCEPTION] = Moments(INCEPTION_DIMENSIONS)
    return spaces


def _add_features(levels_B3HW: torch.Tensor, *, found: Findings, tools: Instruments) -> None:
    found.moments[WAVELETS].add(wavelet_features(levels_B3HW).numpy())
    if tools.inception is not None:
        found.moments[INCEPTION].add(tools.inception(_pictures(levels_B3HW)))


def _lpips(
    levels_B3HW: torch.Tensor, *, target_B3HW: torch.Tensor, lpips: Lpips | None
) -> list[float] | list[None]:
    if lpips is None:
        return [None] * len(levels_B3HW)
    return lpips.distance(from_levels(levels_B3HW), from_levels(target_B3HW)).cpu().tolist()


def _face_cosines(
    levels_B3HW: torch.Tensor, *, decoded_TB3HW: Mapping[str, torch.Tensor], tools: Instruments
) -> dict[str, list[tuple[float, ...]]]:
    """Those of each picture's faces, by tokenizer; none where faces are not measured."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in decoded_TB3HW}
    decoded = [_pictures(each) for each in decoded_TB3HW.values()]
    for number, original in enumerate(_pictures(levels_B3HW)):
        cosines: list[list[float]] = [[] for _ in found]
        if tools.faces is not None:
            cosines = tools.faces.cosines(original, [each[number] for each in decoded])
        for name, values in zip(found, cosines, strict=True):
            found[name].append(tuple(values))
    return found


def _pictures(levels_B3HW: torch.Tensor) -> list[Picture]:
    """RGB [H, W, 3] of each."""
    return list(levels_B3HW.permute(0, 2, 3, 1).contiguous().numpy())
