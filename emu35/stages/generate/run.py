"""One call: from options to files."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from emu35.checkpoint.codec import open_codec
from emu35.checkpoint.source import Described, describe, load_model
from emu35.config import ParallelConfig
from emu35.errors import ConfigError
from emu35.inference.ask import build_request, prompt_seed
from emu35.inference.denoiser import needed_denoiser
from emu35.inference.engine import Engine
from emu35.inference.lead import build_engine
from emu35.inference.memory import cache_tokens
from emu35.inference.request import Decoder, Generated, Request
from emu35.log.console import Console, human_time
from emu35.stages.generate.earlier import PAGE
from emu35.stages.generate.files import Asked, GeneratedFiles
from emu35.stages.generate.options import (
    GenerateOptions,
    Wish,
    call_problems,
    gathered,
    wish_of,
)
from emu35.stages.generate.records import read_records
from emu35.stages.generate.references import References
from emu35.stages.generate.show import ManyAnswers, OneAnswer
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

MOST_ON_A_PAGE = 200
"""Prompts whose pictures one page still holds with comfort; ``emu35 view`` makes larger ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """What came of a call. ``problems`` has one line for everything that is no image or text."""

    answers: list[Generated]
    images: int
    tokens: int
    seconds: float
    problems: list[str]


def generate(options: GenerateOptions) -> GenerateResult:
    """Generate an answer to every prompt and write it below ``options.out``.

    Raises:
        ConfigError: options or records that make no sense, all of them named.
        DataError: a reference image that cannot be used, or an output that cannot be written.
        CheckpointError, ReleaseError, TokenizerError: a source that cannot be opened.
        KeyboardInterrupt: on Ctrl-C, after what there is was written.
    """
    wishes = check(options)
    console = Console(stream=sys.stderr)
    described = describe(options.source, step=options.step, message=console.line)
    # A chat in text alone needs no image tokenizer, and a release may come without.
    pictures = any(wish.pictures for wish in wishes)
    codec = open_codec(described, chosen=options.vision) if pictures else None
    tokenizer = build_text_tokenizer(described.tokenizer)
    positions = described.config.max_position_embeddings
    references = References(codec=codec, area=options.image_area, positions=positions)
    references.read(wishes)
    requests = build_requests(
        options, wishes=wishes, described=described, tokenizer=tokenizer, references=references
    )
    files = GeneratedFiles(
        folder=options.out,
        codec=codec,
        expected=len(wishes),
        logprobs=options.logprobs,
        story=options.story,
        writes=[PAGE] if options.page and len(wishes) <= MOST_ON_A_PAGE else [],
    )
    files.asked = {at: asked(wish, references=references) for at, wish in enumerate(wishes)}
    parallel_decoding = any(wish.decoder is Decoder.dida for wish in wishes)
    source = needed_denoiser(described, chosen=options.vision) if parallel_decoding else None
    model = load_model(
        described,
        precision=options.precision or described.precision,
        parallel=ParallelConfig(tp=options.tp),
        quantize=options.quantize,
    )
    at_once = min(options.batch_size, len(requests))
    engine = build_engine(
        model=model,
        tokenizer=tokenizer,
        source=source,
        max_requests=at_once,
        max_length=max(request.slots for request in requests),
        cache_tokens=options.cache_tokens or cache_tokens(requests, model=model, at_once=at_once),
    )
    for request in requests:
        engine.submit(request)
    # Not before everything is known to run: what an earlier call made is better than nothing.
    files.remove_earlier()
    try:
        return _run(engine, files=files, console=console, requests=requests, options=options)
    finally:
        engine.close()


def check(options: GenerateOptions) -> list[Wish]:
    """What is asked for, prompts first and then records.

    Raises:
        ConfigError: naming everything that no source could satisfy.
        DataError: a file of prompts that cannot be read.
    """
    problems = call_problems(options)
    wishes = [
        wish_of(options, prompt=prompt, where=f"prompt {index}")
        for index, prompt in enumerate(options.prompts)
    ]
    wrong: list[tuple[str, list[str]]] = []
    if options.prompts_file is not None:
        more, wrong = read_records(options.prompts_file, options=options)
        wishes += more
    problems += [f"{where}: {problem}" for where, found in wrong for problem in found]
    if options.stream and len(wishes) > 1:
        problems.append(
            f"stream shows the text of a single prompt, but there are {len(wishes)}; drop one"
        )
    problems += gathered([(wish.where, wish.problems()) for wish in wishes])
    if not wishes and not wrong:
        problems.append("there is no prompt; give at least one")
    if problems:
        raise ConfigError(problems)
    return wishes


def build_requests(
    options: GenerateOptions,
    *,
    wishes: Sequence[Wish],
    described: Described,
    tokenizer: TextTokenizer,
    references: References,
) -> list[Request]:
    """One request a wish, with the task's numbers wherever it leaves them.

    Raises:
        ConfigError: naming every wish that does not fit the model, and why.
    """
    requests: list[Request] = []
    found: list[tuple[str, list[str]]] = []
    for index, wish in enumerate(wishes):
        seed = prompt_seed(wish.seed, index=0 if wish.own_seed else index)
        codes = [reference.codes_HW for reference in references.of(wish)]
        problems: list[str] = []
        try:
            requests.append(
                build_request(
                    wish.ask(images=codes, seed=seed),
                    tokenizer=tokenizer,
                    template=options.template or described.template,
                    max_positions=described.config.max_position_embeddings,
                )
            )
        except ConfigError as error:
            problems = error.problems
        found.append((wish.where, problems))
    if problems := gathered(found):
        raise ConfigError(problems)
    return requests


def asked(wish: Wish, *, references: References) -> Asked:
    """What files tell of a wish."""
    return Asked(
        prompt=wish.prompt,
        task=wish.task,
        seed=wish.seed,
        id=wish.id,
        references=tuple(reference.png for reference in references.of(wish)),
    )


def _run(
    engine: Engine,
    *,
    files: GeneratedFiles,
    console: Console,
    requests: Sequence[Request],
    options: GenerateOptions,
) -> GenerateResult:
    began = time.perf_counter()
    tokenizer = engine.tokenizer
    stream = sys.stdout.isatty() if options.stream is None else options.stream
    if stream and len(requests) == 1:
        shown = OneAnswer(
            console=console, out=sys.stdout, tokenizer=tokenizer, save=files.add_image
        )
    else:
        shown = ManyAnswers(
            console=console, requests=requests, tokenizer=tokenizer, save=files.add_image
        )
    answers: list[Generated] = []
    try:
        with interruptible() as interruption:
            while engine.busy and not interruption.asked:
                updates = engine.step()
                for update in updates:
                    shown.update(update)
                finished = [update.finished for update in updates if update.finished]
                files.write(finished)
                answers += finished
                shown.step()
            if interruption.asked:
                files.write(_abandon(engine, requests=len(requests)))
                raise KeyboardInterrupt
    finally:
        # What is done is done, also when the rest was interrupted.
        files.finish()
        console.close()
        if options.page and len(requests) <= MOST_ON_A_PAGE:
            files.write_page()
    answers.sort(key=lambda answer: answer.index)
    result = GenerateResult(
        answers=answers,
        images=sum(len(answer.document.images) for answer in answers),
        tokens=engine.stats.tokens_generated,
        seconds=time.perf_counter() - began,
        problems=[f"prompt {a.index}: {p}" for a in answers for p in a.document.problems],
    )
    for problem in result.problems:
        console.line(problem)
    console.line(
        f"{len(answers)} prompts, {result.images} images, {result.tokens} tokens in "
        f"{human_time(result.seconds)} -> {files.folder}"
    )
    return result


def _abandon(engine: Engine, *, requests: int) -> list[Generated]:
    """End what is unfinished; the answers of which something whole is there already."""
    updates = [engine.abort(index) for index in range(requests)]
    answers = [update.finished for update in updates if update and update.finished]
    return [answer for answer in answers if answer.document.texts or answer.document.images]


@dataclass(slots=True)
class Interruption:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Ctrl-C within the body is noted rather than raised, so that no step of the engine is torn;
    a second one is raised at once."""
    interruption = Interruption()

    def note(_signal: int, _frame: FrameType | None) -> None:
        if interruption.asked:
            raise KeyboardInterrupt
        interruption.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield interruption  # signals reach the main thread alone
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
