"""Every measure that a table can have, with its unit, the value of a perfect transfer and its source.

A measure that cannot be taken is in the table as well, as missing with its reason.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """What a figure means. `good` is the value of a perfect transfer, None where there is no such thing."""

    name: str
    label: str
    unit: str
    good: float | None
    source: str


SMM, OURS = "SMM, arXiv 2311.17009", "ours (infer/measure_sprites.py)"
DIRECTION = "ours (infer/measure_direction.py)"
DITFLOW, TGVE, VBENCH = "DiTFlow, arXiv 2412.07776", "LOVEU-TGVE-2023", "VBench 0.1.5"
BY_SPRITES = (
    Measure("smf", "SMF", "R2 of the sprites' paths, -1..1", 1.0, OURS),
    Measure("gain", "gain", "size of the motion, 1 is the reference's", 1.0, OURS),
    Measure("vcos", "vcos", "mean cosine of velocities, -1..1", 1.0, OURS),
    Measure("acc", "AttrAcc", "share of frames and attributes that are the caption's", 1.0, OURS),
    Measure("leak", "AttrLeak", "share of frames and attributes that are the reference's", 0.0, OURS),
    Measure("coverage", "coverage", "share of frames with every sprite seen", 1.0, OURS),
    Measure("extra", "extra", "sprites too many, mean a frame", 0.0, OURS),
)
BY_POINTS = (
    Measure("mf_code", "MF (script)", "mean best cosine of tracks, -1..1", None, f"{SMM}, as its script computes it"),
    Measure("mf_sym", "MF", "mean best cosine of tracks both ways, -1..1", 1.0, f"{SMM}, halved; stillness by ours"),
    Measure("mf_moving", "MF moving", "MF of what moves, -1..1", 1.0, "ours (infer/measure_motion.py)"),
    Measure("mf_star", "MF*", "MF with its chance level taken off, 0 is chance, 1 perfect", 1.0, "ours, after SMM"),
)
BY_BOXES = (
    Measure("miou", "mIoU", "of sprites with the reference's boxes, 0..1", 1.0, "Peekaboo, which S2V2V follows"),
    Measure("csim", "CSIM", "mean cosine of all pairs of frames, CLIP B/32", None, "our reading of S2V2V"),
    Measure("csim_gt", "CSIM-GT", "the same within the reference's boxes", None, "our reading of S2V2V"),
    Measure("fml", "FML", "-", None, "S2V2V, which names it and does not define it"),
)
BY_TEXT = (
    Measure("text_b32", "text B/32", "mean cosine of frames and caption, centre crop", None, f"{DITFLOW}: its script"),
    Measure("text_b32_whole", "text B/32 whole", "the same, letterbox", None, "ours, for subjects at the sides"),
    Measure("text_l14", "text L/14", "mean cosine of frames and caption, centre crop", None, f"{TGVE}, a hundredth"),
    Measure("text_l14_whole", "text L/14 whole", "the same, letterbox", None, "ours, for subjects at the sides"),
)
BY_QUALITY = (
    Measure("tc_adjacent", "TC", "mean cosine of adjacent frames, CLIP B/32", None, "Follow-Your-Motion and others"),
    Measure("tc_pairs", "TC pairs", "mean cosine of all pairs of frames, CLIP L/14", None, TGVE),
    Measure("subject", "subject", "consistency, DINO B/16, 0..1", None, VBENCH),
    Measure("background", "background", "consistency, CLIP B/32, 0..1", None, VBENCH),
    Measure("aesthetic", "aesthetic", "LAION's linear head on CLIP L/14, a tenth", None, VBENCH),
    Measure("smoothness", "smoothness", "0..1", None, f"{VBENCH}, by AMT-S"),
    Measure("smooth_linear", "smooth (linear)", "1 less the mean error of middle frames", None, "ours, in its place"),
    Measure("to_reference", "CLIP to ref.", "mean cosine, frame by frame; leak is the gain over none", None, "ours"),
    Measure("lpips", "LPIPS to ref.", "0 is the reference", None, "LPIPS, arXiv 1801.03924"),
    Measure("diversity", "diversity", "variance over seeds, of pixels in 0..1", None, "as CMC's, on pixels"),
)  # fmt: skip
BY_REVERSAL = (
    Measure("selectivity", "selectivity", "does it turn round with the reference? cosine, -1..1", 1.0, DIRECTION),
    Measure("turned", "turned", "how far it turns round, 1 is fully", 1.0, DIRECTION),
)
MEASURES = (*BY_SPRITES, *BY_REVERSAL, *BY_POINTS, *BY_BOXES, *BY_TEXT, *BY_QUALITY)
LABELS = {measure.name: measure.label for measure in MEASURES}


def names(measures: tuple[Measure, ...]) -> tuple[str, ...]:
    """Of measures."""
    return tuple(measure.name for measure in measures)
