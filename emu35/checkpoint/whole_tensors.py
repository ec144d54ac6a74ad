"""Buckets back to whole tensors, for loaders that take nothing less (vLLM's ``load_weights``)."""

from collections.abc import Iterator, Mapping

import torch

from emu35.checkpoint.buckets import Bucket, Receiver, TensorSpec, whole_pieces
from emu35.errors import CheckpointError


class WholeTensors:
    """Puts together what buckets split. Tensors follow each other, so at most one is unfinished at
    any time, and that one takes memory of its own on ``device``.

    Args:
        shapes: every tensor that has to come; None takes whatever comes.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self._missing = None if shapes is None else set(shapes)
        self._device = device or torch.device("cpu")
        self._open: tuple[TensorSpec, torch.Tensor, Receiver] | None = None
        self._index = 0

    def feed(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that are whole with this bucket, by name, on its device or on ours; those of
        the first kind are views of it. To be iterated to the end.

        Raises:
            CheckpointError: a bucket or rows are missing, or a tensor is unknown.
        """
        if bucket.layout.index != self._index:
            raise CheckpointError(
                f"bucket {bucket.layout.index} came where {self._index} is the next; send them in "
                "order"
            )
        self._index += 1
        for part in bucket.layout.slices:
            single = Bucket(
                layout=type(bucket.layout)(index=bucket.layout.index, slices=(part,)),
                data=bucket.data,
            )
            if self._open is None and part.start == 0 and part.last:
                yield part.spec.name, self._done(part.spec, bucket.rows(part))
                continue
            spec, tensor, receiver = self._opened(part.spec)
            receiver.write(single)
            if part.last:
                receiver.finish()
                self._open = None
                yield spec.name, self._done(spec, tensor)

    def _opened(self, spec: TensorSpec) -> tuple[TensorSpec, torch.Tensor, Receiver]:
        if self._open is None:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
            shapes = {spec.name: spec.shape}
            receiver = Receiver(shapes, pieces=whole_pieces({spec.name: tensor}))
            self._open = (spec, tensor, receiver)
        elif self._open[0] != spec:
            raise CheckpointError(
                f"rows of {spec.name} came before the last of {self._open[0].name}"
            )
        return self._open

    def _done(self, spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
        if self._missing is not None:
            if spec.name not in self._missing:
                raise CheckpointError(f"{spec.name} is unknown here, or came before")
            self._missing.remove(spec.name)
        return tensor.view(spec.shape)

    def finish(self) -> None:
        """Everything should have come.

        Raises:
            CheckpointError: it has not.
        """
        if self._open is not None:
            raise CheckpointError(f"{self._open[0].name} is not whole; send all buckets")
        if self._missing:
            raise CheckpointError(
                f"{len(self._missing)} tensors are missing, {min(self._missing)} for one"
            )
