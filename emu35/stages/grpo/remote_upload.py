"""New weights for rollout servers, a bucket at a time.

``emu35 serve --weight-updates`` takes buckets as they are, at ``/weights``. vLLM hands them to its
workers through ``/collective_rpc``, whose arguments are JSON, hence base64; the workers have the
methods of :class:`emu35.stages.grpo.vllm_worker.WeightExtension`. A server that fails in the middle
is left alone: it answers nothing until a whole update came.
"""

import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from emu35.checkpoint.buckets import Bucket, encode, weights_tag
from emu35.errors import LaunchError
from emu35.stages.grpo.remote_servers import Dialect, Server

_ATTEMPTS = 3
"""How often a bucket is sent to a server that does not confirm it."""


class _Failed(Exception):
    """A server did not take what it was sent."""


class _Upload:
    """One server being given weights."""

    def __init__(self, server: Server, *, client: httpx.Client) -> None:
        self.server = server
        self._client = client
        self._session = ""

    def begin(self, version: int) -> None:
        if self.server.dialect is Dialect.vllm:
            self._post("/pause?mode=abort")  # until /resume nothing is generated
            self._remotely("emu35_begin", version)
            return
        found = self._post("/weights/begin", json={"version": version, "in_flight": "abort"})
        self._session = str(found.get("update"))

    def send(self, content: bytes, *, digest: str, index: int) -> None:
        """One bucket, again where its answer was lost: servers know the one they wrote last."""
        for attempt in range(_ATTEMPTS):
            try:
                if self.server.dialect is Dialect.vllm:
                    self._remotely("emu35_bucket", base64.b64encode(content).decode(), digest)
                    return
                headers = {
                    "Content-Type": "application/octet-stream",
                    "X-Emu35-Update": self._session,
                    "X-Emu35-SHA256": digest,
                }
                found = self._post("/weights/bucket", content=content, headers=headers)
                if found.get("bucket") != index:
                    raise _Failed(f"it confirms bucket {found.get('bucket')!r}, not {index}")
                return
            except (httpx.HTTPError, _Failed):
                if attempt == _ATTEMPTS - 1:
                    raise

    def commit(self, tag: str) -> None:
        if self.server.dialect is Dialect.vllm:
            self._remotely("emu35_commit", tag)
            self._post("/reset_prefix_cache", wanted=None)
            self._post("/resume")
            return
        found = self._post("/weights/commit", json={"update": self._session, "weights": tag})
        if found.get("weights") != tag:
            raise _Failed(f"it serves {found.get('weights')!r}, not {tag!r}")

    def check(self, tag: str) -> None:
        """A vLLM's workers have to say that their weights are ``tag``."""
        for found in self._remotely("emu35_weights"):
            if found.get("weights") != tag:
                raise _Failed(f"its weights are {found.get('weights')!r}, not {tag!r}")

    def _remotely(self, method: str, *arguments: Any) -> list[dict[str, Any]]:
        """Call ``method`` of every worker; each has to confirm."""
        found = self._post("/collective_rpc", json={"method": method, "args": list(arguments)})
        results = found.get("results")
        if not isinstance(results, list) or not results:
            raise _Failed(f"{method}: no worker answered")
        for result in results:
            if not isinstance(result, dict) or "error" in result:
                raise _Failed(f"{method}: {result}")
        return results

    def _post(self, path: str, *, wanted: type | None = dict, **content: Any) -> dict[str, Any]:
        response = self._client.post(f"{self.server.url}{path}", **content)
        if response.status_code != 200:
            raise _Failed(f"HTTP {response.status_code} of {path}: {response.text[:500]}")
        if wanted is None:
            return {}
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise _Failed(f"{path} answered no JSON object: {response.text[:100]!r}")
        return found


def connect(url: str, *, client: httpx.Client) -> Server:
    """What serves at ``url``; with its trouble where nothing does."""
    server = Server(url=url.rstrip("/"), model="", dialect=Dialect.emu35)
    try:
        response = client.get(f"{server.url}/v1/models")
        response.raise_for_status()
        model = response.json()["data"][0]
        server.model = str(model["id"])
        server.dialect = Dialect.vllm if model["owned_by"] == "vllm" else Dialect.emu35
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        server.trouble = f"it does not say what it serves: {type(error).__name__}: {error}"
    return server


def check_weights(servers: Sequence[Server], *, tag: str, client: httpx.Client) -> None:
    """Ask those ``servers`` whose answers do not say it by which weights they are.

    Raises:
        LaunchError: by others than ``tag``, or nobody knows.
    """
    for server in servers:
        if server.dialect is not Dialect.vllm or not server.usable:
            continue
        try:
            _Upload(server, client=client).check(tag)
        except (httpx.HTTPError, _Failed) as error:
            raise LaunchError(
                f"{server.url} cannot say that its answers are by weights {tag} ({error}); it was "
                "started again, or somebody else replaces them. Run the same command again: "
                "nothing was trained on them"
            ) from error


def upload(
    buckets: Iterator[Bucket], *, servers: Sequence[Server], version: int, client: httpx.Client
) -> str:
    """Give ``servers`` the weights in ``buckets``; their tag. All servers take a bucket at the same
    time. One that fails has ``trouble`` afterwards. The buckets are always iterated to the end, as
    other ranks fill them."""
    uploads = [_Upload(server, client=client) for server in servers]
    digests: list[str] = []
    with ThreadPoolExecutor(max(1, len(uploads))) as pool:

        def all_of(step: Any) -> None:
            def one(each: _Upload) -> None:
                try:
                    step(each)
                except (httpx.HTTPError, _Failed) as error:
                    each.server.trouble = f"new weights: {type(error).__name__}: {error}"

            list(pool.map(one, [each for each in uploads if each.server.usable]))

        all_of(lambda each: each.begin(version))
        for bucket in buckets:
            content, digest = encode(bucket), bucket.digest()
            index = bucket.layout.index
            digests.append(digest)
            all_of(lambda each, c=content, d=digest, i=index: each.send(c, digest=d, index=i))
        tag = weights_tag(version, digests)
        all_of(lambda each: each.commit(tag))
    for server in servers:
        server.weights = tag if server.dialect is Dialect.emu35 else None
    return tag
