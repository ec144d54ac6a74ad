"""``stage=dida_eval``: the table against independent figures, going on, and refusals."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from test_pretrain import CODES, config_of, write_shards
from tiny_vision import write_tiny_ibq

from emu35.checkpoint.source import describe
from emu35.cli import main
from emu35.config import DiDAConfig
from emu35.config.io import write_config
from emu35.data.scenes.describe import Scene
from emu35.data.scenes.quality import ScenePrompt
from emu35.data.scenes.render import render
from emu35.inference.grammar import GridSize
from emu35.inference.request import DenoiseOptions
from emu35.stages import dida, picture_features
from emu35.stages.dida_eval.decoders import Asking, Decoding, evaluate_decoder, open_evaluation
from emu35.tokens.document import Image, Part, Text
from emu35.tokens.template import PromptTemplate, Task, build_prompt
from emu35.tokens.text import build_text_tokenizer
from emu35.vision.codec import load_codec

SIDE = 4
PROMPTS = 20
SAMPLERS = ("kinetic_euler", "entropy_bound")
PICTURES: list[Part] = [Text("a picture"), Image(np.arange(6).reshape(2, 3)), Text("b")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapted run that validated itself, ``run``; what it validated on, and
    prompts."""
    place = tmp_path_factory.mktemp("dida_eval")
    vision = write_tiny_ibq(place / "vision", codes=CODES)
    shards = write_shards(place / "pictures", tokenizer=vision, parts=PICTURES)
    config = config_of(sources={"pictures": shards}, validation={"seen": shards}, vision=vision)
    config.stage = DiDAConfig(
        steps=2,
        global_batch_size=2,
        micro_batch_size=2,
        noisy_length=config.data.sequence_length,  # type: ignore[attr-defined]
        responses_only=False,
    )
    config.optim.lr = 1e-2
    (place / "run").mkdir()
    write_config(config, place / "run")
    dida.run(config, run_dir=place / "run")
    colours, shapes = ("red", "blue", "green", "pink"), ("circle", "star", "square", "triangle")
    lines = [
        json.dumps(
            {
                "prompt": f"a {colours[n % 4]} {shapes[n // 4 % 4]}",
                "scene": {
                    "background": "white",
                    "objects": [
                        {
                            "colour": colours[n % 4],
                            "shape": shapes[n // 4 % 4],
                            "size": "large",
                            "place": "centre",
                        }
                    ],
                },
            }
        )
        for n in range(PROMPTS)
    ]
    (place / "prompts.jsonl").write_text("\n".join(lines))
    return place


def evaluate(source: Path, run_dir: Path, *overrides: str) -> int:
    """The command, with guidance."""
    return main(
        [
            "run",
            "stage=dida_eval",
            f"run_dir={run_dir}",
            f"stage.init_from={source / 'run'}",
            f"stage.prompts={source / 'prompts.jsonl'}",
            f"stage.size=[{SIDE},{SIDE}]",
            "stage.guidance=3",
            "stage.batch_size=8",
            "stage.denoise_steps=[2,3]",
            "stage.times=[0.25,0.75]",
            "stage.shown=2",
            "data.sequence_length=64",
            "launch.threads=1",
            *overrides,
        ]
    )


@pytest.fixture(scope="module")
def done(source: Path) -> Path:
    run_dir = source / "evaluation"
    samplers = "stage.samplers=[kinetic_euler,entropy_bound]"
    assert evaluate(source, run_dir, samplers, f"data.validation.seen.path={source}/pictures") == 0
    return run_dir


def read(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "evaluation.json").read_text())


def drawn(run_dir: Path, name: str, *, source: Path) -> torch.Tensor:
    """Pixels of a row's codes, as the tokenizer decodes them, in the levels of a PNG file."""
    codes = np.load(run_dir / "rows" / f"{name}.npz")["codes"].astype(np.int64)
    pixels = load_codec(source / "vision").decode(torch.from_numpy(codes))
    return ((pixels + 1) * 127.5).clamp(0, 255).byte().float() / 127.5 - 1


def fid(a_B3HW: torch.Tensor, b_B3HW: torch.Tensor, *, source: Path) -> float:
    """The distance in the tokenizer's feature space, computed with scipy."""
    codec = load_codec(source / "vision")
    vectors = []
    for pixels_B3HW in (a_B3HW, b_B3HW):
        latents = codec.latents(pixels_B3HW).double().flatten(2).numpy()
        vectors.append(np.concatenate([latents.mean(2), latents.std(2)], 1))
    a, b = vectors
    root = np.real(sqrtm(np.cov(a.T) @ np.cov(b.T)))
    spread = np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)


def test_every_decoder_has_a_row_and_its_forwards(done: Path) -> None:
    rows = {row["name"]: row for row in read(done)["rows"]}
    parallel = [f"{name}_{n}" for name in ("kinetic_euler", "entropy_bound") for n in (2, 3)]
    bounds = ["true, through the tokenizer", "true"]
    assert list(rows) == ["ar", "ar_again_1", *parallel, *bounds]
    for name in parallel:
        # A plain prompt opens its picture by itself and is read beside the first canvas; where the
        # model has to open it, one forward reads the prompt alone.
        assert rows[name]["most_forwards"] == rows[name]["forwards"] == rows[name]["steps"]
        assert rows[name]["speedup"] == rows["ar"]["seconds"] / rows[name]["seconds"]
    for name in ("ar", "ar_again_1"):
        assert rows[name]["forwards"] == SIDE * SIDE, "the prompt's forward gives the first code"
    assert all(row["quality"]["pictures"] == PROMPTS for row in rows.values())
    assert rows["ar"]["frechet_ar"] is None
    assert rows["true"]["frechet_true"] is None


def test_tokens_fed_are_those_of_both_streams(done: Path) -> None:
    rows = {row["name"]: row for row in read(done)["rows"]}
    body = SIDE * SIDE + SIDE - 1
    prompts = [f"a {colour} {shape}" for colour, shape in _words()]
    tokenizer = build_text_tokenizer(describe(done.parent / "run").tokenizer)
    asked = [
        build_prompt(Task.t2i, prompt, tokenizer=tokenizer, template=PromptTemplate.plain)
        for prompt in prompts
    ]
    opening = len("4*4") + 1  # BOI and the size
    before = np.mean([len(each.conditional) + len(each.unconditional) for each in asked])
    for steps in (2, 3):
        canvases = 2 * steps * (body + 1)  # with IMG, in both streams before the cut-off at 0.9
        assert rows[f"kinetic_euler_{steps}"]["tokens"] == before + 2 * opening + canvases
    # Token by token, IMG and all of the body but its last code are fed, once.
    assert rows["ar"]["tokens"] == before + 2 * (opening + body)


def _words() -> list[tuple[str, str]]:
    colours, shapes = ("red", "blue", "green", "pink"), ("circle", "star", "square", "triangle")
    return [(colours[n % 4], shapes[n // 4 % 4]) for n in range(PROMPTS)]


def test_distances_are_those_of_the_pictures(done: Path, source: Path) -> None:
    rows = {row["name"]: row for row in read(done)["rows"]}
    reference = drawn(done, "ar", source=source)
    scene = [json.loads(line) for line in (source / "prompts.jsonl").read_text().splitlines()]
    true = np.stack(
        [np.asarray(render(Scene.from_json(item["scene"]), resolution=2 * SIDE)) for item in scene]
    )
    true_B3HW = torch.from_numpy(true).permute(0, 3, 1, 2).float() / 127.5 - 1
    for name in ("ar_again_1", "kinetic_euler_2", "entropy_bound_3"):
        pictures = drawn(done, name, source=source)
        found = (rows[name]["frechet_ar"], rows[name]["frechet_true"])
        wanted = [fid(pictures, other, source=source) for other in (reference, true_B3HW)]
        assert found == pytest.approx(wanted, rel=1e-4)
        assert found[0] > 0


def test_losses_are_those_that_the_run_reported(done: Path, source: Path) -> None:
    lines = (source / "run" / "metrics.jsonl").read_text().splitlines()
    (last,) = [row for row in map(json.loads, lines) if "val/seen/loss" in row]
    found = read(done)["losses"]["seen"]
    for time in (25, 75):
        wanted = last[f"val/seen_t{time}/loss"]
        assert found[f"0.{time}"] == pytest.approx(wanted, rel=1e-5)
    assert found["0.75"] != found["0.25"]
    assert found["clean"] > 0


def test_the_table_and_the_page_show_what_was_measured(done: Path) -> None:
    table = (done / "table.md").read_text()
    rows = read(done)["rows"]
    for row in rows:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {row['name']} |")]
        assert f"{100 * row['quality']['accuracy']['value']:.1f} [" in line
    page = (done / "evaluation.html").read_text()
    assert page.count("<svg") == 9
    assert page.count("data:image/png") == 2
    assert sorted(path.name for path in (done / "samples").iterdir()) == ["000.png", "001.png"]


def test_what_is_done_is_not_done_again(done: Path, source: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(done, tmp_path / "evaluation")
    (run_dir / "rows" / "kinetic_euler_2.json").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in (run_dir / "rows").glob("*")}
    before = read(run_dir)
    validation = f"data.validation.seen.path={source}/pictures"
    samplers = "stage.samplers=[kinetic_euler,entropy_bound]"
    more = "stage.denoise_steps=[2,3,5]"
    assert evaluate(source, run_dir, samplers, validation, more) == 0
    found = {path.name: path.stat().st_mtime_ns for path in (run_dir / "rows").glob("*")}
    changed = {name for name, time in kept.items() if found[name] != time}
    assert changed == {"kinetic_euler_2.npz"}
    assert found.keys() - kept.keys() == {
        "kinetic_euler_2.json",
        *(
            f"{name}_5.{kind}"
            for name in ("kinetic_euler", "entropy_bound")
            for kind in ("json", "npz")
        ),
    }
    again = {row["name"]: row for row in read(run_dir)["rows"]}
    clock = {"seconds", "cpu_seconds", "speedup"}
    for row in before["rows"]:
        told = {key: value for key, value in row.items() if key not in clock}
        assert {key: again[row["name"]][key] for key in told} == told


def test_rows_of_something_else_are_refused(
    done: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(done, tmp_path / "evaluation")
    validation = f"data.validation.seen.path={source}/pictures"
    samplers = "stage.samplers=[kinetic_euler,entropy_bound]"
    assert evaluate(source, run_dir, samplers, validation, "stage.guidance=2") == 2
    assert "stage.guidance: 3.0 -> 2.0" in capsys.readouterr().err
    made_of = run_dir / "rows" / "made_of.json"
    made_of.write_text(made_of.read_text().replace('"step": 2', '"step": 1'))
    assert evaluate(source, run_dir, samplers, validation) == 2
    assert "holds rows of step 1, but now it is 2" in capsys.readouterr().err


def test_without_shards_the_prompts_own_pictures_are_held_out(source: Path, tmp_path: Path) -> None:
    few = ("stage.count=3", "stage.denoise_steps=[1]", "stage.ar_seeds=1", "stage.documents=2")
    assert evaluate(source, tmp_path / "few", *few) == 0
    found = read(tmp_path / "few")
    assert set(found["losses"]["prompts"]) == {"0.25", "0.75", "clean"}
    assert all(loss > 0 for loss in found["losses"]["prompts"].values())
    assert [row["frechet_ar"] for row in found["rows"]] == [None] * 4
    assert "a set of 3 in 16 dimensions, where at least 17 are needed" in found["notes"][0]


def test_bad_numbers_are_refused_together(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "stage.samplers=[euler]": "stage.samplers[0]='euler' is not possible; use one of kinetic_e",
        "stage.denoise_steps=[4,0,4]": "0 steps; use at least 1",
        "stage.steps=8": "steps of decoding are stage.denoise_steps",
        "stage.times=[1.0]": "1.0 is no time between noise (0) and the picture (1)",
        "stage.size=[4,5]": "scenes are square",
        "stage.batch_size=0": "stage.batch_size=0 is too small",
        "launch.nproc=2": "works in one process",
        "stage.init_from=null": "stage.init_from names no model",
        "stage.prompts=": "stage.prompts names no file",
    }
    assert evaluate(source, tmp_path / "run", *wrong) == 2
    told = capsys.readouterr().err
    assert [complaint for complaint in wrong.values() if complaint not in told] == []
    assert "names one twice" in told
    assert not (tmp_path / "run").exists()


def test_missing_inputs_are_refused_together(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "stage.init_from=no_run": "stage.init_from=no_run does not exist",
        "stage.prompts=no.jsonl": "stage.prompts: prompts no.jsonl cannot be read",
        "stage.vision=no_folder": "stage.vision=no_folder is no folder",
        "data.validation.x.path=no_shards": "data.validation.x.path=no_shards is no folder",
    }
    assert evaluate(source, tmp_path / "run", *wrong) == 2
    told = capsys.readouterr().err
    assert [complaint for complaint in wrong.values() if complaint not in told] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("stage.count=21", "holds 20 prompts, but 21 are asked for"),
        ("stage.denoise_steps=[1001]", "denoise steps=1001 must lie in 1..1000"),
        ("stage.size=[16,16]", "positions, but the size needs 279"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_it_draws(
    override: str,
    complaint: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(source, tmp_path / "run", override) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run" / "rows").exists(), "nothing was drawn"


def test_held_out_codes_of_another_tokenizer_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_ibq(tmp_path / "other", codes=CODES, seed=1)
    shards = write_shards(tmp_path / "pictures", tokenizer=other, parts=PICTURES)
    assert evaluate(source, tmp_path / "run", f"data.validation.seen.path={shards}") == 2
    assert "encoded by an image tokenizer with weights" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "rows").glob("*.npz")), "nothing was drawn"


def test_a_source_that_was_not_adapted_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = shutil.copytree(source / "run", tmp_path / "plain")
    text = (plain / "config.yaml").read_text()
    begin, end = text.index("\nstage:"), text.index("\nparallel:")
    (plain / "config.yaml").write_text(f"{text[:begin]}\nstage:\n  kind: pretrain{text[end:]}")
    assert evaluate(source, tmp_path / "run", f"stage.init_from={plain}") == 2
    assert "was not adapted to parallel decoding" in capsys.readouterr().err


def test_what_inception_lacks_is_told_first(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picture_features, "find_spec", lambda name: None)
    assert evaluate(source, tmp_path / "run", "stage.features=inception") == 2
    assert "pip install 'emu35[evaluate]'" in capsys.readouterr().err


def test_the_python_interface_gives_the_same_row(done: Path, source: Path) -> None:
    described = describe(source / "run")
    lines = (source / "prompts.jsonl").read_text().splitlines()
    prompts = [
        ScenePrompt(id=str(n), prompt=item["prompt"], scene=Scene.from_json(item["scene"]))
        for n, item in enumerate(map(json.loads, lines))
    ]
    asking = Asking(
        template=described.template,
        max_positions=described.config.max_position_embeddings,
        size=GridSize(height=SIDE, width=SIDE),
        guidance=3.0,
        batch_size=5,
        seed=1234,
    )
    opened = open_evaluation(described, prompts=prompts, asking=asking)
    rows: Sequence[dict[str, Any]] = read(done)["rows"]
    for decoding in (Decoding(), Decoding(denoise=DenoiseOptions(steps=3))):
        row = evaluate_decoder(
            opened.engine, prompts, decoding=decoding, asking=asking, codec=opened.codec
        )
        (known,) = [each for each in rows if each["name"] == decoding.name]
        codes = np.load(done / "rows" / f"{decoding.name}.npz")["codes"]
        assert np.array_equal(np.stack([np.asarray(each) for each in row.codes]), codes)
        assert row.quality.accuracy.value == known["quality"]["accuracy"]["value"]
        assert row.forwards == known["forwards"], "in batches of another size as well"
