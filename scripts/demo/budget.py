"""How much of everything the demo makes and trains: the one table to change."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """``*_overrides`` and ``*_options`` are passed on to ``emu35`` as they stand; ``task_records``
    counts training records by task, ``task_prompts`` held-out prompts of each."""

    resolution: int
    train_scenes: int
    val_scenes: int
    words: int
    clips: int
    crops_per_photo: int
    text_lines: int
    tokenizer_overrides: tuple[str, ...]
    pretrain_overrides: tuple[str, ...]
    prompts: int
    generate_options: tuple[str, ...]
    task_records: dict[str, int]
    task_prompts: int
    sft_overrides: tuple[str, ...]
    lora_overrides: tuple[str, ...]
    answer_options: tuple[str, ...]
    dida_overrides: tuple[str, ...]
    dida_eval_overrides: tuple[str, ...]
    grpo_prompts: int
    grpo_heldout: int
    grpo_overrides: tuple[str, ...]
    grpo_answer_options: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_TINY_MODEL = (
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "stage.steps=2",
    "stage.global_batch_size=2",
    "stage.micro_batch_size=2",
    "stage.validate_every=2",
)

BUDGETS = {
    # Aims at twenty minutes on two cores, of which pretraining takes the most.
    "default": Budget(
        resolution=64,
        train_scenes=6000,
        val_scenes=200,
        words=1000,
        clips=1500,
        crops_per_photo=12,
        text_lines=600,
        # Its pictures' PSNR is limited by 256 codes and stays the same from step 1,000 on.
        tokenizer_overrides=("stage.steps=1200", "stage.validate_every=120"),
        pretrain_overrides=("stage.steps=1200", "stage.validate_every=400"),
        prompts=72,
        generate_options=("--guidance", "1.5", "--temperature", "0.4"),
        task_records={"t2i": 1500, "x2i": 2500, "story": 800, "chat": 2000, "words": 700},
        task_prompts=48,
        sft_overrides=("stage.steps=1000",),
        lora_overrides=("stage.steps=100",),
        answer_options=(
            *("--guidance", "1", "--temperature", "0.1", "--text-temperature", "0.1"),
            *("--max-new-tokens", "256"),
        ),
        dida_overrides=("stage.steps=320",),
        dida_eval_overrides=(
            *("stage.denoise_steps=[8,25]", "stage.ar_seeds=1", "stage.shown=12"),
            "stage.times=[0.25,0.5,0.75]",
        ),
        grpo_prompts=160,
        grpo_heldout=48,
        grpo_overrides=("stage.steps=10", "stage.validate_every=10"),
        grpo_answer_options=("--guidance", "1", "--temperature", "1.0", "--batch-size", "48"),
    ),
    # Walks every step and learns nothing: the smoke test's.
    "tiny": Budget(
        resolution=64,
        train_scenes=24,
        val_scenes=6,
        words=6,
        clips=6,
        crops_per_photo=1,
        text_lines=10,
        tokenizer_overrides=(
            "stage.steps=2",
            "stage.global_batch_size=4",
            "stage.micro_batch_size=4",
            "stage.validate_every=2",
            "data.validation_images=4",
        ),
        pretrain_overrides=_TINY_MODEL,
        prompts=4,
        generate_options=("--guidance", "1"),
        task_records={"t2i": 4, "x2i": 4, "story": 4, "chat": 4, "words": 4},
        task_prompts=1,
        sft_overrides=_TINY_MODEL,
        lora_overrides=_TINY_MODEL,
        answer_options=("--guidance", "1", "--max-new-tokens", "256"),
        dida_overrides=_TINY_MODEL,
        dida_eval_overrides=("stage.denoise_steps=[2]", "stage.ar_seeds=1", "stage.times=[0.5]"),
        grpo_prompts=4,
        grpo_heldout=2,
        grpo_overrides=(
            *_TINY_MODEL[:6],
            *("stage.steps=2", "stage.prompts_per_step=2", "stage.rollouts_per_prompt=2"),
            "stage.validate_every=2",
        ),
        grpo_answer_options=("--guidance", "1"),
    ),
}
