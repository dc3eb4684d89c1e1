"""FlowMotion: early latents are moved until the clip that they foresee moves like the reference.

Letters: b batch, c latent channel, f latent frame, h height, w width.

Source: FlowMotion, arXiv 2603.06289, and its public script; where the two differ the script is followed. The latent is
moved on the loss of the clip foreseen, `latent - time * velocity`, with the velocity taken as a constant: no gradient
goes through the network, so that the peak of memory is that of plain sampling and a few latents (Adam's two means,
gradient, one frame distance of differences at a time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from motionlora.infer.adam import descended, reach
from motionlora.infer.guidance import GuidanceSettings, guided_steps, guided_until, noised, reference_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from motionlora.heads.backbone import Latent
    from motionlora.infer.guidance import Steer, Time, Walk

SOURCE_SEED = 1_592_590_336
"""Of the shared source noise, far from seeds that people choose: the same seed would be the walk's own noise."""


class FlowMotion(GuidanceSettings):
    """Moves early latents until the clip they foresee moves like the reference; no gradient through the network."""

    paper: ClassVar[str] = "FlowMotion, arXiv 2603.06289"

    lr: float = Field(default=0.003, ge=0, le=1)
    """Of Adam, in units of the latent (script: 0.003; paper: 0.01 for hard motion); 0 moves nothing."""
    iterations: int = Field(default=3, ge=0)
    """Of Adam in a guided step, a fresh one each (script: 3); 0 moves nothing."""
    share: float = Field(default=0.2, ge=0, le=1)
    """Of the steps, the first ones, that are guided (script: 10 of 50)."""
    latent_weight: float = Field(default=20.0, ge=0)
    """Of the latent alignment (script: 20; only its ratio to the other counts)."""
    difference_weight: float = Field(default=5.0, ge=0)
    """Of the difference alignment (script: 5)."""
    differences: Literal["all_pairs", "consecutive"] = "all_pairs"
    """all_pairs: sizes of the differences of all pairs of frames (script). consecutive: signed ones of neighbours."""
    across: float = Field(default=0.1, ge=0, le=1)
    """What remains of the velocity across its mean so far, inside the loss (script: 0.1); 1 does not regularise."""
    source: Literal["predicted", "clean"] = "predicted"
    """predicted: the reference as the model foresees it at the step's time. clean: itself (more motion, less text)."""
    source_noise: Literal["shared", "own"] = "shared"
    """shared: the reference is noised alike for every seed and caption of a call, and foreseen once a step (ours).
    own: each walk draws its own (script). Either way another noise in each step."""
    reuse_velocity: bool = False
    """Ask the network once a guided step, not in each iteration (ours: 1.3 forwards of plain sampling, not 1.7)."""

    def forwards(self, steps: int, passes: int, blocks: int) -> float:
        """1.7 times plain sampling by default: a guided step adds its iterations, and the source once."""
        del blocks
        asked = passes * (1 if self.reuse_velocity else self.iterations) + (self.source == "predicted")
        return steps * passes + guided_steps(self.share, steps) * (asked if self.iterations else 0)

    def dose_bound(self, steps: int) -> float:
        """Adam's, of every guided step: 0.09 by default in 50 steps."""
        return guided_steps(self.share, steps) * reach(self.lr, self.iterations)

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """Early latents are moved by Adam."""
        import torch

        reference, until = reference_of(walk), guided_until(walk.times, self.share)

        @torch.no_grad()
        def steer(latent: Latent, now: Time) -> Latent:
            if now <= until or self.iterations == 0:
                return latent
            source, velocity = self._source(walk, reference, now), self._velocity(walk, latent, now)

            def gradient(moving: Latent) -> Latent:
                return alignment_gradient(moving - now * velocity(moving), source, self)

            return descended(latent, gradient, self.lr, self.iterations)

        yield steer

    def _source(self, walk: Walk, reference: Latent, now: Time) -> Latent:
        """The clip that shall be foreseen: the reference, or what the model makes of it at this time with no caption.

        No classifier-free guidance: the script has it with two equal prompts, where it changes nothing.
        """
        import torch

        if self.source == "clean":
            return reference
        draws = walk.generator
        if self.source_noise == "shared":
            draws = torch.Generator().manual_seed(SOURCE_SEED + int((walk.times > now).sum()))

        def foreseen() -> dict[str, Latent]:
            noise = torch.randn(reference.shape, generator=draws).to(reference)
            latent = noised(reference, noise, now)
            return {"clip": latent - now * walk.model.velocity(latent, now.expand(latent.shape[0]), walk.blank())}

        if self.source_noise == "own":
            return foreseen()["clip"]
        return walk.kept.once(f"flowmotion {draws.initial_seed()} {float(now)}", foreseen, reference)["clip"]

    def _velocity(self, walk: Walk, start: Latent, now: Time) -> Callable[[Latent], Latent]:
        """The network's velocity with classifier-free guidance, regularised in all guided steps but the first."""

        def settled(moving: Latent) -> Latent:
            velocity = walk.velocity(moving, now)
            if now == walk.times[0]:
                return velocity
            return regularised(velocity, (start - walk.noise) / (now - walk.times[0]), self.across)

        if not self.reuse_velocity:
            return settled
        held = settled(start)
        return lambda moving: held


def regularised(velocity: Latent, mean: Latent, across: float) -> Latent:
    """Velocity regularisation: at each place (f, h, w) the part across the mean velocity so far is scaled by `across`.

    The projection is that of the vector of channels; one over the whole latent would be another method.
    """
    along = (velocity * mean).sum(1, keepdim=True) / (mean.square().sum(1, keepdim=True) + 1e-8) * mean
    return along + across * (velocity - along)


def alignment_gradient(foreseen: Latent, source: Latent, settings: FlowMotion) -> Latent:
    """Of `latent_weight * LA + difference_weight * DA` by the clip foreseen; each term's graph is dropped at once."""
    import torch

    with torch.enable_grad():
        leaf = foreseen.detach().requires_grad_()
        (settings.latent_weight * latent_alignment(leaf, source)).backward()
        for term in DIFFERENCES[settings.differences](leaf, source):
            (settings.difference_weight * term).backward()
    assert leaf.grad is not None
    return leaf.grad


def latent_alignment(foreseen: Latent, source: Latent) -> Float[Tensor, ""]:
    """LA: mean squared error, each clip of a batch for itself."""
    return (foreseen - source).square().sum() / foreseen[0].numel()


def all_pairs(foreseen: Latent, source: Latent) -> Iterator[Float[Tensor, ""]]:
    """DA as in the script: mean squared error of |y_f - y_g|, in terms of one frame distance each, whose sum it is.

    The script stacks each ordered pair of frames, and the neighbours once more: f (f - 1) + (f - 1) differences. Held
    are those of one distance, at most f - 1.
    """
    frames = foreseen.shape[2]
    entries = (frames + 1) * (frames - 1) * foreseen[0, :, 0].numel()
    for distance in range(1, frames):
        ours, theirs = ((y[:, :, distance:] - y[:, :, :-distance]).abs() for y in (foreseen, source))
        yield (3 if distance == 1 else 2) * (ours - theirs).square().sum() / entries


def consecutive(foreseen: Latent, source: Latent) -> Iterator[Float[Tensor, ""]]:
    """DA as the paper's words have it: mean squared error of y_(f+1) - y_f, with its sign."""
    if foreseen.shape[2] > 1:
        ours, theirs = foreseen.diff(dim=2), source.diff(dim=2)
        yield (ours - theirs).square().sum() / ours[0].numel()


DIFFERENCES = {"all_pairs": all_pairs, "consecutive": consecutive}
