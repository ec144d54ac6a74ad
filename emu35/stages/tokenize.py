"""``emu35 data tokenize``: pictures into codes on disk."""

from emu35.data.codes.options import TokenizeOptions
from emu35.data.codes.shards import CodesMeta
from emu35.data.codes.tokenize import TokenizeSummary
from emu35.data.codes.tokenize import tokenize as tokenize_pictures
from emu35.stages.data import VisionPictures, file_errors
from emu35.vision.codec import codec_facts
from emu35.vision.plugged import CodecTrust


@file_errors()
def tokenize(
    options: TokenizeOptions, *, trust: CodecTrust = CodecTrust.environment
) -> TokenizeSummary:
    """Tokenize as asked and print a summary with the use of the codebook; run again, it goes on
    where it was stopped. ``trust`` says whether an image tokenizer of another package may be run.

    Raises:
        Emu35Error: see :func:`emu35.data.codes.tokenize.tokenize`.
        ReleaseError: the tokenizer's folder is incomplete, damaged, or its code may not be run.
    """
    facts = codec_facts(options.vision)
    encoder = VisionPictures(
        folder=options.vision,
        area=options.area,
        codebook_size=facts.codebook_size,
        trust=trust,
    )
    meta = CodesMeta(
        source=options.source,
        tokenizer=encoder.digest,
        dtype=encoder.dtype,
        codebook_size=facts.codebook_size,
        factor=facts.factor,
    )
    summary = tokenize_pictures(options, encoder=encoder, meta=meta)
    print(f"{options.out}: " + "\n".join(summary.lines()))
    return summary
