"""Pictures and text by Hugging Face's ``generate``, the way a plain user of it would write them.

The decoding grammar and classifier-free guidance are one LogitsProcessor. Guidance keeps a second
stream of its own with its own key-value cache, as transformers' processor for guidance and the
official Emu3.5 decoder do, and takes the log-softmax of both streams over the whole vocabulary.
Where a plain user has a choice, the cheaper way is taken: logits of the last position only, a
forced token is not scored, and the second stream reads forced tokens together with the next visual
one instead of one by one.

Suffixes: B requests, S tokens of a stream, P tokens not yet read by the second one, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hf_qwen3 import hf_qwen3
from transformers import LogitsProcessor, LogitsProcessorList

from emu35.checkpoint.hf import to_hf
from emu35.config import LMConfig
from emu35.model.transformer import Emu35Model
from emu35.parallel.cpu import without_shim
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

MODEL = LMConfig(
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_position_embeddings=8192,
    init_std=0.1,
)
"""What is compared: small, so that the vocabulary weighs as it does in no real model. The wide
initial weights give every greedy choice a clear winner."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Picture:
    """One picture to generate: the prompts of both streams, the grid in codes, the guidance."""

    prompt: Sequence[int]
    unconditional: Sequence[int]
    height: int
    width: int
    guidance: float

    def layout(self, tokenizer: TextTokenizer) -> list[int | None]:
        """Every token of the answer that the grammar forces, None where a visual one is chosen."""
        vocabulary = tokenizer.vocabulary
        header = [vocabulary.boi, *tokenizer.encode(f"{self.height}*{self.width}"), vocabulary.img]
        rows: list[int | None] = []
        for _ in range(self.height):
            rows += [*[None] * self.width, vocabulary.eol]
        return [*header, *rows[:-1], vocabulary.eoi]


class GuidedPictures(LogitsProcessor):
    """The decoding grammar and guidance of a batch of pictures, for one call of ``generate``."""

    def __init__(
        self, model: Any, *, pictures: Sequence[Picture], tokenizer: TextTokenizer
    ) -> None:
        self.model = model
        self.vocabulary = tokenizer.vocabulary
        self.layouts = [picture.layout(tokenizer) for picture in pictures]
        self.scale_B1 = torch.tensor([[picture.guidance] for picture in pictures])
        self.prompt_length = max(len(picture.prompt) for picture in pictures)
        self.cache: Any = None
        self.pending_BP, self.mask_BS = left_padded(
            [picture.unconditional for picture in pictures], pad=self.vocabulary.pad
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Ids [B, S] so far and logits fp32 [B, V] -> scores [B, V], -inf for what is illegal."""
        step = input_ids.shape[1] - self.prompt_length
        if step:
            self._note(input_ids[:, -1:], step=step)
        forced_B = [
            layout[step] if step < len(layout) else self.vocabulary.pad for layout in self.layouts
        ]
        chosen = [row for row, token in enumerate(forced_B) if token is None]
        if chosen:
            scores = self._guided(scores)
            scores[:, : self.vocabulary.visual_start] = -torch.inf
        for row, token in enumerate(forced_B):
            if token is not None:
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores

    def _note(self, newest_B1: torch.Tensor, *, step: int) -> None:
        """Keep the newest token for the second stream; ended pictures hand it nothing."""
        reads_B1 = torch.tensor([[step <= len(layout)] for layout in self.layouts])
        self.pending_BP = torch.cat([self.pending_BP, newest_B1], 1)
        self.mask_BS = torch.cat([self.mask_BS, reads_B1.long()], 1)

    def _guided(self, scores_BV: torch.Tensor) -> torch.Tensor:
        positions_BS = (self.mask_BS.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            self.pending_BP,
            attention_mask=self.mask_BS,
            position_ids=positions_BS[:, -self.pending_BP.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache, self.pending_BP = out.past_key_values, self.pending_BP[:, :0]
        conditional_BV = torch.log_softmax(scores_BV, -1)
        unconditional_BV = torch.log_softmax(out.logits[:, -1].float(), -1)
        return unconditional_BV + self.scale_B1 * (conditional_BV - unconditional_BV)


class TextOnly(LogitsProcessor):
    """Nothing that belongs to an image is legal."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] -> the same, -inf for visual and layout tokens."""
        del input_ids
        scores[:, self.vocabulary.visual_start :] = -torch.inf
        for token in (self.vocabulary.boi, self.vocabulary.img, self.vocabulary.eoi):
            scores[:, token] = -torch.inf
        scores[:, self.vocabulary.eol] = -torch.inf
        return scores


def hf_model(model: Emu35Model) -> Any:
    """Hugging Face's model with a copy of the weights of ``model``."""
    state: Mapping[str, torch.Tensor] = {
        name: parameter.detach() for name, parameter in model.named_parameters()
    }
    config, size = model.lm_config, model.vocabulary_size
    with without_shim():
        weights = to_hf(state, config=config, vocabulary_size=size)
        return hf_qwen3(weights, config=config, vocabulary_size=size, use_cache=True).eval()


def pictures_one_by_one(
    model: Any, *, pictures: Sequence[Picture], tokenizer: TextTokenizer
) -> list[list[int]]:
    """The greedy tokens of every picture, each generated alone, as the official code does."""
    return [
        pictures_batched(model, pictures=[picture], tokenizer=tokenizer)[0] for picture in pictures
    ]


def pictures_batched(
    model: Any, *, pictures: Sequence[Picture], tokenizer: TextTokenizer
) -> list[list[int]]:
    """The greedy tokens of every picture, BOI to EOI, all in one batch padded at the left."""
    vocabulary = tokenizer.vocabulary
    tokens_BS, mask_BS = left_padded([picture.prompt for picture in pictures], pad=vocabulary.pad)
    lengths = [len(picture.layout(tokenizer)) for picture in pictures]
    decoding = GuidedPictures(model, pictures=pictures, tokenizer=tokenizer)
    # Without a GPU our CPU shim watches every torch call of the process, at our cost alone.
    with without_shim():
        answers_BS = model.generate(
            tokens_BS,
            attention_mask=mask_BS,
            do_sample=False,
            use_cache=True,
            max_new_tokens=max(lengths),
            eos_token_id=vocabulary.eoi,
            pad_token_id=vocabulary.pad,
            logits_processor=LogitsProcessorList([decoding]),
        )
    answers = answers_BS[:, tokens_BS.shape[1] :].tolist()
    return [answer[:length] for answer, length in zip(answers, lengths, strict=True)]


def text_batched(
    model: Any, *, prompts: Sequence[Sequence[int]], vocabulary: Vocabulary, max_new_tokens: int
) -> list[list[int]]:
    """The greedy continuation of every prompt in text tokens, EOS included."""
    tokens_BS, mask_BS = left_padded(prompts, pad=vocabulary.pad)
    with without_shim():
        answers_BS = model.generate(
            tokens_BS,
            attention_mask=mask_BS,
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=vocabulary.eos,
            pad_token_id=vocabulary.pad,
            logits_processor=LogitsProcessorList([TextOnly(vocabulary)]),
        )
    answers = answers_BS[:, tokens_BS.shape[1] :].tolist()
    return [_ended(answer, eos=vocabulary.eos) for answer in answers]


def left_padded(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, S] with ``pad`` before shorter rows, and 1 where a token counts, both int64."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    tokens = [[pad] * count + list(row) for count, row in zip(padding, rows, strict=True)]
    mask = [[0] * count + [1] * len(row) for count, row in zip(padding, rows, strict=True)]
    return torch.tensor(tokens), torch.tensor(mask)


def _ended(answer: list[int], *, eos: int) -> list[int]:
    return answer[: answer.index(eos) + 1] if eos in answer else answer


def first_difference(ours: Sequence[Sequence[int]], *, theirs: Sequence[Sequence[int]]) -> str:
    """Where two lists of answers part first, as a sentence; empty where they are equal."""
    if len(ours) != len(theirs):
        return f"{len(ours)} answers against {len(theirs)}"
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for at, (left, right) in enumerate(zip(a, b, strict=False)):
            if left != right:
                return f"answer {number}, token {at}: {left} against {right}"
        if len(a) != len(b):
            return f"answer {number}: {len(a)} tokens against {len(b)}"
    return ""
