"""Where a run's prompts come from: files, checked; the plan; requests under the policy.

Every rank knows the whole plan (:meth:`PromptSource.take`). Only who samples a prompt makes its
requests (:meth:`PromptSource.asked`), for which the pictures that it shows have to be encoded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.checkpoint.source import describe
from emu35.config import GRPOConfig, LMConfig, PromptDataConfig, RunConfig
from emu35.config.grpo import PolicyConfig
from emu35.config.prompts import PromptTaskConfig
from emu35.errors import ConfigError, DataError
from emu35.inference.request import Request
from emu35.parallel.device import local_device
from emu35.rewards.build import build_rewards
from emu35.rewards.sample import Reward
from emu35.stages.generate.options import gathered
from emu35.stages.generate.references import References
from emu35.stages.grpo.plan import PromptPlan
from emu35.stages.grpo.prompts import TaskPrompt, read_tasks
from emu35.stages.grpo.requests import answer_seed, request_of
from emu35.stages.grpo.sampling import Asked
from emu35.stages.grpo.types import Prompt
from emu35.tokens.template import PromptTemplate, Task
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.vision.codec import ImageCodec, load_codec

Codes = Sequence[NDArray[np.integer]]
"""Of the pictures that a prompt shows, each [H, W]."""

_KEPT = 2048
"""Encoded pictures that are remembered; one of 1024 x 1024 pixels has 32 KiB of codes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A prompt whose turn it is, in its ``serial``-th place among all of the run: one answer under
    ``policy`` for each of ``seeds``."""

    prompt: TaskPrompt
    serial: int
    task: PromptTaskConfig
    policy: PolicyConfig
    seeds: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFiles:
    """The prompts of ``data.tasks`` and of ``data.validation``, by the names of their sets."""

    tasks: Mapping[str, Sequence[TaskPrompt]]
    validation: Mapping[str, Sequence[TaskPrompt]]


def read_prompt_files(config: RunConfig, *, rewards: Mapping[str, Reward]) -> PromptFiles:
    """Read and check all files of prompts that ``config`` names.

    Raises:
        ConfigError: naming everything that is wrong with them.
    """
    stage, data = _sections(config)
    problems: list[str] = []
    found: list[Mapping[str, Sequence[TaskPrompt]]] = []
    for section, tasks, most in (
        ("data.tasks", data.tasks, None),
        ("data.validation", data.validation, stage.evaluation.max_prompts),
    ):
        try:
            found.append(read_tasks(tasks, rewards=rewards, section=section, most=most))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return PromptFiles(tasks=found[0], validation=found[1])


def _sections(config: RunConfig) -> tuple[GRPOConfig, PromptDataConfig]:
    assert isinstance(config.stage, GRPOConfig)
    assert isinstance(config.data, PromptDataConfig)
    return config.stage, config.data


def _template(start: Path) -> PromptTemplate:
    """The form in which prompts are asked: that of every model after fine-tuning.

    Raises:
        ConfigError: ``start`` was never taught it.
        CheckpointError, ReleaseError: it is unusable.
    """
    template = describe(start).template
    if template is not PromptTemplate.official:
        raise ConfigError(
            f"stage.init_from={start} was never tuned to answer prompts (its form of a prompt is "
            f"{template.value}); start from a run of stage=sft, or from a release"
        )
    return template


class PromptSource:
    """The prompts of a run in the order of the plan, the same on every rank, and their requests.

    Attributes:
        tokenizer: of the text.
        codec: of the pictures.
    """

    def __init__(
        self,
        files: PromptFiles,
        *,
        config: RunConfig,
        tokenizer: TextTokenizer,
        codec: ImageCodec,
        template: PromptTemplate,
    ) -> None:
        self._stage, self._data = _sections(config)
        assert isinstance(config.model, LMConfig)
        self._positions = config.model.max_position_embeddings
        self._seed, self._files, self._template = config.seed, files, template
        self.tokenizer, self.codec = tokenizer, codec
        ratios = {name: task.ratio for name, task in self._data.tasks.items()}
        self._plan = PromptPlan(files.tasks, ratios=ratios, seed=config.seed)
        self._encoded = lru_cache(maxsize=_KEPT)(self._encode)

    @classmethod
    def open(cls, config: RunConfig) -> "PromptSource":
        """Read and check everything that answers will be asked for, before any weight of the model
        is read.

        Raises:
            ConfigError: naming every prompt that is wrong or does not fit, and every reward that
                cannot be made.
            DataError: naming every reference that cannot be used.
            CheckpointError, ReleaseError: ``stage.init_from`` or the image tokenizer is unusable.
        """
        stage, _ = _sections(config)
        files = read_prompt_files(config, rewards=build_rewards(stage.rewards))
        assert config.tokenizer.vision is not None
        assert stage.init_from is not None
        source = cls(
            files,
            config=config,
            tokenizer=build_text_tokenizer(config.tokenizer),
            codec=load_codec(Path(config.tokenizer.vision), device=local_device()),
            template=_template(Path(stage.init_from)),
        )
        source.check_fit()
        return source

    def take(self, count: int) -> list[Due]:
        """The next ``count`` prompts."""
        return [
            Due(
                prompt=planned.prompt,
                serial=planned.serial,
                task=self._data.tasks[planned.prompt.task],
                policy=self._stage.rollout,
                seeds=[
                    answer_seed(
                        self._seed,
                        task=planned.prompt.task,
                        number=planned.prompt.number,
                        serial=planned.serial,
                        sample=sample,
                    )
                    for sample in range(self._stage.rollouts_per_prompt)
                ],
            )
            for planned in self._plan.take(count)
        ]

    @property
    def validation(self) -> dict[str, list[Due]]:
        """The prompts that are never trained on, by set. Their seeds are the same at every
        validation, so that what differs is the model."""
        return {
            name: [
                Due(
                    prompt=prompt,
                    serial=prompt.number,
                    task=self._data.validation[name],
                    policy=self._stage.evaluation,
                    seeds=[
                        answer_seed(
                            self._seed,
                            task=f"validation/{name}",
                            number=prompt.number,
                            serial=0,
                            sample=sample,
                        )
                        for sample in range(self._stage.evaluation.samples)
                    ],
                )
                for prompt in prompts
            ]
            for name, prompts in self._files.validation.items()
        }

    def codes(self, due: Due) -> Codes:
        """The pictures that a prompt shows, encoded, or remembered from an earlier turn.

        Raises:
            DataError: one of them can no longer be read.
        """
        wish, area = due.prompt.wish, due.task.image_area
        return [self._encoded(path, wish.task, area) for path in wish.images]

    def asked(self, due: Due, *, codes: Codes) -> Asked:
        """A prompt with the requests of its group; ``codes`` are those of :meth:`codes`."""
        prompt = due.prompt
        request = self._request(prompt, policy=due.policy, codes=codes, seed=due.seeds[0])
        return Asked(
            prompt=Prompt(
                task=prompt.task,
                number=prompt.number,
                id=prompt.id,
                record=prompt.record,
                references=codes,
            ),
            serial=due.serial,
            task=due.task,
            requests=[replace(request, seed=seed) for seed in due.seeds],
        )

    def state_dict(self) -> dict[str, Any]:
        """The place among the prompts, as JSON."""
        return self._plan.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: the prompts are not those it was saved with.
        """
        self._plan.load_state_dict(state)

    def check_fit(self) -> None:
        """Build the request of every prompt once, with references of the right sizes and no codes.

        Raises:
            ConfigError: naming every prompt that does not fit the model or a row, and why.
            DataError: naming every reference that cannot be used.
        """
        found: list[tuple[str, list[str]]] = []
        unusable: dict[str, None] = {}
        for prompt, policy, references in self._all():
            problems: list[str] = []
            try:
                shapes = [
                    references.shape(path, task=prompt.wish.task) for path in prompt.wish.images
                ]
                empty = [np.zeros(shape, dtype=np.int64) for shape in shapes]
                self._request(prompt, policy=policy, codes=empty, seed=0)
            except ConfigError as error:
                problems = error.problems
            except DataError as error:
                unusable.setdefault(f"{prompt.wish.where}: {error}")
            found.append((prompt.wish.where, problems))
        if unusable:
            raise DataError("\n".join(unusable))
        if problems := gathered(found):
            raise ConfigError(problems)

    def _all(self) -> Iterator[tuple[TaskPrompt, PolicyConfig, References]]:
        for sets, tasks, policy in (
            (self._files.tasks, self._data.tasks, self._stage.rollout),
            (self._files.validation, self._data.validation, self._stage.evaluation),
        ):
            references = self._references(tasks)
            for name, prompts in sets.items():
                for prompt in prompts:
                    yield prompt, policy, references[name]

    def _references(self, tasks: Mapping[str, PromptTaskConfig]) -> dict[str, References]:
        """What reads the references of each task."""
        return {name: self._reading(task.image_area) for name, task in tasks.items()}

    def _reading(self, area: int | None) -> References:
        return References(codec=self.codec, area=area, positions=self._positions)

    def _encode(self, path: Path, task: Task, area: int | None) -> NDArray[np.integer]:
        return self._reading(area).open(path, task=task).codes_HW

    def _request(
        self,
        prompt: TaskPrompt,
        *,
        policy: PolicyConfig,
        codes: Codes,
        seed: int,
    ) -> Request:
        return request_of(
            prompt,
            policy=policy,
            references=codes,
            tokenizer=self.tokenizer,
            template=self._template,
            max_positions=self._positions,
            row_length=None if policy is self._stage.evaluation else self._data.sequence_length,
            seed=seed,
        )
