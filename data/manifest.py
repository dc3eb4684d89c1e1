"""Benchmarks of papers, on a copy that the user has: what each consists of, and what of it is not there.

No clip and no caption of theirs is in this project. The user's captions file names clips, captions and classes; what
stands here tells where clips lie in a copy as it is handed out, and whether that is the whole benchmark, so that no
table of a part passes for one of all. Counts are the papers'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from motionlora.data.errors import InputError, meant

BenchmarkName = Literal["davis", "motionbench", "mtbench", "loveu"]


@dataclass(frozen=True)
class Manifest:
    """A benchmark: how many clips it has, the classes of its pairs, and how many captions go with a clip.

    Attributes:
        each: whether every clip has a caption of every class (else a class is the clip's own).
        places: where clips lie in the folder that the user names, the first that has any.
    """

    title: str
    clips: int
    classes: tuple[str, ...]
    captions: int
    each: bool
    source: str
    places: tuple[str, ...] = ("*",)


MANIFESTS: dict[BenchmarkName, Manifest] = {
    "davis": Manifest(
        "DAVIS-50 x 3", 50, ("caption", "subject", "scene"), 3, True, "DiTFlow, arXiv 2412.07776; clips: DAVIS 2017",
        ("*", "JPEGImages/480p/*"),
    ),
    "motionbench": Manifest(
        "MotionBench", 53, ("camera", "single object", "multiple objects", "complex human"), 1, False,
        "Follow-Your-Motion, arXiv 2506.05207",
    ),
    "mtbench": Manifest(
        "MTBench", 100, ("easy", "medium", "hard"), 5, False, "DeT, arXiv 2503.17350; clips: DAVIS and YouTube-VOS",
        ("*", "*/videos/*"),
    ),
    "loveu": Manifest(
        "LOVEU-TGVE-2023", 76, ("style", "object", "background", "multiple"), 4, True, "the LOVEU challenge of 2023",
        ("*", "*_480p/480p_frames/*", "*_480p/480p_videos/*"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """One pair of the user's captions file: its clip, its class, and where it stands; `found` if the clip is there."""

    clip: str
    kind: str
    place: str
    found: bool


def account(name: BenchmarkName, listed: Sequence[Listed]) -> str:
    """How much of a benchmark there is, with every clip that is missing by its name.

    Raises:
        InputError: a class that the benchmark does not have, or no clip at all.
    """
    manifest = MANIFESTS[name]
    for pair in listed:
        if pair.kind not in manifest.classes:
            raise InputError(
                f"{pair.place}: {manifest.title} has no class {pair.kind!r}: set kind to one of "
                f"{', '.join(manifest.classes)} ({meant(pair.kind, manifest.classes)})."
            )
    there = list(dict.fromkeys(pair.clip for pair in listed if pair.found))
    absent = list(dict.fromkeys(pair.clip for pair in listed if not pair.found))
    if not there:
        raise InputError(f"No clip of {manifest.title} is there, of {len(absent)} that are listed: name their folder.")
    pairs = sum(pair.found for pair in listed)
    unlisted = max(0, manifest.clips - len(there) - len(absent))
    told = [f"{manifest.title} ({manifest.source}): {len(there)} of {manifest.clips} clips"]
    told.append(f"{pairs} of {manifest.clips * manifest.captions} pairs")
    told.append("; ".join(_by_class(manifest, listed)))
    if absent:
        told.append(f"clips that are listed and not there: {', '.join(absent)}")
    if unlisted:
        told.append(f"{unlisted} clips are not in the captions file")
    if lacking := _incomplete(manifest, listed):
        told.append(f"clips without all captions: {', '.join(lacking)}")
    return "; ".join(told)


def _by_class(manifest: Manifest, listed: Sequence[Listed]) -> list[str]:
    return [f"{kind} {sum(pair.found and pair.kind == kind for pair in listed)}" for kind in manifest.classes]


def _incomplete(manifest: Manifest, listed: Sequence[Listed]) -> list[str]:
    """Clips that are there with fewer captions, or fewer classes of them, than the benchmark has."""
    kinds: dict[str, list[str]] = {}
    for pair in listed:
        if pair.found:
            kinds.setdefault(pair.clip, []).append(pair.kind)
    wanted = len(manifest.classes) if manifest.each else 1
    return [clip for clip, own in kinds.items() if len(own) < manifest.captions or len(set(own)) < wanted]
