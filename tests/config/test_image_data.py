"""The data section of the image tokenizer: filters and scorers as YAML gives them."""

import pytest

from emu35.config import ImageDataConfig, PictureFilterConfig
from emu35.config.images import (
    AestheticsScorerConfig,
    ClassifierScorerConfig,
    Fit,
    MissingScore,
    ScorerConfig,
)
from emu35.config.io import may_change
from emu35.config.rules import find_problems
from emu35.errors import ConfigError
from emu35.run.compose import compose


def composed(*overrides: str) -> ImageDataConfig:
    data = compose(["experiment=demo/ibq", *overrides]).data
    assert isinstance(data, ImageDataConfig)
    return data


def test_filters_and_scorers_are_read_from_the_command_line():
    data = composed(
        "data.filters=[{scorer: min_side, min: 256}, {scorer: mark, max: 0.5, missing: keep}]",
        "+data.scorers.mark={kind: classifier, path: m.onnx, fit: centre, field: pwatermark}",
        "+data.scorers.looks={kind: aesthetics_model, model: clip, head: head.pth}",
        "+data.scorers.told={field: a.b}",
        "data.buckets=aspect",
    )
    first, second = data.filters
    assert first == PictureFilterConfig(scorer="min_side", min=256.0)
    assert second.missing is MissingScore.keep
    mark = data.scorers["mark"]
    assert isinstance(mark, ClassifierScorerConfig)
    assert mark.fit is Fit.centre
    assert isinstance(data.scorers["looks"], AestheticsScorerConfig)
    assert type(data.scorers["told"]) is ScorerConfig
    assert not list(data.problems())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.filters=[{scorer: beauty, min: 1}]"], "scorer='beauty' is unknown; use one of"),
        (["data.filters=[{scorer: width}]"], "neither min nor max"),
        (["data.filters=[{scorer: width, min: 2, max: 1}]"], "min=2.0 exceeds max=1.0"),
        (["data.filters=[{scorer: width, least: 2}]"], "unknown key 'data.filters[0].least'"),
        (["+data.scorers.width={field: w}"], "has the name of a scorer that is always there"),
        (["+data.scorers.a={kind: classifier}"], "data.scorers.a.path is empty"),
        (["+data.scorers.a={kind: watermark}"], "kind='watermark' is unknown"),
        (["+data.scorers.a={}"], "data.scorers.a.field is empty"),
        (["data.flip=1.5"], "data.flip=1.5 must lie in [0, 1]"),
        (["data.width_field=w"], "belong together"),
        (["data.bucket_group=12"], "data.bucket_group=12 is not a multiple of stage.micro"),
        (["data.decode_threads=0"], "data.decode_threads=0 is too small"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(overrides, message):
    try:
        config = compose(["experiment=demo/ibq", *overrides])
        text = "\n".join(find_problems(config))
    except ConfigError as error:
        text = str(error)
    assert message in text


def test_a_run_may_go_on_with_other_threads_but_not_with_other_filters():
    assert may_change("data.decode_threads")
    assert may_change("data.scorers.mark.device")
    assert not may_change("data.filters")
    assert not may_change("data.flip")
