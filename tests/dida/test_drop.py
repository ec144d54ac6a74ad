"""Documents without prompts are what the unconditional stream of generation sees."""

import pytest
import torch
from dida_rows import TOKENIZER, VOCABULARY, picture, row

from emu35.data.batch import Batch
from emu35.dida.drop import PromptDrop, unconditional_ids
from emu35.tokens.document import Special
from emu35.tokens.serialize import image_tokens
from emu35.tokens.template import Task, Turn, build_prompt

ANSWER = picture(2, 3, seed=4)


def answered(prompt: list[int]) -> list[int]:
    """The prompt, a picture as the answer, and the end."""
    return [*prompt, *image_tokens(ANSWER.codes_HW, TOKENIZER), VOCABULARY.ess, VOCABULARY.eos]


@pytest.mark.parametrize("task", [Task.t2i, Task.x2i, Task.story, Task.howto, Task.chat])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_a_document_becomes_the_unconditional_prompt_and_the_pictures(
    task: Task, references: int
) -> None:
    images = [picture(1, 2, seed=seed).codes_HW for seed in range(references)]
    prompt = build_prompt(task, "a red cat", images=images, tokenizer=TOKENIZER)
    found = unconditional_ids(answered(prompt.conditional), TOKENIZER)
    assert found == answered(prompt.unconditional)


def test_earlier_turns_keep_their_pictures_alone() -> None:
    drawn = (*TOKENIZER.encode("here: "), *image_tokens(picture(1, 1).codes_HW, TOKENIZER))
    earlier = [Turn(question="draw", images=(picture(2, 1).codes_HW,), answer=drawn)]
    prompt = build_prompt(Task.x2i, "again", earlier=earlier, tokenizer=TOKENIZER)
    found = unconditional_ids(answered(prompt.conditional), TOKENIZER)
    assert found == answered(prompt.unconditional)


def test_text_between_the_pictures_of_an_answer_goes_too() -> None:
    prompt = build_prompt(Task.story, "tell", tokenizer=TOKENIZER)
    image = image_tokens(ANSWER.codes_HW, TOKENIZER)
    told = [*TOKENIZER.encode("first"), *image, *TOKENIZER.encode("then"), *image]
    found = unconditional_ids([*prompt.conditional, *told, VOCABULARY.ess], TOKENIZER)
    assert found == [*prompt.unconditional, *image, *image, VOCABULARY.ess]


def captions(sample: int) -> Batch:
    """Captions and pictures, and a document of words alone."""
    return row(
        [["red", picture(2, 2)], ["words"], ["blue", picture(1, 3)]], columns=64, sample=sample
    )


def test_a_share_of_the_documents_with_pictures_is_dropped_and_the_rest_stays() -> None:
    drop = PromptDrop(tokenizer=TOKENIZER, share=0.25, seed=3)
    lost = 0
    for sample in range(200):
        before, after = captions(sample), drop(captions(sample))
        for begin in before.document_start[0].unique().tolist():
            if begin == 64:
                continue
            columns = before.document_start[0] == begin
            if torch.equal(after.tokens[0, columns], before.tokens[0, columns]):
                continue
            lost += 1
            ids = before.tokens[0, columns].tolist()
            kept = [VOCABULARY.bos, *ids[ids.index(VOCABULARY.boi) :]]
            assert after.tokens[0, begin : begin + len(kept)].tolist() == kept
            rest = slice(begin + len(kept), begin + len(ids))
            assert (after.tokens[0, rest] == VOCABULARY.pad).all()
            assert not after.label_valid[0, begin + len(kept) - 1 : rest.stop].any()
            assert (after.document_start[0, rest] == 64).all()
            labels = after.labels[0, begin : begin + len(kept) - 1].tolist()
            assert labels == kept[1:]
            valid = after.label_valid[0, begin : begin + len(kept) - 1]
            assert valid.all()
            positions = after.positions[0, begin : begin + len(kept)].tolist()
            assert positions == list(range(len(kept)))
    # Four standard deviations of 400 draws.
    assert abs(lost / 400 - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_no_share_changes_nothing() -> None:
    batch = captions(1)
    assert PromptDrop(tokenizer=TOKENIZER, share=0.0, seed=3)(batch) is batch


def test_documents_that_show_no_picture_of_their_own_keep_their_prompt() -> None:
    """Questions on a picture, and pieces of documents that were cut."""
    drop = PromptDrop(tokenizer=TOKENIZER, share=0.999, seed=3)
    bss, ess = (VOCABULARY.special_string(id) for id in (VOCABULARY.bss, VOCABULARY.ess))
    asked = [picture(1, 2), "what is it?", Special(bss), "a cat", Special(ess)]
    batch = row([asked], columns=40)
    assert torch.equal(drop(batch).tokens, batch.tokens)
    prompt = "You are a helpful assistant for t2i task. USER: draw a cat ASSISTANT: "
    drawn = row([[prompt, Special(bss), picture(1, 2), Special(ess)]], columns=100)
    assert not torch.equal(drop(drawn).tokens, drawn.tokens)
    tail = row([[picture(2, 3), "words"]], columns=40)
    first = 6  # inside the picture, whose beginning another row has
    for name in ("tokens", "labels", "label_modality", "label_valid", "positions"):
        values = getattr(tail, name)
        values[0, :-first] = values[0, first:].clone()
    tail.document_start[0] = torch.where(tail.tokens[0] == VOCABULARY.pad, 40, 0)
    assert torch.equal(drop(tail).tokens, tail.tokens)
