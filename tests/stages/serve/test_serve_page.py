"""The page at ``/`` in a real browser, against a real server."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from emu35.inference.engine import Engine
from emu35.inference.request import Update

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH; on Debian the package chromium has it"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server) -> Iterator[Page]:
    """The page, ready; it must ask for nothing but this server, and its script must not fail."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    elsewhere: list[str] = []
    failures: list[str] = []
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((server.url, "data:", "blob:"))
            else elsewhere.append(request.url)
        ),
    )
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#health")).to_have_text("ready")
    expect(page.locator("#tasks label")).to_have_count(7)
    yield page
    page.close()
    assert elsewhere == []
    assert failures == []


def choose(page: Page, task: str, *, rows: int, columns: int) -> None:
    page.locator("#tasks label", has_text=re.compile(f"^{task}$")).click()
    page.select_option("#ratio", "custom")
    page.fill("#rows", str(rows))
    page.fill("#columns", str(columns))


def test_a_picture_is_generated_and_can_be_downloaded(page: Page, tmp_path: Path) -> None:
    choose(page, "Image", rows=12, columns=16)
    page.fill("#prompt", "a red circle")
    page.fill("#seed", "7")
    page.click("#generate")
    expect(page.locator("figcaption")).to_contain_text("32 \u00d7 24 pixels", timeout=20_000)
    expect(page.locator(".facts")).to_contain_text("complete")
    expect(page.locator(".facts")).to_contain_text("seed 7")
    with page.expect_download() as download:
        page.click("text=Download")
    download.value.save_as(tmp_path / "picture.png")
    assert download.value.suggested_filename == "emu35_7_0.png"
    assert Image.open(tmp_path / "picture.png").size == (32, 24)
    # The second answer goes to the history; the first one comes back from it.
    page.fill("#prompt", "a blue square")
    page.click("#generate")
    expect(page.locator("#history button")).to_have_count(2, timeout=20_000)
    page.locator("#history button").first.click()
    expect(page.locator(".asked")).to_contain_text("a red circle")


def test_the_picture_grows_and_stop_leaves_it_as_it_is(
    page: Page, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def unhurried(engine: Engine) -> list[Update]:
        time.sleep(0.01)  # this model draws faster than a browser clicks
        return step(engine)

    monkeypatch.setattr(Engine, "step", unhurried)
    choose(page, "Image", rows=20, columns=22)
    page.fill("#prompt", "slowly")
    aborted = server.metric('emu35_requests_ended_total{reason="abort"}')
    page.click("#generate")
    # A preview of the first rows is on the screen before the picture is complete.
    expect(page.locator(".canvas img")).to_have_attribute(
        "src", re.compile("^data:image/jpeg"), timeout=20_000
    )
    page.click("#stop")
    expect(page.locator("figcaption")).to_contain_text("unfinished")
    expect(page.locator(".facts")).to_contain_text("stopped")
    expect(page.locator("#generate")).to_be_enabled()
    for _ in range(50):
        if server.metric('emu35_requests_ended_total{reason="abort"}') > aborted:
            break
        page.wait_for_timeout(50)
    assert server.metric('emu35_requests_ended_total{reason="abort"}') == aborted + 1
    assert server.metric("emu35_cache_used_tokens") == 0


def test_a_story_has_text_and_pictures_and_goes_on(page: Page) -> None:
    choose(page, "Story", rows=4, columns=4)
    page.click("#more summary")
    page.fill("#max_tokens", "90")
    page.fill("#seed", "2")
    page.fill("#prompt", "once")
    page.click("#generate")
    expect(page.locator(".facts button")).to_be_visible(timeout=20_000)
    assert page.locator(".picture").count() >= 1
    assert page.locator(".words").count() >= 1
    page.check("#continue")
    page.fill("#prompt", "and then")
    page.click("#generate")
    expect(page.locator("#history button")).to_have_count(2, timeout=20_000)
    expect(page.locator(".error")).to_have_count(0)


def test_references_are_added_and_errors_are_shown(page: Page, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "reference.png")
    page.set_input_files("#files", tmp_path / "reference.png")
    expect(page.locator("#references img")).to_have_count(1)
    expect(page.locator("input[value=x2i]")).to_be_checked()
    page.select_option("#ratio", "custom")
    page.fill("#rows", "40")
    page.fill("#columns", "40")
    page.fill("#prompt", "make it blue")
    page.click("#generate")
    expect(page.locator(".error")).to_contain_text("the size needs 1647")
    page.fill("#rows", "4")
    page.fill("#columns", "5")
    page.click("#generate")
    expect(page.locator("figcaption")).to_contain_text("10 \u00d7 8 pixels", timeout=20_000)


def test_a_reference_is_removed_by_the_keyboard(page: Page, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "reference.png")
    choosers: list[object] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    for key in ("Enter", " "):
        page.set_input_files("#files", tmp_path / "reference.png")
        expect(page.locator("#references img")).to_have_count(1)
        page.locator("#references button").focus()
        page.keyboard.press(key)
        expect(page.locator("#references img")).to_have_count(0)
    page.wait_for_timeout(200)
    assert choosers == []
    # On the field itself the same key chooses files.
    page.locator("#drop").focus()
    with page.expect_file_chooser():
        page.keyboard.press("Enter")


def test_no_other_page_frames_it_and_heads_are_answered(server) -> None:
    for path in ("/", "/health", "/metrics"):
        head, body = httpx.head(f"{server.url}{path}"), server.get(path)
        assert head.status_code == body.status_code == 200
        assert head.content == b""
        assert head.headers["content-type"] == body.headers["content-type"]
    assert "frame-ancestors 'none'" in server.get("/").headers["content-security-policy"]
    assert "head" not in server.get("/openapi.json").json()["paths"]["/"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_readable(
    page: Page, scheme: str, tmp_path: Path, record: Callable[[Page, str], None]
) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    ink, ground = page.evaluate(
        "() => [getComputedStyle(document.body).color, "
        "getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, ground) > 7
    record(page, scheme)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two CSS colours, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        levels = [int(level) / 255 for level in re.findall(r"\d+", color)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.fixture
def record(tmp_path: Path) -> Callable[[Page, str], None]:
    """Keep a screenshot, for whoever looks at the test's folder."""

    def record(page: Page, name: str) -> None:
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)

    return record
