"""Rounds of reinforcement learning on a tiny model, in whatever layout; alone or under torchrun.

Usage: policy_worker.py RESULT.json '{"stage": {...}, "parallel": {...}, "steps": 2}'

Prompts, seeds and rewards are fixed, so every layout must draw the same answers and learn the same.
``"free": [...]`` says how many bytes of memory are free to each rank.
"""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tiny_engine import TOKENIZER, V, picture_request, sampling, text_request
from tiny_models import tiny_lm

from emu35.config import GRPOConfig, LMConfig, PromptTaskConfig, RunConfig
from emu35.config.schema import build, to_plain, with_defaults
from emu35.inference import memory
from emu35.inference.request import Request
from emu35.model.attention.support import MaskKind
from emu35.parallel.mesh import init_mesh, leave
from emu35.rewards.scale import Scores
from emu35.stages.grpo.embedded import EmbeddedEngine
from emu35.stages.grpo.lesson import compared, lesson
from emu35.stages.grpo.replica import Replica
from emu35.stages.grpo.rows import lay_out
from emu35.stages.grpo.sampling import Asked, sample
from emu35.stages.grpo.types import Group, Prompt, Rollout
from emu35.stages.grpo.updates import PolicyUpdates
from emu35.stages.grpo.whole_model import WholeModel
from emu35.stages.language_model import build_trained
from emu35.train.clock import StepClock
from emu35.train.guard import Guard

LENGTH = 192
ANSWERS = 3


def configure(spec: dict[str, Any]) -> RunConfig:
    """A run of ``spec`` on the tiny model."""
    misfits: dict[str, str] = {}
    tree = {
        "seed": 3,
        "model": {"kind": "lm", **to_plain(tiny_lm(init_std=0.3)), **spec.get("model", {})},
        "stage": {"kind": "grpo", "loss_chunk": 17, "rollouts_per_prompt": ANSWERS}
        | spec.get("stage", {}),
        "data": {"kind": "prompts", "sequence_length": LENGTH},
        "optim": {"lr": 0.01, "min_lr": 0.01, "warmup_steps": 0, "weight_decay": 0.1},
        "parallel": spec.get("parallel", {}),
        "engine": spec.get("engine", {}),
    }
    config = build(with_defaults(tree), misfits=misfits)
    assert config is not None, misfits
    return config


def requests(guidance: float, kept: bool) -> list[Request]:
    """Pictures of known and free size, and prose."""
    visual = sampling(top_k=20, temperature=1.2) if kept else sampling()
    alike: dict[str, Any] = {"guidance": guidance, "visual": visual, "keep_candidates": True}
    if guidance == 1:
        alike["unconditional"] = ()
    text = sampling(top_p=0.9) if kept else sampling()
    return [
        picture_request("a red circle", **alike),
        picture_request("two", **alike),
        text_request("prose", text=text, max_images=0, max_new_tokens=25, **alike),
        picture_request("another caption, longer than the others", **alike),
        text_request("more", text=text, max_images=0, max_new_tokens=30, **alike),
    ]


def asked(step: int, *, stage: GRPOConfig, kept: bool) -> list[Asked]:
    prompts = requests(stage.rollout.guidance, kept)
    return [
        Asked(
            prompt=Prompt(task="t", number=number, id=f"t:{number}", record={}),
            serial=len(prompts) * step + number,
            task=PromptTaskConfig(path=""),
            requests=[
                replace(request, seed=1000 * step + 10 * number + answer)
                for answer in range(ANSWERS)
            ],
        )
        for number, request in enumerate(prompts)
    ]


def judge(rollout: Rollout) -> Scores:
    """Something that answers differ in: the share of even ids, and one answer without a score."""
    if rollout.seed % 10 == 2 and rollout.seed // 10 % 100 == 1:
        return Scores(unscored={"even": "nobody knows"})
    return Scores(total=1 + 9 * float((rollout.ids % 2 == 0).mean()))


def rounds(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What every step drew, reported and computed."""
    config = configure(spec)
    stage = config.stage
    assert isinstance(stage, GRPOConfig)
    assert isinstance(config.model, LMConfig)
    mesh = init_mesh(config.parallel, seed=config.seed)
    replica = Replica(mesh=mesh)
    chunks = build_trained(config, vocabulary=V, masks=MaskKind.packed_causal)
    updates = PolicyUpdates(
        config=config,
        mesh=mesh,
        chunks=chunks,
        guard=Guard(config.guard),
        clock=StepClock(),
    )
    whole = WholeModel.of(updates.passes, config=config, vocabulary_size=V.size, bucket_bytes=1000)
    engine = EmbeddedEngine(
        whole=whole, tokenizer=TOKENIZER, version=lambda: updates.version, batch_size=4
    )
    updates.reference.take()
    found: list[dict[str, Any]] = []
    for step in range(spec.get("steps", 2)):
        own = replica.part(replica.share(asked(step, stage=stage, kept=spec.get("kept", False))))
        engine.prepare([request for item in own for request in item.requests])
        answered = sample(own, engine=engine, scoring=None, step=step, beat=lambda: None)
        engine.release()
        groups = replica.joined(
            [
                Group(
                    serial=item.asked.serial,
                    prompt=item.asked.prompt,
                    rollouts=[item.rollouts[number] for number in range(ANSWERS)],
                    scores=[judge(item.rollouts[number]) for number in range(ANSWERS)],
                )
                for item in answered
            ]
        )
        parts = lesson(
            compared(groups, stage=stage), stage=stage, row_length=LENGTH, replica=replica
        )
        batches = [
            lay_out(
                part,
                tokenizer=TOKENIZER,
                sequence_length=LENGTH,
                micro_batch_size=stage.micro_batch_size,
                multiple=updates.passes.group_size,
            )
            for part in parts
        ]
        micro_batches = [updates.micro_batches(part) for part in batches]
        every = [one for part in micro_batches for one in part]
        drift = updates.replay(every)
        updates.ask_reference(every)
        made = []
        for _ in range(stage.epochs):
            for part in micro_batches:
                update = updates.update(part, rate=0.01)
                assert update.refused is None
                made.append({**update.report.metrics(), "grad_norm": update.grad_norm})
        ids = {
            group.serial: [rollout.ids.tolist() for rollout in group.rollouts]
            for some in replica.gathered(list(groups))
            for group in some
        }
        found.append(
            {
                "ids": [ids[serial] for serial in sorted(ids)],
                "drift": asdict(drift),
                "updates": made,
            }
        )
    return found


def main(result: Path, spec: dict[str, Any]) -> None:
    if "free" in spec:
        found = SimpleNamespace(available=spec["free"][int(os.environ["RANK"])])
        memory.psutil.virtual_memory = lambda: found  # type: ignore[attr-defined]
    found = rounds(spec)
    from emu35.parallel.collectives import is_main

    if is_main():
        result.write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
