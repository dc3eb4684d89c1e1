"""A picture of a comparison's page, for the README: two references, a few methods, made by the embedded tiny Wan.

    python tests/bench_screenshot.py --loras runs/transfer      resumes; writes results/report.png

`--loras` is a folder with NAME/temporal.safetensors for each reference (`bench_transfer.py` leaves one); without it
there is no method lora and no loss curve. Minutes on a CPU; needs Chromium.
"""

import argparse
import base64
import io
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from chromium import NAMES, Browser, chromium
from PIL import Image

from motionlora.data.benchmark import protocol_hash
from motionlora.data.cache import replacing
from motionlora.infer.bench_sprites import SPRITES, protocol_pairs
from motionlora.infer.compare import compared
from motionlora.infer.compare_settings import BenchSpritesSettings

LARGEST = 300_000
"""Bytes of the picture."""
WIDTH = 1200
"""Pixels: the reference and five methods in a row."""
FRAME = 30
"""Of 49: far enough for the tracks to show."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("runs/screenshot"))
    parser.add_argument("--results", type=Path, default=Path("results/report.png"))
    parser.add_argument("--loras", type=Path)
    parser.add_argument("--references", nargs=2, default=["zigzag", "circle"])
    parser.add_argument("--methods", nargs="+", default=["flowmotion", "sdedit", "static"])
    chosen = parser.parse_args()
    program = chromium()
    if program is None:
        sys.exit(f"There is no Chromium here (looked for {', '.join(NAMES)}): install one.")
    pairs = [replace(pair, seeds=(0,)) for pair in protocol_pairs("objects") if pair.source.name in chosen.references]
    methods = ("none", *chosen.methods)
    if chosen.loras:
        pairs = [replace(pair, lora=str(chosen.loras / pair.source.name / "temporal.safetensors")) for pair in pairs]
        methods = ("none", "lora", *chosen.methods)
    settings = BenchSpritesSettings(methods=methods, controls=False, points=0, private=True, out=chosen.work)
    facts = {"protocol": f"two references of the sprite protocol, hash {protocol_hash()}, one seed"}
    compared(pairs, settings, SPRITES, facts)
    picture = picture_of(chosen.work / "report.html", program)
    if len(picture) > LARGEST:
        sys.exit(f"The picture has {len(picture)} bytes, at most {LARGEST} are wanted: take fewer methods.")
    with replacing(chosen.results) as draft:
        draft.write_bytes(picture)
    print(f"{chosen.results}: {len(picture)} bytes")


def picture_of(page: Path, program: str) -> bytes:
    """The whole page as PNG in 256 colours, its clips standing at `FRAME`."""
    with TemporaryDirectory() as profile:
        browser = Browser(program, Path(profile))
        try:
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
            browser.call("Emulation.setScrollbarsHidden", hidden=True)
            browser.open(page, width=WIDTH)
            height = browser.ask("document.body.getBoundingClientRect().height")
            size = {"width": WIDTH, "height": round(height), "deviceScaleFactor": 1, "mobile": False}
            browser.call("Emulation.setDeviceMetricsOverride", **size)
            browser.ask("setPlaying(false)")
            browser.ask(f"at('scrub').value = {FRAME}; at('scrub').dispatchEvent(new Event('input'))")
            browser.until(f"[...document.querySelectorAll('canvas')].every(c => c.dataset.frame === '{FRAME}')")
            shot = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
        finally:
            browser.process.terminate()
            browser.process.wait(30)
    small, content = Image.open(io.BytesIO(shot)).convert("RGB").quantize(256), io.BytesIO()
    small.save(content, format="PNG", optimize=True)
    return content.getvalue()


if __name__ == "__main__":
    main()
