"""HeadMap: the measured roles of all attention heads; classify, save, load.

Needs neither torch nor a model: a rule is applied anew to saved scores in milliseconds.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from motionlora.data.cache import replacing
from motionlora.data.json_text import parsed_json
from motionlora.data.settings import InputError
from motionlora.heads.token_grid import TokenGrid

if TYPE_CHECKING:
    from motionlora.heads.settings import Rule

Kind: TypeAlias = Literal["spatial", "temporal", "all"]
FORMAT = "motionlora.head_map/1"

# Follow-Your-Motion (arXiv 2506.05207): the release wants the temporal mass to win by the ratio, the paper lets it
# lose by the ratio. The first leans to spatial heads, the second to temporal ones.
RULES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "code": lambda spatial, temporal, ratio: temporal >= ratio * spatial,
    "paper": lambda spatial, temporal, ratio: temporal > spatial / ratio,
}


@dataclass(frozen=True, eq=False)
class HeadMap:
    """What was measured on one clip with one model.

    Attributes:
        backbone: name of the model.
        grid: token grid of the clip.
        times: noise levels in [0, 1] over which the scores are averaged.
        scores: float64 "block head 2": spatial and temporal share of the attention mass, each in [0, 1].
        mask_block: tokens that the masks treat as one.
        clip_hash: content hash of the clip.
        caption: caption of the clip.

    Raises:
        InputError: scores of another shape, not finite, or outside [0, 1].
    """

    backbone: str
    grid: TokenGrid
    times: tuple[float, ...]
    scores: np.ndarray
    mask_block: int
    clip_hash: str
    caption: str

    def __post_init__(self) -> None:
        shape = self.scores.shape
        if len(shape) != 3 or shape[2] != 2 or 0 in shape:
            raise InputError(
                f"A head map needs scores of shape (blocks, heads, 2), got {shape}: score the heads again."
            )
        # A share may exceed 1 by the rounding of its sum.
        if not (np.isfinite(self.scores).all() and self.scores.min() >= 0 and self.scores.max() <= 1 + 1e-4):
            raise InputError("A head map needs scores from 0 to 1, got others: score the heads again.")

    @property
    def blocks(self) -> int:
        return self.scores.shape[0]

    @property
    def heads(self) -> int:
        return self.scores.shape[1]

    def temporal(self, rule: Rule = "code", ratio: float = 1.3) -> np.ndarray:
        """True for temporal heads, False for spatial ones; bool "block head".

        Args:
            rule: "code": temporal where its mass >= ratio * spatial mass (the release, our default);
                "paper": temporal where its mass > spatial mass / ratio (arXiv 2506.05207).
            ratio: above 0; 1.3 in paper and release, where it is called alpha. At 1 the rules agree but for ties.

        Raises:
            InputError: an unknown rule, or a ratio that is not above 0.
        """
        if rule not in RULES:
            raise InputError(f"There is no head rule {rule!r}{_nearest(rule, RULES)}; allowed are {', '.join(RULES)}.")
        if not 0 < ratio < float("inf"):
            raise InputError(f"The ratio of a head rule must be above 0, got {ratio}: 1.3 is the published one.")
        return RULES[rule](self.scores[..., 0], self.scores[..., 1], ratio)

    def chosen(self, kind: Kind, rule: Rule = "code", ratio: float = 1.3) -> np.ndarray:
        """The heads of one kind, bool "block head". Some blocks may have none.

        Raises:
            InputError: an unknown kind, or as `temporal`.
        """
        temporal = self.temporal(rule, ratio)
        kinds = {"spatial": ~temporal, "temporal": temporal, "all": np.ones_like(temporal)}
        if kind not in kinds:
            raise InputError(
                f"There is no kind of heads {kind!r}{_nearest(kind, kinds)}; allowed are {', '.join(kinds)}."
            )
        return kinds[kind]

    def counts(self, rule: Rule = "code", ratio: float = 1.3) -> np.ndarray:
        """Spatial and temporal heads of each block, int "block 2"."""
        temporal = self.temporal(rule, ratio).sum(axis=1)
        return np.stack((self.heads - temporal, temporal), axis=1)

    def as_json(self, rule: Rule = "code", ratio: float = 1.3) -> dict[str, Any]:
        """Everything, ready for JSON, with the verdict of one rule for readers who do not have this module."""
        return {
            "format": FORMAT,
            "backbone": self.backbone,
            "grid": {"frames": self.grid.frames, "height": self.grid.height, "width": self.grid.width},
            "times": list(self.times),
            "mask_block": self.mask_block,
            "clip_hash": self.clip_hash,
            "caption": self.caption,
            "rule": rule,
            "ratio": ratio,
            "temporal": self.temporal(rule, ratio).astype(int).tolist(),
            "scores": self.scores.tolist(),
        }

    @classmethod
    def from_json(cls, content: Any, source: str = "This text") -> HeadMap:
        """The inverse of `as_json`. The verdict is not read: it follows from the scores.

        Args:
            content: what JSON gave.
            source: where it came from, the subject of the sentence when it is wrong.

        Raises:
            InputError: another format, a missing field, or a wrong type.
        """
        came = content.get("format") if isinstance(content, dict) else type(content).__name__
        if came != FORMAT:
            raise InputError(f"{source} is no head map: its format is {came!r:.80}, not {FORMAT!r}; score anew.")
        try:
            return cls(
                backbone=_text(content["backbone"]),
                grid=TokenGrid(*(int(content["grid"][side]) for side in ("frames", "height", "width"))),
                times=tuple(float(time) for time in content["times"]),
                scores=np.array(content["scores"], dtype=np.float64),
                mask_block=int(content["mask_block"]),
                clip_hash=_text(content["clip_hash"]),
                caption=_text(content["caption"]),
            )
        except InputError as error:
            raise InputError(f"{source} is damaged: {error}") from None
        except KeyError as missing:
            raise InputError(f"{source} is a head map without {missing}; score the heads again.") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{source} is a damaged head map ({error!s:.200}); score the heads again.") from None

    def save(self, path: str | Path, rule: Rule = "code", ratio: float = 1.3) -> None:
        """Writes `as_json` to a file; either the whole file appears or nothing changes.

        Raises:
            StorageError: the file cannot be written.
        """
        text = json.dumps(self.as_json(rule, ratio), indent=1, ensure_ascii=False)
        with replacing(Path(path)) as draft:
            draft.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HeadMap:
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, no JSON, or as `from_json`.
        """
        try:
            content = parsed_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"Cannot read the head map {path}: {error.strerror}; give a file made by `heads`."
            ) from None
        except ValueError:
            raise InputError(f"{path} is no head map: it is not JSON; give a file made by `heads`.") from None
        return cls.from_json(content, str(path))


def _nearest(name: object, allowed: dict[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
