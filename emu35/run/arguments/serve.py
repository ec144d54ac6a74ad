"""``emu35 serve``: an HTTP server over the generation engine."""

import argparse

from emu35.errors import ConfigError
from emu35.run.arguments import Commands
from emu35.run.arguments.source import add_source, end_without_leading, read_source

_PACKAGES = frozenset({"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"})


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = "HTTP server for text and pictures: OpenAI's interface, and a page to try it"
    command = commands.add_parser("serve", help=text, description=text)
    add_source(command)
    command.add_argument(
        "--model-name", metavar="NAME", help="what clients call it (default: the source's name)"
    )
    command.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    command.add_argument("--port", type=int, default=8000, help="default 8000; 0: a free one")
    command.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key clients must send"
    )
    command.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for running requests, after SIGTERM (default 30)",
    )
    command.add_argument(
        "--weight-updates",
        action="store_true",
        help="let a trainer replace the weights (POST /weights/...); use a key where others can "
        "reach the port",
    )
    _add_limits(command)
    command.set_defaults(handler=_serve)


def _add_limits(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("limits")
    for name, default, what in (
        ("max-requests", 16, "generated at a time"),
        ("max-waiting", 256, "in line; beyond that the answer is 429"),
        ("max-body-mb", 64, "MiB of one call"),
        ("max-image-pixels", 2**25, "of one reference image"),
        ("max-references", 16, "reference images of one call"),
        ("max-bucket-mb", 1024, "MiB of one bucket of new weights"),
    ):
        text = f"{what} (default {default})"
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of prompt and answer (default: all)"
    )
    group.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="slots of the key-value cache (default: for --max-requests of the longest)",
    )


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from emu35.stages.serve.options import Limits, ServeOptions
        from emu35.stages.serve.server import serve
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise ConfigError(
            f"the package {error.name} is missing; install the server's with "
            "pip install 'emu35[serve]'"
        ) from error
    if (code := end_without_leading(arguments)) is not None:
        return code
    chosen = read_source(arguments)
    serve(
        ServeOptions(
            source=arguments.source,
            step=arguments.step,
            vision=arguments.vision,
            template=chosen.template,
            precision=chosen.precision,
            quantize=chosen.quantize,
            model_name=arguments.model_name,
            host=arguments.host,
            port=arguments.port,
            max_requests=arguments.max_requests,
            max_waiting=arguments.max_waiting,
            cache_tokens=arguments.cache_tokens,
            max_length=arguments.max_length,
            limits=Limits(
                max_body_mb=arguments.max_body_mb,
                max_image_pixels=arguments.max_image_pixels,
                max_references=arguments.max_references,
            ),
            grace=arguments.grace,
            api_key_env=arguments.api_key_env,
            tp=arguments.tp,
            weight_updates=arguments.weight_updates,
            max_bucket_mb=arguments.max_bucket_mb,
        )
    )
    return 0
