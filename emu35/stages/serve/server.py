"""``emu35 serve``: from a folder to an open port, and down again in good order."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from emu35.checkpoint.codec import codec_folder, open_codec
from emu35.checkpoint.source import Described, describe, load_model
from emu35.config import ParallelConfig
from emu35.errors import ConfigError
from emu35.inference.arena import whole_pages
from emu35.inference.denoiser import find_denoiser
from emu35.inference.engine import Engine
from emu35.inference.lead import build_engine
from emu35.inference.memory import free_slots
from emu35.log.console import Console
from emu35.stages.serve.app import build_app
from emu35.stages.serve.asking import Asker
from emu35.stages.serve.options import ServeOptions, check
from emu35.stages.serve.service import Service
from emu35.tokens.text import build_text_tokenizer
from emu35.vision.codec import ImageCodec

_BACKLOG = 2048
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

Message = Callable[[str], object]


def serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT; returns when all is closed. Of ``tp`` ranks this is rank 0,
    which the others :func:`~emu35.inference.lead.follow`.

    Raises:
        ConfigError: options that make no sense, or a port that cannot be had.
        CheckpointError, ReleaseError, TokenizerError: a source that cannot be opened.
    """
    check(options)
    message = Console(stream=sys.stderr).line
    described = describe(options.source, step=options.step, message=message)
    _check_source(options, described=described)
    with contextlib.closing(_listen(options)) as listener:
        asyncio.run(_serve(options, described=described, listener=listener, message=message))


def engine_maker(options: ServeOptions, *, described: Described) -> Callable[[], Engine]:
    """What loads the model, or this rank's part of it, and builds the engine."""

    def make() -> Engine:
        model = load_model(
            described,
            precision=options.precision or described.precision,
            parallel=ParallelConfig(tp=options.tp),
            quantize=options.quantize,
        )
        length = _max_length(options, described=described)
        fitting = min(2 * options.max_requests * whole_pages(length), free_slots(model))
        return build_engine(
            model=model,
            tokenizer=build_text_tokenizer(described.tokenizer),
            source=find_denoiser(described, chosen=options.vision),
            max_length=length,
            cache_tokens=options.cache_tokens or fitting,
            max_requests=options.max_requests,
            max_waiting=options.max_waiting,
        )

    return make


def _max_length(options: ServeOptions, *, described: Described) -> int:
    positions = described.config.max_position_embeddings
    return min(options.max_length or positions, positions)


def build_service(options: ServeOptions, *, described: Described) -> Service:
    """The service of ``described``, nothing loaded yet; to be called in the event loop."""
    return Service(
        name=options.model_name or described.name,
        options=options,
        asker=Asker(
            tokenizer=build_text_tokenizer(described.tokenizer),
            template=options.template or described.template,
            max_length=_max_length(options, described=described),
        ),
        make_engine=engine_maker(options, described=described),
        open_codec=lambda: _open_codec(options, described=described),
    )


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: what a signal means is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def build_server(service: Service) -> Server:
    """The HTTP server over ``service``."""
    return Server(
        uvicorn.Config(
            build_app(service),
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
            backlog=_BACKLOG,
        )
    )


async def _serve(
    options: ServeOptions, *, described: Described, listener: socket.socket, message: Message
) -> None:
    service = build_service(options, described=described)
    server = build_server(service)
    asked, hurry = _stop_signals()
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    message(f"emu35: http://{shown}:{port}/ loads {service.name}")
    if options.host not in _LOOPBACK and options.api_key() is None:
        message(f"emu35: {options.host} is open to others, without a key (see --api-key-env)")
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(asked.wait())
    try:
        await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            message(f"emu35: ready: {service.name}")
            if not service.pictures.available:
                message("emu35: no image tokenizer: pictures stay ids (see --vision)")
                if described.noise and find_denoiser(described, chosen=options.vision) is None:
                    message("emu35: nor can they be decoded in parallel, in distances of its codes")
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        message(f"emu35: finishing what runs, at most {options.grace:g} s")
        await service.drain(hurry=hurry)
    finally:
        server.should_exit = True
        await serving
        stopping.cancel()
    if starting.done():
        await service.close()
    message("emu35: stopped")


def _stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events that SIGTERM and SIGINT set: the first signal one, the second the other."""
    asked, hurry = asyncio.Event(), asyncio.Event()

    def note() -> None:
        (hurry if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, note)
    return asked, hurry


def _check_source(options: ServeOptions, *, described: Described) -> None:
    """What can be known to be wrong before anything is loaded."""
    folder = options.vision or described.vision_folder
    if options.vision is not None and not options.vision.is_dir():
        raise ConfigError(
            f"image tokenizer {folder} does not exist; give its folder with --vision "
            "(config.yaml and model.ckpt)"
        )


def _open_codec(options: ServeOptions, *, described: Described) -> ImageCodec | None:
    """The image tokenizer; None where there is none, and pictures stay ids."""
    if codec_folder(described, chosen=options.vision) is None:
        return None
    return open_codec(described, chosen=options.vision)


def _listen(options: ServeOptions) -> socket.socket:
    """A bound socket; clients can connect to it from now on.

    Raises:
        ConfigError: the address is taken or cannot be had.
    """
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server(
            (options.host, options.port), family=family, backlog=_BACKLOG
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {options.host}:{options.port}: {error.strerror or error}; "
            "choose another --port (0 takes a free one) or --host"
        ) from error
    listener.set_inheritable(False)
    return listener
