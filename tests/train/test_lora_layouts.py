"""Adapters train alike in every layout, and as the plain matrices W + scale B A would."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from test_layouts import OVERLAP, assert_same
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

LORA: dict[str, Any] = {"rank": 4, "alpha": 12.0}
SCALE = LORA["alpha"] / LORA["rank"]
MOMENT = "optimizer.state.exp_avg."
# With beta1 = 0 the first moment in a checkpoint is the gradient of the last step.
GRADIENT = {"betas": [0.0, 0.95], "clip_grad": 0.0}
BEFORE = 3


@pytest.fixture(scope="module")
def reference(pools: dict[int, RankPool]) -> dict:
    return pools[1].train(lora=LORA, spans=True)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, whole, by torch's own converter."""
    whole = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint / "state", whole)
    found = torch.load(whole, weights_only=True)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def trained(pools: dict[int, RankPool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose B are no longer zero."""
    folder = tmp_path_factory.mktemp("lora") / "trained"
    pools[1].train(lora=LORA, optim=GRADIENT, steps=BEFORE, validate=False, save=str(folder))
    return folder


@pytest.fixture(scope="module")
def oracle(pools: dict[int, RankPool], trained: Path) -> dict[str, Any]:
    """The next step's loss and gradients by the chain rule from those of whole matrices: a model
    without adapters, of the weights W + scale B A, gives dW, and then dA = scale B' dW and
    dB = scale dW A'."""
    folder = trained.with_name("merged")
    found = pools[1].train(
        merge=[str(trained), LORA],
        optim=GRADIENT,
        first_step=BEFORE + 1,
        steps=1,
        validate=False,
        save=str(folder),
    )
    before, after = tensors(trained), tensors(folder)
    gradients: dict[str, torch.Tensor] = {}
    for name in before:
        if name.endswith(".adapter.a") and not name.startswith("optimizer."):
            stem = name.removesuffix("adapter.a")
            weight = after[f"{MOMENT}{stem}weight"].double()
            a, b = before[name].double(), before[f"{stem}adapter.b"].double()
            gradients[name] = SCALE * b.transpose(-1, -2) @ weight
            gradients[f"{stem}adapter.b"] = SCALE * weight @ a.transpose(-1, -2)
    return {"loss": found["metrics"][0]["loss"], "gradients": gradients}


LAYOUTS = {
    "one-recompute": {"ranks": 1, "engine": {"recompute": "full"}},
    "tp2-sp-recompute": {"ranks": 2, "tp": 2, "sp": True, "engine": {"recompute": "full"}},
    "dp2-zero1-overlap": {"ranks": 2, "zero1": True, "engine": OVERLAP},
    "pp2-vpp2": {"ranks": 2, "pp": 2, "vpp": 2},
}
MORE_LAYOUTS = {
    "one": {"ranks": 1},
    "tp2": {"ranks": 2, "tp": 2},
    "one-selective": {
        "ranks": 1,
        "engine": {
            "recompute": "selective",
            "recompute_modules": ["core_attn", "layernorm", "mlp"],
        },
    },
    "one-two-layers": {"ranks": 1, "engine": {"recompute": "full", "recompute_layers": 2}},
    "one-micro1-recompute": {
        "ranks": 1,
        "micro_batch_size": 1,
        "engine": {"recompute": "full"},
    },
    "tp2-sp": {"ranks": 2, "tp": 2, "sp": True},
    "tp4-sp": {"ranks": 4, "tp": 4, "sp": True},
    "dp2": {"ranks": 2},
    "dp2-overlap": {"ranks": 2, "engine": {"overlap_grad_reduce": True}},
    "dp4-zero1": {"ranks": 4, "zero1": True, "micro_batch_size": 1},
    "cp2": {"ranks": 2, "cp": 2},
    "cp2-a2a": {"ranks": 2, "cp": 2, "cp_comm_type": "a2a"},
    "pp2": {"ranks": 2, "pp": 2},
    "pp2-recompute": {"ranks": 2, "pp": 2, "engine": {"recompute": "full"}},
    "pp2-uneven": {"ranks": 2, "pp": 2, "pp_layers": [3, 1]},
    "pp4": {"ranks": 4, "pp": 4},
    "tp2-pp2-sp-zero1": {"ranks": 4, "tp": 2, "pp": 2, "sp": True, "zero1": True},
    "tp2-cp2-sp-zero1-recompute": {
        "ranks": 4,
        "tp": 2,
        "cp": 2,
        "sp": True,
        "zero1": True,
        "engine": {"recompute": "full"},
    },
    "tp2-dp2-zero1-overlap": {
        "ranks": 4,
        "tp": 2,
        "zero1": True,
        "micro_batch_size": 1,
        "engine": OVERLAP,
    },
    "pp2-zero1-vpp2-overlap": {
        "ranks": 4,
        "pp": 2,
        "vpp": 2,
        "zero1": True,
        "engine": {**OVERLAP, "overlap_p2p": True, "recompute": "full"},
    },
}


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "layout",
    [
        *(pytest.param(layout, id=name) for name, layout in LAYOUTS.items()),
        *(
            pytest.param(layout, id=name, marks=pytest.mark.slow)
            for name, layout in MORE_LAYOUTS.items()
        ),
    ],
)
def test_every_adapter_gets_the_gradient_of_the_merged_matrix(
    layout: dict,
    reference: dict,
    oracle: dict[str, Any],
    trained: Path,
    pools: dict[int, RankPool],
    tmp_path: Path,
) -> None:
    """And five steps from the beginning are those of one process."""
    spec = dict(layout)
    pool = pools[spec.pop("ranks")]
    assert_same(pool.train(lora=LORA, spans=True, **spec), reference)
    found = pool.train(
        lora=LORA,
        optim=GRADIENT,
        load=str(trained),
        steps=1,
        validate=False,
        save=str(tmp_path / "after"),
        **spec,
    )
    assert found["metrics"][0]["loss"] == pytest.approx(oracle["loss"], rel=1e-5)
    state, gradients = tensors(tmp_path / "after"), oracle["gradients"]
    # The optimizer holds the adapters and nothing else.
    assert {n for n in state if n.startswith(MOMENT)} == {MOMENT + n for n in gradients}
    for name, expected in gradients.items():
        gradient = state[MOMENT + name].double()
        assert expected.abs().max() > 0, name
        error = (gradient - expected).norm() / expected.norm()
        assert error < 1e-4, (name, float(error))


def test_the_first_step_is_that_of_the_base(reference: dict, pools: dict[int, RankPool]) -> None:
    """Bit for bit, because B is zero; and the base never changes."""
    base = pools[1].train(spans=True, steps=1, validate=False)
    assert reference["metrics"][0]["loss"] == base["metrics"][0]["loss"]
    start = pools[1].train(lora=LORA, spans=True, steps=0, validate=False)["weights"]
    frozen = {name for name in start if ".adapter." not in name}
    assert all(reference["weights"][name] == start[name] for name in frozen)
    changed = {name for name in start if reference["weights"][name] != start[name]}
    assert changed == start.keys() - frozen


@pytest.mark.parametrize(
    "engine",
    [
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]},
    ],
    ids=["full", "selective"],
)
def test_recomputation_draws_the_same_dropout(engine: dict, pools: dict[int, RankPool]) -> None:
    """Bit for bit, in the adapters and beside them."""
    dropped = {**LORA, "dropout": 0.3}
    common = {"lora": dropped, "dropout": 0.1, "steps": 2, "validate": False}
    kept = pools[1].train(**common)
    assert pools[1].train(**common, engine=engine) == kept


@pytest.mark.multiproc
@pytest.mark.parametrize("sp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_ranks_hold_alike_stays_alike(sp: bool, pools: dict[int, RankPool]) -> None:
    """With dropout, of which ranks that share their tokens must draw the same."""
    found = pools[2].train(
        lora={**LORA, "dropout": 0.3}, dropout=0.1, steps=4, validate=False, tp=2, sp=sp
    )
    one, two = found["copies"]
    assert len(one) == 4 * 4  # layers x linear maps
    assert one == two


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"tp": 2, "sp": True}, id="tp2-sp"),
        pytest.param({"pp": 2, "vpp": 2}, id="pp2-vpp2", marks=pytest.mark.slow),
        pytest.param({"zero1": True}, id="zero1", marks=pytest.mark.slow),
    ],
)
def test_adapters_merge_alike_in_every_layout(
    layout: dict, oracle: dict[str, Any], trained: Path, pools: dict[int, RankPool]
) -> None:
    """Weights that are to be trained whole, and weights beside adapters of their own."""
    step = {"merge": [str(trained), LORA], "first_step": BEFORE + 1, "steps": 1, "validate": False}
    for adapters in ({}, {"lora": {"rank": 2, "alpha": 1.0}}):
        found = pools[2].train(**step, **adapters, **layout)
        assert found["metrics"][0]["loss"] == pytest.approx(oracle["loss"], rel=1e-6)
