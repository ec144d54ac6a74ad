"""What one training step really allocates."""

import torch

from emu35.config import LMConfig, LMStageConfig, RunConfig, TokenDataConfig
from emu35.data.batch import Batch
from emu35.model.build import build_chunks
from emu35.model.init import initialize
from emu35.parallel.mesh import init_mesh
from emu35.tokens.vocabulary import vocabulary_of
from emu35.train.objective import Term, weights_by_modality
from emu35.train.step import LMTask


class OneRow:
    """Stands in for the loader: the same full row at every step."""

    def __init__(self, *, length: int, vocabulary_size: int) -> None:
        tokens_BS = torch.randint(0, vocabulary_size, (1, length))
        valid_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
        valid_BS[:, -1] = False
        self.batch = Batch(
            tokens=tokens_BS,
            labels=tokens_BS.roll(-1, 1),
            label_modality=torch.zeros_like(tokens_BS, dtype=torch.uint8),
            label_valid=valid_BS,
            label_source=torch.zeros_like(tokens_BS, dtype=torch.int16),
            positions=torch.arange(length)[None],
            document_start=torch.zeros_like(tokens_BS),
            sample_ids=[0],
        )

    def next_step(self) -> list[Batch]:
        return [self.batch]

    def counts(self) -> dict[str, float]:
        return {}


def peak_of_one_step(config: RunConfig) -> int:
    """Bytes that the allocator held at most during the second of two steps."""
    model, stage, data = config.model, config.stage, config.data
    assert isinstance(model, LMConfig)
    assert isinstance(stage, LMStageConfig)
    assert isinstance(data, TokenDataConfig)
    before = torch.cuda.memory_allocated()
    mesh = init_mesh(config.parallel, seed=0)
    size = vocabulary_of(config.tokenizer).size
    chunks = build_chunks(
        model,
        vocabulary_size=size,
        parallel=config.parallel,
        engine=config.engine,
        precision=stage.precision,
    )
    initialize(chunks[0], seed=0)
    task = LMTask(
        config=config,
        mesh=mesh,
        chunks=chunks,
        loader=OneRow(length=data.sequence_length, vocabulary_size=size),  # type: ignore[arg-type]
        validation={},
        terms=[Term(name="labels", token_weights=weights_by_modality(stage.loss_weights))],
    )
    task.train_step(1)
    torch.cuda.reset_peak_memory_stats()
    task.train_step(2)
    return torch.cuda.max_memory_allocated() - before
