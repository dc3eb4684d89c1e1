"""What papers print of the methods that are compared here: for orientation, never to be merged with our figures.

Models, clips, sizes and trackers differ from paper to paper and from ours: motion fidelity of one and the same method
goes from 0.41 to 0.81 between them. Gains over the same model without transfer are what can be compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row of a paper's table; None where it has no such column.

    Attributes:
        method: its name here.
        text: mean CLIP cosine of frames and caption.
        fidelity: motion fidelity, as SMM's script computes it or is said to.
        temporal: mean CLIP cosine of adjacent frames.
        seconds: a clip, as the paper counts them.
    """

    method: str
    called: str
    paper: str
    text: float | None
    fidelity: float | None
    temporal: float | None
    seconds: float | None


DITFLOW = "DiTFlow, CogVideoX-5B, 50 clips of DAVIS x 3 captions"
FYM = "Follow-Your-Motion, MotionBench, 32 frames of 512 x 512, each method on its own model"
FASTVMT = "FastVMT, Wan 2.1, 50 clips of DAVIS, 32 frames of 832 x 480, A100"
FLOWMOTION = "FlowMotion, 49 frames of 720 x 480, each method on its own model; from a summary of others"
ROWS = (
    Published("none", "no transfer", DITFLOW, 0.318, 0.523, None, None),
    Published("inject", "KV injection", DITFLOW, 0.319, 0.608, None, None),
    Published("motionclone", "MotionClone", DITFLOW, 0.318, 0.634, None, None),
    Published("smm", "SMM", DITFLOW, 0.315, 0.766, None, None),
    Published("moft", "MOFT", DITFLOW, 0.318, 0.726, None, None),
    Published("ditflow", "DiTFlow", DITFLOW, 0.319, 0.785, None, None),
    Published("lora", "Follow-Your-Motion", FYM, 0.375, 0.976, 0.971, 781),
    Published("motionclone", "MotionClone", FYM, 0.298, 0.825, 0.906, 1028),
    Published("smm", "SMM", FYM, 0.276, 0.927, 0.924, 785),
    Published("moft", "MOFT", FYM, 0.283, 0.786, 0.928, 1241),
    Published("ditflow", "DiTFlow", FYM, 0.371, 0.813, 0.937, 714),
    Published("motionclone", "MotionClone", FASTVMT, 0.2304, 0.7315, 0.9722, 397.05),
    Published("smm", "SMM", FASTVMT, 0.2374, 0.7353, 0.9366, 809.70),
    Published("moft", "MOFT", FASTVMT, 0.2297, 0.6511, 0.9797, 595.81),
    Published("ditflow", "DiTFlow", FASTVMT, 0.2091, 0.4062, 0.9822, 626.83),
    Published("fastvmt", "FastVMT", FASTVMT, 0.2422, 0.7471, 0.9865, 184.18),
    Published("flowmotion", "FlowMotion, Wan 1.3B", FLOWMOTION, 0.347, 0.850, 0.986, 213),
    Published("ditflow", "DiTFlow, CogVideoX-2B", FLOWMOTION, 0.350, 0.691, 0.983, 349),
)


def published_of(methods: Iterable[str]) -> list[Published]:
    """The rows of these methods, as `method.py` reads them, whatever their settings; controls have none."""
    wanted = {part.partition(":")[0] for name in methods if not name.startswith("wrong:") for part in name.split("+")}
    return [row for row in ROWS if row.method in wanted]
