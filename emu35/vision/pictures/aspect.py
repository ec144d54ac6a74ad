"""Pictures in nearly their own shape, every micro-batch of one size."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.vision.pictures import cut
from emu35.vision.pictures.buckets import BucketPlan, assign, make_buckets
from emu35.vision.pictures.cut import Draw
from emu35.vision.pictures.files import PictureFile, Rejects, fingerprint
from emu35.vision.pictures.square import SquarePictures
from emu35.vision.pictures.store import CACHE_BYTES, PictureStore


class AspectPictures:
    """uint8 pictures by sample number, ``group`` consecutive ones of one size. Threads share it.

    A picture is resized until it covers the size of its bucket and cut to it, at random; of that,
    training may see a smaller piece of about ``crop`` squared pixels, and a share ``flip`` of the
    samples mirrored.

    Args:
        sizes_N2: (width, height) of each of ``files``, in pixels.
        group: pictures in a row that have one shape, a multiple of the micro-batch size.
    """

    def __init__(
        self,
        files: Sequence[PictureFile],
        *,
        sizes_N2: NDArray[np.int64],
        resolution: int,
        factor: int,
        seed: int,
        rejects: Rejects,
        group: int,
        crop: int = 0,
        flip: float = 0.0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        assert len(sizes_N2) == len(files)
        self.files = files
        self.rejects = rejects
        self.buckets = make_buckets(resolution=resolution, factor=factor, crop=crop)
        self._bucket_N = assign(sizes_N2, buckets=self.buckets)
        self._members = [np.flatnonzero(self._bucket_N == k) for k in range(len(self.buckets))]
        self._group = group
        self._plan = BucketPlan([len(part) for part in self._members], group=group, seed=seed)
        self._flip = flip
        self._draw = Draw(seed=seed)
        self._store = PictureStore(
            files, resize=self._cover, rejects=rejects, cache_bytes=cache_bytes
        )
        # Squares are asked for a few times in a run, so they are not kept.
        self._squares = SquarePictures(
            files,
            resolution=resolution,
            factor=factor,
            seed=seed,
            rejects=rejects,
            cache_bytes=0,
        )

    def __len__(self) -> int:
        return len(self.files)

    @property
    def identity(self) -> str:
        """Equal where every sample number means the same picture in the same shape."""
        digest = sha256(f"{fingerprint(self.files)} {self._group} {self.buckets}".encode())
        digest.update(self._bucket_N.astype(np.int8).tobytes())
        return digest.hexdigest()

    @property
    def counts(self) -> dict[tuple[int, int], int]:
        """Pictures by (width, height), those that occur."""
        return {
            (bucket.width, bucket.height): len(members)
            for bucket, members in zip(self.buckets, self._members, strict=True)
            if len(members)
        }

    def sample(self, sample: int) -> NDArray[np.uint8]:
        """``[3, H, W]``, sample number ``sample`` of the run. One that cannot be used is replaced
        by the next good one of its bucket, or, where there is none, by one of the bucket that is
        nearest in shape, cut to this one's; such a bucket is named among ``rejects``.

        Raises:
            DataError: too many pictures were rejected, or all.
        """
        place = self._plan.place(sample)
        bucket = self.buckets[place.bucket]
        own = self._from(place.bucket, first=place.member)
        picture = next((found for found in map(self._store.get, own) if found is not None), None)
        if picture is None:
            picture = self._stand_in(place.bucket, sample=sample)
        whole = cut.window(
            picture,
            width=bucket.width,
            height=bucket.height,
            position=self._draw.position(sample),
        )
        piece = cut.crop(
            whole,
            width=bucket.crop_width,
            height=bucket.crop_height,
            draw=self._draw,
            sample=sample,
        )
        return piece[:, :, ::-1] if self._draw.mirrored(sample, share=self._flip) else piece

    def square(self, sample: int) -> NDArray[np.uint8]:
        """``[3, resolution, resolution]``, as :meth:`SquarePictures.square`: what a codebook starts
        from. Sample numbers have another meaning there.

        Raises:
            DataError: too many pictures were rejected.
        """
        return self._squares.square(sample)

    def _from(self, bucket: int, *, first: int) -> Iterator[int]:
        """The pictures of a bucket, once around."""
        members = self._members[bucket]
        for step in range(len(members)):
            yield int(members[(first + step) % len(members)])

    def _stand_in(self, bucket: int, *, sample: int) -> NDArray[np.uint8]:
        """A picture of another bucket that covers this one, of which all pictures are broken. The
        sample number chooses it, so that epochs differ and a resumed run sees the same."""
        shape = self.buckets[bucket]

        def distance(other: int) -> float:
            found = self.buckets[other]
            return float(abs(np.log(found.width / found.height * shape.height / shape.width)))

        def cover(image: Image.Image, index: int) -> NDArray[np.uint8]:
            del index
            return cut.covering(image, width=shape.width, height=shape.height)

        # The nearest is this bucket itself, whose first picture is the one that an error names.
        nearest = sorted(range(len(self.buckets)), key=distance)
        picture = self._store.first_good(
            chain.from_iterable(self._from(other, first=sample) for other in nearest), resize=cover
        )
        count = len(self._members[bucket])
        self.rejects.reasons[f"bucket {shape.width}x{shape.height}"] = (
            f"none of its {count} pictures can be used; others stand in, cut to its shape"
        )
        return picture

    def _cover(self, image: Image.Image, index: int) -> NDArray[np.uint8]:
        bucket = self.buckets[self._bucket_N[index]]
        return cut.covering(image, width=bucket.width, height=bucket.height)
