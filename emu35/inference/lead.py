"""One rank leads, the others follow: an engine over several tensor-parallel ranks for commands that
take their requests in one place (a terminal, a socket).

:class:`LeadingEngine` is the engine of rank 0; whatever it is told, it passes on before it does it.
The other ranks sit in :func:`follow`. Words travel through the process group's store rather than as
collectives: a server may be idle for days, and no collective may.
"""

import os
import pickle
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from emu35.checkpoint.buckets import Bucket, Layout
from emu35.checkpoint.source import describe, load_model
from emu35.config import ParallelConfig, Precision
from emu35.errors import Emu35Error, LaunchError
from emu35.inference.denoise import Denoiser
from emu35.inference.denoiser import DenoiserSource
from emu35.inference.engine import Engine
from emu35.inference.request import Request, Update
from emu35.model.quantize import Quantization
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import current_mesh
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

_PATIENCE = timedelta(seconds=60)
"""How long a rank waits for a word before it asks again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Make:
    """Build an engine with these numbers."""

    numbers: dict[str, Any]
    denoiser: DenoiserSource | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Submit:
    request: Request


@dataclass(frozen=True, kw_only=True, slots=True)
class _Abort:
    index: int


@dataclass(frozen=True, slots=True)
class _BeginWeights:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weights:
    """A bucket follows, as a collective."""

    layout: Layout


@dataclass(frozen=True, slots=True)
class _FinishWeights:
    pass


@dataclass(frozen=True, slots=True)
class _Step:
    pass


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Word: TypeAlias = (
    _Make | _Submit | _Abort | _BeginWeights | _Weights | _FinishWeights | _Step | _Close
)


class _Words:
    """What rank 0 says, in order, one key of the store a word."""

    engines = 0
    """Built in this process so far: each has words of its own."""

    def __init__(self) -> None:
        # torch's own annotations know neither the class nor that values are bytes.
        store = dist.distributed_c10d._get_default_store()
        self._store: Any = PrefixStore(f"emu35/lead/{_Words.engines}", store)
        _Words.engines += 1
        self._said = self._forgotten = 0

    def say(self, word: _Word) -> None:
        self._store.set(str(self._said), pickle.dumps(word))
        self._said += 1

    def forget(self) -> None:
        """Everybody has heard what was said so far."""
        for number in range(self._forgotten, self._said):
            self._store.delete_key(str(number))
        self._forgotten = self._said

    def hear(self) -> _Word:
        key = str(self._said)
        while True:
            try:
                self._store.wait([key], _PATIENCE)
                break
            except dist.DistStoreError as error:
                if "timeout" not in str(error).lower():
                    raise
        self._said += 1
        return pickle.loads(self._store.get(key))


class LeadingEngine(Engine):
    """Rank 0's engine; :meth:`close` sends the others home.

    When a step fails here for a reason that the others need not share (memory, a bug), they may be
    left inside a collective. The engine is then of no more use, and says so.
    """

    def __init__(
        self,
        *,
        model: Emu35Model,
        tokenizer: TextTokenizer,
        source: DenoiserSource | None = None,
        **numbers: Any,
    ) -> None:
        self._broken: BaseException | None = None
        self._words = _Words()
        self._words.say(_Make(numbers=numbers, denoiser=source))
        denoiser = _open(source, model=model)
        super().__init__(model=model, tokenizer=tokenizer, denoiser=denoiser, **numbers)

    def submit(self, request: Request) -> int:
        """As of :class:`Engine`, on all ranks."""
        self._check()
        self._words.say(_Submit(request=request))
        return super().submit(request)

    def step(self) -> list[Update]:
        """As of :class:`Engine`, on all ranks."""
        self._check()
        self._words.say(_Step())
        forwards = self.stats.forwards
        try:
            updates = super().step()
        except Emu35Error:
            raise  # the same on every rank
        except BaseException as error:
            self._broken = error
            raise
        if self.stats.forwards > forwards:  # the layers' collectives have brought all ranks here
            self._words.forget()
        return updates

    def abort(self, index: int) -> Update | None:
        """As of :class:`Engine`, on all ranks."""
        self._check()
        self._words.say(_Abort(index=index))
        return super().abort(index)

    def begin_weights(self) -> None:
        """As of :class:`Engine`, on all ranks."""
        self._check()
        self._words.say(_BeginWeights())
        super().begin_weights()

    def write_weights(self, bucket: Bucket) -> None:
        """As of :class:`Engine`, on all ranks."""
        self._check()
        assert self._incoming is not None, "begin_weights comes first"
        self._incoming.check(bucket.layout)
        self._words.say(_Weights(layout=bucket.layout))
        try:
            super().write_weights(_share(bucket))
        except BaseException as error:
            self._broken = error
            raise

    def finish_weights(self) -> None:
        """As of :class:`Engine`, on all ranks."""
        self._check()
        super().finish_weights()
        self._words.say(_FinishWeights())

    def _check(self) -> None:
        if self._broken is not None:
            raise LaunchError(
                f"the ranks of this engine have lost each other in a step that failed "
                f"({type(self._broken).__name__}: {self._broken}); start the command again"
            )

    def close(self) -> None:
        """Let the other ranks end."""
        self._words.say(_Close())


def build_engine(
    *,
    model: Emu35Model,
    tokenizer: TextTokenizer,
    source: DenoiserSource | None = None,
    **numbers: Any,
) -> Engine:
    """The engine for a model that may be one tensor-parallel rank's part: on rank 0, where the
    others :func:`follow`. ``source`` is what it decodes pictures in parallel with; ``numbers`` are
    those of :class:`Engine`."""
    if model.config.tensor_model_parallel_size > 1:
        return LeadingEngine(model=model, tokenizer=tokenizer, source=source, **numbers)
    denoiser = _open(source, model=model)
    return Engine(model=model, tokenizer=tokenizer, denoiser=denoiser, **numbers)


def _share(bucket: Bucket) -> Bucket:
    """``bucket`` as rank 0 has it, on the device of this rank. Collective."""
    mesh = current_mesh()
    data = bucket.data.to(mesh.device)
    dist.broadcast(data, src=dist.get_global_rank(mesh.tp_group, 0), group=mesh.tp_group)
    return Bucket(layout=bucket.layout, data=data)


def _open(source: DenoiserSource | None, *, model: Emu35Model) -> Denoiser | None:
    return source.open(model.output_weight.device) if source else None


def follows() -> bool:
    """Whether this process is a rank other than 0, which is to :func:`follow`."""
    return os.environ.get("RANK", "0") != "0"


def follow(
    path: Path,
    *,
    step: int | None,
    precision: Precision | None,
    tp: int,
    quantize: Quantization | None = None,
) -> None:
    """Load this rank's part of the run or release ``path`` and do as rank 0 is told, until it
    closes its engine. Arguments as rank 0 has them.

    Raises:
        Emu35Error: the source cannot be opened; rank 0 raises the same.
    """
    described = describe(path, step=step, message=lambda _: None)
    model = load_model(
        described,
        precision=precision or described.precision,
        parallel=ParallelConfig(tp=tp),
        quantize=quantize,
    )
    obey(model, tokenizer=build_text_tokenizer(described.tokenizer))


def obey(model: Emu35Model, *, tokenizer: TextTokenizer) -> None:
    """The loop of :func:`follow`, for a loaded model."""
    words = _Words()
    first = words.hear()
    assert isinstance(first, _Make)
    denoiser = _open(first.denoiser, model=model)
    engine = Engine(model=model, tokenizer=tokenizer, denoiser=denoiser, **first.numbers)
    while not isinstance(word := words.hear(), _Close):
        try:
            match word:
                case _Submit():
                    engine.submit(word.request)
                case _Abort():
                    engine.abort(word.index)
                case _Step():
                    engine.step()
                case _BeginWeights():
                    engine.begin_weights()
                case _Weights():
                    device = model.output_weight.device
                    engine.write_weights(_share(Bucket.empty(word.layout, device=device)))
                case _FinishWeights():
                    engine.finish_weights()
                case _:
                    raise AssertionError(f"an engine that is in use was told {word}")
        except Emu35Error:
            # Rank 0 is told the same, and answers for it.
            continue
