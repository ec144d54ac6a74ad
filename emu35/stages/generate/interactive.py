"""A dialogue in the terminal: a turn for each line that is read, pictures as they come.

Every turn is asked with all turns before it. Lines that begin with a slash steer the session; a
line that begins with two is an instruction that begins with one::

    /image FILE    show a picture with the next instruction
    /size HxW      grid of the pictures from now on, in codes; also a ratio (16:9), or auto
    /undo          forget the last turn and its files, or the pictures not asked about yet
    /save          write the dialogue so far as one story (story.pb) and page (index.html)
    /help  /quit   (the end of the input quits as well)

Each turn is written when it ends, as any answer of ``emu35 generate`` is; leaving saves the story.
Ctrl-C stops the present answer, of which texts and whole images stay, and keeps the session.
"""

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO, TypeAlias

from emu35.checkpoint.codec import open_codec
from emu35.checkpoint.source import describe, load_model
from emu35.config import ParallelConfig
from emu35.data.story import Clip, Segment, Story
from emu35.errors import ConfigError, DataError
from emu35.inference.arena import whole_pages
from emu35.inference.ask import Turn, build_request, parse_size, prompt_seed
from emu35.inference.denoiser import needed_denoiser
from emu35.inference.engine import Engine
from emu35.inference.lead import build_engine
from emu35.inference.memory import free_slots
from emu35.inference.request import Decoder, Finish, Generated, Request
from emu35.log.console import Console
from emu35.stages.generate.earlier import DIALOGUE, PAGE
from emu35.stages.generate.files import Asked, GeneratedFiles
from emu35.stages.generate.options import (
    GenerateOptions,
    Wish,
    call_problems,
    wish_of,
)
from emu35.stages.generate.references import Reference, References
from emu35.stages.generate.run import interruptible
from emu35.stages.generate.show import OneAnswer
from emu35.tokens.template import ASPECT_RATIOS, PromptTemplate, Task
from emu35.tokens.text import build_text_tokenizer

TASKS = (Task.explore, Task.chat, Task.story, Task.howto, Task.vla)
"""Tasks that make sense turn by turn; the others end with one image."""

_PROMPT = "> "
_COMMANDS = ("/image FILE", "/size HxW", "/undo", "/save", "/help", "/quit")

ReadLine: TypeAlias = Callable[[], str | None]
"""The next line that was typed; None at the end of the input."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Done:
    """A turn that has ended, for the model and for people."""

    turn: Turn
    story: Story


@dataclass(kw_only=True, slots=True)
class Session:
    """A dialogue: what was said, and what holds for the next turn. ``asked`` counts the turns that
    were ever begun, so that one that was undone and asked again may come out differently."""

    engine: Engine
    files: GeneratedFiles
    references: References
    console: Console
    out: TextIO
    wish: Wish
    template: PromptTemplate
    max_positions: int
    done: list[_Done] = field(default_factory=list[_Done])
    shown: list[Reference] = field(default_factory=list[Reference])
    asked: int = 0

    def answer(self, instruction: str) -> None:
        """One turn. What is wrong with it is said, and the session goes on."""
        try:
            request = self._request(instruction)
            index = self.engine.submit(request)
        except ConfigError as error:
            self.console.line(str(error))
            return
        number = len(self.done)
        self.files.asked[number] = Asked(
            prompt=instruction,
            task=self.wish.task,
            seed=request.seed,
            references=tuple(reference.png for reference in self.shown),
        )
        self.asked += 1
        generated = self._generate(index, number=number)
        if not generated.tokens:
            self.console.line("stopped before it said anything; the turn is not kept")
            return
        self.files.write([generated])
        turn = Turn(
            question=instruction,
            answer=tuple(generated.ids),
            images=tuple(reference.codes_HW for reference in self.shown),
        )
        self.done.append(_Done(turn=turn, story=self.files.story(generated)))
        self.shown = []
        if generated.finish is Finish.abort:
            self.console.line("stopped; /undo forgets the turn")
        elif generated.finish is Finish.length:
            self.console.line("the answer was cut short by its length (max_new_tokens)")

    def obey(self, command: str) -> bool:
        """Carry out a line that begins with a slash; whether the session goes on."""
        word, _, rest = command.partition(" ")
        rest = rest.strip()
        try:
            match word:
                case "/image":
                    self._show(rest)
                case "/size":
                    self._resize(rest)
                case "/undo":
                    self._undo()
                case "/save":
                    self.save()
                case "/help":
                    self.console.line("  ".join(_COMMANDS))
                case "/quit":
                    return False
                case _:
                    self.console.line(f"{word} is no command; there are {', '.join(_COMMANDS)}")
        except (ConfigError, DataError) as error:
            self.console.line(str(error))
        return True

    def save(self) -> None:
        """Write the dialogue so far.

        Raises:
            DataError: it cannot be written.
        """
        self.files.finish()
        if not self.done:
            self.console.line("nothing was said yet")
            return
        self.files.write_dialogue(dialogue([done.story for done in self.done]))
        turns = "1 turn" if len(self.done) == 1 else f"{len(self.done)} turns"
        self.console.line(f"{turns} -> {self.files.folder}")

    def _request(self, instruction: str) -> Request:
        ask = replace(self.wish, prompt=instruction).ask(
            images=[reference.codes_HW for reference in self.shown],
            earlier=[done.turn for done in self.done],
            seed=prompt_seed(self.wish.seed, index=self.asked),
        )
        return build_request(
            ask,
            tokenizer=self.engine.tokenizer,
            template=self.template,
            max_positions=self.max_positions,
        )

    def _generate(self, index: int, *, number: int) -> Generated:
        """Step until the answer has ended or Ctrl-C was pressed; the answer as turn ``number``."""
        display = OneAnswer(
            console=self.console,
            out=self.out,
            tokenizer=self.engine.tokenizer,
            save=lambda _, codes_HW: self.files.add_image(number, codes_HW),
        )
        with interruptible() as interruption:
            while True:
                updates = self.engine.step()
                if interruption.asked and (last := self.engine.abort(index)):
                    updates.append(last)
                for update in updates:
                    display.update(update)
                    if update.finished:
                        return replace(update.finished, index=number)
                display.step()

    def _show(self, name: str) -> None:
        path = Path(name.strip("'\"")).expanduser()  # terminals quote what is dropped on them
        if not path.is_file():
            self.console.line(f"image {name or '(no name)'} does not exist; write /image FILE")
            return
        self.shown.append(self.references.open(path, task=self.wish.task))
        height, width = self.shown[-1].codes_HW.shape
        self.console.line(f"{path}: {height}*{width} codes, shown with the next instruction")

    def _resize(self, text: str) -> None:
        self.references.require_codec("a picture")
        if text in ASPECT_RATIOS:
            self.wish = replace(self.wish, ratio=text, size=None)
        else:
            self.wish = replace(self.wish, ratio=None, size=parse_size(text))
        self.console.line(f"size {text} from now on")

    def _undo(self) -> None:
        if self.shown:
            self.shown = []
            self.console.line("dropped the pictures that were not asked about yet")
        elif self.done:
            self.done.pop()
            self.files.forget(len(self.done))
            self.console.line(f"forgot turn {len(self.done) + 1}")
        else:
            self.console.line("there is no turn to undo")


def interactive(options: GenerateOptions, *, read: ReadLine | None = None) -> list[Turn]:
    """Hold a dialogue below ``options.out``; ``options.prompts`` are its first instructions, and
    the others are read by ``read`` (default: from standard input). The turns that were kept.

    Raises:
        ConfigError, DataError, CheckpointError, ReleaseError, TokenizerError: as
            :func:`~emu35.stages.generate.run.generate`, before the first turn.
    """
    wish = check(options)
    console = Console(stream=sys.stderr)
    described = describe(options.source, step=options.step, message=console.line)
    # A chat in text alone may do without an image tokenizer.
    pictures = wish.pictures or options.vision or described.vision_folder
    codec = open_codec(described, chosen=options.vision) if pictures else None
    positions = described.config.max_position_embeddings
    references = References(codec=codec, area=options.image_area, positions=positions)
    references.read([wish])
    tokenizer = build_text_tokenizer(described.tokenizer)
    files = GeneratedFiles(
        folder=options.out,
        codec=codec,
        expected=0,
        logprobs=options.logprobs,
        story=False,
        writes=[PAGE, DIALOGUE],
    )
    parallel_decoding = wish.decoder is Decoder.dida
    source = needed_denoiser(described, chosen=options.vision) if parallel_decoding else None
    model = load_model(
        described,
        precision=options.precision or described.precision,
        parallel=ParallelConfig(tp=options.tp),
        quantize=options.quantize,
    )
    session = Session(
        engine=build_engine(
            model=model,
            tokenizer=tokenizer,
            source=source,
            max_requests=1,
            max_length=positions,
            cache_tokens=options.cache_tokens or min(2 * whole_pages(positions), free_slots(model)),
        ),
        files=files,
        references=references,
        console=console,
        out=sys.stdout,
        wish=replace(wish, images=()),
        template=options.template or described.template,
        max_positions=positions,
        shown=references.of(wish),
    )
    session.files.remove_earlier()
    try:
        _talk(session, prompts=options.prompts, read=read or _stdin(console))
    finally:
        if session.done:
            session.save()
        console.close()
        session.engine.close()
    return [done.turn for done in session.done]


def check(options: GenerateOptions) -> Wish:
    """What holds for every turn.

    Raises:
        ConfigError: naming everything that makes no sense.
    """
    # The instructions are not known yet; any text stands for them.
    wish = wish_of(options, prompt="instruction", where="call")
    problems = [*call_problems(options), *wish.problems()]
    if options.task not in TASKS:
        names = ", ".join(task.value for task in TASKS)
        problems.append(
            f"task {options.task.value} is one image, which is no dialogue; use one of {names}"
        )
    if options.prompts_file is not None:
        problems.append("a dialogue reads its instructions one by one; drop the file of prompts")
    if problems:
        raise ConfigError(problems)
    if options.task is Task.explore and options.steps is None:
        # The next instruction is about what this one showed.
        wish = replace(wish, steps=1)
    return wish


def dialogue(stories: Sequence[Story]) -> Story:
    """The turns of a dialogue as one story. A story has one question, the first; each later one is
    a clip of its own, with the pictures that were shown with it."""
    first = stories[0]
    clips = list(first.clips)
    for story in stories[1:]:
        asked = Segment(asr=f"USER: {story.question}", images=story.reference_images)
        clips += [Clip(segments=[asked]), *story.clips]
    return Story(
        story_id="dialogue",
        question=first.question,
        summary="\n\n".join(story.summary for story in stories if story.summary),
        reference_images=first.reference_images,
        clips=[replace(clip, clip_id=f"clip_{at:04d}") for at, clip in enumerate(clips)],
    )


def _talk(session: Session, *, prompts: Sequence[str], read: ReadLine) -> None:
    for prompt in prompts:
        session.answer(prompt)
    while (line := read()) is not None:
        text = line.strip()
        if text.startswith("//"):
            session.answer(text[1:])
        elif text.startswith("/"):
            if not session.obey(text):
                return
        elif text:
            session.answer(text)


def _stdin(console: Console) -> ReadLine:
    """Lines of standard input: edited on a terminal, as they are elsewhere."""
    stream = sys.stdin
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    if stream.isatty():
        # Gives input() its editing and history, where Python has it.
        with suppress(ImportError):
            import readline  # noqa: F401
        return lambda: _typed(console)
    return lambda: stream.readline() or None


def _typed(console: Console) -> str | None:
    while True:
        try:
            return input(_PROMPT)
        except EOFError:
            return None
        except KeyboardInterrupt:
            console.line("\n/quit or Ctrl-D leaves the session")
