"""DiTFlow: early latents are moved until the attention finds every token where the reference's does.

Letters: b clip, n token of a frame, p pair of frames.

Source: DiTFlow, arXiv 2412.07776, and its public code. Where the two differ the code is followed (logits averaged over
heads; only tokens that move are compared), and the paper's text is a setting. Instead of the latent the rotary
positions can be optimised: tables for queries and for keys, carried on from step to step and dropped behind the guided
ones.

Memory: the activations of blocks 0 to `block` of one clip, and what `attention_flow` holds. Positions add their tables
six times (gradient, Adam's two means, in full width twice): 34 MB each at 480 x 832 x 81 by the 1.3B.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from motionlora.data.errors import InputError
from motionlora.infer.adam import descended
from motionlora.infer.features import FeatureGuidance
from motionlora.infer.guidance import guided_steps, guided_until, noised, reference_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from motionlora.heads.backbone import Latent, Prompt
    from motionlora.heads.rotary import Tables, Turned
    from motionlora.infer.attention_flow import Compared, Displacements
    from motionlora.infer.features import Target
    from motionlora.infer.found import Kind
    from motionlora.infer.guidance import Steer, Time, Walk


FOUND: dict[str, Kind] = {"latent": "latents", "positions": "positions"}


class DiTFlow(FeatureGuidance):
    """Moves early latents until a block's attention finds every token where the reference's does."""

    paper: ClassVar[str] = "DiTFlow, arXiv 2412.07776"

    optimise: Literal["latent", "positions"] = "latent"
    """latent: the latent moves. positions: rotary tables of queries and keys do, and the latent stays."""
    more_blocks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Blocks whose flow counts beside that of `block` (paper's ablation: three of them)."""
    tau: float = Field(default=2.0, gt=0)
    """What logits are multiplied by before the softmax (paper: 2); low values draw displacements to the middle."""
    heads: Literal["mean_of_logits", "logits_of_means"] = "mean_of_logits"
    """mean_of_logits: each head's logits, averaged (code). logits_of_means: of averaged queries and keys (paper)."""
    compares: Literal["moving", "all"] = "moving"
    """moving: where the reference's displacement is not zero (code): what stands still is free. all: everywhere."""
    span: int | None = Field(default=None, ge=0)
    """Compare frames that lie at most so far apart; none compares all pairs (paper)."""

    save: Path | None = None
    """A file for what is found, the latent of the last guided step or the positions of all (safetensors): `generate
    --latents FILE` and `--positions FILE` use it with another caption. none keeps nothing."""

    def read_blocks(self, blocks: int) -> list[int]:
        """The blocks whose flow is read, of a model of so many."""
        return sorted({super().depth(blocks), *self.more_blocks})

    def depth(self, blocks: int) -> int:
        """The last of them."""
        return self.read_blocks(blocks)[-1]

    def gradients(self, steps: int, blocks: int) -> float:
        """One an iteration, from the last block; on the way to positions it does not leave block 0."""
        part = 1.0 if self.optimise == "latent" else self.depth(blocks) / (self.depth(blocks) + 1)
        return super().gradients(steps, blocks) * part

    def dose_bound(self, steps: int) -> float | None:
        """Adam's, 0.078 by default in 50 steps; positions do not move the latent."""
        return super().dose_bound(steps) if self.optimise == "latent" else 0.0

    def identity(self, blocks: int) -> str:
        """With the blocks that are read."""
        return f"{super().identity(blocks)} of {self.read_blocks(blocks)}"

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """Early latents, or positions, are moved by Adam.

        Raises:
            InputError: a block that the model does not have, or that is injected into; nothing to save.
            StorageError: what was found cannot be saved.
        """
        from motionlora.infer.attention_flow import refuse_injected
        from motionlora.infer.found import save_found

        guided = guided_steps(self.share, len(walk.times) - 1) if self.iterations else 0
        if self.save and not guided:
            raise InputError(f"Nothing is optimised that {self.save} could hold: raise guidance.share or iterations.")
        refuse_injected(self.inject.blocks, self.read_blocks(walk.model.blocks))
        tables: list[tuple[Time, Tables]] = []
        with super().steering(walk) if self.optimise == "latent" else self._turned(walk, tables) as steer:

            def saving(latent: Latent, now: Time) -> Latent:
                moved = steer(latent, now)
                if self.save and int((walk.times >= now).sum()) == guided:
                    save_found(self.save, FOUND[self.optimise], tables or [(now, moved)])
                return moved

            yield saving

    @contextmanager
    def _turned(self, walk: Walk, kept: list[tuple[Time, Tables]]) -> Iterator[Steer]:
        """The latent stays; the tables of a guided step serve its iterations and its step, with caption and without."""
        import torch

        reference, until = reference_of(walk), guided_until(walk.times, self.share)
        rates = self.rates(len(walk.times) - 1) if self.iterations else []
        clean = self._clean_target(walk, reference) if rates and self.reference_noise == "clean" else {}
        with self.inject.steering(walk) as injecting, walk.model.turning() as turned:
            tables = turned.stock(walk.noise)

            @torch.no_grad()
            def steer(latent: Latent, now: Time) -> Latent:
                nonlocal tables
                turned.clear()
                latent = injecting(latent, now)
                if now <= until or not rates:
                    return latent
                target = clean or self._target_at(walk, noised(reference, walk.noise, now), now)

                def gradient(moving: Tables) -> Tables:
                    return self._tables_gradient(walk, latent, now, target, turned, moving)

                tables = descended(tables, gradient, rates[int((walk.times > now).sum())], self.iterations)
                turned.put(tables)
                kept.extend([(now, tables)] if self.save else [])
                return latent

            yield steer

    def _tables_gradient(
        self, walk: Walk, latent: Latent, now: Time, target: Target, turned: Turned, tables: Tables
    ) -> Tables:
        import torch

        with torch.enable_grad(), self.recomputed(walk):
            leaf = tables.detach().requires_grad_()
            turned.put(leaf)
            loss = self.loss(self.features(walk, latent, now, walk.prompt), target)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return gradient

    def features(self, walk: Walk, latent: Latent, time: Time, prompt: Prompt) -> dict[int, Compared]:
        """Queries and keys of the blocks."""
        from motionlora.infer.attention_flow import FUSINGS, queries_keys

        blocks = self.read_blocks(walk.model.blocks)
        return queries_keys(walk.model, latent, time, prompt, blocks, FUSINGS[self.heads])

    def target(self, features: dict[int, Compared]) -> Target:
        """The displacement of each token to where the reference attends most, in every pair of frames."""
        from motionlora.infer.attention_flow import displacements, frame_pairs, hard

        return {
            str(block): displacements(seen, frame_pairs(seen.grid.frames, self.span), hard)
            for block, seen in features.items()
        }

    def loss(self, features: dict[int, Compared], target: Target) -> Float[Tensor, " b"]:
        """The mean over blocks of the flow's error, ours being the mean displacement of each token's attention."""
        from motionlora.infer.attention_flow import displacements, frame_pairs, soft

        missed = [
            flow_error(
                displacements(seen, frame_pairs(seen.grid.frames, self.span), soft, self.tau),
                target[str(block)],
                self.compares,
            )
            for block, seen in features.items()
        ]
        return sum(missed[1:], missed[0]) / len(missed)


def flow_error(ours: Displacements, theirs: Displacements, compares: Literal["moving", "all"]) -> Float[Tensor, " b"]:
    """Mean squared error of x and y over the tokens and pairs that count; 0 where none does.

    Where the reference's displacement is zero nothing is asked: a token that stands still there, each frame's flow into
    itself, and a whole clip in which nothing moves.
    """
    counts = (theirs != 0).any(-1) | (compares == "all")
    missed = (ours - theirs).square().mean(-1) * counts
    return missed.sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)
