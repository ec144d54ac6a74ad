"""``emu35 data inspect DIR``: documents of a folder, on the terminal and as a page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emu35.config.tokenizer import TokenizerConfig, TokenizerKind
from emu35.data.place import place_of
from emu35.data.show import ShownDocument, numbers_from, random_numbers, show_documents
from emu35.data.source import Source
from emu35.data.stats import source_of
from emu35.errors import ConfigError
from emu35.stages.data import file_errors
from emu35.stages.data_page import Entry, Painter, documents_page
from emu35.stages.output import write_output
from emu35.tokens.text import build_text_tokenizer
from emu35.vision.codec import ImageCodec, decode_grids, load_codec, weights_digest
from emu35.vision.resize import to_image


@dataclass(kw_only=True, slots=True)
class InspectOptions:
    """Show ``count`` documents from number ``first``, or with a seed ``random`` ones.

    The shards name their own tokenizer; ``table`` is its file where the cache has none. ``images``
    is a folder to write the decoded pictures to, with the image tokenizer in folder ``vision``.
    ``html`` is a page to write; its pictures are decoded with ``vision`` and are maps of codes
    without.
    """

    folder: str | Path
    first: int | None = None
    count: int = 5
    random: int | None = None
    images: Path | None = None
    vision: Path | None = None
    html: Path | None = None
    table: str | None = None


@file_errors()
def inspect(options: InspectOptions) -> None:
    """Print documents as text with pictures as ``[image 6x6]``; optionally write a page, and the
    pictures as files.

    Raises:
        Emu35Error: if the shards, the tokenizer or the image tokenizer cannot be used.
    """
    _check(options)
    source = source_of(place_of(options.folder))
    if options.random is None:
        numbers = numbers_from(source, first=options.first or 0, count=options.count)
    else:
        numbers = random_numbers(source, count=options.count, seed=options.random)
    tokenizer = build_text_tokenizer(tokenizer_of(source, table=options.table))
    codec = None if options.vision is None else load_vision(options.vision, sources=[source])
    # Not a list: a page of thousands of documents is written as they are read.
    documents = show_documents(source, tokenizer=tokenizer, numbers=numbers)
    shown = _print(documents, codec=codec, images=options.images)
    if options.html is None:
        for _ in shown:
            pass
        return
    chosen = "at random" if options.random is not None else "in their order"
    page = documents_page(
        (Entry(document=document) for document in shown),
        painter=Painter(codec),
        title=source.name,
        lead=f"{len(numbers)} of {len(source):,} documents of {options.folder}, {chosen}.",
    )
    write_output(options.html, content=page.encode("ascii"))
    print(f"written: {options.html}")


def _check(options: InspectOptions) -> None:
    problems: list[str] = []
    if options.count < 1:
        problems.append(f"--count {options.count} must be at least 1")
    if options.random is not None and options.first is not None:
        problems.append("--first and --random both choose documents; give one of them")
    if options.random is not None and options.random < 0:
        problems.append(f"--random {options.random} must not be negative")
    if options.images is not None and options.vision is None:
        problems.append(
            "--images: writing pictures needs the image tokenizer; give its folder with --vision"
        )
    if problems:
        raise ConfigError(problems)


def _print(
    documents: Iterable[ShownDocument], *, codec: ImageCodec | None, images: Path | None
) -> Iterable[ShownDocument]:
    """Print every document as it passes, and write its pictures into ``images``."""
    for document in documents:
        print(f"--- document {document.number}  id {document.id}  {document.tokens} tokens")
        print(document.text())
        if codec is not None and images is not None:
            write_pictures(document, codec=codec, folder=images)
        yield document


def tokenizer_of(source: Source, *, table: str | None) -> TokenizerConfig:
    """The text tokenizer that the shards of ``source`` were made with."""
    meta = source.metas[0]
    return TokenizerConfig(
        kind=TokenizerKind(meta.kind), codebook_size=meta.codebook_size, table=table
    )


def load_vision(folder: Path, *, sources: Sequence[Source]) -> ImageCodec:
    """The image tokenizer in ``folder``, to decode pictures of ``sources``; prints a line where it
    is not the one that encoded them.

    Raises:
        ConfigError: if its codebook has another size than theirs.
        ReleaseError: if the folder is incomplete or damaged.
    """
    codec = load_codec(folder)
    metas = [meta for source in sources for meta in source.metas]
    sizes = sorted({meta.codebook_size for meta in metas} - {codec.codebook_size})
    if sizes:
        raise ConfigError(
            f"--vision {folder} has {codec.codebook_size} codes, but the shards were made with "
            f"{sizes[0]}; name the image tokenizer that they were ingested with"
        )
    digest = weights_digest(folder)
    others = sorted({meta.vision for meta in metas if meta.vision} - {digest})
    if others:
        print(
            f"--vision {folder} (weights {digest[:12]}) did not encode these pictures (weights "
            f"{others[0][:12]} did); they will not look as they did"
        )
    return codec


def write_pictures(document: ShownDocument, *, codec: ImageCodec, folder: Path) -> None:
    """Write the decoded pictures of a document as ``DOCUMENT_PICTURE.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    grids = [image.codes_HW for image in document.images]
    for number, pixels in enumerate(decode_grids(codec, grids)):
        to_image(pixels).save(folder / f"{document.number:06d}_{number:02d}.png")
