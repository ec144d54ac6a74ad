"""Pictures of a model adapted to parallel decoding, token by token and in parallel: the same
captions of the demo's language, the same engine, the verifier as judge."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

STEPS = 25
"""The default of ``emu35 generate --decoder dida``."""


def measure_generation(run: Path, *, prompts: int, batch_size: int, temperature: float) -> Any:
    """Accuracies, forwards and times of ``run``, whose pictures have 8 x 8 codes as the demo's.

    ``accuracy_*`` is the share of attributes (colour, shape, size, place) that the verifier reads
    back right, ``right_*`` of pictures in which number, colours and places are; ``*_again`` is
    token by token with other seeds, which says how much is chance. ``wall_ratio`` is the time of a
    picture token by token over that in parallel, at ``batch_size`` pictures at a time.
    """
    from emu35.checkpoint.source import describe
    from emu35.data.scenes.corpus import sample_prompts
    from emu35.data.scenes.quality import read_scene_prompts
    from emu35.inference.grammar import GridSize
    from emu35.inference.request import DenoiseOptions
    from emu35.stages.dida_eval.decoders import (
        Asking,
        Decoding,
        evaluate_decoder,
        open_evaluation,
    )

    described = describe(run)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        lines = (f"{json.dumps(prompt)}\n" for prompt in sample_prompts(count=prompts, seed=11))
        path.write_text("".join(lines))
        asked = read_scene_prompts(path)
    asking = Asking(
        template=described.template,
        max_positions=described.config.max_position_embeddings,
        size=GridSize(height=8, width=8),
        guidance=1.0,
        temperature=temperature,
        text_temperature=0.1,
        max_new_tokens=256,
        batch_size=batch_size,
    )
    opened = open_evaluation(described, prompts=asked, asking=asking)

    def drawn(decoding: Decoding) -> Any:
        return evaluate_decoder(
            opened.engine, asked, decoding=decoding, asking=asking, codec=opened.codec
        )

    ar, again, dida = (
        drawn(Decoding()),
        drawn(Decoding(again=1)),
        drawn(Decoding(denoise=replace(DenoiseOptions(), steps=STEPS))),
    )
    return {
        "prompts": prompts,
        "batch_size": batch_size,
        "temperature": temperature,
        "steps": STEPS,
        "forwards_per_image": dida.most_forwards,
        "forwards_per_image_ar": ar.most_forwards,
        "accuracy_ar": round(ar.quality.accuracy.value, 4),
        "accuracy_ar_again": round(again.quality.accuracy.value, 4),
        "accuracy_dida": round(dida.quality.accuracy.value, 4),
        "right_ar": round(ar.quality.right.value, 4),
        "right_ar_again": round(again.quality.right.value, 4),
        "right_dida": round(dida.quality.right.value, 4),
        "wall_ratio": round(ar.seconds / dida.seconds, 3),
        "cpu_ratio": round(ar.cpu_seconds / dida.cpu_seconds, 3),
    }
