"""Clips: every frame of the made files carries its number as a brightness, so that what is read is known exactly."""

import math
import os
import resource
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from motionlora.data import reading
from motionlora.data.clip import Clip, describe, read_clip, write_clip
from motionlora.data.errors import InputError, StorageError
from motionlora.data.frames import Footage, taken
from motionlora.data.say import silent

CODECS = {
    "h264.mp4": "libx264",
    "h264.mov": "libx264",
    "vp9.webm": "libvpx-vp9",
    "vp8.webm": "libvpx",
    "av1.mp4": "libsvtav1",
}
GOOD = {"libvpx": {"crf": "4", "b": "4M"}}
FORMS = [*CODECS, "animation.gif", "animation.webp", "folder"]


def numbered(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames of one grey each, 16 + 4 times the frame's number."""
    return np.broadcast_to((16 + 4 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def numbers(clip: Clip) -> list[int]:
    """The numbers that the frames carry; fails where a frame is between two."""
    levels = (clip.pixels.mean((1, 2, 3)) - 16) / 4
    assert np.abs(levels - levels.round()).max() < 0.4
    return levels.round().astype(int).tolist()


def video(
    path: Path,
    pixels: np.ndarray,
    *,
    fps: Fraction | int = 20,
    codec: str = "libx264",
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A video file made by PyAV; `milliseconds` are the frames' time stamps."""
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} here")
    with av.open(
        str(path), "w", options={"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    ) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=GOOD.get(codec, {}) | (options or {}))
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for index, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, index * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pictures(folder: Path, pixels: np.ndarray, suffix: str = "png") -> Path:
    folder.mkdir()
    for index, picture in enumerate(pixels):
        Image.fromarray(np.ascontiguousarray(picture)).save(folder / f"{index}.{suffix}")
    return folder


def made(tmp_path: Path, form: str, pixels: np.ndarray, fps: int = 20) -> Path:
    path = tmp_path / form
    if form in CODECS:
        return video(path, pixels, fps=fps, codec=CODECS[form])
    if form == "folder":
        return pictures(path, pixels)
    write_clip(Clip(pixels, fps, ""), path)
    return path


def read(path: Path, frames: int | None = None, fps: float | None = None, **settings: Any) -> Clip:
    said: list[str] = settings.pop("said", [])
    return read_clip(path, frames=frames, fps=fps, say=said.append, **settings)


# Time


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_frames_in_order_and_its_rate(tmp_path: Path, form: str) -> None:
    clip = read(made(tmp_path, form, numbered(23)), fps=20 if form == "folder" else None)
    assert numbers(clip) == list(range(21))
    assert clip.fps == pytest.approx(20, abs=1e-9)
    assert clip.pixels.shape == (21, 64, 96, 3)
    assert clip.pixels.dtype == np.uint8


@pytest.mark.parametrize("form", [form for form in FORMS if form != "folder"])
@pytest.mark.parametrize("fps", [5, 10, 16, 24000 / 1001, 40])
def test_the_frame_at_a_moment_is_the_last_one_shown_before_it(tmp_path: Path, form: str, fps: float) -> None:
    clip = read(made(tmp_path, form, numbered(41)), frames=9, fps=fps)
    assert numbers(clip) == [math.floor(k * 20 / fps + 1e-9) for k in range(9)]
    assert clip.fps == fps


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_variable_rate_is_read_by_time_stamps(tmp_path: Path, suffix: str) -> None:
    stamps = [10 * k * k for k in range(20)]
    codec = {"mp4": "libx264", "webm": "libvpx-vp9"}[suffix]
    path = video(tmp_path / f"a.{suffix}", numbered(20), milliseconds=stamps, codec=codec)
    assert numbers(read(path, 33, 10.0)) == [math.isqrt(10 * k) for k in range(33)]
    found = describe(path)
    assert (found["rate"], found["frames"]) == ("variable", 20)


def test_a_phones_dropped_frames_do_not_move_the_rate(tmp_path: Path) -> None:
    kept = [k for k in range(40) if k not in (7, 8, 21)]
    path = video(tmp_path / "a.mp4", numbered(40)[kept], milliseconds=[50 * k for k in kept])
    clip = read(path)
    assert clip.fps == pytest.approx(20)
    assert numbers(clip) == [max(k for k in kept if k <= moment) for moment in range(37)]


@pytest.mark.parametrize(
    "rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(25), Fraction(12), Fraction(15, 2)]
)
@pytest.mark.parametrize("form", ["vp9.webm", "h264.mp4"])
def test_rates_are_exact_though_clocks_round(tmp_path: Path, rate: Fraction, form: str) -> None:
    path = video(tmp_path / form, numbered(45), fps=rate, codec=CODECS[form])
    clip = read(path)
    assert clip.fps == pytest.approx(float(rate), rel=3e-4)
    assert numbers(clip) == list(range(45))


def test_a_late_start_does_not_count(tmp_path: Path) -> None:
    path = video(tmp_path / "a.webm", numbered(20), codec="libvpx-vp9", milliseconds=[3000 + 50 * k for k in range(20)])
    assert numbers(read(path, 17)) == list(range(17))


def test_shown_at_is_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        stamps = np.concatenate([[0.0], np.cumsum(generator.uniform(0.01, 0.2, 30))])
        times = generator.uniform(0, stamps[-1] + 1, 40)
        expected = [max(k for k, stamp in enumerate(stamps) if stamp <= time + 1e-6) for time in times]
        footage = Footage("a", stamps, stamps[-1] + 0.1, 0.0, 64, 64, 1.0, 0, "", (), lambda until: None)
        assert footage.shown_at(times).tolist() == expected


def test_a_single_frame_of_eleven_days_has_a_rate() -> None:
    footage = Footage("a", np.zeros(1), 1e6, 1e-3, 64, 64, 1.0, 0, "", (), lambda until: None)
    assert footage.rate() == (1e-6, True)
    assert taken(footage, None, None, silent)[0].tolist() == [0]


def test_what_is_taken_is_said(tmp_path: Path) -> None:
    path = made(tmp_path, "h264.mp4", numbered(41))
    said: list[str] = []
    read(path, 9, 40.0, said=said)
    assert any("4 of the frames are repeats" in line for line in said)
    said.clear()
    read(path, 9, 10.0, said=said)
    assert any("41 frames at 20 fps, 2.05 s; takes 9 frames at 10 fps" in line for line in said)
    assert not any("repeats" in line for line in said)
    said.clear()
    read(pictures(tmp_path / "shots", numbered(5)), said=said)
    assert any("no rate, taken as 16 fps" in line and "speed changes" in line for line in said)
    assert all("\n" not in line for line in said)


# Count


@pytest.mark.parametrize(
    ("asked", "near"), [(16, "13 or 17"), (2, "1 or 5"), (0, "ask for 1"), (-3, "ask for 1"), (80, "77 or 81")]
)
def test_frames_are_4k_plus_1(tmp_path: Path, asked: int, near: str) -> None:
    with pytest.raises(InputError, match=near):
        read(pictures(tmp_path / "shots", numbered(5)), asked)


@pytest.mark.parametrize("form", FORMS)
def test_shorter_than_asked_names_what_fits(tmp_path: Path, form: str) -> None:
    path = made(tmp_path, form, numbered(20))
    with pytest.raises(InputError, match=r"shorter than asked: 21 frames at 20 fps last 1.05 s .* 1.00 s; ask for 17 "):
        read(path, 21, 20.0)
    assert read(path, 17, 20.0).frames == 17


def test_the_rate_that_the_refusal_names_is_enough(tmp_path: Path) -> None:
    path = made(tmp_path, "h264.mp4", numbered(20))
    with pytest.raises(InputError, match=r"at least 25 fps"):
        read(path, 25, 20.0)
    assert read(path, 25, 25.0).frames == 25


# Size


def noise(height: int, width: int, frames: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_cropping_alone_changes_no_pixel(tmp_path: Path) -> None:
    pixels = noise(37, 53)
    said: list[str] = []
    clip = read(pictures(tmp_path / "shots", pixels), said=said)
    assert np.array_equal(clip.pixels, pixels[:, 2:34, 2:50])
    assert any(
        "cuts 2 pixels left, cuts 3 pixels right, cuts 2 pixels top, cuts 3 pixels bottom" in line for line in said
    )
    assert not any("scales" in line for line in said)


def test_a_size_that_fits_is_left_alone(tmp_path: Path) -> None:
    pixels = noise(32, 48, 5)
    said: list[str] = []
    clip = read(pictures(tmp_path / "shots", pixels), 5, height=32, width=48, said=said)
    assert np.array_equal(clip.pixels, pixels)
    assert not any("becomes" in line for line in said), "a size that stays is no news"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((None, None), (96, 192)),
        ((48, None), (48, 96)),
        ((None, 64), (32, 64)),
        ((64, 64), (64, 64)),
        ((208, 400), (208, 400)),
    ],
)
@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_sides_left_open_are_the_largest_multiples(
    tmp_path: Path, asked: tuple[int | None, int | None], expected: tuple[int, int], fit: str
) -> None:
    clip = read(pictures(tmp_path / "shots", numbered(1, 100, 200)), height=asked[0], width=asked[1], fit=fit)
    assert (clip.height, clip.width) == expected


def test_crop_takes_the_centre_and_letterbox_keeps_all(tmp_path: Path) -> None:
    thirds = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), 64, axis=0)[None].repeat(64, axis=0)
    folder = pictures(tmp_path / "shots", thirds[None])
    assert np.array_equal(read(folder, height=64, width=64).pixels[0], thirds[:, 64:128])
    said: list[str] = []
    boxed = read(folder, height=48, width=48, fit="letterbox", said=said).pixels[0]
    assert not boxed[:16].any()
    assert not boxed[32:].any()
    assert [int(boxed[24, column].argmax()) for column in (8, 24, 40)] == [0, 1, 2]
    assert any("adds 32 black rows" in line for line in said)


@pytest.mark.parametrize(
    ("side", "value", "near"), [("height", 50, "48 or 64"), ("width", 8, "use 16"), ("width", 0, "use 16")]
)
def test_sides_are_multiples(tmp_path: Path, side: str, value: int, near: str) -> None:
    with pytest.raises(InputError, match=f"{side} {value} .*{near}"):
        read(pictures(tmp_path / "shots", numbered(1)), **{side: value})


def test_smaller_than_a_multiple_is_refused_unless_enlarged(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "shots", numbered(1, 10, 40))
    with pytest.raises(InputError, match="40 x 10 pixels"):
        read(folder)
    assert read(folder, height=32, width=128).pixels.shape == (1, 32, 128, 3)


def marked(height: int, width: int, box: tuple[slice, slice]) -> np.ndarray:
    """Five black frames with a white box."""
    pixels = np.zeros((5, height, width, 3), np.uint8)
    pixels[:, *box] = 255
    return pixels


def white(clip: Clip) -> tuple[int, int]:
    """Height and width of the white box."""
    bright = clip.pixels[0, ..., 1] > 127
    return int(bright.any(1).sum()), int(bright.any(0).sum())


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(1, 2), Fraction(16, 11)])
@pytest.mark.parametrize("rotation", [0, 90])
def test_pixels_come_out_square_and_upright(tmp_path: Path, aspect: Fraction, rotation: int) -> None:
    pixels = marked(96, 96, (slice(24, 72), slice(24, 72)))
    path = video(tmp_path / "a.mp4", pixels, aspect=aspect, rotation=rotation)
    high, wide = white(read(path, 1))
    shown = aspect if rotation == 0 else 1 / aspect
    assert wide / high == pytest.approx(float(shown), rel=0.06)
    assert min(high, wide) == pytest.approx(48, abs=2)
    assert describe(path)["pixel_aspect"] == pytest.approx(float(shown), abs=1e-3)


@pytest.mark.parametrize("rotation", [90, 180, 270, -90])
@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_both_readers_turn_upright(tmp_path: Path, rotation: int, codec: str) -> None:
    pixels = marked(64, 96, (slice(0, 16), slice(0, 24)))
    clip = read(video(tmp_path / "a.mp4", pixels, rotation=rotation, codec=codec), 1)
    expected = np.rot90(pixels[0], rotation // 90)
    assert clip.pixels.shape[1:] == expected.shape
    assert np.abs(clip.pixels[0].astype(int) - expected).mean() < 6


# Readers


@pytest.mark.parametrize("form", ["h264.mp4", "vp9.webm"])
def test_without_decord_the_same_frames_come(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, form, np.concatenate([noise(64, 96, 3), numbered(10)]))
    same: Any = {"frames": None, "fps": None, "height": None, "width": None, "multiple": 16, "fit": "crop"}
    _, expected = reading.read(path, silent, **same, caption="")
    assert reading.describe(path, silent, fps=None)[0]["reader"] == "decord"
    monkeypatch.setitem(sys.modules, "decord", None)
    assert reading.describe(path, silent, fps=None)[0]["reader"] == "PyAV"
    assert np.abs(reading.read(path, silent, **same, caption="")[1].astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("form", "reader"),
    [("h264.mp4", "decord"), ("av1.mp4", "PyAV"), ("animation.gif", "PyAV"), ("animation.webp", "Pillow")],
)
def test_describe(tmp_path: Path, form: str, reader: str) -> None:
    path = made(tmp_path, form, numbered(24))
    path.with_suffix(".txt").write_text("a grey\nthing\n")
    found = describe(path)
    expected = {"frames": 24, "fps": 20.0, "rate": "constant", "seconds": 1.2, "frames_4k1": 21, "reader": reader}
    expected |= {"height": 64, "width": 96, "pixel_aspect": 1.0, "rotation": 0, "caption": "a grey thing"}
    assert {key: found[key] for key in expected} == expected


def test_folders_are_in_natural_order_and_gaps_are_said(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "shots", numbered(13), "jpg")
    (folder / "readme.md").write_text("not a picture")
    said: list[str] = []
    assert numbers(read(folder, 13, 12.0, said=said)) == list(range(13))
    assert not any("jump" in line for line in said)
    (folder / "4.jpg").unlink()
    read(folder, 9, 12.0, said=said)
    assert any("jump from 3.jpg to 5.jpg" in line for line in said)


def test_captions_are_given_or_beside(tmp_path: Path) -> None:
    path, folder = made(tmp_path, "h264.mp4", numbered(5)), pictures(tmp_path / "shots", numbered(5))
    assert read(path).caption == read(folder).caption == ""
    (folder / "caption.txt").write_text("inside")
    assert read(folder).caption == "inside"
    (tmp_path / "shots.txt").write_text("  beside \n the folder\n")
    path.with_suffix(".txt").write_text("Größe", encoding="utf-8")
    assert (read(path).caption, read(folder).caption) == ("Größe", "beside the folder")
    assert read(path, caption="given").caption == "given"
    path.with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read(path)


# Bad input


def busy(tmp_path: Path, suffix: str) -> Path:
    codec = {".mp4": "libx264", ".webm": "libvpx-vp9"}[suffix]
    return video(tmp_path / f"whole{suffix}", noise(96, 128, 40), codec=codec, options={"g": "10"})


def truncated(tmp_path: Path, suffix: str = ".mp4") -> Path:
    whole = busy(tmp_path, suffix).read_bytes()
    path = tmp_path / f"truncated{suffix}"
    path.write_bytes(whole[: len(whole) * 6 // 10])
    return path


def overwritten(tmp_path: Path, suffix: str = ".mp4") -> Path:
    """Whole in length, index and start, with a tenth in the middle replaced."""
    data = bytearray(busy(tmp_path, suffix).read_bytes())
    middle, tenth = len(data) // 2, len(data) // 10
    data[middle : middle + tenth] = np.random.default_rng(1).bytes(tenth)
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(data)
    return path


def scratched(tmp_path: Path) -> Path:
    """Thirty bytes in the middle replaced, over which decord paints without a word."""
    data = bytearray(busy(tmp_path, ".mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 30] = np.random.default_rng(1).bytes(30)
    path = tmp_path / "scratched.mp4"
    path.write_bytes(data)
    return path


def file(name: str, data: bytes):
    def make(tmp_path: Path) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return make


def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / "notes.txt").write_text("none")
    return tmp_path / "shots"


def mixed_folder(tmp_path: Path) -> Path:
    folder = pictures(tmp_path / "shots", numbered(5))
    Image.new("RGB", (40, 40)).save(folder / "5.png")
    return folder


def broken_folder(tmp_path: Path) -> Path:
    folder = pictures(tmp_path / "shots", noise(64, 64, 5))
    data = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(data[: len(data) // 2])
    return folder


def fake_picture(tmp_path: Path) -> Path:
    folder = pictures(tmp_path / "shots", numbered(5))
    (folder / "2.png").write_text("no picture")
    return folder


def single_picture(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    return tmp_path / "one.png"


def single_webp(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "one.webp")
    return tmp_path / "one.webp"


def frameless(path: Path) -> Path:
    """A header with a video stream, and not one frame; MP4 then forgets the stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=20)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return path


BAD = {
    "missing": (lambda tmp_path: tmp_path / "nowhere.mp4", "cannot be read"),
    "empty": (file("empty.mp4", b""), "empty file"),
    "text": (file("text.txt", b"hello\n" * 100), "not a video"),
    "text named mp4": (file("text.mp4", b"hello\n" * 100), "not a video"),
    "playlist": (file("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nother.ts\n"), "not a video"),
    "picture": (single_picture, "not a video"),
    "single webp": (single_webp, "single picture"),
    "sound": (lambda tmp_path: sound(tmp_path / "sound.mp4"), "sound but no moving"),
    "frameless mp4": (lambda tmp_path: frameless(tmp_path / "none.mp4"), "no moving pictures"),
    "frameless webm": (lambda tmp_path: frameless(tmp_path / "none.webm"), "cut short"),
    "truncated mp4": (truncated, "truncated"),
    "truncated webm": (lambda tmp_path: truncated(tmp_path, ".webm"), "truncated"),
    "damaged mp4": (overwritten, "damaged"),
    "scratched mp4": (scratched, "damaged"),
    "folder without pictures": (empty_folder, "no pictures"),
    "pictures of two sizes": (mixed_folder, "40 x 40"),
    "broken picture": (broken_folder, "3.png"),
    "fake picture": (fake_picture, "2.png"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("ask", [read, describe])
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path, name: str, ask) -> None:
    make, words = BAD[name]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words) as refusal:
        ask(path)
    message = str(refusal.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message
    assert ": " in message
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_behind_what_is_used_does_not_matter(tmp_path: Path) -> None:
    assert read(overwritten(tmp_path), 9).frames == 9


def test_no_permission_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, "h264.mp4", numbered(5))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        reading.describe(path, silent, fps=None)


# Writing


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("fps", [12.0, 16.0, 24.0])
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str, fps: float) -> None:
    path = tmp_path / f"new/clip{suffix}"
    write_clip(Clip(numbered(25), fps, ""), path)
    assert numbers(read(path, 25, fps)) == list(range(25))
    assert describe(path)["seconds"] == pytest.approx(25 / fps, abs=0.011)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_still_clips_keep_their_length(tmp_path: Path) -> None:
    # libwebp turns a clip that never changes into a plain picture.
    for suffix in (".mp4", ".gif"):
        write_clip(Clip(np.full((13, 32, 32, 3), 90, np.uint8), 10.0, ""), tmp_path / f"still{suffix}")
        assert read(tmp_path / f"still{suffix}", 13, 10.0).frames == 13


def test_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(Clip(noise(64, 96, 5), 16.0, ""), path, comment='{"seed": 7, "caption": "Größe"}')
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert container.metadata["comment"] == '{"seed": 7, "caption": "Größe"}'


@pytest.mark.parametrize("exact", [False, True])
def test_the_same_frames_give_the_same_file(tmp_path: Path, exact: bool) -> None:
    """However memory looks: x264 has read what nothing wrote, on CPUs with AVX-512; on others this finds less."""
    draws, files = np.random.default_rng(1), set()
    blocks = draws.integers(0, 256, (9, 8, 12, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for _ in range(15):
        litter = [draws.integers(0, 256, size, np.uint8) for size in draws.integers(500, 60_000, 60)]
        del litter
        write_clip(Clip(blocks, 16.0, ""), tmp_path / "clip.mp4", exact=exact)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1


def test_colours_survive_mp4(tmp_path: Path) -> None:
    colours = np.array([(215, 35, 40), (40, 170, 60), (45, 75, 225), (240, 220, 45), (128, 128, 128)], np.uint8)
    write_clip(Clip(np.broadcast_to(colours[:, None, None], (5, 64, 64, 3)), 16.0, ""), tmp_path / "clip.mp4")
    found = read(tmp_path / "clip.mp4").pixels.mean((1, 2))
    assert np.abs(found - colours).max() <= 4


def test_comments_of_animations(tmp_path: Path) -> None:
    for suffix in (".gif", ".webp"):
        write_clip(Clip(numbered(5), 16.0, ""), tmp_path / f"clip{suffix}", comment="seed 7")
    assert Image.open(tmp_path / "clip.gif").info["comment"] == b"seed 7"
    assert Image.open(tmp_path / "clip.webp").getexif()[0x010E] == "seed 7"


@pytest.mark.parametrize(
    ("name", "height", "words"), [("a.mp4", 63, "96 x 62"), ("a.avi", 64, ".mp4, .gif, .webp"), ("a", 64, "''")]
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, name: str, height: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_clip(Clip(numbered(5, height), 16.0, ""), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_a_full_disk_is_a_storage_error_and_keeps_the_old_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(StorageError, match=path.name):
            write_clip(Clip(noise(128, 128, 9), 16.0, ""), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_the_hash_is_of_pixels_and_shape_alone() -> None:
    pixels = noise(32, 48, 5)
    first = Clip(pixels, 16.0, "a").content_hash()
    assert Clip(pixels.copy(), 12.0, "b").content_hash() == first
    assert Clip(np.asfortranarray(pixels), 16.0, "a").content_hash() == first
    assert Clip(pixels.reshape(5, 48, 32, 3), 16.0, "a").content_hash() != first
    changed = pixels.copy()
    changed[4, 31, 47, 2] ^= 1
    assert Clip(changed, 16.0, "a").content_hash() != first
