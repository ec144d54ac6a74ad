"""Reinforcement learning from a configuration: the assembly of its parts."""

from pathlib import Path

from emu35.checkpoint.gathered import GatheredWeights
from emu35.config import GRPOConfig, RunConfig
from emu35.config.grpo import EngineKind
from emu35.errors import ConfigError
from emu35.model.attention.support import MaskKind
from emu35.parallel.mesh import init_mesh
from emu35.stages.grpo.books import Books
from emu35.stages.grpo.embedded import EmbeddedEngine
from emu35.stages.grpo.engine import RolloutEngine
from emu35.stages.grpo.replica import Replica
from emu35.stages.grpo.sampler import Sampler
from emu35.stages.grpo.source import PromptSource
from emu35.stages.grpo.task import GRPOTask
from emu35.stages.grpo.updates import PolicyUpdates
from emu35.stages.grpo.whole_model import WholeModel
from emu35.stages.language_model import build_trained
from emu35.tokens.text import TextTokenizer
from emu35.train.clock import StepClock
from emu35.train.guard import Guard
from emu35.train.trainer import FitResult, fit


def run(config: RunConfig, *, run_dir: Path) -> FitResult:
    """Train as configured, or continue what ``run_dir`` holds.

    Raises:
        Emu35Error: for anything a user can mend; Interrupted after a signal, saved.
    """
    stage = config.stage
    assert isinstance(stage, GRPOConfig)
    mesh = init_mesh(config.parallel, seed=config.seed, timeout=config.launch.timeout)
    source = PromptSource.open(config)
    vocabulary = source.tokenizer.vocabulary
    chunks = build_trained(config, vocabulary=vocabulary, masks=MaskKind.packed_causal)
    guard, clock = Guard(config.guard), StepClock(device=mesh.device, peers=mesh.pp_rank)
    updates = PolicyUpdates(config=config, mesh=mesh, chunks=chunks, guard=guard, clock=clock)
    replica = Replica(mesh=mesh)
    sampler = Sampler(
        stage=stage,
        source=source,
        engine=_engine(config, updates=updates, tokenizer=source.tokenizer, replica=replica),
        replica=replica,
        clock=clock,
    )
    books = Books(
        config=config,
        run_dir=run_dir,
        replica=replica,
        tokenizer=source.tokenizer,
        scoring=sampler.scoring,
    )
    try:
        task = GRPOTask(
            config=config,
            source=source,
            sampler=sampler,
            updates=updates,
            books=books,
            guard=guard,
            clock=clock,
        )
        return fit(task, config=config, run_dir=run_dir)
    finally:
        sampler.close()


def _engine(
    config: RunConfig, *, updates: PolicyUpdates, tokenizer: TextTokenizer, replica: Replica
) -> RolloutEngine:
    """Whoever answers prompts: this run's own ranks, or servers."""
    assert isinstance(config.stage, GRPOConfig)
    rollout = config.stage.rollout
    if rollout.engine is EngineKind.remote:
        try:
            # Of the libraries of an extra, which nobody else needs.
            from emu35.stages.grpo.remote import RemoteEngine
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"stage.rollout.engine=remote: {error}; pip install 'emu35[grpo]', or use "
                "stage.rollout.engine=embedded"
            ) from error
        return RemoteEngine(
            config=rollout,
            tokenizer=tokenizer,
            replica=replica,
            weights=GatheredWeights(updates.chunks, mesh=replica.mesh),
            gather_parameters=updates.passes.gather_parameters,
            version=lambda: updates.version,
        )
    whole = WholeModel.of(
        updates.passes,
        config=config,
        vocabulary_size=tokenizer.vocabulary.size,
        bucket_bytes=rollout.bucket_bytes,
    )
    return EmbeddedEngine(
        whole=whole,
        tokenizer=tokenizer,
        version=lambda: updates.version,
        batch_size=rollout.batch_size,
        slots=rollout.cache_tokens,
    )
