"""From the configuration to the pictures that are used."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emu35.config.images import (
    PROXY_SCORERS,
    Buckets,
    ClassifierScorerConfig,
    ImageDataConfig,
    ScorerConfig,
)
from emu35.parallel.collectives import is_main, rank
from emu35.vision.pictures.columns import ColumnFolder, key_of
from emu35.vision.pictures.files import PictureFiles
from emu35.vision.pictures.filters import Filters, Selection
from emu35.vision.pictures.readers import MetadataReader, PixelReader, SizeReader
from emu35.vision.pictures.scorers import PictureScorer
from emu35.vision.pictures.scorers.classifier import Classifier
from emu35.vision.pictures.scorers.proxies import make_proxy
from emu35.vision.pictures.survey import (
    Message,
    Readers,
    Stores,
    Survey,
    agreed_fingerprint,
    on_every_rank,
)
from emu35.vision.pictures.unread import Unread

MakeScorer = Callable[[str, ScorerConfig], PictureScorer]
"""Name and configuration of an entry of ``data.scorers`` -> its scorer."""


def needs_survey(data: ImageDataConfig) -> bool:
    """Whether pictures must be looked at before training; squares without filters need none."""
    return bool(data.filters) or data.buckets is Buckets.aspect


def select_pictures(
    files: PictureFiles,
    *,
    data: ImageDataConfig,
    cache: Path,
    make_scorer: MakeScorer,
    message: Message,
    memory: Path | None = None,
) -> Selection:
    """Look at ``files`` as ``data`` asks; scores are kept in ``cache``, which runs may share, and
    what could not be read in the folder ``memory`` of this run, so that it sees the same when it is
    resumed (None: nowhere). Collective.

    ``make_scorer`` makes the scorers that are neither proxies nor classifiers from files.

    Raises:
        DataError: the ranks see different pictures, too many are broken, too few are left, or a
            score is missing that may not.
        ConfigError: a scorer's model cannot be used.
    """
    filters = Filters(data.filters, scorers=data.scorers)
    fields = filters.fields
    sizes = data.buckets is Buckets.aspect or filters.need_sizes
    scorers = _make_scorers(filters.computed, data=data, make_scorer=make_scorer)
    readers = Readers(
        sizes=(
            SizeReader(metadata=files.metadata_digest, fields=_size_fields(data)) if sizes else None
        ),
        metadata=MetadataReader(fields, metadata=files.metadata_digest) if fields else None,
        pixels=PixelReader(scorers) if scorers else None,
    )
    fingerprint = agreed_fingerprint(files)
    stores = on_every_rank(
        lambda: _open_stores(files, fingerprint=fingerprint, cache=cache, memory=memory)
    )[rank()]
    if stores.unread:
        message(
            f"{len(stores.unread)} pictures could not be read when this run began, and are not "
            f"looked at again; delete {stores.unread.path} and they are"
        )
    with ThreadPoolExecutor(data.decode_threads, thread_name_prefix="survey") as pool:
        survey = Survey(
            files, filters=filters, readers=readers, stores=stores, pool=pool, message=message
        )
        selection = survey.run()
    selection.check(min_kept=data.min_kept)
    # Not before: who is told to mend pictures must find them looked at again.
    survey.remember()
    return selection


def _open_stores(
    files: PictureFiles, *, fingerprint: str, cache: Path, memory: Path | None
) -> Stores:
    if not is_main():
        return Stores()
    return Stores(
        columns=ColumnFolder(cache, key=key_of(files, fingerprint=fingerprint)),
        # Without the bytes that are in the other key: those of a mended picture are not the same.
        unread=None if memory is None else Unread(memory, key=fingerprint[:16]),
    )


def _make_scorers(
    names: Sequence[str], *, data: ImageDataConfig, make_scorer: MakeScorer
) -> list[PictureScorer]:
    scorers = list[PictureScorer]()
    for name in names:
        if name in PROXY_SCORERS:
            scorers.append(make_proxy(name, side=data.resolution))
            continue
        config = data.scorers[name]
        if isinstance(config, ClassifierScorerConfig):
            scorers.append(Classifier(name, config=config))
        else:
            scorers.append(make_scorer(name, config))
    return scorers


def _size_fields(data: ImageDataConfig) -> tuple[str, str] | None:
    if data.width_field is None or data.height_field is None:
        return None
    return data.width_field, data.height_field
