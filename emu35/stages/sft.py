"""Supervised fine-tuning: pretraining's assembly, with the loss on responses only
(paper section 4.1). Its documents come from task records, see `emu35 data tasks`."""

from functools import partial
from pathlib import Path

from emu35.config import RunConfig
from emu35.stages.pretrain import train_on_tokens
from emu35.tokens.vocabulary import vocabulary_of
from emu35.train.objective import response_weights
from emu35.train.trainer import FitResult


def run(config: RunConfig, *, run_dir: Path) -> FitResult:
    """Fine-tune as configured, or continue what ``run_dir`` holds.

    Raises:
        Emu35Error: for anything a user can mend; Interrupted after a signal, saved.
    """
    responses = partial(response_weights, vocabulary=vocabulary_of(config.tokenizer))
    return train_on_tokens(config, run_dir=run_dir, weigh=responses)
