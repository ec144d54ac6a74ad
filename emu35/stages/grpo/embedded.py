"""Rollouts by the trainer's own ranks, with the trainer's own weights."""

from collections.abc import Callable, Sequence

import torch

from emu35.inference.arena import whole_pages
from emu35.inference.engine import Engine
from emu35.inference.memory import cache_tokens
from emu35.inference.ranks import agree_on_least
from emu35.inference.request import Generated, Request
from emu35.stages.grpo.whole_model import WholeModel
from emu35.tokens.text import TextTokenizer


class EmbeddedEngine:
    """An engine around ``whole``. Its cache lives from :meth:`prepare` to :meth:`release`, so that
    training has the memory while nobody samples.

    Args:
        version: of the trainer's weights; another number whenever they have changed.
        batch_size: requests in flight at once.
        slots: of the cache; None: enough for the largest ``batch_size`` requests, as far as the
            memory of every rank of the tensor-parallel group goes.
    """

    def __init__(
        self,
        *,
        whole: WholeModel,
        tokenizer: TextTokenizer,
        version: Callable[[], int],
        batch_size: int,
        slots: int | None = None,
    ) -> None:
        self._whole, self._tokenizer, self._version = whole, tokenizer, version
        self._batch_size, self._slots = batch_size, slots
        self._engine: Engine | None = None

    def prepare(self, requests: Sequence[Request]) -> None:
        """Take over the weights of now and make room for ``requests``, all that will be submitted.
        Collective over the pipeline group, and over the tensor-parallel one."""
        self._whole.refresh(version=self._version())
        if not requests:
            return
        longest = max(whole_pages(request.slots) for request in requests)
        at_once = min(self._batch_size, len(requests))
        model = self._whole.model
        self._engine = Engine(
            model=model,
            tokenizer=self._tokenizer,
            max_length=longest,
            max_requests=at_once,
            cache_tokens=self._slots
            or agree_on_least(cache_tokens(requests, model=model, at_once=at_once)),
        )

    def submit(self, request: Request) -> int:
        """Queue a request; its number.

        Raises:
            ConfigError: it can never fit the cache.
        """
        assert self._engine is not None, "prepare comes first"
        return self._engine.submit(request)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return self._engine is not None and self._engine.busy

    def step(self) -> list[Generated]:
        """One forward; the answers that ended with it."""
        assert self._engine is not None
        return [update.finished for update in self._engine.step() if update.finished is not None]

    def release(self) -> None:
        """Give the cache back, and not to torch's allocator alone: pieces of it would be in the
        way of the larger tensors of training."""
        self._engine = None
        torch.cuda.empty_cache()  # nothing where there is no GPU

    def tallies(self) -> dict[str, float]:
        """Nothing can go wrong that would not end the run."""
        return {}

    def close(self) -> None:
        """Nothing more will be asked."""
        self.release()
