"""Rollouts by servers: ``emu35 serve --weight-updates``, or vLLM on GPUs.

The trainer's ranks keep their layout, whatever it is; rank 0 gathers the weights a bucket at a time
(:mod:`emu35.checkpoint.gathered`) and gives them to every server whenever they have changed. Then
each tensor-parallel group of the trainer asks for the answers to its own prompts: its first rank
talks to the servers, and the others are told what came.
"""

import os
import time
from collections.abc import Callable, Sequence

import httpx
import torch.distributed as dist

from emu35.checkpoint.buckets import INITIAL
from emu35.checkpoint.gathered import GatheredWeights
from emu35.config.grpo import RolloutConfig
from emu35.errors import ConfigError, Emu35Error, LaunchError
from emu35.inference.request import Generated, Request
from emu35.parallel.collectives import world_size
from emu35.stages.grpo.remote_body import Reader, restricted
from emu35.stages.grpo.remote_servers import Asking, Dialect, RemoteCounts, Server
from emu35.stages.grpo.remote_upload import check_weights, connect, upload
from emu35.stages.grpo.replica import Replica
from emu35.tokens.text import TextTokenizer

_PATIENCE = 0.5
"""Seconds that a step waits for an answer at most, so that the trainer shows signs of life."""


class RemoteEngine:
    """Asks the servers of ``config``.

    Args:
        config: ``stage.rollout``.
        tokenizer: the model's.
        replica: this rank's place among those that sample.
        weights: what the trainer's ranks hold together.
        gather_parameters: makes every parameter whole; called before weights are read.
        version: number of the weights of now; they are sent when it has changed.

    Raises:
        ConfigError: ``config.api_key_env`` names a variable that is not set.
    """

    def __init__(
        self,
        *,
        config: RolloutConfig,
        tokenizer: TextTokenizer,
        replica: Replica,
        weights: GatheredWeights,
        gather_parameters: Callable[[], None],
        version: Callable[[], int],
    ) -> None:
        self._config, self._replica = config, replica
        self._weights, self._gather, self._version = weights, gather_parameters, version
        self._headers = _headers(config)
        self._asking = Asking(
            reader=Reader(tokenizer),
            timeout=config.timeout,
            at_once=config.batch_size,
            headers=self._headers,
        )
        self._loaded: int | None = None
        self._vllm = False
        self._tag = INITIAL
        self._submitted = 0
        self._update_seconds = 0.0
        self._open: dict[int, Request] = {}

    @property
    def counts(self) -> RemoteCounts:
        """What happened so far, as far as this rank asked."""
        return self._asking.counts

    def tallies(self) -> dict[str, float]:
        """:attr:`counts`, and the seconds that servers were given weights."""
        return {**self.counts.metrics(), "engine/update_s": self._update_seconds}

    def prepare(self, requests: Sequence[Request]) -> None:
        """Give the servers the weights of now, if they have not got them. Collective over all
        ranks.

        Raises:
            LaunchError: on every rank, where no server took them.
            ConfigError: what ``requests`` ask for is nothing that these servers can report.
        """
        version = self._version()
        if version != self._loaded:
            servers = self._update(version)
            self._vllm = any(each.dialect is Dialect.vllm and each.usable for each in servers)
            # Without a thread where nobody is asked: other ranks of a tensor-parallel group.
            if self._replica.leads:
                self._asking.use(servers)
            self._loaded = version
        self._check(requests)

    def _update(self, version: int) -> list[Server]:
        began = time.monotonic()
        self._gather()
        shared: list[object] = [None]
        buckets = self._weights.buckets(bucket_bytes=self._config.bucket_bytes)
        if dist.get_rank() == 0:
            with self._client() as client:
                servers = [connect(url, client=client) for url in self._config.servers]
                tag = upload(buckets, servers=servers, version=version, client=client)
            shared = [(servers, tag)]
        else:
            for _ in buckets:
                raise AssertionError("only rank 0 has buckets")
        if world_size() > 1:
            dist.broadcast_object_list(shared, src=0)
        assert isinstance(shared[0], tuple)
        servers: list[Server]
        servers, self._tag = shared[0]
        failed = [f"{each.url}: {each.trouble}" for each in servers if not each.usable]
        if dist.get_rank() == 0:
            self.counts.given_up += len(failed)
            self._update_seconds += time.monotonic() - began
        if len(failed) == len(servers):
            raise LaunchError(
                f"no rollout server took weights {version}: {'; '.join(failed)}. Start them with "
                "emu35 serve --weight-updates, and run the same command again"
            )
        if failed and dist.get_rank() == 0:
            print(f"rollout servers left out: {'; '.join(failed)}", flush=True)
        return servers

    def _check(self, requests: Sequence[Request]) -> None:
        """vLLM reports no candidates, so a trainer could not replay what top-k and top-p left. What
        is only judged is not replayed."""
        if self._vllm and any(
            each.keep_candidates and (restricted(each.text) or restricted(each.visual))
            for each in requests
        ):
            raise ConfigError(
                "vLLM does not report which ids top-k and top-p left, so the trainer cannot replay "
                "them; use top_k=0 and top_p=1 in stage.rollout, or emu35 serve"
            )

    def submit(self, request: Request) -> int:
        """Ask for an answer; its number.

        Raises:
            ConfigError: the request can never be run.
        """
        if request.denoise is not None:
            raise ConfigError("pictures decoded in parallel have no log-probabilities to train on")
        if problems := request.problems():
            raise ConfigError(problems)
        index = self._submitted
        self._submitted += 1
        self._open[index] = request
        if self._replica.leads:
            self._asking.submit(index, request)
        return index

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._open)

    def step(self) -> list[Generated]:
        """Wait a moment for answers, and give those that came. Collective over the tensor-parallel
        group.

        Raises:
            LaunchError, ConfigError: an answer cannot be had; on every rank of the group.
        """
        answers: list[Generated] = []
        failed: Emu35Error | None = None
        if self._replica.leads:
            for ended in self._asking.ended(wait=_PATIENCE):
                if ended.answer is not None:
                    answers.append(ended.answer)
                failed = failed or ended.error
        answers, failed = self._replica.agreed((answers, failed))
        if failed is not None:
            raise failed
        for answer in answers:
            del self._open[answer.index]
        return answers

    def release(self) -> None:
        """Nothing more is asked of these weights; whatever is on its way is forgotten. Collective
        over the tensor-parallel group.

        Raises:
            LaunchError: a vLLM server, whose answers do not say it, has other weights by now.
        """
        if self._open and self._replica.leads:
            self._asking.cancel()
        self._open.clear()
        if not self._vllm:
            return
        failed: LaunchError | None = None
        if self._replica.leads:
            try:
                with self._client() as client:
                    check_weights(self._asking.servers, tag=self._tag, client=client)
            except LaunchError as error:
                failed = error
        failed = self._replica.agreed(failed)
        if failed is not None:
            raise failed

    def _client(self) -> httpx.Client:
        timeout = httpx.Timeout(self._config.timeout, connect=10.0)
        return httpx.Client(timeout=timeout, headers=self._headers)

    def close(self) -> None:
        """End the thread that asks."""
        self._asking.close()


def _headers(config: RolloutConfig) -> dict[str, str]:
    name = config.api_key_env
    if name is None:
        return {}
    if not (key := os.environ.get(name)):
        raise ConfigError(
            f"the environment variable {name} (stage.rollout.api_key_env) is not set; put the "
            "servers' key in it"
        )
    return {"Authorization": f"Bearer {key}"}
