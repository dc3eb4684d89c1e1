"""Video files: the only file that knows decord and PyAV.

decord reads the pixels. PyAV reads what decord cannot open (GIF, AV1), and of every file the header, the time stamps
and the damage, because decord says nothing of pixel aspect and reads many damaged files without a word. PyAV writes.
"""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from motionlora.data.errors import InputError
from motionlora.data.frames import GRAIN, Footage, Frame, Unreadable, check_picture
from motionlora.data.limits import limits

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

OPEN = {"format_whitelist": "mov,matroska,webm,gif", "protocol_whitelist": "file"}
"""Containers that are read. A playlist must not make the reader open other files or addresses."""
BATCH = 256 * 2**20
"""Bytes of frames that decord decodes at once, and at most 16 frames."""
SAME_EACH_TIME = {"x264-params": "asm=SSE4.2"} if platform.machine() in ("x86_64", "AMD64") else {}
"""x264's AVX-512 code reads memory that nothing wrote: 22 files of the same frames in 40 tries. As fast without."""


def open_video(path: Path) -> Footage:
    """A video opened for reading: all that its header, its packets and its first frame tell.

    Raises:
        InputError: no video, no moving pictures, no frames, truncated, or damaged at the start.
    """
    header = _header(path)
    try:
        first = next(_decoded(path), None)
        timed = header.stamps or [float(frame.time or 0) for frame in _decoded(path)]
    except Unreadable as fault:
        raise InputError(f"{path} is damaged ({fault}): copy it again.") from fault
    if first is None:
        raise InputError(f"{path} holds no frames: record or export it again.")
    stamps = np.asarray(timed) - timed[0]
    if len(stamps) > 1 and stamps[-1] <= 0:
        raise InputError(f"{path} has time stamps that do not advance: re-encode it.")
    turns = round(first.rotation / 90)
    shape = (first.width, first.height) if turns % 2 else (first.height, first.width)
    last = header.last or (float(np.median(np.diff(stamps))) if len(stamps) > 1 else 0.0)
    # decord turns frames by what QuickTime files say, and by nothing else.
    trusted = header.movie or turns == 0
    decord = ("decord", partial(_by_decord, path, stamps, header.clock, shape))
    return Footage(
        name=str(path),
        stamps=stamps,
        seconds=float(stamps[-1]) + last,
        clock=header.clock,
        height=shape[0],
        width=shape[1],
        aspect=1 / header.aspect if turns % 2 else header.aspect,
        rotation=first.rotation,
        kind=header.codec,
        readers=(*((decord,) if trusted else ()), ("PyAV", partial(_by_pyav, path, turns))),
        check=partial(_check, path, stamps, header.clock),
    )


def write_video(
    pixels: UInt8[np.ndarray, "frame height width 3"], fps: float, path: Path, comment: str, *, exact: bool = False
) -> None:
    """Writes H.264 in MP4 as browsers play it: yuv420p, crf 18, index first; `comment` is its comment tag.

    `exact` keeps every pixel as it is (RGB, lossless), which programs such as VLC play and browsers do not.

    Raises:
        OSError: the file cannot be written.
    """
    import av
    from av.video.reformatter import Colorspace

    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = comment
            rate = Fraction(fps).limit_denominator(1001)
            codec, crf, layout = ("libx264rgb", "0", "rgb24") if exact else ("libx264", "18", "yuv420p")
            stream = container.add_stream(codec, rate=rate, options={"crf": crf, **SAME_EACH_TIME})
            stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], layout
            # What PyAV's conversion makes of RGB. Unsaid, players guess by the height and show large clips off-colour.
            if not exact:
                stream.codec_context.colorspace = Colorspace.ITU601.value
            for picture in pixels:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except av.FFmpegError as fault:
        raise OSError(fault.errno, _reason(fault)) from fault


@dataclass(frozen=True, eq=False)
class _Header:
    """What a video says of itself without decoding.

    `stamps` (seconds) is empty where packets do not say when they are shown; `last` is how long the last frame lasts,
    0 where unknown; `movie` that it is MP4 or MOV.
    """

    codec: str
    clock: float
    aspect: float
    movie: bool
    stamps: list[float]
    last: float


def _header(path: Path) -> _Header:
    import av

    try:
        with av.open(str(path), options=OPEN) as container:
            stream = _moving(path, container)
            codec, clock = stream.codec_context.codec.canonical_name, float(stream.time_base or 0)
            check_picture(str(path), stream.height, stream.width)
            spans, end, whole = _packets(path, container, stream)
            # Not every VP8 packet is shown: there only decoding tells.
            timed = codec != "vp8" and all(span is not None for span in spans)
            stamps = sorted((start * clock, length * clock) for start, length in filter(None, spans))
            short = (container.duration or 0) / 1e6 - end > 0.5
            if spans and (short or not whole):
                raise InputError(f"{path} is truncated or damaged, it ends before its header says: copy it again.")
            return _Header(
                codec=codec,
                clock=clock,
                aspect=float(stream.sample_aspect_ratio or 1),
                movie="mov" in container.format.name,
                stamps=[stamp for stamp, _ in stamps] if timed else [],
                last=stamps[-1][1] if stamps else 0.0,
            )
    except (InputError, MemoryError):
        raise
    except Exception as fault:
        raise InputError(
            f"{path} is not a video that can be read, or is cut short ({_reason(fault)}): copy it again, or name an "
            "MP4, MOV, WebM or GIF."
        ) from fault


def _packets(
    path: Path, container: "InputContainer", stream: "VideoStream"
) -> tuple[list[tuple[int, int] | None], float, bool]:
    """Start and length in ticks of every shown packet of the stream, None where it does not say.

    Also when the last packet of any stream ends, in seconds, and whether all packets are whole. Packets are let go one
    by one: a file may be larger than the memory.
    """
    spans: list[tuple[int, int] | None] = []
    end, whole = 0.0, True
    for packet in container.demux():
        if not packet.size:
            continue
        span = None if packet.pts is None else (packet.pts, packet.duration or 0)
        whole = whole and not packet.is_corrupt
        end = end if span is None else max(end, sum(span) * float(packet.time_base or 0))
        if packet.stream is stream and not packet.is_discard:
            spans.append(span)
            limits().refuse_over("frames", len(spans), f"{path} has {{}} frames or more", "cut it to what is meant")
    return spans, end, whole


def _moving(path: Path, container: "InputContainer") -> "VideoStream":
    """The stream of moving pictures; a song's cover is none. Its decoder raises rather than paint over damage."""
    from av.stream import Disposition

    cover = Disposition.attached_pic
    moving = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not moving:
        what = "sound but no" if container.streams.audio else "no"
        raise InputError(f"{path} holds {what} moving pictures: name a video.")
    moving[0].codec_context.options = {"err_detect": "explode"}
    return moving[0]


def _decoded(path: Path) -> Iterator["VideoFrame"]:
    """Frames in the order in which they are shown, all of one size."""
    import av

    size = None
    try:
        with av.open(str(path), options=OPEN) as container:
            for count, frame in enumerate(container.decode(_moving(path, container))):
                size = size or (frame.width, frame.height)
                if frame.is_corrupt or size != (frame.width, frame.height):
                    raise Unreadable(f"frame {count} is {'broken' if frame.is_corrupt else 'of another size'}")
                yield frame
    except (InputError, Unreadable, MemoryError):
        raise
    # PyAV also raises EOFError, IndexError and UnicodeDecodeError on broken files.
    except Exception as fault:
        raise Unreadable(_reason(fault)) from fault


def _check(path: Path, stamps: np.ndarray, clock: float, until: float) -> None:
    """Decodes up to a time: decord reads many damaged files without a word, with wrong pixels."""
    wanted = stamps[stamps <= until + GRAIN]
    seen: list[float] = []
    try:
        for frame in islice(_decoded(path), len(wanted)):
            seen.append(float(frame.time or 0))
    except Unreadable as fault:
        raise InputError(
            f"{path} is damaged after frame {len(seen)} ({fault}): copy it again or re-encode it."
        ) from fault
    whole = len(seen) == len(wanted) and np.abs(np.asarray(seen) - seen[0] - wanted).max() <= clock + GRAIN
    if not whole:
        raise InputError(f"{path} is damaged, its frames are not those that its index names: re-encode it.")


def _by_decord(
    path: Path, stamps: np.ndarray, clock: float, shape: tuple[int, int], indexes: Sequence[int]
) -> Iterator[Frame]:
    """Frames by decord, where it counts and turns them as PyAV does."""
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        video = decord.VideoReader(str(path), num_threads=1)
        times = video.get_frame_timestamp(range(len(video)))[:, 0]
        if len(times) != len(stamps) or np.abs(times - times[0] - stamps).max() > clock + 1e-3:
            raise Unreadable("other time stamps")
        batch = max(1, min(16, BATCH // (3 * shape[0] * shape[1])))
        for start in range(0, len(indexes), batch):
            frames = video.get_batch(list(indexes[start : start + batch])).asnumpy()
            if frames.shape[1:3] != shape:
                raise Unreadable("another size")
            yield from frames
    except Exception as fault:
        raise Unreadable(f"decord: {_reason(fault)}") from fault


def _by_pyav(path: Path, turns: int, indexes: Sequence[int]) -> Iterator[Frame]:
    """Frames by PyAV, turned counter-clockwise by quarter turns, which it does not do itself."""
    wanted = set(indexes)
    for index, frame in enumerate(islice(_decoded(path), max(wanted) + 1)):
        if index in wanted:
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def _reason(fault: Exception) -> str:
    """The fault in a few words on one line."""
    text = str(getattr(fault, "strerror", None) or fault).strip() or type(fault).__name__
    return text.splitlines()[0][:120]
