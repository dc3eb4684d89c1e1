"""What DiTFlow found, in a file, and walks that use it again with another caption: no reference, nothing optimised.

Letters: g guided step, b clip, c latent channel, f latent frame, h, w, s token, r pair of rotary channels.

Source: the zero-shot transfer of DiTFlow, arXiv 2412.07776. A file holds `times` and either `latents` (one: that of the
last guided step, since the walk goes on from it and forgets all before) or `positions` (the tables of each guided step,
34 MB each at 480 x 832 x 81 by the 1.3B). Both cost what plain sampling costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from motionlora.data.cache import replacing
from motionlora.data.errors import InputError
from motionlora.infer.guide_none import NoGuidance

if TYPE_CHECKING:
    from motionlora.heads.backbone import Latent
    from motionlora.infer.guidance import Guidance, Steer, Time, Walk
    from motionlora.infer.settings import GenerateSettings

Kind: TypeAlias = Literal["latents", "positions"]
MAKE = {
    "latents": "make one with --guidance ditflow --guidance.save FILE",
    "positions": "make one with --guidance ditflow --guidance.optimise positions --guidance.save FILE",
}


@dataclass(frozen=True, eq=False)
class Found:
    """What was optimised at each of these times.

    Attributes:
        times: falling, fp32.
        tensors: "g b c f h w" latents or "g b 4 s r" tables, fp32.
    """

    kind: Kind
    times: Float[Tensor, " g"]
    tensors: Float[Tensor, "g b ..."]


def save_found(path: Path, kind: Kind, found: Sequence[tuple[Time, Tensor]]) -> None:
    """Writes what was found at each time, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    from safetensors.torch import save

    times, tensors = (torch.stack(column) for column in zip(*found, strict=True))
    held = {"times": times, kind: tensors}
    with replacing(path) as draft:
        draft.write_bytes(save({name: tensor.float().cpu().contiguous() for name, tensor in held.items()}))


def load_found(path: Path, kind: Kind) -> Found:
    """What `save_found` wrote.

    Raises:
        InputError: not there, damaged, or of the other kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        held: Mapping[str, Tensor] = load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError) as fault:
        raise InputError(f"{path} cannot be read as saved {kind} ({fault}): {MAKE[kind]}.") from None
    if set(held) != {"times", kind} or len(held["times"]) != len(held[kind]):
        what = ", ".join([*sorted(held)[:2], *(["..."] if len(held) > 2 else [])])
        raise InputError(f"{path} holds {what} and no saved {kind}: {MAKE[kind]}.")
    return Found(kind, held["times"], held[kind])


@dataclass(frozen=True, eq=False)
class Reuse:
    """Steers a walk by what another found; a `Guidance` without settings of its own."""

    path: Path
    found: Found

    @contextmanager
    def steering(self, walk: Walk) -> Iterator[Steer]:
        """At the saved times the saved latents take the walk's place, or the saved tables turn queries and keys.

        Raises:
            InputError: the walk has no step at a saved time, or is of another size than what was saved.
        """
        if not all(torch.isclose(walk.times[:-1], time, atol=1e-6).any() for time in self.found.times):
            levels = ", ".join(f"{float(time):.4g}" for time in self.found.times)
            raise InputError(
                f"{self.path} was saved at the noise levels {levels}, at which this walk has no steps: take the "
                "--sample.steps and --sample.shift that it was saved with."
            )
        way = {"latents": self._replaced, "positions": self._turned}[self.found.kind]
        with way(walk) as steer:
            yield steer

    @contextmanager
    def _replaced(self, walk: Walk) -> Iterator[Steer]:
        latents = self._fitting(walk.noise)

        def steer(latent: Latent, now: Time) -> Latent:
            at = self._at(now)
            return latent if at is None else latents[at].to(latent).expand_as(latent)

        yield steer

    @contextmanager
    def _turned(self, walk: Walk) -> Iterator[Steer]:
        with walk.model.turning() as turned:
            stock = turned.stock(walk.noise)
            tables = self._fitting(stock)

            def steer(latent: Latent, now: Time) -> Latent:
                turned.clear()
                if (at := self._at(now)) is not None:
                    turned.put(tables[at].to(stock).expand_as(stock))
                return latent

            yield steer

    def _at(self, now: Time) -> int | None:
        close = torch.isclose(self.found.times, now, atol=1e-6).nonzero()
        return int(close[0]) if len(close) else None

    def _fitting(self, asked: Tensor) -> Tensor:
        came = tuple(self.found.tensors.shape[1:])
        if came[1:] != tuple(asked.shape[1:]) or came[0] not in (1, len(asked)):
            raise InputError(
                f"{self.path} holds {self.found.kind} of {came} and this walk needs {tuple(asked.shape)}: take the "
                "model, the frames and the size that it was saved with."
            )
        return self.found.tensors


def steering_of(settings: GenerateSettings, clips: int) -> Guidance:
    """What steers the clips of a call: the guidance of its settings, or what `--latents` or `--positions` names.

    Raises:
        InputError: several of these, a file that does not hold what is asked for, or a file to be written for several
            clips.
    """
    files: dict[Kind, Path | None] = {"latents": settings.latents, "positions": settings.positions}
    given: list[tuple[Kind, Path]] = [(kind, path) for kind, path in files.items() if path is not None]
    if len(given) > 1 or (given and not isinstance(settings.guidance, NoGuidance)):
        raise InputError(
            f"--{given[0][0]} came beside {'--positions' if len(given) > 1 else 'a --guidance'}: a walk is steered by "
            "one of them, so leave the other out."
        )
    if getattr(settings.guidance, "save", None) and clips > 1:
        raise InputError(
            f"guidance.save keeps what the walk of one clip found and {clips} clips are to be made: give one caption "
            "and one seed."
        )
    return Reuse(given[0][1], load_found(given[0][1], given[0][0])) if given else settings.guidance
