"""Where a run's prompts come from: files, checked; the plan; requests under the policy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from emu35.tokens.template import PromptTemplate
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.vision.codec import ImageCodec, load_codec


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
    """The prompts of a run, as requests in the order of the plan; the same on every rank.

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

    def take(self, count: int) -> list[Asked]:
        """The next ``count`` prompts, each with the requests of its group."""
        stage, references = self._stage, self._references(self._data.tasks)
        return [
            self._asked(
                planned.prompt,
                task=self._data.tasks[planned.prompt.task],
                serial=planned.serial,
                policy=stage.rollout,
                references=references[planned.prompt.task],
                seeds=[
                    answer_seed(
                        self._seed,
                        task=planned.prompt.task,
                        number=planned.prompt.number,
                        serial=planned.serial,
                        sample=sample,
                    )
                    for sample in range(stage.rollouts_per_prompt)
                ],
            )
            for planned in self._plan.take(count)
        ]

    @property
    def validation(self) -> dict[str, list[Asked]]:
        """The prompts that are never trained on, by set. Their seeds are the same at every
        validation, so that what differs is the model."""
        evaluation, references = self._stage.evaluation, self._references(self._data.validation)
        return {
            name: [
                self._asked(
                    prompt,
                    task=self._data.validation[name],
                    serial=prompt.number,
                    policy=evaluation,
                    references=references[name],
                    seeds=[
                        answer_seed(
                            self._seed,
                            task=f"validation/{name}",
                            number=prompt.number,
                            serial=0,
                            sample=sample,
                        )
                        for sample in range(evaluation.samples)
                    ],
                )
                for prompt in prompts
            ]
            for name, prompts in self._files.validation.items()
        }

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
        """What reads the references of each task, which are kept as long as it is."""
        return {
            name: References(codec=self.codec, area=task.image_area, positions=self._positions)
            for name, task in tasks.items()
        }

    def _asked(
        self,
        prompt: TaskPrompt,
        *,
        task: PromptTaskConfig,
        serial: int,
        policy: PolicyConfig,
        references: References,
        seeds: Sequence[int],
    ) -> Asked:
        codes = [reference.codes_HW for reference in references.of(prompt.wish)]
        request = self._request(prompt, policy=policy, codes=codes, seed=seeds[0])
        return Asked(
            prompt=Prompt(
                task=prompt.task,
                number=prompt.number,
                id=prompt.id,
                record=prompt.record,
                references=codes,
            ),
            serial=serial,
            task=task,
            requests=[replace(request, seed=seed) for seed in seeds],
        )

    def _request(
        self,
        prompt: TaskPrompt,
        *,
        policy: PolicyConfig,
        codes: Sequence[NDArray[np.integer]],
        seed: int,
    ) -> Request:
        return request_of(
            prompt,
            policy=policy,
            references=codes,
            tokenizer=self.tokenizer,
            template=self._template,
            max_positions=self._positions,
            # What is only judged stands in no row.
            row_length=None if policy is self._stage.evaluation else self._data.sequence_length,
            seed=seed,
        )
