"""One ingestion from options to token shards and a summary."""

from collections.abc import Sequence
from typing import Any

from emu35.data.ingest.documents import FOLDERS
from emu35.data.ingest.job import JobOptions, run_job
from emu35.data.ingest.options import Existing, IngestOptions, IngestSummary
from emu35.data.ingest.pictures import PictureEncoder
from emu35.data.ingest.token_shards import TokenShards
from emu35.data.readers.discover import InputFile, find_inputs
from emu35.errors import DataError


def ingest(options: IngestOptions, *, encoder: PictureEncoder | None) -> IngestSummary:
    """Turn inputs into token shards; see the package for what an interruption leaves behind.

    Args:
        encoder: makes codes of pictures; None where the inputs hold no picture.

    Raises:
        ConfigError: for impossible options.
        DataError: if inputs are missing, the output folder cannot be used, an input has too many
            rejects, or nothing at all could be ingested.
        TokenizerError: if the text table is missing.
        LaunchError: if a worker died.
    """
    options.validate()
    inputs = find_inputs(
        options.inputs,
        text_unit=options.text_unit,
        starts=options.starts,
        layout=options.layout,
        pictures=options.pictures,
        fields=options.clips.names if options.clips is not None else (),
    )
    if not inputs:
        raise DataError(
            "the inputs hold nothing but what img2dataset writes about its shards; give the tars, "
            "or the folder they are in"
        )
    _require_encoder(inputs, encoder=encoder)
    product = TokenShards(options=options, encoder=encoder)
    # Made here, so that a missing table shows before anything is touched.
    _ = product.tokenizer
    if encoder is not None and options.existing is Existing.replace:
        encoder.check()
    return run_job(
        product,
        inputs=inputs,
        options=JobOptions(
            out=options.out,
            folders=list(FOLDERS[options.order]),
            identity=_identity(options, encoder=encoder),
            label=f"ingest {options.source}",
            workers=options.workers,
            max_rejects=options.max_rejects,
            dedup=options.dedup,
            existing=options.existing,
        ),
    )


def _require_encoder(inputs: Sequence[InputFile], *, encoder: PictureEncoder | None) -> None:
    """Raises: DataError if there is no encoder and an input is bound to need one."""
    pictures = next((source for source in inputs if source.is_of_pictures), None)
    if encoder is None and pictures is not None:
        raise DataError(
            f"input {pictures.path} holds pictures, but no image tokenizer was given; "
            "name its folder with --vision (tokenizer.vision)"
        )


def _identity(options: IngestOptions, *, encoder: PictureEncoder | None) -> dict[str, Any]:
    """The options that decide what a document becomes; a rerun must repeat them."""
    area = options.area
    return {
        "source": options.source,
        "tokenizer": options.tokenizer.kind.value,
        "codebook_size": options.tokenizer.codebook_size,
        "vision": encoder.digest if encoder is not None else None,
        "area": area.most if area.least == area.most else f"{area.least}..{area.most}",
        "order": options.order.value,
        "text_unit": options.text_unit.value,
        "starts": options.starts.value,
        "layout": options.layout.value if options.layout is not None else None,
        "sequence_length": options.sequence_length,
        "dedup": options.dedup.value,
        "clips": ", ".join(options.clips.names) if options.clips is not None else None,
        "pictures": str(options.pictures.resolve()) if options.pictures is not None else None,
    }
