"""A tiny model that likes to draw, and real servers of it on free ports."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
from tiny_vision import write_tiny_ibq
from trainer_side import UPDATED, Trainer

from emu35.checkpoint import sharded
from emu35.checkpoint.manager import CheckpointManager
from emu35.checkpoint.source import describe, load_model
from emu35.config import (
    CheckpointConfig,
    DiDAConfig,
    LMConfig,
    Precision,
    RunConfig,
    TokenizerConfig,
)
from emu35.config.io import write_config
from emu35.model.build import build_model
from emu35.model.init import initialize
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh
from emu35.stages.serve.options import ServeOptions
from emu35.stages.serve.server import build_server, build_service
from emu35.stages.serve.service import Service
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.tokens.vocabulary import vocabulary_of

CODES = 64
POSITIONS = 512


def write_vision(folder: Path, *, codes: int = CODES) -> None:
    # A group of its norms has two values even in a picture of one code.
    write_tiny_ibq(folder, codes=codes, ch=64)


@pytest.fixture
def write_other_vision() -> Callable[[Path], None]:
    """Writes an image tokenizer whose codes are not the model's."""
    return lambda folder: write_vision(folder, codes=CODES // 2)


@pytest.fixture(scope="session")
def drawing_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as stage=dida leaves it, in the plain form of prompts. Its model opens a picture
    about every tenth token of text and ends about every hundredth, whatever it has read: all states
    hold one constant feature, which these two ids listen to."""
    root = tmp_path_factory.mktemp("serve")
    write_vision(root / "vision")
    model = LMConfig(
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        init_std=0.1,
    )
    config = RunConfig(
        run_dir=str(root / "run"),
        name="tiny",
        model=model,
        tokenizer=TokenizerConfig(codebook_size=CODES, vision=str(root / "vision")),
        stage=DiDAConfig(responses_only=False),
    )
    folder = root / "run"
    folder.mkdir()
    write_config(config, folder)
    vocabulary = vocabulary_of(config.tokenizer)
    single_process_mesh()
    built = build_model(model, vocabulary_size=vocabulary.size)
    initialize(built, seed=5, pad_id=vocabulary.pad)
    parameters = dict(built.named_parameters())
    with torch.no_grad():
        parameters["embedding.word_embeddings.weight"][:, 0] = 3.0
        output = parameters["output_layer.weight"]
        output[:, 0] = 0.0
        output[vocabulary.boi, 0] = 0.8
        output[vocabulary.eos, 0] = 0.4
    manager = CheckpointManager(root=folder / "checkpoints", config=CheckpointConfig(), identity={})
    manager.save(1, write=lambda to: sharded.save(to, chunks=[built], optimizer=None), extra={})
    return folder


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, body: object, **more: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **more)  # type: ignore[arg-type]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60)

    def metric(self, name: str) -> float:
        """The value of one line of ``/metrics``, labels included in ``name``; 0 if not there."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


class _Threaded:
    """Runs a server the way :mod:`emu35.stages.serve.server` does, without signals."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._up = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.running: Running | None = None

    def start(self) -> Running:
        self._thread.start()
        assert self._up.wait(60), "the server did not start"
        if self._error:
            raise self._error
        assert self.running is not None
        return self.running

    def stop(self) -> None:
        assert self.running is not None
        self.running.loop.call_soon_threadsafe(self._down.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"

    async def _main(self) -> None:
        self._down = asyncio.Event()
        try:
            described = describe(self._options.source, message=lambda _: None)
            service = build_service(self._options, described=described)
            server = build_server(service)
            server.config.port = 0
            serving = asyncio.create_task(server.serve())
            await service.start()
            while not server.started:
                await asyncio.sleep(0.01)
        except BaseException as error:
            self._error = error
            self._up.set()
            return
        port = server.servers[0].sockets[0].getsockname()[1]
        self.running = Running(
            url=f"http://127.0.0.1:{port}", service=service, loop=asyncio.get_running_loop()
        )
        self._up.set()
        await self._down.wait()
        service.engine.abort_all()
        server.should_exit = True
        await serving
        await service.close()


@pytest.fixture
def start_server(drawing_run: Path) -> Iterator[Callable[..., Running]]:
    """Start a server with options of its own; it ends with the test."""
    started: list[_Threaded] = []

    def start(**changes: object) -> Running:
        threaded = _Threaded(ServeOptions(source=drawing_run, **changes))  # type: ignore[arg-type]
        started.append(threaded)
        return threaded.start()

    yield start
    for threaded in started:
        if threaded.running is not None:
            threaded.stop()


@pytest.fixture(scope="session")
def server(drawing_run: Path) -> Iterator[Running]:
    """A server with default limits that most tests share. None may leave a request behind."""
    threaded = _Threaded(ServeOptions(source=drawing_run))
    yield threaded.start()
    threaded.stop()


@pytest.fixture(scope="session")
def updated_server(drawing_run: Path) -> Iterator[Running]:
    """A server whose weights tests replace; whoever asks it something sends it some first."""
    threaded = _Threaded(ServeOptions(source=drawing_run, **UPDATED))
    yield threaded.start()
    threaded.stop()


@pytest.fixture(scope="session")
def tokenizer(drawing_run: Path) -> TextTokenizer:
    return build_text_tokenizer(describe(drawing_run).tokenizer)


@pytest.fixture
def trained(drawing_run: Path) -> Emu35Model:
    """The served model, a few updates later."""
    model = load_model(describe(drawing_run), precision=Precision.fp32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def trainer_of(trained: Emu35Model, tokenizer: TextTokenizer) -> Iterator[Callable[..., Trainer]]:
    """Trainers of ``trained``, whose engines end with the test."""
    made: list[Trainer] = []

    def make(**config: object) -> Trainer:
        made.append(Trainer(trained, tokenizer, **config))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()
