"""S2V2V: points shall look along their tracks, from frame to later frame, as the reference's points do.

Letters: b batch, l block, c channel of the model, p point, f latent frame, g later latent frame, s place of the token
grid, k cell near a point's track.

Source: S2V2V, section on sparse points and sparse correlation maps; an earlier version of the same work is arXiv
2501.07563 ("motion consistency loss"). Read thus where it is unclear: block outputs are compared, 10 is an inverse
temperature, a map is kept within a disc around the track, and a point stands in latent frame j at the middle of the
pixel frames that it covers, hidden where it is hidden in all of them. Published was classifier guidance of weight 10000
in the first 30 steps (50 with boxes); here early latents are moved by Adam as by DiTFlow, arXiv 2412.07776, or the
velocity is (`update`).

Points come from a file, from boxes, or are found: points that move, followed by the default tracker. Clicks and points
that are found are followed in the reference's decoded latent. A walk knows no pixels, a track is needed to half a token
only, and so every walk has its points, whoever made it. Without a reference boxes are enough: a clip of black boxes on
white is made, and a map is kept within the whole box (the trajectory variant). There maps that are brought to sum 1
cannot tell an object that fills its box from bare background, which is as even: what stands out of the box then costs,
and what leaves it altogether does not. Shares of the whole frame (`maps`) tell them apart, and are taken for boxes.

Memory: the activations of the blocks up to the last that is compared, in fp32 the features of the cells alone, points x
frames x cells x channels a block (8 points at 480 x 832 x 81 by the 1.3B: 30 MB), and maps of points x frames^2 x cells
(0.4 MB); with shares of the frame the features of all tokens (201 MB a block) and points x frames x tokens (22 MB).
Nothing grows with tokens^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator

from motionlora.data.errors import InputError
from motionlora.infer.features import FeatureGuidance
from motionlora.infer.guidance import reference_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float
    from torch import Tensor

    from motionlora.data.clip import Clip
    from motionlora.heads.backbone import Latent, Prompt, TokenGrid
    from motionlora.infer.features import Target
    from motionlora.infer.guidance import Steer, Time, Walk

Maps: TypeAlias = "Float[Tensor, 'b l p f g k']"
Places: TypeAlias = "dict[str, Tensor]"
"""cells: Int "p f k", places of a frame, the point's own first; inside: Bool "p f k", which count; visible: "p f"."""


class S2V2V(FeatureGuidance):
    """Moves early latents until points resemble their surroundings along their tracks as the reference's do."""

    paper: ClassVar[str] = "S2V2V; an earlier version is arXiv 2501.07563"

    block: int | None = Field(default=None, ge=0)
    """The last whose output is compared, counted from zero; none takes the one before half depth (14 of 30)."""
    taps: int = Field(default=4, ge=1)
    """How many blocks are compared: the last one and every second before it (ours: 8, 10, 12 and 14 of 30)."""
    points: Path | None = None
    """JSON file of points: frame, x, y in pixels, a click each; none finds points that move."""
    boxes: Path | None = None
    """JSON file of boxes: frame, x, y, w, h in pixels; their centres are the points, and no reference is needed."""
    count: int = Field(default=8, ge=1)
    """How many points are looked for where no file is given."""
    radius: float | None = Field(default=None, ge=1)
    """Tokens around the track that a map is kept in; none takes 3 of 30 rows, at least 1.5."""
    inverse_temperature: float = Field(default=10.0, gt=0)
    """Factor of the cosines before the softmax (paper: 10)."""
    correlation_range: int | None = Field(default=None, ge=1)
    """How many latent frames ahead a point is looked for; none looks to the end (paper: to the end, about 8 do)."""
    maps: Literal["near", "frame"] | None = None
    """near: a map is brought to sum 1 near the track (paper). frame: it holds shares of the whole frame (ours, which
    alone keeps sprites in boxes on the tiny Wan). None takes near for points and frame for boxes."""
    noise: Literal["own", "trajectory"] = "own"
    """trajectory: start from noise whose coarse part moves with the boxes (FreeTraj); the layout comes with it."""
    noise_cut: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.25, 0.1)
    """Up to which frequency in space and in time it moves, as shares of the highest (FreeTraj's script: 0.25, 0.1)."""
    update: Literal["latent", "velocity"] = "latent"
    """latent: Adam, as the other methods here. velocity: one step a guided step along the gradient, like the paper."""
    eta: float = Field(default=0.3, ge=0)
    """Of `velocity`: root mean square of what is added to the velocity, whose own is about 1."""

    @field_validator("boxes")
    @classmethod
    def _one_file(cls, boxes: Path | None, info: ValidationInfo) -> Path | None:
        if boxes is not None and info.data.get("points") is not None:
            raise ValueError("it should be left out where points come from a file of points")
        return boxes

    @field_validator("noise")
    @classmethod
    def _boxes_lead_the_noise(cls, noise: str, info: ValidationInfo) -> str:
        if noise == "trajectory" and info.data.get("boxes") is None:
            raise ValueError("noise can follow boxes only: name a file of boxes, or leave it at own")
        return noise

    @property
    def asked(self) -> int:
        """One gradient a guided step for the velocity."""
        return self.iterations if self.update == "latent" else min(1, self.iterations)

    def depth(self, blocks: int) -> int:
        """The last block that is compared."""
        return max(0, blocks // 2 - 1) if self.block is None else self.block

    def compared(self, blocks: int) -> list[int]:
        """The blocks that are compared, of a model of so many."""
        return sorted(range(self.depth(blocks), -1, -2)[: self.taps])

    def dose_bound(self, steps: int) -> float | None:
        """Adam's; a gradient of a given root mean square may be large in single elements, and a new start is."""
        return super().dose_bound(steps) if self.update == "latent" and self.noise == "own" else None

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """Early latents, or the velocity, are moved; before, the start may be.

        Raises:
            InputError: as `FeatureGuidance`; a file does not fit.
        """
        from motionlora.infer.trajectory_noise import moving_noise

        leads = self.boxes if self.noise == "trajectory" else None
        start = moving_noise(walk.noise, walk.model, leads, self.noise_cut) if leads else None
        with super().steering(walk) as steer:

            def started(latent: Latent, now: Time) -> Latent:
                return steer(latent if start is None or now < walk.times[0] else start, now)

            yield started

    def refuse(self, frames: int, height: int, width: int) -> None:
        """Refuses a file that cannot be read or names a place outside of the clip."""
        from motionlora.infer.points import read_boxes, read_marks

        for path, read in ((self.points, read_marks), (self.boxes, read_boxes)):
            if path is not None:
                read(path, (frames, height, width))

    def made_reference(self, frames: int, height: int, width: int, fps: float) -> Clip | None:
        """Black boxes that move over white, where there is a file of boxes."""
        from motionlora.infer.points import box_clip, read_boxes

        size = (frames, height, width)
        return None if self.boxes is None else box_clip(read_boxes(self.boxes, size), size, fps)

    def features(self, walk: Walk, latent: Latent, time: Time, prompt: Prompt) -> Maps:
        """The correlation maps of all compared blocks, by a forward that ends in the last one."""
        import torch

        places, grid, blocks = self.places(walk), walk.model.grid(latent), self.compared(walk.model.blocks)
        with walk.model.capturing(blocks, "block", stop=True) as seen:
            seen.run(lambda: walk.model.velocity(latent, time.expand(latent.shape[0]), prompt))
        pairs = counted_pairs(places["visible"], self.correlation_range)
        shares = self.maps or ("near" if self.boxes is None else "frame")
        maps = [correlation_maps(seen[block], grid, places, self.inverse_temperature, shares) for block in blocks]
        return torch.stack(maps, 1) * pairs.unsqueeze(-1)

    def target(self, features: Maps) -> Target:
        """The reference's maps."""
        return {"maps": features}

    def loss(self, features: Maps, target: Target) -> Float[Tensor, " b"]:
        """The sum of squared differences over blocks, points, pairs of frames and cells."""
        return (features - target["maps"]).square().sum((1, 2, 3, 4, 5))

    def descent(self, walk: Walk, latent: Latent, now: Time, gradient: Callable[[Latent], Latent]) -> Latent:
        """Adam; or the step's share of `eta` times the gradient, brought to root mean square 1, added to the velocity.

        Added to the velocity, not to the noise, where it would count 1 / (1 - time) times; and before the network is
        asked, so that the velocity is that of the latent moved: a difference of second order in the step.
        """
        if self.update == "latent":
            return super().descent(walk, latent, now, gradient)
        then = walk.times[int((walk.times >= now).sum())]
        pull = gradient(latent)
        size = pull.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
        return latent + (then - now) * self.eta * pull / (size + 1e-12)

    def identity(self, blocks: int) -> str:
        """With the file's content, which may change under its name."""
        return f"{super().identity(blocks)} {self._content()}"

    def places(self, walk: Walk) -> Places:
        """Where the points and their surroundings are, found once for all walks that share what they keep.

        Raises:
            InputError: a file does not fit, or no point is seen in two latent frames.
        """
        name = f"s2v2v places {self.points} {self.boxes} {self.count} {self.radius}"
        if name not in walk.kept.tensors:
            places = walk.kept.once(f"{name} {self._content()}", lambda: self._places(walk), walk.noise)
            if not counted_pairs(places["visible"], self.correlation_range).any():
                raise InputError(
                    f"Of {len(places['visible'])} points none is seen in two latent frames that are compared: name "
                    "points that can be followed in a file with --guidance.points."
                )
            walk.kept.tensors[name] = places
        return walk.kept.tensors[name]

    def _content(self) -> str:
        file = self.points or self.boxes
        return sha256(file.read_bytes()).hexdigest() if file and file.is_file() else "found"

    def _places(self, walk: Walk) -> Places:
        import torch

        from motionlora.infer.spots import spots_of

        latent, model = reference_of(walk), walk.model
        if len(latent) > 1:
            raise InputError(f"S2V2V takes one reference for all clips of a batch, got {len(latent)}: give one.")
        spots = spots_of(latent, model, points=self.points, boxes=self.boxes, count=self.count, radius=self.radius)
        return {name: torch.from_numpy(value) for name, value in vars(spots).items()}


def counted_pairs(visible: Bool[Tensor, "p f"], reach: int | None) -> Bool[Tensor, "p f g"]:
    """Whether a point is seen in frame f and in the later frame g, at most `reach` frames ahead."""
    import torch

    frames = visible.shape[1]
    later = torch.ones(frames, frames, dtype=torch.bool, device=visible.device).triu(1).tril(reach or frames)
    return visible.unsqueeze(2) & visible.unsqueeze(1) & later


def correlation_maps(
    tokens: Float[Tensor, "b fs c"],
    grid: TokenGrid,
    places: Places,
    inverse_temperature: float,
    shares: Literal["near", "frame"] = "near",
) -> Float[Tensor, "b p f g k"]:
    """softmax_k(inverse_temperature * cos(feature of the point in f, feature of cell k near its track in g)).

    The softmax over the cells inside is that over the whole frame, kept there and brought back to sum 1: other cells
    have 0. Only the cells are read. With shares of the `frame` it is not brought back to sum 1.
    """
    import torch
    from einops import einsum, rearrange
    from torch.nn.functional import normalize

    frames = torch.arange(grid.frames, device=tokens.device)[None, :, None]
    by_frame = rearrange(tokens, "b (f s) c -> b f s c", f=grid.frames)
    near = normalize(by_frame[:, frames, places["cells"]].float(), dim=-1)
    own = near[:, :, :, 0]
    logits = inverse_temperature * einsum(own, near, "b p f c, b p g k c -> b p f g k")
    logits = logits.masked_fill(~places["inside"].unsqueeze(1), -torch.inf)
    if shares == "near":
        return logits.softmax(-1)
    everywhere = einsum(own, normalize(by_frame.float(), dim=-1), "b p f c, b g s c -> b p f g s")
    return (logits - (inverse_temperature * everywhere).logsumexp(-1, keepdim=True)).exp()
