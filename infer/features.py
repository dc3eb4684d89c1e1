"""Guidance by a loss on what a forward shows, by default one block's output: the frame that all such methods share.

Letters: b batch, c channel of the model, f latent frame, h, w places of the token grid. Imports torch when it is used.

Source: the harness of DiTFlow, arXiv 2412.07776, in which the others are its baselines. Gradients go back through the
network from the block to the latent: memory is that of the activations of blocks 0 to `block` of one clip, or of one
block and the inputs of these (`recompute`). Their forwards have the caption alone, no classifier-free guidance, and end
after the block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field

from motionlora.infer.adam import descended, reach
from motionlora.infer.guidance import GuidanceSettings, guided_steps, guided_until, noised, reference_of
from motionlora.infer.guide_inject import Injection

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from motionlora.heads.backbone import Backbone, Latent, Prompt
    from motionlora.infer.guidance import Steer, Time, Walk

Features: TypeAlias = "Float[Tensor, 'b c f h w']"
Target: TypeAlias = "dict[str, Tensor]"
"""What a loss needs to know of the reference's features."""


class FeatureGuidance(GuidanceSettings):
    """Settings and steering of a guidance by features; `target` and `loss` are the method's own."""

    lr: float = Field(default=0.002, ge=0, le=1)
    """Of Adam in the first guided step, in units of the latent (DiTFlow: 0.002); 0 moves nothing."""
    lr_falls_to: float = Field(default=0.5, ge=0, le=1)
    """Share of lr that it falls to, in equal parts, behind the last guided step (DiTFlow: 0.5)."""
    iterations: int = Field(default=5, ge=0)
    """Of Adam in a guided step, a fresh one each (DiTFlow: 5); 0 moves nothing."""
    share: float = Field(default=0.2, ge=0, le=1)
    """Of the steps, the first ones, that are guided (DiTFlow: 0.2)."""
    block: int | None = Field(default=None, ge=0)
    """Whose output is compared, counted from zero; none takes that at half depth (DiTFlow: 15 of 30)."""
    reference_noise: Literal["clean", "matched"] = "clean"
    """clean: at time 0 with no caption, once a call (DiTFlow). matched: noised like the walk, in each guided step."""
    recompute: bool = False
    """Keep the inputs of blocks alone and compute blocks once more for gradients: the same result, less memory."""
    inject: Injection = Injection(blocks=())
    """KV injection beside it (DiTFlow: block 0); none by default, so that the loss is seen alone."""

    @abstractmethod
    def target(self, features: Any) -> Target:
        """What the loss compares with, from the reference's features."""

    @abstractmethod
    def loss(self, features: Any, target: Target) -> Float[Tensor, " b"]:
        """Of each clip of the batch."""

    def features(self, walk: Walk, latent: Latent, time: Time, prompt: Prompt) -> Any:
        """What of a forward is compared; here the output of `block`, as `Features`. It ends in the block `depth`."""
        return block_features(walk.model, latent, time, prompt, self.depth(walk.model.blocks))

    def identity(self, blocks: int) -> str:
        """All that the target of a clean reference depends on besides model, LoRAs and reference."""
        own = self.model_dump_json(exclude={"name", *FeatureGuidance.model_fields})
        return f"{type(self).__name__} {own} block {self.depth(blocks)}"

    def depth(self, blocks: int) -> int:
        """The block, of a model of so many."""
        return blocks // 2 if self.block is None else self.block

    @property
    def asked(self) -> int:
        """Gradients in a guided step."""
        return self.iterations

    def descent(self, walk: Walk, latent: Latent, now: Time, gradient: Callable[[Latent], Latent]) -> Latent:
        """The latent of a guided step, led down the loss; here by Adam."""
        rate = self.rates(len(walk.times) - 1)[int((walk.times > now).sum())]
        return descended(latent, gradient, rate, self.iterations)

    def rates(self, steps: int) -> list[float]:
        """Adam's rate in each guided step: from `lr` down."""
        guided = guided_steps(self.share, steps)
        return [self.lr * (1 + (self.lr_falls_to - 1) * step / guided) for step in range(guided)]

    def forwards(self, steps: int, passes: int, blocks: int) -> float:
        """An iteration adds a forward up to the block, and one more to recompute it; so does the reference: once, or in
        each guided step."""
        guided = guided_steps(self.share, steps) if self.asked else 0
        reference = min(guided, 1) if self.reference_noise == "clean" else guided
        part = (self.depth(blocks) + 1) / blocks
        return self.inject.forwards(steps, passes, blocks) + part * (
            guided * self.asked * (1 + self.recompute) + reference
        )

    def gradients(self, steps: int, blocks: int) -> float:
        """One an iteration, from the block."""
        return guided_steps(self.share, steps) * self.asked * (self.depth(blocks) + 1) / blocks

    def dose_bound(self, steps: int) -> float | None:
        """Adam's: 0.078 by default in 50 steps."""
        return sum(reach(rate, self.iterations) for rate in self.rates(steps))

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """Early latents are moved by Adam; the reference's features are taken before anything is injected.

        Raises:
            InputError: a block that the model does not have.
        """
        import torch

        reference, until = reference_of(walk), guided_until(walk.times, self.share)
        acts = self.asked > 0 and guided_steps(self.share, len(walk.times) - 1) > 0
        clean = self._clean_target(walk, reference) if acts and self.reference_noise == "clean" else {}
        with self.inject.steering(walk) as injecting:

            @torch.no_grad()
            def steer(latent: Latent, now: Time) -> Latent:
                latent = injecting(latent, now)
                if now <= until or not acts:
                    return latent
                target = clean or self._target_at(walk, noised(reference, walk.noise, now), now)

                def gradient(moving: Latent) -> Latent:
                    return self._gradient(walk, moving, now, target)

                return self.descent(walk, latent, now, gradient)

            yield steer

    def _gradient(self, walk: Walk, latent: Latent, now: Time, target: Target) -> Latent:
        import torch

        with torch.enable_grad(), self.recomputed(walk):
            leaf = latent.detach().requires_grad_()
            loss = self.loss(self.features(walk, leaf, now, walk.prompt), target)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return gradient

    def recomputed(self, walk: Walk) -> AbstractContextManager[None]:
        """In which a gradient is taken."""
        from motionlora.heads.recompute import recomputing

        return recomputing(walk.model.transformer) if self.recompute else nullcontext()

    def _clean_target(self, walk: Walk, reference: Latent) -> Target:
        name = self.identity(walk.model.blocks)
        return walk.kept.once(name, lambda: self._target_at(walk, reference, walk.times[-1]), reference)

    def _target_at(self, walk: Walk, latent: Latent, time: Time) -> Target:
        import torch

        with torch.no_grad():
            return self.target(self.features(walk, latent, time, walk.blank()))


def block_features(model: Backbone, latent: Latent, time: Time, prompt: Prompt, block: int) -> Features:
    """The block's output in fp32, by a forward that ends there; gradients flow where grad is enabled."""
    from einops import rearrange

    grid = model.grid(latent)
    with model.capturing([block], "block", stop=True) as seen:
        seen.run(lambda: model.velocity(latent, time.expand(latent.shape[0]), prompt))
    return rearrange(seen[block].float(), "b (f h w) c -> b c f h w", f=grid.frames, h=grid.height, w=grid.width)


def cosine(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """The cosine along an axis; 0, with no gradient, where either vector is zero."""
    import torch

    lengths = torch.linalg.vector_norm(one, dim=dim) * torch.linalg.vector_norm(other, dim=dim)
    return (one * other).sum(dim) / (lengths + 1e-12)
