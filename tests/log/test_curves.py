"""curves.html shows every series, whatever a run went through, and stays small."""

import math
import re
from pathlib import Path

import pytest

from emu35.config import LogConfig
from emu35.log.curves import MOST_POINTS, Track
from emu35.log.metrics import make_logger

STEPS = 40


def report(run_dir: Path, *, first: int = 1, last: int = STEPS) -> None:
    """A run like those of pretraining: two sources, one set that comes at every other validation,
    a gradient norm that is once not finite."""
    log = make_logger(
        config=LogConfig(every=1),
        run_dir=run_dir,
        name="a <b> & c",
        total_steps=STEPS,
        start_step=first - 1,
    )
    for step in range(first, last + 1):
        metrics = {
            "loss": 4 / step,
            "loss_text": 3 / step,
            "loss_visual": 5 / step,
            "loss/web_pages": 2 / step,
            "loss/videos": 6 / step,
            "share/web_pages": 0.5,
            "share/videos": 0.5,
            "lr": 1e-5 * step / STEPS,
            "grad_norm": math.inf if step == 7 else 1.5,
            "tokens": 100,
        }
        if step > 20:  # a source that came to its end
            del metrics["loss/videos"], metrics["share/videos"]
        log.step(step, metrics)
        if step % 10 == 0:
            found = {"t2i/loss": 7 / step, "empty/loss": math.nan}
            if step % 20 == 10 or step == STEPS:
                found["isg_bench/loss"] = 8 / step
            log.validation(step, found)
    log.close()


def page(run_dir: Path) -> str:
    return (run_dir / "curves.html").read_text(encoding="utf-8")


def charts(text: str) -> dict[str, dict[str, str]]:
    """Title -> name -> newest value, as the legends show them."""
    return {
        title: dict(re.findall(r"</i>(.*?) <b>(.*?)</b>", legend))
        for title, legend in re.findall(
            r"<figcaption>(.*?)</figcaption>.*?<div class=\"legend\">(.*?)</div>", text
        )
    }


def test_every_series_of_a_run_is_drawn(tmp_path: Path) -> None:
    report(tmp_path)
    text = page(tmp_path)
    found = charts(text)
    assert found["Loss"] == {"loss": "0.1"}
    assert found["Loss by modality"] == {"loss text": "0.075", "loss visual": "0.125"}
    assert found["Loss by source"] == {"web pages": "0.05", "videos": "0.3"}
    assert found["Validation loss"] == {"t2i": "0.175", "isg bench": "0.2"}
    assert found["Learning rate"] == {"lr": "1e-05"}
    assert found["Gradient norm"] == {"grad norm": "1.5"}
    assert "a &lt;b&gt; &amp; c" in text
    assert "Step 40 of 40" in text
    assert "nan" not in text.lower().replace("nance", "")
    assert "inf" not in re.sub(r"[a-z-]+:[^;]*;", "", text).lower()


def test_the_page_is_there_from_the_first_validation_on(tmp_path: Path) -> None:
    log = make_logger(config=LogConfig(every=1), run_dir=tmp_path, name="x", total_steps=9)
    log.step(1, {"loss": 3.0})
    assert not (tmp_path / "curves.html").exists()
    log.validation(1, {"text/loss": 2.5})
    assert charts(page(tmp_path)) == {"Loss": {"loss": "3"}, "Validation loss": {"text": "2.5"}}
    assert not list(tmp_path.glob(".*")), "written in one go, nothing temporary left"
    log.close()


def test_rewards_stand_by_task_with_their_parts(tmp_path: Path) -> None:
    log = make_logger(config=LogConfig(every=1), run_dir=tmp_path, name="x", total_steps=9)
    metrics = {"loss": 0.0, "reward": 5.0, "reward/scenes": 6.0, "reward/words": 4.0}
    metrics |= {"reward/scenes/verifier": 7.0, "reward/scenes/ocr": 2.0}
    metrics |= {"heldout/scenes/judge": 3.0, "kl": 0.5, "kl_text": 0.25, "kl_visual": 0.75}
    log.step(1, metrics)
    log.validation(1, {"held/reward": 4.5, "other/reward": 3.5, "held/ocr": 2.5, "psnr": 20.0})
    log.close()
    found = charts(page(tmp_path))
    assert found["Reward"] == {"reward": "5", "scenes": "6", "words": "4"}
    assert found["Reward of scenes"] == {"verifier": "7", "ocr": "2"}
    assert found["Held-out rewards"] == {"scenes/judge": "3"}
    assert found["kl"] == {"kl": "0.5", "kl text": "0.25", "kl visual": "0.75"}
    assert found["Validation: reward"] == {"held": "4.5", "other": "3.5"}
    assert found["Validation: ocr"] == {"held": "2.5"}
    assert found["Validation: psnr"] == {"psnr": "20"}


@pytest.mark.parametrize("lost", [0, 3])
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path: Path, lost: int) -> None:
    report(tmp_path / "whole")
    report(tmp_path / "parts", last=23)
    report(tmp_path / "parts", first=24 - lost)

    def timeless(run: Path) -> str:
        return re.sub(r"<figure[^>]*><figcaption>tokens per s.*?</figure>", "", page(run))

    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")


def test_a_long_run_is_drawn_in_few_points_that_keep_its_shape() -> None:
    track = Track()
    for step in range(1, 100_001):
        track.add(step, 10 / math.sqrt(step))
    points = track.drawn()
    assert MOST_POINTS / 2 <= len(points) <= MOST_POINTS
    assert points[-1][0] == 100_000
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    for x, y in points[10:]:
        assert y == pytest.approx(10 / math.sqrt(x), rel=0.1)
    mean = sum(10 / math.sqrt(step) for step in range(1, 100_001)) / 100_000
    assert sum(y for _, y in points[:-1]) / (len(points) - 1) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("value", [0.0, 1 / 6, -3.0, 1e-9, 1e12])
def test_a_curve_that_does_not_move_is_drawn(tmp_path: Path, value: float) -> None:
    log = make_logger(config=LogConfig(every=1), run_dir=tmp_path, name="x", total_steps=9)
    for step, factor in ((1, 1.0), (2, 1 + 1e-16), (3, 1 - 1e-15)):
        log.step(step, {"loss": value * factor, "share/a": value * factor})
    log.close()
    (line, other) = re.findall(r"<polyline points=\"(.*?)\"", page(tmp_path))
    for points in (line, other):
        assert all(0 <= float(y) <= 300 for y in re.findall(r",(\S+)", points))
