"""Every experiment composes, and resolves to what its golden file says.

After a deliberate change: ``emu35 show experiment=X > tests/golden/experiments/X.yaml``.
"""

from pathlib import Path

import pytest

from emu35.config import DiDAConfig, LMStageConfig, TokenDataConfig
from emu35.config.io import to_yaml
from emu35.config.schema import to_plain
from emu35.planner.plan import make_plan
from emu35.run.compose import compose, find_configs, group_options

GOLDEN = Path(__file__).parents[1] / "golden" / "experiments"
EXPERIMENTS = group_options("experiment", folders=[find_configs()])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_what_its_golden_file_says(name: str):
    resolved = to_yaml(to_plain(compose([f"experiment={name}"])))
    assert resolved == (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")


def test_every_golden_file_has_its_experiment():
    found = {p.relative_to(GOLDEN).with_suffix("").as_posix() for p in GOLDEN.rglob("*.yaml")}
    assert found == set(EXPERIMENTS)


@pytest.mark.parametrize(
    ("name", "tokens", "visual", "rate"),
    [
        # Paper Table 2: 10.3T and 3.5T tokens seen.
        ("pretrain_s1", 10.3e12, 0.5, 5e-4),
        ("pretrain_s2", 3.5e12, 0.5, 1e-5),
        # Section 4.1.3: 1024 sequences x 3000 steps x 16,384 and 32,768.
        ("sft_s1", 50.3e9, 1.0, 6e-6),
        ("sft_s2", 100.7e9, 0.5, 6e-6),
        # Section 2.1: "a few billions tokens".
        ("dida", 4.2e9, 0.5, 1e-5),
    ],
)
def test_recipes_see_as_many_tokens_as_the_paper(
    name: str, tokens: float, visual: float, rate: float
):
    config = compose([f"experiment=emu35_34b/{name}"])
    plan = make_plan(config)
    assert plan["parameters"] == 34_103_460_864
    assert plan["tokens"] == pytest.approx(tokens, rel=0.01)
    assert isinstance(config.stage, LMStageConfig)
    assert config.stage.loss_weights.visual == visual
    assert config.optim.lr == rate


def test_adaptation_has_room_for_a_copy_of_every_picture_of_a_row():
    config = compose(["experiment=emu35_34b/dida"])
    stage, data = config.stage, config.data
    assert isinstance(stage, DiDAConfig)
    assert isinstance(data, TokenDataConfig)
    assert stage.noisy_length % 128 == 0
    for side in (64, 45):
        copy = side * (side + 1)
        # Beside what is copied a picture has its size, BOI and EOI.
        pictures = data.sequence_length // (copy + len(f"{side}*{side}") + 2)
        assert pictures * copy <= stage.noisy_length


@pytest.mark.parametrize("name", ["pretrain_s1", "pretrain_s2"])
def test_pretraining_shares_add_up_and_there_are_nine_validation_sets(name: str):
    data = compose([f"experiment=emu35_34b/{name}"]).data
    assert isinstance(data, TokenDataConfig)
    assert sum(source.ratio for source in data.sources.values()) == pytest.approx(1.0)
    assert len(data.validation) == 9
