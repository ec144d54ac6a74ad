"""What a batch goes through before the model sees it: noise in the copies, and nowhere else."""

from dataclasses import fields, replace

import pytest
import torch
from dida_rows import CODES, VOCABULARY, picture, row

from emu35.config import PathConfig, PathKind
from emu35.data.batch import Batch
from emu35.dida.corrupt import Corruption, mask_id
from emu35.dida.layout import NoisyCopies
from emu35.dida.path import build_path


def corruption(kind: PathKind = PathKind.metric, **values: object) -> Corruption:
    codebook_KD = torch.randn(CODES, 6, generator=torch.Generator().manual_seed(3))
    path = build_path(PathConfig(kind=kind), codebook_KD=codebook_KD)
    options = {"vocabulary": VOCABULARY, "device": torch.device("cpu"), "seed": 5, **values}
    return Corruption(path=path, **options)  # type: ignore[arg-type]


def wide(sample: int = 0, *, height: int = 6) -> Batch:
    batch = row([["a", picture(height, 8, seed=1), "b", picture(3, 3, seed=2)]], columns=120)
    return NoisyCopies(vocabulary=VOCABULARY, room=90)(replace(batch, sample_ids=[sample]))


def codes_of_copies(batch: Batch) -> torch.Tensor:
    """Where they are, bool [B, S]."""
    assert batch.noisy is not None
    return (batch.noisy >= 0) & (batch.tokens >= VOCABULARY.visual_start)


@pytest.mark.parametrize("kind", list(PathKind))
def test_only_the_codes_of_copies_change(kind: PathKind) -> None:
    before = wide()
    after = corruption(kind, time=0.2)(before)
    places = codes_of_copies(before)
    changed = after.tokens != before.tokens
    assert changed[places].float().mean() > 0.5
    assert not changed[~places].any()
    for name in ("labels", "label_valid", "positions", "document_start", "noisy", "intervals"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    ids = after.tokens[places]
    if kind is PathKind.absorbing:
        assert set(ids[changed[places]].tolist()) == {mask_id(VOCABULARY)}
    else:
        assert (ids >= VOCABULARY.visual_start).all()
        assert (ids < VOCABULARY.size).all()


@pytest.mark.parametrize("time", [0.2, 0.8])
def test_a_share_t_of_the_codes_stays_with_the_mask(time: float) -> None:
    noise = corruption(PathKind.absorbing, time=time)
    kept = total = 0
    for sample in range(60):
        before = wide(sample)
        places = codes_of_copies(before)
        kept += int((noise(before).tokens == before.tokens)[places].sum())
        total += int(places.sum())
    # Four standard deviations.
    assert abs(kept / total - time) < 4 * (time * (1 - time) / total) ** 0.5


def test_a_picture_has_one_time_and_each_its_own() -> None:
    """With the mask, the share of a picture that is left tells its time: over many pictures it
    spreads as times do, far wider than it would at a single time."""
    noise = corruption(PathKind.absorbing)
    shares = []
    for sample in range(80):
        before = wide(sample)
        assert before.noisy is not None
        places = codes_of_copies(before) & (before.noisy == 0)
        shares.append((noise(before).tokens == before.tokens)[places].float().mean().item())
    spread = torch.tensor(shares).std()
    assert 0.2 < spread < 0.4, "1 / sqrt(12) = 0.29 of uniform times; 0.07 of a single one"
    assert abs(torch.tensor(shares).mean() - 0.5) < 0.15


def test_noise_depends_on_seed_row_and_purpose_and_not_on_the_batch() -> None:
    alone = corruption()(wide(7)).tokens
    others = [wide(3), wide(7), wide(9)]
    names = [field.name for field in fields(Batch) if field.name != "sample_ids"]
    together = Batch(
        **{name: torch.cat([getattr(batch, name) for batch in others]) for name in names},
        sample_ids=[3, 7, 9],
    )
    assert torch.equal(corruption()(together).tokens[1], alone[0])
    assert not torch.equal(corruption()(wide(8)).tokens, alone)
    assert not torch.equal(corruption(seed=6)(wide(7)).tokens, alone)
    assert not torch.equal(corruption(purpose="validation")(wide(7)).tokens, alone)


def test_a_shift_leaves_more_noise() -> None:
    kept = {
        shift: sum(
            int((noise(batch).tokens == batch.tokens)[codes_of_copies(batch)].sum())
            for sample in range(40)
            for batch in [wide(sample)]
        )
        for shift in (1.0, 4.0)
        for noise in [corruption(PathKind.absorbing, shift=shift)]
    }
    assert kept[4.0] < 0.8 * kept[1.0]


def test_without_copies_nothing_happens() -> None:
    batch = NoisyCopies(vocabulary=VOCABULARY, room=8)(row([["words"]], columns=20))
    assert corruption()(batch) is batch
