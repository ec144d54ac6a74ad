"""The pictures of README, from a finished demo.

    python scripts/demo/readme_pictures.py [runs/demo]

``drawings.png``: the first twelve held-out captions in English, not the best ones.
``documents.png``: documents of the shards, decoded from their tokens.
``page.png``: the page of ``emu35 serve`` (needs playwright, and ``chromium`` on PATH).
"""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from emu35.tokens.text import build_text_tokenizer
from evaluate import find_pictures, read_lines

HERE = Path(__file__).parent / "pictures"
SHARDS = ("scenes/caption_first", "scenes/image_first", "clips", "tasks/x2i", "tasks/chat")
SIDE, COLUMNS, COUNT, WORDS, GAP = 144, 6, 12, 52, 12
CAPTIONS = (
    "There is a small pink circle at the bottom left.",
    "Two shapes: a small green triangle at the top left and a large cyan star on the right.",
    "There is a large yellow circle on the left.",
)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def main() -> None:
    demo = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    HERE.mkdir(exist_ok=True)
    draw_grid(demo).save(HERE / "drawings.png", optimize=True)
    draw_documents(demo).save(HERE / "documents.png", optimize=True)
    photograph_page(demo, to=HERE / "page.png")


def draw_grid(demo: Path) -> Image.Image:
    """Drawings with their captions beneath."""
    prompts = read_lines(demo / "corpus" / "heldout.jsonl")
    pictures = find_pictures(prompts, folder=demo / "generated")
    chosen = [p for p in prompts if p["prompt"].isascii() and p["id"] in pictures][:COUNT]
    rows = -(-len(chosen) // COLUMNS)
    cell = (SIDE + GAP, SIDE + WORDS + GAP)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + GAP, rows * cell[1] + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for at, prompt in enumerate(chosen):
        x, y = GAP + at % COLUMNS * cell[0], GAP + at // COLUMNS * cell[1]
        with Image.open(pictures[prompt["id"]]) as picture:
            large = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(large, (x, y))
        pen.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline="#cccccc")
        words = textwrap.wrap(prompt["prompt"], 24)
        shown = words if len(words) <= 3 else [*words[:2], words[2] + " ..."]
        pen.text((x, y + SIDE + 4), "\n".join(shown), fill="#333333", font=font)
    return sheet.quantize(64)


def draw_documents(demo: Path) -> Image.Image:
    """The second document of several sources, a line each: what it says, and its pictures."""
    from emu35.data.show import show_document
    from emu35.data.stats import source_of
    from emu35.stages.data_inspect import load_vision, tokenizer_of
    from emu35.vision.codec import decode_grids
    from emu35.vision.resize import to_image

    lines: list[tuple[str, list[Image.Image]]] = []
    for name in SHARDS:
        source = source_of(demo / "shards" / name)
        tokenizer = build_text_tokenizer(tokenizer_of(source, table=None))
        document = show_document(source, number=1, tokenizer=tokenizer)
        codec = load_vision(demo / "ibq" / "vision_tokenizer", sources=[source])
        pixels = decode_grids(codec, [image.codes_HW for image in document.images])
        text = f"{name}, document {document.number}: {document.text()}"
        lines.append((text, [to_image(each) for each in pixels]))
    side, wide, row = 96, 560, 96 + GAP
    most = max(len(pictures) for _, pictures in lines)
    sheet = Image.new("RGB", (wide + most * row + GAP, len(lines) * row + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for at, (text, pictures) in enumerate(lines):
        y = GAP + at * row
        words = textwrap.wrap(text.encode("ascii", "replace").decode(), 84)
        pen.multiline_text((GAP, y), "\n".join(words[:6]), fill="#333333", font=font)
        for place, picture in enumerate(pictures):
            large = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(large, (wide + place * row, y))
    return sheet.quantize(64)


def photograph_page(demo: Path, *, to: Path) -> None:
    """The server's page after a few pictures."""
    from playwright.sync_api import expect, sync_playwright

    command = [sys.executable, "-m", "emu35", "serve", "--run", str(demo / "pretrain")]
    command += ["--vision", str(demo / "ibq" / "vision_tokenizer"), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        found = re.search(r"http://\S+", server.stderr.readline())
        assert found, "the server did not say where it listens"
        with sync_playwright() as player:
            browser = player.chromium.launch(
                executable_path=shutil.which("chromium"), args=list(ARGUMENTS)
            )
            page = browser.new_page(viewport={"width": 1200, "height": 830})
            page.goto(found[0])
            expect(page.locator("#health")).to_have_text("ready", timeout=120_000)
            for caption in CAPTIONS:
                page.fill("#prompt", caption)
                page.fill("#seed", "1")
                page.evaluate("document.querySelector('#more').open = true")
                page.fill("#temperature", "0.4")
                page.fill("#guidance", "1.5")
                page.evaluate("document.querySelector('#more').open = false")
                page.click("#generate")
                expect(page.locator("#generate")).to_be_enabled(timeout=60_000)
            page.screenshot(path=str(to))
            browser.close()
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
