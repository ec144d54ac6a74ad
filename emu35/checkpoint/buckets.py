"""Weights in buckets of bounded size, whatever carries them.

A bucket is one stretch of bytes that holds rows of one or several tensors (rows are indices of the
first dimension; a scalar is one row). A tensor that is larger than what is left of a bucket goes on
in the next one: the embedding of the 34B model is 2,763 MiB, and nobody wants buffers of that size.
Tensors follow each other in one order and rows ascend, so a receiver knows what is missing.

Where the names, shapes and types of all tensors are known on both sides, :func:`plan_buckets` gives
both the same layouts, and only bytes need to travel. Elsewhere :func:`encode` puts the layout in
front of them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from emu35.checkpoint.hf import Piece
from emu35.errors import CheckpointError, ConfigError

INITIAL = "initial"
"""What the weights that a server was started with are called (:func:`weights_tag` names others)."""

_ALIGNED = 16
"""Every slice begins at a multiple of so many bytes, so that any type can be read in place."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}
"""Types that weights may have on the wire, by name."""

_LENGTH = 8
"""Bytes in front of an encoded bucket that say how long its description is."""

_LONGEST_HEAD = 2**26
"""Bytes of a description; one of a real bucket has a few hundred a tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """What a tensor is called and how it is made."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "TensorSpec":
        """That of ``tensor``."""
        return cls(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)

    @property
    def rows(self) -> int:
        """Indices of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one of them."""
        return prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Rows [``start``, ``stop``) of a tensor, from byte ``offset`` of a bucket on."""

    spec: TensorSpec
    start: int
    stop: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return (self.stop - self.start) * self.spec.row_bytes

    @property
    def last(self) -> bool:
        """Whether the tensor ends here."""
        return self.stop == self.spec.rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What bucket number ``index`` holds, in order, and where."""

    index: int
    slices: tuple[Slice, ...]

    @property
    def nbytes(self) -> int:
        """Size of the bucket."""
        last = self.slices[-1]
        return last.offset + last.nbytes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bucket:
    """``data``, uint8 [``layout.nbytes``] on any device, as ``layout`` says."""

    layout: Layout
    data: torch.Tensor

    @classmethod
    def empty(cls, layout: Layout, *, device: torch.device) -> "Bucket":
        """One to be filled. What lies between two slices is zero."""
        data = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        return cls(layout=layout, data=data)

    def rows(self, part: Slice) -> torch.Tensor:
        """The rows of ``part`` [stop - start, ...], a view."""
        flat = self.data[part.offset : part.offset + part.nbytes].view(part.spec.dtype)
        return flat.view(part.stop - part.start, *part.spec.shape[1:])

    def digest(self) -> str:
        """SHA-256 of the description and the bytes."""
        found = hashlib.sha256(_head(self.layout))
        found.update(self.data.cpu().numpy().data)
        return found.hexdigest()


def plan_buckets(specs: Iterable[TensorSpec], *, bucket_bytes: int) -> Iterator[Layout]:
    """How tensors go into buckets of at most ``bucket_bytes``. Of ``specs`` only as many are asked
    for as the next bucket needs.

    Raises:
        ConfigError: a single row is larger than a bucket.
        CheckpointError: a tensor of a type that does not travel.
    """
    index, slices, used = 0, list[Slice](), 0
    for spec in specs:
        _require_fit(spec, bucket_bytes=bucket_bytes)
        start = 0
        while True:
            offset = -(-used // _ALIGNED) * _ALIGNED
            room = (bucket_bytes - offset) // spec.row_bytes if spec.row_bytes else spec.rows
            if room < 1 and start < spec.rows:
                yield Layout(index=index, slices=tuple(slices))
                index, slices, used = index + 1, [], 0
                continue
            stop = min(spec.rows, start + room)
            slices.append(Slice(spec=spec, start=start, stop=stop, offset=offset))
            used, start = offset + slices[-1].nbytes, stop
            if start == spec.rows:
                break
    if slices:
        yield Layout(index=index, slices=tuple(slices))


def _require_fit(spec: TensorSpec, *, bucket_bytes: int) -> None:
    if spec.dtype not in _DTYPES.values():
        raise CheckpointError(
            f"{spec.name} is {spec.dtype}; weights travel as one of {', '.join(_DTYPES)}"
        )
    if spec.row_bytes > bucket_bytes:
        raise ConfigError(
            f"bucket_bytes={bucket_bytes} is less than one row of {spec.name} "
            f"({spec.row_bytes} bytes); use larger buckets"
        )


@torch.no_grad()
def pack(weights: Iterable[tuple[str, torch.Tensor]], *, bucket_bytes: int) -> Iterator[Bucket]:
    """``weights`` in buckets on their own device. A tensor is asked for when its bucket is made and
    let go of when all of it is in one.

    Raises:
        ConfigError, CheckpointError: as :func:`plan_buckets`.
    """
    held: dict[str, torch.Tensor] = {}

    def specs() -> Iterator[TensorSpec]:
        for name, tensor in weights:
            held[name] = tensor
            yield TensorSpec.of(name, tensor)

    for layout in plan_buckets(specs(), bucket_bytes=bucket_bytes):
        bucket = Bucket.empty(layout, device=held[layout.slices[0].spec.name].device)
        for part in layout.slices:
            name = part.spec.name
            tensor = held[name] if held[name].dim() else held[name].view(1)
            bucket.rows(part).copy_(tensor[part.start : part.stop].view_as(bucket.rows(part)))
            if part.last:
                del held[name]
        yield bucket


class Receiver:
    """Puts what comes in buckets into its places.

    Args:
        shapes: every tensor that has to come, whole.
        pieces: the parts of them that are held here; a rank's, or :func:`whole_pieces`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, pieces: Iterable[Piece]) -> None:
        self._shapes = dict(shapes)
        self._pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
        for piece in pieces:
            self._pieces[piece.name].append(piece)
        self._came = dict[str, int]()  # rows, by name

    def check(self, layout: Layout) -> None:
        """Whether a bucket of this ``layout`` may come now; nothing is changed.

        Raises:
            CheckpointError: it holds a tensor that is not ours, of another shape, or rows that are
                not the next ones.
        """
        came = dict(self._came)
        for part in layout.slices:
            name, shape = part.spec.name, part.spec.shape
            if name not in self._shapes:
                raise CheckpointError(
                    f"bucket {layout.index} has {name}, which this model has not; is it of "
                    "another architecture?"
                )
            if shape != self._shapes[name]:
                raise CheckpointError(
                    f"bucket {layout.index}: {name} has shape {shape}, but this model's is "
                    f"{self._shapes[name]}"
                )
            if part.start != came.get(name, 0) or (name in came and came[name] == part.spec.rows):
                raise CheckpointError(
                    f"bucket {layout.index} has rows {part.start} to {part.stop} of {name}, of "
                    f"which {came.get(name, 0)} have come; send all buckets in order"
                )
            came[name] = part.stop

    @torch.no_grad()
    def write(self, bucket: Bucket) -> None:
        """Put the rows of ``bucket`` into their places, converted to the type there.

        Raises:
            CheckpointError: as :meth:`check`; nothing was written.
        """
        self.check(bucket.layout)
        for part in bucket.layout.slices:
            rows = bucket.rows(part)
            for piece in self._pieces[part.spec.name]:
                _write(rows, start=part.start, piece=piece)
            self._came[part.spec.name] = part.stop

    def finish(self) -> None:
        """Everything should have come.

        Raises:
            CheckpointError: it has not.
        """
        missing = [
            name
            for name, shape in self._shapes.items()
            if name not in self._came or self._came[name] < (shape[0] if shape else 1)
        ]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(self._shapes)} tensors are not whole, {missing[0]} for "
                "one; send all buckets"
            )


def whole_pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[Piece]:
    """Each of ``tensors`` as the place for all of the tensor of its name."""
    for name, tensor in tensors.items():
        target = tensor.detach() if tensor.dim() else tensor.detach().view(1)
        yield Piece(name=name, dim=0, start=0, stop=len(target), target=target)


def _write(rows: torch.Tensor, *, start: int, piece: Piece) -> None:
    """What ``piece`` has of ``rows``, the first of which is row ``start`` of the tensor."""
    if piece.dim:
        piece.target[start : start + len(rows)] = rows[:, piece.start : piece.stop]
        return
    first, stop = max(start, piece.start), min(start + len(rows), piece.stop)
    if first < stop:
        own = rows[first - start : stop - start].to(piece.target.dtype)
        at = row_index(piece.target, start=first - piece.start, count=len(own), dims=rows.dim())
        piece.target[at] = own.to(piece.target.device)


def row_index(
    target: torch.Tensor, *, start: int, count: int, dims: int
) -> tuple[slice] | tuple[torch.Tensor, ...]:
    """What ``target`` is indexed with for ``count`` rows of a tensor of ``dims`` dimensions, where
    it is a view with more of them: its first ones together then count rows, as in the view of the
    queries in a ``linear_qkv``."""
    if target.dim() == dims:
        return (slice(start, start + count),)
    numbers = torch.arange(start, start + count, device=target.device)
    return torch.unravel_index(numbers, target.shape[: target.dim() - dims + 1])


def encode(bucket: Bucket) -> bytes:
    """``bucket``, which must not be empty, for the wire: the length of its description (8 bytes,
    little endian), that as JSON, and its bytes."""
    head = _head(bucket.layout)
    data = bucket.data.cpu().numpy().data
    return b"".join((len(head).to_bytes(_LENGTH, "little"), head, data))


def decode(content: bytes | bytearray) -> Bucket:
    """The inverse of :func:`encode`; the bucket lies in the memory of a bytearray.

    Raises:
        CheckpointError: it is none.
    """
    view = memoryview(content)
    length = int.from_bytes(view[:_LENGTH], "little")
    if len(view) < _LENGTH or length > min(_LONGEST_HEAD, len(view) - _LENGTH):
        raise CheckpointError(f"{len(view)} bytes are no bucket: their description is cut short")
    begin = _LENGTH + length
    layout = _read_head(bytes(view[_LENGTH:begin]))
    if len(view) - begin != layout.nbytes:
        raise CheckpointError(
            f"bucket {layout.index} has {len(view) - begin} bytes where its description says "
            f"{layout.nbytes}; it was cut short on its way"
        )
    own = content if isinstance(content, bytearray) else bytearray(content)
    return Bucket(layout=layout, data=torch.frombuffer(own, dtype=torch.uint8, offset=begin))


def weights_tag(version: int, digests: Sequence[str]) -> str:
    """What weights are called: their version, and, as they might be another run's, 12 hexadecimal
    digits of a hash of all buckets."""
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    return f"{version}-{whole[:12]}"


def _head(layout: Layout) -> bytes:
    slices = [
        {**asdict(part.spec), "dtype": str(part.spec.dtype).removeprefix("torch.")}
        | {"start": part.start, "stop": part.stop, "offset": part.offset}
        for part in layout.slices
    ]
    head = json.dumps({"index": layout.index, "slices": slices}).encode()
    # Spaces, so that the bytes behind it are aligned as well.
    return head.ljust(-(-(len(head) + _LENGTH) // _ALIGNED) * _ALIGNED - _LENGTH)


def _read_head(head: bytes) -> Layout:
    try:
        found = json.loads(head)
        slices = tuple(_read_slice(part) for part in found["slices"])
        layout = Layout(index=_natural(found["index"]), slices=slices)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the description of a bucket is none: {error!r}") from error
    used = 0
    for part in slices:
        if part.offset < used or part.offset % _ALIGNED or not part.start <= part.stop:
            raise CheckpointError(
                f"bucket {layout.index}: the rows of {part.spec.name} lie at byte {part.offset}, "
                "where they cannot"
            )
        if part.stop > part.spec.rows:
            raise CheckpointError(
                f"bucket {layout.index}: {part.spec.name} has {part.spec.rows} rows, not "
                f"{part.stop}"
            )
        used = part.offset + part.nbytes
    if not slices or not layout.nbytes:
        raise CheckpointError(f"bucket {layout.index} is empty")
    return layout


def _read_slice(part: dict[str, Any]) -> Slice:
    if part["dtype"] not in _DTYPES:
        raise ValueError(f"weights of type {part['dtype']}; use {', '.join(_DTYPES)}")
    spec = TensorSpec(
        name=str(part["name"]),
        shape=tuple(_natural(size) for size in part["shape"]),
        dtype=_DTYPES[part["dtype"]],
    )
    numbers = {name: _natural(part[name]) for name in ("start", "stop", "offset")}
    return Slice(spec=spec, **numbers)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of rows or bytes")
    return value
