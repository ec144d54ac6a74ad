"""What samples rollouts: one protocol, two engines.

:class:`~emu35.stages.grpo.embedded.EmbeddedEngine` runs in the trainer's own ranks;
:mod:`emu35.stages.grpo.remote` asks servers.
"""

from collections.abc import Sequence
from typing import Protocol

from emu35.inference.request import Generated, Request


class RolloutEngine(Protocol):
    """Samples answers with one version of the weights at a time."""

    def prepare(self, requests: Sequence[Request]) -> None:
        """Take over the trainer's weights of now, and make ready for ``requests``, all that will be
        submitted until :meth:`release`. Collective over the ranks of the trainer."""
        ...

    def submit(self, request: Request) -> int:
        """Queue a request; its number."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        ...

    def step(self) -> list[Generated]:
        """Go on a little, and the answers that ended with it; ``index`` is the number of their
        request."""
        ...

    def release(self) -> None:
        """Nothing more is asked of these weights; what is unanswered is forgotten."""
        ...

    def tallies(self) -> dict[str, float]:
        """What happened on this rank since the engine was made, as metrics; of the same names on
        every rank. It is counted where a tensor-parallel group is led."""
        ...

    def close(self) -> None:
        """Nothing more will be asked at all."""
        ...
