"""One truth: the same losses from every layout, micro-batch size and packing."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool


@pytest.fixture(scope="module")
def reference(pools: dict[int, RankPool]) -> dict:
    return pools[1].train(spans=True)


def assert_same(run: dict, reference: dict) -> None:
    ours, theirs = run["metrics"], reference["metrics"]
    assert len(ours) == len(theirs) == 5
    for a, b in zip(ours, theirs, strict=True):
        assert a["tokens"] == b["tokens"]
        names = {name for name in b if name.startswith(("loss", "share/"))}
        assert names >= {"loss", "loss_text", "loss_visual", "loss/text", "share/text"}
        assert names == {name for name in a if name.startswith(("loss", "share/"))}
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-6), name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert run["validation"] == pytest.approx(reference["validation"], rel=1e-6)


def test_the_losses_of_the_sources_add_up_to_the_loss(reference: dict) -> None:
    for metrics in reference["metrics"]:
        parts = {
            name: (metrics[f"share/{name}"], metrics[f"loss/{name}"])
            for name in ("images", "stories", "text")
        }
        assert sum(share for share, _ in parts.values()) == pytest.approx(1.0, rel=1e-6)
        assert all(0 < share < 1 for share, _ in parts.values())
        weighted = sum(share * loss for share, loss in parts.values())
        assert weighted == pytest.approx(metrics["loss"], rel=1e-6)
        assert len({loss for _, loss in parts.values()}) == 3


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "tp2-sp": {"ranks": 2, "tp": 2, "sp": True},
    "dp2-zero1-overlap": {"ranks": 2, "zero1": True, "engine": OVERLAP},
    "cp2": {"ranks": 2, "cp": 2},
    "pp2-vpp2": {"ranks": 2, "pp": 2, "vpp": 2},
}
MORE_LAYOUTS = {
    "tp2": {"ranks": 2, "tp": 2},
    "tp4-sp": {"ranks": 4, "tp": 4, "sp": True},
    "dp2": {"ranks": 2},
    "dp2-overlap": {"ranks": 2, "engine": {"overlap_grad_reduce": True}},
    "dp4-zero1": {"ranks": 4, "zero1": True, "micro_batch_size": 1},
    "one-zero1-overlap": {"ranks": 1, "zero1": True, "engine": OVERLAP},
    "tp2-zero1-overlap": {"ranks": 2, "tp": 2, "zero1": True, "engine": OVERLAP},
    "pp2": {"ranks": 2, "pp": 2},
    "pp2-uneven": {"ranks": 2, "pp": 2, "pp_layers": [3, 1]},
    "pp2-vpp2-overlap": {"ranks": 2, "pp": 2, "vpp": 2, "engine": {"overlap_p2p": True}},
    "pp2-zero1-vpp2-overlap": {
        "ranks": 4,
        "pp": 2,
        "vpp": 2,
        "zero1": True,
        "engine": {**OVERLAP, "overlap_p2p": True},
    },
    "pp4": {"ranks": 4, "pp": 4},
    "cp2-a2a": {"ranks": 2, "cp": 2, "cp_comm_type": "a2a"},
    "cp4": {"ranks": 4, "cp": 4},
    "cp4-a2a": {"ranks": 4, "cp": 4, "cp_comm_type": "a2a"},
    "tp2-pp2-sp-zero1": {"ranks": 4, "tp": 2, "pp": 2, "sp": True, "zero1": True},
    "tp2-cp2-sp-zero1-recompute": {
        "ranks": 4,
        "tp": 2,
        "cp": 2,
        "sp": True,
        "zero1": True,
        "engine": {"recompute": "full"},
    },
    "tp2-cp2-a2a-selective": {
        "ranks": 4,
        "tp": 2,
        "cp": 2,
        "cp_comm_type": "a2a",
        "engine": {
            "recompute": "selective",
            "recompute_modules": ["core_attn", "layernorm", "mlp"],
        },
    },
    "pp2-cp2": {"ranks": 4, "pp": 2, "cp": 2},
    "tp2-dp2-zero1": {"ranks": 4, "tp": 2, "zero1": True, "micro_batch_size": 1},
}


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_two_ranks_train_what_one_trains(
    layout: dict, reference: dict, pools: dict[int, RankPool]
) -> None:
    assert_same(_train(pools, layout), reference)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("layout", MORE_LAYOUTS.values(), ids=MORE_LAYOUTS)
def test_more_layouts_train_what_one_trains(
    layout: dict, reference: dict, pools: dict[int, RankPool]
) -> None:
    assert_same(_train(pools, layout), reference)


def _train(pools: dict[int, RankPool], layout: dict) -> dict:
    spec = dict(layout)
    return pools[spec.pop("ranks")].train(spans=True, **spec)


@pytest.mark.parametrize(
    "split",
    [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"packed": False, "micro_batch_size": 4}],
    ids=["micro1", "micro4", "unpacked"],
)
def test_micro_batches_and_packing_do_not_change_the_loss(
    split: dict, reference: dict, pools: dict[int, RankPool]
) -> None:
    assert_same(pools[1].train(spans=True, **split), reference)


@pytest.mark.parametrize(
    "engine",
    [
        {"recompute": "full"},
        {"recompute": "full", "recompute_layers": 2},
        {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
        {"recompute": "selective", "recompute_modules": ["layernorm"]},
    ],
    ids=["full", "two-layers", "attention-mlp", "norms"],
)
def test_recomputed_activations_are_the_kept_ones(engine: dict, pools: dict[int, RankPool]) -> None:
    """Bit for bit, dropout included: the same numbers are drawn again."""
    kept = pools[1].train(steps=2, dropout=0.1)
    assert pools[1].train(steps=2, dropout=0.1, engine=engine) == kept


GLOBAL_ROWS = st.lists(
    st.lists(st.integers(1, 24), max_size=3).filter(lambda lengths: sum(lengths) <= 48),
    min_size=8,
    max_size=8,
).filter(lambda rows: any(length > 1 for lengths in rows for length in lengths))
"""The documents of eight rows: some rows empty, some documents of a single token."""


@pytest.mark.multiproc
@settings(
    max_examples=6,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=GLOBAL_ROWS,
    split=st.sampled_from([{"micro_batch_size": 4}, {"packed": False, "micro_batch_size": 1}]),
    layout=st.sampled_from(
        [
            {"tp": 2, "sp": True},
            {"cp": 2},
            {"cp": 2, "cp_comm_type": "a2a"},
            {"pp": 2},
            {"zero1": True, "micro_batch_size": 1},
        ]
    ),
)
def test_any_documents_give_one_loss_and_gradient(
    rows: list[list[int]], split: dict, layout: dict, pools: dict[int, RankPool]
) -> None:
    common = {"steps": 1, "lengths": rows, "spans": True, "validate": False}
    whole = pools[1].train(**common)["metrics"][0]
    for found in (pools[1].train(**common, **split), pools[2].train(**common, **layout)):
        (metrics,) = found["metrics"]
        assert metrics["tokens"] == whole["tokens"] == sum(map(sum, rows))
        assert metrics["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "layout",
    [{"ranks": 1}, {"ranks": 2, "zero1": True}, {"ranks": 2, "tp": 2}],
    ids=["one", "dp2-zero1", "tp2"],
)
def test_matrices_decay_and_norms_do_not(layout: dict, pools: dict[int, RankPool]) -> None:
    """AdamW's decay is lr x weight decay x weight, apart from the gradient: the same first step
    with and without it differs by just that."""
    decay, rate = 0.4, 1e-2 / 2  # half-way through the warm-up
    spec = {**layout, "validate": False}
    start, plain, decayed = (
        _train(pools, {**spec, "steps": steps, "weight_decay": value})["weights"]
        for steps, value in ((0, 0.0), (1, 0.0), (1, decay))
    )
    norms = {name for name in start if "norm" in name}
    assert len(norms) == 4 * 4 + 1  # before attention and MLP, of queries and of keys; the last
    for name in start:
        lost = plain[name] - decayed[name]
        expected = 0.0 if name in norms else rate * decay * start[name]
        assert lost == pytest.approx(expected, abs=2e-6), name
        if name in norms:
            assert start[name] > 1, "a norm that decayed would show"


def test_bf16_trains_close_to_fp32(reference: dict, pools: dict[int, RankPool]) -> None:
    run = pools[1].train(spans=True, precision="bf16")
    for a, b in zip(run["metrics"], reference["metrics"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
