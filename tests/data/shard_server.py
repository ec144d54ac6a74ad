"""A loopback HTTP server of a folder: with a listing, with ranges, and failing when told to."""

import os
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """``url`` of the folder. ``faults`` are answers to come first, by name: a status, or 0 for a
    body that breaks off. ``whole`` counts the requests for whole files, by name."""

    url: str = ""
    ranges: bool = True
    listing: bool = True
    faults: dict[str, list[int]] = field(default_factory=dict)
    whole: Counter[str] = field(default_factory=Counter)
    asked: int = 0


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args, served: Served, **kwargs) -> None:
        self.served = served
        super().__init__(*args, **kwargs)

    def log_message(self, format: str, *args) -> None:
        del format, args

    def list_directory(self, path):
        if self.served.listing:
            return super().list_directory(path)
        self.send_error(HTTPStatus.NOT_FOUND)
        return None

    def do_GET(self) -> None:
        self.served.asked += 1
        path = Path(self.translate_path(self.path))
        bounds = self.headers.get("Range") if self.served.ranges else None
        faults = self.served.faults.get(path.name)
        fault = faults.pop(0) if faults else None
        if fault:
            self.send_error(fault)
        elif not path.is_file():
            super().do_GET()
        elif bounds is not None:
            first, last = (int(number) for number in bounds.removeprefix("bytes=").split("-"))
            data = path.read_bytes()
            part = f"bytes {first}-{last}/{len(data)}"
            self._answer(data[first : last + 1], part=part, broken=fault == 0)
        else:
            self.served.whole[path.name] += 1
            self._answer(path.read_bytes(), broken=fault == 0)

    def _answer(self, data: bytes, *, broken: bool, part: str | None = None) -> None:
        self.send_response(HTTPStatus.OK if part is None else HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Length", str(len(data)))
        if part is not None:
            self.send_header("Content-Range", part)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if broken else data)


@contextmanager
def serve(folder: Path) -> Generator[Served, None, None]:
    """Serve ``folder`` as the path of its name."""
    served = Served()
    handler = partial(_Handler, served=served, directory=os.fspath(folder.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}/{folder.name}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
