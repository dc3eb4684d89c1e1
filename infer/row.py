"""One row of a comparison's results: a clip as it came out, or why there is none."""

from dataclasses import dataclass, field
from typing import Any, Literal

from motionlora.infer.method import Control


@dataclass(frozen=True)
class Row:
    """One cell's outcome.

    Attributes:
        clip, kind, caption, method, seed: which cell.
        control: what kind of control the method is, `none` for a method.
        status, sentence: `failed` has the reason.
        key: of the clip, `cells/KEY.mp4`.
        values: measures by name; `missing`: why the others are not there.
        cost: forwards, gradients, dose and seconds by phase, as measured when the clip was made.
        paths: for the page alone.
    """

    clip: str
    kind: str
    caption: str
    method: str
    seed: int
    control: Control = "none"
    status: Literal["done", "failed"] = "done"
    sentence: str = ""
    key: str = ""
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    paths: list[Any] = field(default_factory=list)

    @property
    def pairing(self) -> tuple[str, str, int]:
        """What two rows share that may be compared: clip, caption and seed."""
        return self.clip, self.caption, self.seed
