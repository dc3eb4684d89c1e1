"""Laws of the page: nothing from outside, captions are text, frames in step; and blind rankings, in real Chromium."""

import base64
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import NAMES, Browser, chromium
from PIL import Image

from motionlora.data.clip import Clip
from motionlora.data.errors import InputError
from motionlora.heads.head_map import HeadMap
from motionlora.heads.lora import MotionLora
from motionlora.heads.lora_file import save_lora
from motionlora.heads.token_grid import TokenGrid
from motionlora.infer.compare_table import write_tables
from motionlora.infer.learned import Learned, curve_of, learned_beside
from motionlora.infer.method import parsed_method
from motionlora.infer.pairs import Pair, Source
from motionlora.infer.rankings import sum_up
from motionlora.infer.report import embedded, row_id, sheet_of, write_report
from motionlora.infer.report_field import coloured, field_of
from motionlora.infer.row import Row
from motionlora.infer.studio import Cell

EVIL = """<script>window.stung = 1</script></script><img src=x onerror="window.stung=1"> & 'so' "on" \u2028"""
FILE = "<b onclick=window.stung=1>.mp4"
METHODS = ("none", "flowmotion", "inject", "static")
FRAMES = 7


def clip_of(shade: int) -> Clip:
    """Frame i is of one colour, 30 i in red and `shade` in green."""
    pixels = np.zeros((FRAMES, 64, 64, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 30 * np.arange(FRAMES)[:, None, None], shade
    return Clip(pixels, 12.0, "")


def lora_at(folder: Path) -> Path:
    """A LoRA of two heads on a map of 2 x 2, with the log of three steps beside it."""
    grid, scores = TokenGrid(2, 2, 2), np.array([[[0.1, 0.4], [0.4, 0.1]], [[0.3, 0.3], [0.0, 0.2]]])
    head_map = HeadMap("m", grid, (0.9,), scores, 1, "c", EVIL)
    factors = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(8, 2)}
    weights = {f"blocks.{b}.attn1.to_q.{name}.weight": factor for b in range(2) for name, factor in factors.items()}
    story = {"rule": "code", "ratio": 1.3, "strength": 1.0}
    save_lora(MotionLora(weights, 2, 2.0, head_map, "temporal", story), folder / "temporal.safetensors")
    steps = [{"step": step, "loss": loss, "seconds": 0.5} for step, loss in ((1, 0.9), (2, None), (3, 0.3))]
    (folder / "log-temporal.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"step": 4, "lo')
    return folder / "temporal.safetensors"


def rows_and_cells(lora: str = "") -> tuple[list[Row], list[Cell]]:
    """Two clips, one caption each, four methods, of which one is a control and one fails on the second clip."""
    rows, cells = [], []
    for at, (name, caption) in enumerate(((FILE, EVIL), ("two.mp4", "a plain caption"))):
        clip = clip_of(40 * at)
        pair = Pair(Source(name, lambda clip=clip: clip, clip.content_hash()), caption, (0,))
        for number, text in enumerate(METHODS):
            method = parsed_method(text)
            cells.append(
                Cell(pair, replace(method, lora=bool(lora) and text == "flowmotion"), 0, replace(pair, lora=lora))
            )
            row = Row(name, "", caption, text, 0, method.control, key=f"{at}{number}")
            if text == "inject" and at:
                row = Row(name, "", caption, text, 0, status="failed", sentence=f"it broke: {EVIL}")
            else:
                values = {"smf": 0.1 * number + at, "gain": 10.0 - number}
                cost = {"forwards": 4.0, "seconds_sample": 2.0 + number}
                row = replace(row, values=values, cost=cost, paths=[[[320, 320], None]])
            rows.append(row)
    return rows, cells


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    rows, cells = rows_and_cells(str(lora_at(folder)))
    write_tables(rows, folder, {"model": EVIL})

    def made(cell: Cell) -> Clip:
        return clip_of(100 + 20 * METHODS.index(cell.method.name))

    write_report(cells, rows, made, lambda source: [[[0, 0]] * FRAMES], folder / "report.html", {"model": EVIL})
    return folder / "report.html"


class Tags(HTMLParser):
    """Every tag with its attributes, and what stands inside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def test_the_page_asks_for_nothing_and_captions_are_no_markup(page: Path) -> None:
    parser = Tags()
    text = page.read_text(encoding="utf-8")
    parser.feed(text)
    assert [tag for tag, _ in parser.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in parser.tags}
    assert not {"src", "href", "onclick", "onerror"} & {name for _, found in parser.tags for name in found}
    assert "http" not in text.replace("http-equiv", "")
    data = json.loads(parser.scripts[0])
    assert {row["caption"] for row in data["rows"]} == {EVIL, "a plain caption"}
    assert data["rows"][0]["clip"] == FILE
    assert not set("<>&\u2028") & set(parser.scripts[0])
    assert embedded({"a": [float("nan"), 1.5]}) == '{"a":[null,1.5]}'
    table = (page.parent / "table.md").read_text(encoding="utf-8")
    assert "<script" not in table
    assert "<img" not in table


def test_a_sheet_holds_every_frame() -> None:
    sheet = sheet_of(clip_of(90))
    picture = Image.open(io.BytesIO(base64.b64decode(sheet["src"].partition(",")[2]))).convert("RGB")
    assert (sheet["width"], sheet["height"], sheet["frames"], sheet["pixels"]) == (64, 64, FRAMES, 64)
    for frame in range(FRAMES):
        place = (frame % sheet["columns"] * 64 + 32, frame // sheet["columns"] * 64 + 32)
        assert np.abs(np.array(picture.getpixel(place)) - [30 * frame, 90, 0]).max() < 6
    wide = sheet_of(Clip(np.zeros((3, 480, 832, 3), np.uint8), 12.0, ""))
    assert (wide["width"], wide["height"], wide["pixels"]) == (416, 240, 832)


def test_what_a_lora_learned_is_told_and_nothing_is_made_up(page: Path, tmp_path: Path) -> None:
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    assert [(lora["method"], lora["clip"], lora["rank"]) for lora in data["loras"]] == [
        ("flowmotion", FILE, 2), ("flowmotion", "two.mp4", 2)
    ]  # fmt: skip
    assert data["loras"][0]["curves"] == {"temporal": [[1, 0.9], [3, 0.3]]}
    assert data["loras"][0]["seconds"] == 1.5
    assert data["loras"][0]["heads"]["trained"] == [[1, 0], [0, 1]]
    (tmp_path / "log-temporal.jsonl").write_text((page.parent / "log-temporal.jsonl").read_text())
    assert learned_beside(tmp_path / "fox.safetensors") == Learned()
    assert learned_beside(tmp_path / "x" / "temporal.safetensors") == Learned()
    many = [{"step": step, "loss": float(step % 2), "seconds": 0.0} for step in range(1, 1001)]
    curve = curve_of(many)
    assert len(curve) <= 80
    assert curve[-1][0] == 1000
    assert {loss for _, loss in curve[:-1]} <= {0.46154, 0.53846}, "means of 13 steps"


def test_displacements_have_their_direction_and_speed() -> None:
    generator = np.random.default_rng(0)
    texture = np.array(Image.fromarray(generator.integers(0, 256, (20, 40), np.uint8)).resize((160, 80)))
    frames = [np.stack([texture[5:69, 60 - 2 * i : 124 - 2 * i]] * 3, -1) for i in range(4)]
    field = field_of(Clip(np.stack(frames), 12.0, ""))
    assert field.shape == (4, 24, 24, 2)
    y, x = np.median(field.reshape(-1, 2), 0)
    assert abs(x - 2) < 0.2
    assert abs(y) < 0.2
    large = np.repeat(np.repeat(np.stack(frames), 5, 1), 5, 2)
    assert abs(np.median(field_of(Clip(large, 12.0, ""))[..., 1]) - 10) < 1, "pixels of the clip, not of its small copy"
    directions = np.array([(0.0, 2.0), (2.0, 0.0), (0.0, -2.0), (0.0, 0.0), (0.0, 1.0), (0.0, 9.0)])
    colours = [(255, 0, 0), (128, 255, 0), (0, 255, 255), (255, 255, 255), (255, 128, 128), (255, 0, 0)]
    assert np.abs(coloured(directions, 2.0).astype(int) - colours).max() <= 1


def test_rankings_are_summed_up_with_equal_ranks_shared(page: Path, tmp_path: Path) -> None:
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    rows, _ = rows_and_cells()
    ids = {(row.clip, row.method): row_id(row) for row in rows}

    def entry(clip: str, method: str, rank: int) -> dict[str, Any]:
        return {"cell": ids[clip, method], "motion": rank, "text": 1, "quality": rank}

    first = [entry(FILE, "none", 3), entry(FILE, "flowmotion", 1), entry(FILE, "inject", 2)]
    second = [entry("two.mp4", "none", 1), entry("two.mp4", "flowmotion", 2)]
    ranking = {
        "format": "motionlora ranking 1",
        "comparison": data["id"],
        "rater": "A|<b>",
        "rankings": [first, second],
    }
    (tmp_path / "one.json").write_text(json.dumps(ranking))
    said: list[str] = []
    sum_up([tmp_path / "one.json"], page.parent, said.append)
    figures = {(f["method"], f["criterion"]): f for f in json.loads((page.parent / "rankings.json").read_text())}
    assert figures["none", "motion"]["rank"] == 2.0  # 3 and 1
    assert figures["flowmotion", "motion"]["rank"] == 1.5
    assert figures["flowmotion", "motion"]["best"] == 0.5
    assert figures["none", "text"]["rank"] == 0.5 * (2.0 + 1.5)  # three equal share 2, two share 1.5
    assert figures["inject", "quality"]["ranked"] == 1
    assert r"1 raters: A\|&lt;b>" in said[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "else"}, "is no ranking"),
        ({"comparison": "0"}, "another comparison"),
        ({"rankings": [[{"cell": "?", "motion": 1, "text": 1, "quality": 1}]]}, "names cells that are not there"),
        ({"rankings": 3}, "is damaged"),
    ],
)
def test_a_wrong_ranking_is_refused(page: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    data = json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
    ranking = {"format": "motionlora ranking 1", "comparison": data["id"], "rankings": []} | change
    (tmp_path / "r.json").write_text(json.dumps(ranking))
    with pytest.raises(InputError, match=reason):
        sum_up([tmp_path / "r.json"], page.parent)
    with pytest.raises(InputError, match="--out"):
        sum_up([tmp_path / "r.json"], tmp_path / "nowhere")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(NAMES)}): the page was not opened")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("Chromium's real-time thread starves the rest of it on a single core: the page was not opened")
    made = Browser(program, tmp_path_factory.mktemp("profile"))
    yield made
    made.process.terminate()
    made.process.wait(30)


def column(browser: Browser, table: str, number: int) -> list[str]:
    return browser.ask(f"[...document.querySelectorAll('#{table} tbody tr')].map(r => r.cells[{number}].textContent)")


def choose(browser: Browser, selector: str, value: str) -> None:
    browser.ask(f"""(() => {{ const box = document.querySelector({json.dumps(selector)});
        box.value = {json.dumps(value)}; box.dispatchEvent(new Event('change')); }})()""")


def test_clips_play_in_step_and_scrub_together(browser: Browser, page: Path) -> None:
    browser.open(page)
    drawn = "[...document.querySelectorAll('canvas')].filter(c => c.player.visible).map(c => c.dataset.frame)"
    browser.until(f"{drawn}.length >= 5 && {drawn}.every(f => f !== undefined)")
    browser.ask("setPlaying(true)")
    before = browser.ask("clock.frame")
    browser.until(f"Math.abs(clock.frame - {before}) > 1")
    browser.ask("at('play').click()")
    assert browser.ask("clock.playing") is False
    assert browser.ask("at('play').textContent") == "Play"
    stopped = browser.ask("clock.frame")
    assert browser.ask("new Promise(done => setTimeout(() => done(clock.frame), 300))") == stopped
    for frame in (0, 5, 3):
        browser.ask(f"at('scrub').value = {frame}; at('scrub').dispatchEvent(new Event('input'))")
        assert set(browser.ask(drawn)) <= {str(frame), str(min(frame, FRAMES - 1))}
        browser.ask("at('tracks').checked = false; drawFrame()")
        reds = browser.ask("""[...document.querySelectorAll('canvas')].filter(c => c.player.visible).map(
            c => c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data[0])""")
        assert len(reds) >= 5
        assert all(abs(red - 30 * frame) < 8 for red in reds), "every clip shows the same frame"
    browser.ask("at('tracks').checked = true; drawFrame()")
    choose(browser, "#view", "field")
    middle = "c => [...c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data.slice(0, 3)]"
    seen = f"[...document.querySelectorAll('canvas')].filter(c => c.player.visible).flatMap({middle})"
    browser.ask("at('tracks').checked = false; drawFrame()")
    browser.until(f"{seen}.every(level => level > 250)")  # clips of one colour stand still, which is white
    assert browser.ask("at('wheel').hidden") is False
    choose(browser, "#view", "src")
    browser.until(f"{seen}.some(level => level < 200)")
    browser.ask("at('tracks').checked = true; drawFrame()")
    corner = browser.ask("""(() => { const c = document.querySelector('.reference canvas');
        return [...c.getContext('2d').getImageData(2, 2, 1, 1).data]; })()""")
    assert corner[0] > 200, "the reference's path lies at its first pixel, in red"
    assert browser.complaints() == []


def test_tables_sort_and_filters_filter(browser: Browser, page: Path) -> None:
    browser.open(page)
    heads = browser.ask("[...document.querySelectorAll('#cells th')].map(h => h.textContent)")
    smf = heads.index("SMF")
    click = f"document.querySelectorAll('#cells th button')[{smf}].click()"
    browser.ask(click)
    assert column(browser, "cells", smf) == ["1.30", "1.10", "1", "0.30", "0.20", "0.10", "0", "\u2013"]
    browser.ask(click)
    assert column(browser, "cells", smf) == ["0", "0.10", "0.20", "0.30", "1", "1.10", "1.30", "\u2013"], (
        "missing is last"
    )
    assert browser.ask(f"document.querySelectorAll('#cells th')[{smf}].ariaSort") == "ascending"
    assert column(browser, "summary", 0) == list(METHODS)
    assert column(browser, "summary", 1) == ["2", "2", "1", "2"]
    choose(browser, "#filter-method", "inject")
    assert set(column(browser, "cells", 0)) == {"inject"}
    assert browser.ask("document.querySelectorAll('section.group').length") == 2
    choose(browser, "#filter-clip", FILE)
    assert column(browser, "cells", 1) == [FILE]
    assert browser.ask("document.querySelectorAll('canvas').length") == 2
    choose(browser, "#filter-method", "")
    choose(browser, "#filter-clip", "")
    choose(browser, "#filter-caption", "a plain caption")
    assert column(browser, "cells", 0) == list(METHODS)
    assert browser.complaints() == []


def test_what_was_learned_is_drawn_and_follows_the_filters(browser: Browser, page: Path) -> None:
    browser.open(page)
    count = "document.querySelectorAll('#learning {}').length"
    assert browser.ask(count.format("figure")) == 2
    assert browser.ask(count.format("polyline")) == 2
    assert browser.ask(count.format("rect.trained")) == 4
    assert browser.ask(count.format("rect")) == 8
    dots = "[...document.querySelectorAll('#costs circle title')].map(t => t.textContent)"
    assert browser.ask(dots) == ["none", "flowmotion", "inject"]
    choose(browser, "#filter-clip", "two.mp4")
    assert browser.ask(count.format("figure")) == 1
    choose(browser, "#filter-method", "none")
    assert browser.ask(count.format("figure")) == 0
    assert browser.ask("at('learning').closest('details').hidden") is True
    assert browser.complaints() == []


def test_what_people_wrote_is_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.ask("window.stung") is None
    assert browser.ask("document.querySelector('.group h3').textContent") == EVIL
    assert browser.ask("document.querySelector('.group .about').textContent").startswith(FILE)
    assert browser.ask("document.querySelector('.failed').textContent").startswith("inject")
    assert EVIL in browser.ask("document.querySelector('#facts dd').textContent")
    assert browser.ask("document.querySelectorAll('script, img, b[onclick]').length") == 2


def test_blind_mode_hides_names_and_its_file_is_summed_up(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    browser.ask("at('blind').click()")
    text = browser.ask("document.body.innerText + document.getElementById('groups').innerHTML")
    assert [name for name in METHODS if name in text] == []
    groups = browser.ask("[...document.querySelectorAll('.group')].map(g => g.querySelectorAll('figure.made').length)")
    assert groups == [3, 2], "the control is not ranked, nor what failed"
    assert browser.ask("at('progress').textContent") == "0 of 2 groups ranked"
    # rank the first group by the green of its clips, which tells the methods apart here
    browser.ask("""(() => { const group = document.querySelector('.group');
        drawFrame();
        const made = [...group.querySelectorAll('figure.made')];
        made.forEach(f => f.querySelector('canvas').player.draw()); })()""")
    browser.until("[...document.querySelectorAll('.group figure.made canvas')].slice(0, 3).every(c => c.dataset.frame)")
    greens = browser.ask("""(() => { const made = [...document.querySelector('.group').querySelectorAll('figure.made')];
        const green = f => { const c = f.querySelector('canvas');
          return c.getContext('2d').getImageData(c.width / 2, c.height / 4, 1, 1).data[1]; };
        const order = made.slice().sort((a, b) => green(a) - green(b));
        order.forEach((f, i) => f.querySelectorAll('select').forEach(s => {
          s.value = String(i + 1); s.dispatchEvent(new Event('change')); }));
        return order.map(green); })()""")
    assert [round((green - 100) / 20) for green in greens] == [0, 1, 2]
    assert browser.ask("at('progress').textContent") == "1 of 2 groups ranked"
    browser.ask("at('rater').value = '7'; window.URL.createObjectURL = () => '#'; at('export').click()")
    exported = browser.ask("at('exported').value")
    assert [name for name in METHODS if name in exported] == []
    (tmp_path / "ranking.json").write_text(exported)
    sum_up([tmp_path / "ranking.json"], page.parent, lambda line: None)
    figures = json.loads((page.parent / "rankings.json").read_text())
    ranks = {figure["method"]: figure["rank"] for figure in figures if figure["criterion"] == "motion"}
    assert ranks == {"none": 1.0, "flowmotion": 2.0, "inject": 3.0}
    browser.ask("at('blind').click()")
    assert column(browser, "summary", 0) == list(METHODS)
    assert browser.complaints() == []


def test_it_reads_on_a_phone_and_in_the_dark(browser: Browser, page: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(page, width=390, height=844)
        colours.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
        assert browser.ask("document.documentElement.scrollWidth") <= 390, "nothing runs out of the screen"
        if folder := os.environ.get("MOTIONLORA_SCREENSHOTS"):
            picture = browser.call("Page.captureScreenshot", format="png")["data"]
            (Path(folder) / f"phone-{scheme}.png").write_bytes(base64.b64decode(picture))
    assert colours[0] != colours[1]
    assert browser.complaints() == []
