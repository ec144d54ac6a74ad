"""Noisy copies train alike in every layout: the same noise, the same two losses, one gradient."""

import pytest
from rank_pool import RankPool
from test_layouts import LAYOUTS, MORE_LAYOUTS

from emu35.config import PathKind

LORA = {"rank": 4, "alpha": 12.0}
NO_MLP = {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm"]}


@pytest.fixture(scope="module")
def reference(pools: dict[int, RankPool]) -> dict:
    return pools[1].train(dida="metric")


@pytest.fixture(scope="module")
def adapted(pools: dict[int, RankPool]) -> dict:
    return pools[1].train(dida="metric", lora=LORA)


def assert_same(run: dict, reference: dict) -> None:
    assert len(run["metrics"]) == len(reference["metrics"]) == 5
    for ours, theirs in zip(run["metrics"], reference["metrics"], strict=True):
        for name in ("tokens", "pictures", "pictures_copied"):
            assert ours[name] == theirs[name]
        names = {name for name in theirs if name.startswith(("loss", "share/"))}
        assert names >= {"loss", "loss_noisy", "loss_next_token", "loss_text", "loss_visual"}
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    times = {"held_out", "held_out_t25", "held_out_t50", "held_out_t75"}
    assert {name.partition("/")[0] for name in reference["validation"]} == times
    assert run["validation"] == pytest.approx(reference["validation"], rel=1e-6)


def layouts(spec: dict[str, dict], *, slow: bool) -> list:
    marks = [pytest.mark.slow] if slow else []
    return [pytest.param(layout, id=name, marks=marks) for name, layout in spec.items()]


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "layout", [*layouts(LAYOUTS, slow=False), *layouts(MORE_LAYOUTS, slow=True)]
)
def test_every_layout_trains_what_one_process_trains(
    layout: dict, reference: dict, pools: dict[int, RankPool]
) -> None:
    spec = dict(layout)
    assert_same(pools[spec.pop("ranks")].train(dida="metric", **spec), reference)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "layout",
    [
        *layouts({name: LAYOUTS[name] for name in ("tp2-sp", "cp2")}, slow=False),
        pytest.param({"ranks": 1, "engine": {"recompute": "full"}}, id="one-recompute"),
        pytest.param({"ranks": 1, "engine": NO_MLP}, id="one-selective", marks=pytest.mark.slow),
        *layouts(
            {
                "cp2-a2a": MORE_LAYOUTS["cp2-a2a"],
                "pp2-recompute": {"ranks": 2, "pp": 2, "engine": {"recompute": "full"}},
                "tp2-cp2-sp-zero1-recompute": MORE_LAYOUTS["tp2-cp2-sp-zero1-recompute"],
            },
            slow=True,
        ),
    ],
)
def test_adapters_of_copies_train_alike_too(
    layout: dict, adapted: dict, pools: dict[int, RankPool]
) -> None:
    spec = dict(layout)
    assert_same(pools[spec.pop("ranks")].train(dida="metric", lora=LORA, **spec), adapted)


def test_adapters_of_copies_leave_the_next_tokens_as_they_were(
    adapted: dict, pools: dict[int, RankPool]
) -> None:
    """Bit for bit, after steps that changed what is predicted of the copies."""
    losses = [metrics["loss_next_token"] for metrics in adapted["metrics"]]
    noisy = [metrics["loss_noisy"] for metrics in adapted["metrics"]]
    frozen = pools[1].train(dida="metric", lora=LORA, optim={"lr": 0.0})
    assert losses == [metrics["loss_next_token"] for metrics in frozen["metrics"]]
    assert all(a < b for a, b in zip(noisy[2:], _noisy(frozen)[2:], strict=True))
    assert adapted["validation"]["held_out/loss"] == frozen["validation"]["held_out/loss"]


def _noisy(run: dict) -> list[float]:
    return [metrics["loss_noisy"] for metrics in run["metrics"]]


@pytest.mark.parametrize("kind", list(PathKind))
def test_the_loss_is_the_sum_of_its_two_means(kind: PathKind, pools: dict[int, RankPool]) -> None:
    for metrics in pools[1].train(dida=str(kind), steps=2)["metrics"]:
        total = metrics["loss_next_token"] + metrics["loss_noisy"]
        assert metrics["loss"] == pytest.approx(total, rel=1e-6)
