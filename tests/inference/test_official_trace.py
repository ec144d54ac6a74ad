"""A trace of the official decoder, reproduced row by row.

The trace fed the official logits processor with closed forms instead of a model: at step k the
conditional logits are 3 sin(0.001 (id + 1)(k + 1)), the unconditional ones 3 cos(0.0013 (id + 1)
(k + 1)), evaluated in fp64 and rounded to fp32. It records what remained to sample from.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emu35.inference.grammar import Grammar, GrammarOptions, GridSize, NextKind, SizeIds
from emu35.inference.sampler import guide, restrict
from emu35.tokens.template import Sampling
from emu35.tokens.vocabulary import Vocabulary

V = Vocabulary(n_text=151_643, codebook_size=131_072)
# The released table spells 0..9 as 15..24 and the star as 9.
SIZES = SizeIds(digits=tuple(range(15, 25)), star=9)
GOLDEN = Path(__file__).parents[1] / "golden" / "pipeline.json"

pytestmark = pytest.mark.golden


def trace() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())["processor_traces"]["t2i_forced_2x3"]


def closed_form_logits(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    phase_V = torch.arange(1, V.size + 1, dtype=torch.float64) * (step + 1)
    return (
        (3 * torch.sin(0.001 * phase_V)).float()[None],
        (3 * torch.cos(0.0013 * phase_V)).float()[None],
    )


def remaining(machine: Grammar, *, step: int, numbers: dict[str, float]) -> tuple[Any, Any]:
    """Scores and ids of what may be sampled at ``step``."""
    logits_1V, unconditional_1V = closed_form_logits(step)
    legal = machine.next()
    if legal.kind is NextKind.FORCED:
        ids = torch.tensor(legal.ids)
        return logits_1V[0, ids], ids
    if legal.kind is NextKind.TEXT:
        first, part_1V, kind = 0, logits_1V[:, : V.visual_start], "text"
    else:
        first, kind = V.visual_start, "image"
        part_1V = guide(
            logits_1V, unconditional_NV=unconditional_1V, scale=numbers["guidance_scale"]
        )[:, first:]
    scores_1M, columns_1M = restrict(
        part_1V,
        sampling=Sampling(
            temperature=1.0,
            top_k=int(numbers[f"{kind}_top_k"]),
            top_p=numbers[f"{kind}_top_p"],
        ),
    )
    kept = torch.isfinite(scores_1M[0])
    return scores_1M[0][kept], columns_1M[0][kept] + first


def test_every_row_of_the_official_trace() -> None:
    golden = trace()
    numbers = golden["kwargs"]
    size = GridSize(height=numbers["target_height"], width=numbers["target_width"])
    machine = Grammar(
        vocabulary=V, size_ids=SIZES, options=GrammarOptions(size=size, stray_layout=True)
    )
    for row, token in zip(golden["rows"], [*golden["script"], None], strict=True):
        scores, ids = remaining(machine, step=row["step"], numbers=numbers)
        found = {
            "n_allowed": len(ids),
            "min_id": int(ids.min()),
            "max_id": int(ids.max()),
            # fp32 has several equal maxima in the text rows; argmax means the first of them.
            "argmax": int(ids[scores == scores.max()].min()),
            "max_value": float(scores.max()),
            "lse": float(scores.double().logsumexp(0)),
        }
        exact = {key: row[key] for key in ("n_allowed", "min_id", "max_id", "argmax")}
        assert {key: found[key] for key in exact} == exact, row["step"]
        assert found["max_value"] == pytest.approx(row["max_value"], abs=2e-6), row["step"]
        assert found["lse"] == pytest.approx(row["lse"], abs=2e-6), row["step"]
        if token is not None:
            machine.accept(token)


def test_what_the_official_trace_feeds_the_unconditional_stream() -> None:
    golden = trace()
    machine = Grammar(
        vocabulary=V,
        size_ids=SIZES,
        options=GrammarOptions(size=GridSize(height=2, width=3), stray_layout=True),
    )
    fed = [token for token in golden["script"] if machine.accept(token)]
    official = [token for row in golden["rows"] for call in row["uncond_fed"] for token in call]
    # The official decoder prefills the unconditional prompt late, together with the first BOI.
    assert golden["unc_ids"] + fed == official
