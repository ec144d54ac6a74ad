"""Memory by formula: against a real training step where one fits, and in its proportions."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emu35.config import LMConfig, ParallelConfig
from emu35.config.stage import adapters_of
from emu35.planner.plan import describe, make_plan
from emu35.run.compose import compose

GIB = 2**30
ADAPTED = ["stage.adapter=lora", "stage.init_from=runs/base"]


def memory(*overrides: str) -> dict[str, Any]:
    return make_plan(compose(overrides))["memory_bytes_per_rank"]


def test_terms_of_a_single_rank():
    plan = make_plan(compose(["model=tiny", "stage.precision=fp32"]))
    found = plan["memory_bytes_per_rank"]
    assert found["weights"] == 4 * plan["parameters"]
    assert found["gradients"] == 4 * plan["parameters"]
    assert found["optimizer"] == 8 * plan["parameters"]
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert found["total"] == sum(found[part] for part in parts)


def test_bf16_halves_weights_and_adds_a_main_copy():
    fp32, bf16 = memory("model=tiny"), memory("model=tiny", "stage.precision=bf16")
    assert bf16["weights"] * 2 == fp32["weights"]
    assert bf16["gradients"] == fp32["gradients"]
    assert bf16["optimizer"] * 2 == fp32["optimizer"] * 3


def test_zero1_divides_the_optimizer_over_replicas():
    base = ["model=tiny", "launch.nproc=4"]
    plain, zero = memory(*base), memory(*base, "parallel.zero1=true")
    assert zero["optimizer"] == -(-plain["optimizer"] // 4)
    assert zero["weights"] == plain["weights"]


def test_activations_follow_tokens_layers_and_layout():
    base = ["model=demo", "stage.global_batch_size=16"]
    one = memory(*base)["activations"]
    assert memory(*base, "stage.micro_batch_size=2")["activations"] == 2 * one
    assert memory(*base, "data.sequence_length=2048")["activations"] == 2 * one
    assert memory(*base, "model.num_layers=8")["activations"] == 2 * one
    split = [*base, "launch.nproc=2", "parallel.tp=2"]
    with_sp = memory(*split, "parallel.sp=true")["activations"]
    assert with_sp == pytest.approx(one / 2, rel=1e-3)
    assert with_sp < memory(*split)["activations"] < one
    # 1F1B: the first of two stages has half the layers and two micro-batches in flight.
    assert memory(*base, "launch.nproc=2", "parallel.pp=2")["activations"] == one
    assert memory(*base, "launch.nproc=2", "parallel.cp=2")["activations"] == one // 2
    dense = memory(*base, "model.attention_backend=dense")["activations"]
    assert dense - one == 4 * 1024 * 4 * 1024 * 4  # layers x rows x heads x keys x fp32


def test_the_paper_recipe_fits_an_80_gib_accelerator():
    assert memory("experiment=emu35_34b/pretrain_s1")["total"] < 80 * GIB


@pytest.mark.parametrize(
    "engine",
    [
        [],
        ["engine.recompute=selective"],
        ["engine.recompute=selective", "engine.recompute_modules=[mlp]"],
        ["engine.recompute=selective", "engine.recompute_modules=[core_attn,mlp]"],
        ["engine.recompute=full"],
        ADAPTED,
        [*ADAPTED, "stage.lora.dropout=0.1"],
        [*ADAPTED, "engine.recompute=selective", "engine.recompute_modules=[mlp]"],
    ],
    ids=[
        "kept",
        "core_attn",
        "mlp",
        "attention-mlp",
        "full",
        "adapters",
        "adapters-dropout",
        "adapters-mlp",
    ],
)
def test_activation_formula_is_near_what_a_layer_really_keeps(engine: list[str]):
    """Counts the bytes that autograd saves in a forward pass of the model itself (norms that are
    recomputed are let go only later, which this way of counting cannot see)."""
    torch = pytest.importorskip("torch")
    from emu35.model.build import build_model
    from emu35.model.context import AttentionContext
    from emu35.model.lora import train_adapters
    from emu35.model.mask import AttentionMask
    from emu35.parallel.mesh import single_process_mesh

    single_process_mesh()
    config = compose(["model=demo", "data.sequence_length=256", *engine])
    model = config.model
    saved: dict[int, dict[int, int]] = {}

    for layers in (1, 3):
        module = build_model(
            replace(model, num_layers=layers),  # type: ignore[type-var]
            vocabulary_size=64,
            parallel=ParallelConfig(),
            engine=config.engine,
            precision=config.stage.precision,
        )
        if lora := adapters_of(config.stage):
            train_adapters(module, config=lora, seed=0)
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        seen = saved.setdefault(layers, {})

        def keep(tensor: Any, seen: dict[int, int] = seen, weights: set[int] = weights) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.zeros(1, 256, dtype=torch.int64)
        context = AttentionContext(
            positions_BS=torch.arange(256)[None],
            mask=AttentionMask.causal(torch.zeros(1, 256, dtype=torch.int64)),
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = module(tokens, context=context)
        assert hidden.requires_grad
    measured = (sum(saved[3].values()) - sum(saved[1].values())) / 2
    layers = [f"model.num_layers={count}" for count in (1, 3)]
    one, three = (
        memory("model=demo", "data.sequence_length=256", *engine, count)["activations"]
        for count in layers
    )
    predicted = (three - one) / 2
    assert predicted == pytest.approx(measured, rel=0.35)


def test_full_recomputation_keeps_the_inputs_of_layers_and_one_layer():
    base = ["model=demo", "stage.global_batch_size=16"]
    kept, full = memory(*base)["activations"], memory(*base, "engine.recompute=full")["activations"]
    assert kept / 4 < full < kept / 2
    half = memory(*base, "engine.recompute=full", "engine.recompute_layers=2")["activations"]
    assert full < half < kept


def test_uneven_stages_are_planned_by_the_fullest():
    base = ["model=demo", "stage.global_batch_size=16", "launch.nproc=2", "parallel.pp=2"]
    even, uneven = memory(*base), memory(*base, "parallel.pp_layers=[1,3]")
    assert uneven["weights"] > even["weights"]
    # The last stage holds one micro-batch at a time: three layers there, four layers' worth before.
    assert uneven["activations"] == even["activations"] * 3 // 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_formula_is_what_a_process_really_grows_by(precision: str, repository: Path) -> None:
    """The benchmark measures resident memory over the whole vocabulary, where logits and the
    gradient of the weights both count."""
    script = repository / "scripts" / "bench" / "loss.py"
    size = ["--tokens", "192", "--chunk", "64", "--hidden", "128", "--precision", precision]
    done = subprocess.run(
        [sys.executable, str(script), "--only", "emu35", *size],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] == pytest.approx(found["planned"], rel=0.2)


def test_plan_counts_one_chunk_of_the_loss_and_its_weights_gradient():
    base = ["model=tiny", "stage.precision=fp32", "data.sequence_length=1024"]
    small, large = (memory(*base, f"stage.loss_chunk={n}")["logits"] for n in (100, 200))
    rows, rest = divmod(large - small, 100 * 4)
    assert rest == 0
    model = compose(base).model
    assert isinstance(model, LMConfig)
    hidden = model.hidden_size
    assert small == 4 * rows * (100 + hidden) + 2 * 4 * 1024 * hidden


def test_images_are_planned_without_a_guess_at_activations():
    plan = make_plan(compose(["experiment=tiny/ibq_131k"]))
    assert plan["memory_bytes_per_rank"]["activations"] is None
    assert "tokens_per_step" not in plan
    assert "not estimated" in describe(plan)


def test_the_tokenizer_keeps_fp32_weights_and_their_average_and_splits_moments_alone():
    split = make_plan(compose(["experiment=ibq/455m"]))
    whole = make_plan(compose(["experiment=ibq/455m", "parallel.zero1=false"]))
    count = 455_336_963
    assert split["parameters"] == count
    for plan, optimizer in ((split, -(-count * 12 // 32)), (whole, count * 8)):
        found = plan["memory_bytes_per_rank"]
        assert [found[name] for name in ("weights", "gradients", "average")] == [4 * count] * 3
        assert found["optimizer"] == optimizer
        assert found["total"] == 12 * count + optimizer


def test_adapters_are_all_that_has_gradients_and_optimizer_state():
    base = ["model=tiny", "stage.precision=bf16", "stage.init_from=runs/base"]
    lora = ["stage.adapter=lora", "stage.lora.rank=8"]
    whole, adapted = make_plan(compose(base)), make_plan(compose([*base, *lora]))
    model = compose(base).model
    assert isinstance(model, LMConfig)
    query, key = (
        heads * model.head_dim for heads in (model.num_attention_heads, model.num_kv_heads)
    )
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    sides = (hidden + query + 2 * key) + (query + hidden) + (hidden + 2 * ffn) + (ffn + hidden)
    trained = 8 * model.num_layers * sides
    assert adapted["trained_parameters"] == trained
    assert "trained_parameters" not in whole
    assert f"{trained:,} in adapters" in describe(adapted)
    found = adapted["memory_bytes_per_rank"]
    assert found["weights"] == 2 * (whole["parameters"] + trained)
    assert found["gradients"] == 4 * trained
    assert found["optimizer"] == 12 * trained
    # And the loss forms no gradient of the output layer: fp32 sums and a bf16 copy.
    logits = whole["memory_bytes_per_rank"]["logits"] - found["logits"]
    assert logits == 6 * adapted["vocabulary_size"] * hidden
    two = memory(*base, *lora, "launch.nproc=2", "parallel.tp=2")["gradients"]
    assert found["gradients"] / 2 < two < found["gradients"]


def test_the_largest_model_is_adapted_on_one_machine_of_eight():
    plan = make_plan(compose(["experiment=emu35_34b/sft_lora"]))
    assert plan["world_size"] == 8
    assert plan["memory_bytes_per_rank"]["total"] < 40 * GIB
    words = ["experiment=emu35_34b/sft_lora", "stage.adapter=none"]
    assert memory(*words)["total"] > 80 * GIB
