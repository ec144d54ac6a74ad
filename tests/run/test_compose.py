"""Overrides to a configuration: what is accepted, and that every mistake is named at once."""

from pathlib import Path

import pytest

from emu35.config import IBQConfig, PretrainConfig, SFTConfig, TokenDataConfig
from emu35.config.data import Overlong
from emu35.errors import ConfigError
from emu35.run.compose import compose


def problems_of(*overrides: str, configs: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, configs=configs)
    return caught.value.problems


def test_nothing_chosen_is_a_valid_configuration():
    config = compose([])
    assert isinstance(config.stage, PretrainConfig)
    assert config.run_dir == "runs/run"


def test_values_override_the_experiment_and_name_fills_the_run_folder():
    config = compose(["experiment=demo/pretrain", "optim.lr=3e-4", "name=mine"])
    assert config.optim.lr == 3e-4
    assert config.run_dir == "runs/mine"


def test_kind_selects_the_class():
    assert isinstance(compose(["stage=sft", "data.overlong=drop"]).stage, SFTConfig)
    assert isinstance(compose(["experiment=tiny/ibq_131k"]).model, IBQConfig)


def test_sources_can_be_added_changed_and_removed():
    config = compose(
        [
            "experiment=demo/pretrain",
            "data.sources.mine.path=shards/mine",
            "+data.sources.mine.ratio=2",
            "data.sources.scenes_t2i.path=elsewhere",
            "~data.sources.photos_t2i",
        ]
    )
    assert isinstance(config.data, TokenDataConfig)
    assert "photos_t2i" not in config.data.sources
    assert config.data.sources["mine"].ratio == 2.0
    assert config.data.sources["scenes_t2i"].path == "elsewhere"


def test_a_section_can_refer_to_another():
    config = compose(["optim.lr=0.01", "optim.min_lr=${optim.lr}"])
    assert config.optim.min_lr == 0.01


@pytest.mark.parametrize(
    "path", ["/data/it's here", "a=b/c", "a b", "x(1)", "/a%b", "C:\\d", "~/x"]
)
def test_paths_need_no_quotes(path: str):
    assert compose([f"run_dir={path}"]).run_dir == path


def test_counts_may_be_written_as_powers_but_not_as_fractions():
    assert compose(["stage.steps=1e3"]).stage.steps == 1000
    assert problems_of("stage.steps=2.5") == ["stage.steps=2.5 is a number; expected an integer"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.stpes=5", "unknown key 'stage.stpes' in PretrainConfig. Did you mean 'steps'?"),
        ("modle=demo", "unknown key 'modle' in RunConfig. Did you mean 'model'?"),
        ("lr=1", "unknown key 'lr' in RunConfig. Did you mean 'optim.lr'?"),
        ("experimnt=x", "unknown key 'experimnt' in RunConfig. Did you mean 'experiment'?"),
        ("stage.steps=abc", "stage.steps='abc' is a string; expected an integer"),
        ("stage.steps=true", "stage.steps=true is a boolean; expected an integer"),
        ("stage.steps=null", "stage.steps=null is no value; expected an integer"),
        ("parallel.sp=1", "parallel.sp=1 is an integer; expected true or false"),
        ("optim.lr=nan", "optim.lr=nan must be a finite number"),
        ("optim.betas=0.9", "optim.betas=0.9 is a number; expected a list, as in [1, 2]"),
        ("optim.betas=[0.9,x]", "optim.betas[1]='x' is a string; expected a number"),
        (
            "stage.precision=bf61",
            "stage.precision='bf61' is not possible; use one of fp32, bf16. Did you mean 'bf16'?",
        ),
        (
            "stage.kind=sfft",
            "stage.kind='sfft' is unknown; use one of pretrain, sft, dida, dida_eval, grpo, ibq, "
            "tokenizer_eval. "
            "Did you mean 'sft'?",
        ),
        (
            "data.sources.x.ratio=1",
            "data.sources.x.path is not set and has no default; give it a value",
        ),
        (
            "stage.loss_weights=3",
            "stage.loss_weights=3 is an integer; expected a section with: "
            "text, visual, layout, control",
        ),
        (
            "~data.sources.gone",
            "~data.sources.gone removes what is not there; present: nothing",
        ),
        ("stage.steps=1,2", "'stage.steps=1,2' describes several runs; one run has one value"),
        ("optim.betas=[0.9", "cannot read 'optim.betas=[0.9'; an override is key=value"),
        ("stage.steps", "cannot read 'stage.steps'; an override is key=value"),
        ("seed=${nowhere}", "seed='${nowhere}': Interpolation key 'nowhere' not found"),
        ("parallel.tp=3 launch.nproc=3", "tp=3 does not divide num_kv_heads=2"),
    ],
)
def test_each_mistake_is_named_with_its_remedy(override: str, message: str):
    problems = problems_of(*override.split(" "))
    assert problems[0].startswith(message)


def test_a_field_that_does_not_exist_cannot_be_added():
    (problem,) = problems_of("+stage.foo=1")
    assert problem.startswith("unknown key 'stage.foo' in PretrainConfig. It has: kind, steps,")


def test_all_mistakes_are_reported_together():
    problems = problems_of(
        "stage.stpes=5", "optim.lr=fast", "nonsense", "parallel.tp=3", "launch.nproc=3"
    )
    assert len(problems) == 4
    assert [p.split(" ")[0] for p in problems] == ["cannot", "unknown", "optim.lr='fast'", "tp=3"]


def test_a_misspelt_option_is_answered_with_the_ones_there_are():
    (problem,) = problems_of("experiment=demo/pretrian", "data.paths=[x]")
    assert problem.startswith("unknown experiment 'demo/pretrian'; available: ")
    assert problem.endswith("Did you mean 'demo/pretrain'?")


def test_beside_a_misspelt_option_certain_mistakes_are_still_named():
    problems = problems_of("stage=sftt", "stage.stpes=1")
    assert [p.split(" ")[0] for p in problems] == ["unknown", "unknown"]
    assert "stage.stpes" in problems[1]


def test_no_experiment_can_be_said_aloud():
    assert compose(["experiment=null", "model=tiny"]) == compose(["model=tiny"])


def test_what_is_no_section_has_no_fields():
    problems = problems_of("model=bogus", "seed.foo=1")
    assert problems[1] == "seed.foo: seed is a single value; use seed=VALUE"


def test_a_folder_of_configurations_must_exist(tmp_path: Path):
    (problem,) = problems_of("model=tiny", configs=tmp_path / "nowhere")
    assert problem.startswith(f"--configs {tmp_path}/nowhere is no folder")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.ch_mult=[]", "model.ch_mult=[] must name at least one resolution level"),
        ("model.ch_mult=[1,0]", "model.ch_mult=[1, 0] must name at least one resolution level"),
        ("model.in_channels=0", "model.in_channels=0 "),
        (
            "seed=999999999999999999999999",
            "seed=999999999999999999999999 must lie in 0..4294967295",
        ),
        ("seed=-1", "seed=-1 must lie in 0.."),
    ],
)
def test_numbers_that_no_run_could_use(override: str, message: str):
    assert any(text.startswith(message) for text in problems_of("experiment=demo/ibq", override))


def test_interleaved_stages_need_whole_groups_of_micro_batches():
    layout = ("model=demo", "parallel.pp=2", "parallel.vpp=2", "launch.nproc=2")
    (problem,) = problems_of(*layout, "stage.global_batch_size=3")
    assert problem.startswith("parallel.vpp=2 interleaves micro-batches in groups of pp=2")
    assert compose([*layout, "stage.global_batch_size=4"]).parallel.vpp == 2


def test_a_group_is_chosen_once():
    assert problems_of("model=demo", "model=tiny") == ["model is chosen twice: demo and tiny"]


def test_a_folder_of_ones_own_experiments(tmp_path: Path):
    own = tmp_path / "experiment"
    own.mkdir()
    (own / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [demo/pretrain, {override /model: tiny}, _self_]\n"
        "stage: {steps: 7}\n"
    )
    config = compose(["experiment=mine"], configs=tmp_path)
    assert config.stage.steps == 7
    assert config.name == "demo_pretrain"
    (own / "mine.yaml").write_text("# @package _global_\nstage: {stpes: 7}\n")
    assert "Did you mean 'steps'?" in problems_of("experiment=mine", configs=tmp_path)[0]
    (own / "mine.yaml").write_text("# @package _global_\ndefaults: [{override /model: nope}]\n")
    assert "nope" in problems_of("experiment=mine", configs=tmp_path)[0]
    (own / "mine.yaml").write_text("stage: [unclosed\n")
    assert "mine.yaml" in problems_of("experiment=mine", configs=tmp_path)[0]


def test_composing_leaves_no_trace():
    assert compose(["experiment=demo/pretrain"]) == compose(["experiment=demo/pretrain"])
    assert compose([]) != compose(["experiment=demo/pretrain"])


def test_fine_tuning_never_makes_documents_of_the_tails_of_others():
    (problem,) = problems_of("stage=sft")
    assert "a tail without its prompt teaches nothing; use data.overlong=drop" in problem
    for stage in ("sft_s1", "sft_s2"):
        data = compose([f"experiment=emu35_34b/{stage}"]).data
        assert isinstance(data, TokenDataConfig)
        assert data.overlong is Overlong.drop
