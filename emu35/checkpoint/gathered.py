"""The weights of a model that ranks share, in official form and a bucket at a time.

Rank 0 asks for the rows of one bucket after the other, and whoever holds a part of them sends it:
nothing of the model's size, nor of a tensor's, ever exists beside the parameters. Only the ranks of
the first replica have anything to send.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from emu35.checkpoint.agree import gather
from emu35.checkpoint.buckets import Bucket, Receiver, Slice, TensorSpec, plan_buckets, row_index
from emu35.checkpoint.hf import Piece, Shard, held_pieces
from emu35.model.lora import AdaptedLinear, adapted_linears
from emu35.model.names import global_name, weights_by_name
from emu35.model.shapes import hf_shapes
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import Mesh, current_mesh

_LINEARS = {
    "q_proj": "self_attention.linear_qkv",
    "k_proj": "self_attention.linear_qkv",
    "v_proj": "self_attention.linear_qkv",
    "o_proj": "self_attention.linear_proj",
    "gate_proj": "mlp.linear_fc1",
    "up_proj": "mlp.linear_fc1",
    "down_proj": "mlp.linear_fc2",
}
"""The linear map that an official matrix is a part of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Rank ``rank`` holds indices [start, stop) of dimension ``dim`` of a tensor."""

    rank: int
    dim: int
    start: int
    stop: int

    def rows(self, part: Slice) -> tuple[int, int]:
        """The rows of ``part`` that it holds, [first, stop)."""
        if self.dim:
            return part.start, part.stop
        return max(part.start, self.start), min(part.stop, self.stop)


class GatheredWeights:
    """What ``chunks``, this rank's part of a model, and those of the other ranks are together, with
    adapters merged. Made and used collectively; the parameters may change in between."""

    def __init__(self, chunks: Sequence[Emu35Model], *, mesh: Mesh) -> None:
        model = chunks[0]
        parameters = {name: p for chunk in chunks for name, p in weights_by_name(chunk).items()}
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._shapes = hf_shapes(model.lm_config, vocabulary_size=model.vocabulary_size)
        self._pieces = {
            piece.name: piece
            for piece in held_pieces(
                parameters,
                config=model.lm_config,
                vocabulary_size=model.vocabulary_size,
                shard=Shard(rank=mesh.tp_rank, size=mesh.tp_size),
            )
            if mesh.dp_rank == mesh.cp_rank == 0
        }
        self._adapted = {
            global_name(chunk, name): linear
            for chunk in chunks
            for name, linear in adapted_linears(chunk).items()
        }
        self._product: tuple[AdaptedLinear, torch.Tensor] | None = None
        self._rank = dist.get_rank()
        self._sources = self._find_sources()

    def _find_sources(self) -> dict[str, list[_Source]]:
        """Who holds what; of equal parts (norms, on every tensor-parallel rank) the first."""
        own = [
            (p.name, _Source(rank=self._rank, dim=p.dim, start=p.start, stop=p.stop))
            for p in self._pieces.values()
        ]
        found: dict[str, list[_Source]] = {name: [] for name in self._shapes}
        for name, source in (item for of_rank in gather(own) for item in of_rank):
            parts = [(each.start, each.stop) for each in found[name]]
            if (source.start, source.stop) not in parts and source.start < source.stop:
                found[name].append(source)
        return found

    @property
    def specs(self) -> list[TensorSpec]:
        """Every tensor, in release order."""
        return [
            TensorSpec(name=name, shape=shape, dtype=self._dtype)
            for name, shape in self._shapes.items()
        ]

    @torch.no_grad()
    def buckets(self, *, bucket_bytes: int) -> Iterator[Bucket]:
        """All of it, in order, on rank 0; other ranks get nothing. Collective: every rank has to
        iterate to the end, in the same moment of training.

        Raises:
            ConfigError: a row is larger than a bucket; on every rank.
        """
        for layout in plan_buckets(self.specs, bucket_bytes=bucket_bytes):
            bucket = Bucket.empty(layout, device=self._device) if self._rank == 0 else None
            for part in layout.slices:
                for source in self._sources[part.spec.name]:
                    self._move(part, source=source, bucket=bucket)
            if bucket is not None:
                yield bucket
        self._product = None

    def _move(self, part: Slice, *, source: _Source, bucket: Bucket | None) -> None:
        """What ``source`` has of ``part`` into its place, on the two ranks that this concerns."""
        first, stop = source.rows(part)
        if first >= stop:
            return
        if source.rank == self._rank:
            start = first if source.dim else first - source.start
            rows = self._read(part, start=start, count=stop - first)
            if bucket is None:
                dist.send(rows, dst=0)
                return
        elif bucket is None:
            return
        else:
            width = (source.stop - source.start,) if source.dim else part.spec.shape[1:]
            rows = torch.empty(stop - first, *width, dtype=self._dtype, device=self._device)
            dist.recv(rows, src=source.rank)
        place = bucket.rows(part)[first - part.start : stop - part.start]
        if source.dim:
            place = place[:, source.start : source.stop]
        place.copy_(rows)

    def _read(self, part: Slice, *, start: int, count: int) -> torch.Tensor:
        """Rows from ``start`` on of what this rank holds of a tensor, adapters merged."""
        piece = self._pieces[part.spec.name]
        at = row_index(piece.target, start=start, count=count, dims=len(part.spec.shape))
        rows = piece.target[at]
        linear = self._adapted.get(_linear_name(piece.name))
        if linear is not None:
            rows = self._added(linear, piece=piece)[at] + rows
        return rows.to(self._dtype).contiguous()

    def _added(self, linear: AdaptedLinear, *, piece: Piece) -> torch.Tensor:
        """As ``piece`` sees its weight, what the adapter adds: fp32, so that the sum is
        rounded once, as in :func:`~emu35.model.lora.merge_adapters`."""
        if self._product is None or self._product[0] is not linear:
            adapter = linear.adapter
            assert adapter is not None
            product = (adapter.b.float() @ adapter.a.float()).mul_(adapter.scale)
            self._product = (linear, product)
        offset = piece.target.storage_offset() - linear.weight.storage_offset()
        return self._product[1].as_strided(piece.target.shape, piece.target.stride(), offset)


def _linear_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``decoder.layers.3.self_attention.linear_qkv``;
    empty where the tensor is no part of a linear map."""
    words = name.split(".")
    linear = _LINEARS.get(words[-2])
    return f"decoder.layers.{words[2]}.{linear}" if linear else ""


def receiver_of(model: Emu35Model) -> Receiver:
    """What takes all of ``model``'s weights in buckets: the inverse of :class:`GatheredWeights` for
    a model that is whole or split by tensor parallelism alone. Adapters stay as they are."""
    mesh = current_mesh()
    pieces = held_pieces(
        weights_by_name(model),
        config=model.lm_config,
        vocabulary_size=model.vocabulary_size,
        shard=Shard(rank=mesh.tp_rank, size=mesh.tp_size),
    )
    shapes = hf_shapes(model.lm_config, vocabulary_size=model.vocabulary_size)
    return Receiver(shapes, pieces=pieces)
