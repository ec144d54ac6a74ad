"""Pictures for training the image tokenizer: which there are, which are used, which comes when.

*What is there?* :mod:`.files` lists files of folders and members of webdataset tars (:mod:`.tars`)
under the paths that are named (:mod:`.places`) in one fixed order, as columns of names and offsets;
no picture is read for it. Bytes are read from where they lie, picture by picture, so a tar of any
size takes no memory.

*Which are used?* Without filters and buckets, all of them, and training starts at once. Otherwise
:mod:`.survey` looks at every picture before the first step: its size in the header, numbers in the
JSON beside it, what a scorer makes of its pixels (:mod:`.readers`, :mod:`.scorers`). The ranks
share the work out, and the numbers are kept as :mod:`.columns`, so a run that is resumed looks at
nothing again and sees the same; numbers of metadata that changed meanwhile are read anew. What
could not be read (:mod:`.unread`) is believed by that run alone. :mod:`.filters` compares them with
their bounds. Who is left out is named with the score that decided (``filtered.jsonl``), apart from
who is broken (``rejects.jsonl``). :func:`.select.select_pictures` does all of this.

*Which one now?* A pure function of seed and sample number, so a resumed run needs nothing but its
step number and any number of ranks shares one sequence. :class:`SquarePictures` cuts squares; every
epoch is a permutation of its own (:func:`picture_at`). :class:`AspectPictures` lets pictures keep
their shape: sizes of about the same area from a fixed list of ratios, and as many pictures in a row
of one size as a micro-batch has. Its order is a plan with closed formulas (:mod:`.buckets`) instead
of a queue for each size, so there, too, any step can be found without those before it.

*What of it?* :mod:`.cut` resizes, and cuts and mirrors by draws of the sample number. A square
picture is used whole unless crops are asked for, smaller pieces at random places.

*What if it is broken?* The next picture (of the bucket, or of the nearest one where a bucket has no
other) takes its place, and its name and reason go to the :class:`Rejects`. Resized pictures stay in
memory as bytes until ``CACHE_BYTES`` are full; what does not fit is decoded anew each time
(:mod:`.store`). :class:`PictureBatches` has the next batch decoded by threads while a step is
computed, and no more than that.
"""

from emu35.vision.pictures.aspect import AspectPictures
from emu35.vision.pictures.batches import PictureBatches
from emu35.vision.pictures.files import (
    PictureFile,
    PictureFiles,
    Rejects,
    find_pictures,
    fingerprint,
)
from emu35.vision.pictures.square import SquarePictures, picture_at

__all__ = [
    "AspectPictures",
    "PictureBatches",
    "PictureFile",
    "PictureFiles",
    "Rejects",
    "SquarePictures",
    "find_pictures",
    "fingerprint",
    "picture_at",
]
