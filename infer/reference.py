"""The clip that gives the motion: read, compared with what is to be made, encoded once for all clips of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from motionlora.data.cache import content_key
from motionlora.data.clip import Clip, read_clip
from motionlora.data.errors import InputError
from motionlora.heads.memory import ROUNDED
from motionlora.infer.guidance import BLANK, Kept
from motionlora.infer.guidance_list import guidance_class, guidance_names

if TYPE_CHECKING:
    from motionlora.heads.backbone import Latent, Prompt
    from motionlora.heads.wan import WanBackbone
    from motionlora.infer.settings import GenerateSettings


@dataclass(frozen=True, eq=False)
class Reference:
    """What a walk takes of the reference.

    Attributes:
        latent: None where nothing gives the motion.
        kept: what guidances computed from it.
        facts: for the JSON beside a clip.
    """

    latent: Latent | None = None
    kept: Kept = field(default_factory=Kept)
    facts: Mapping[str, Any] | None = None


def read_reference(settings: GenerateSettings, say: Callable[[str], None]) -> Clip | None:
    """The clip of `--reference`, with its own frames and pixels, or the one that the guidance makes itself; None where
    the guidance takes none.

    Raises:
        InputError: the guidance needs a clip and none was given, or takes none and one was; the clip cannot be read, or
            is not of the frames and the size that are to be made.
    """
    guidance, path = settings.guidance, settings.reference
    name = getattr(guidance, "name", type(guidance).__name__)
    size = (settings.frames, settings.height, settings.width)
    guidance.refuse(*size)
    if path is None:
        made = guidance.made_reference(*size, settings.fps)
        if guidance.needs_reference and made is None:
            raise InputError(f"Guidance {name} takes its motion from a clip: name one with --reference.")
        return made
    if not guidance.needs_reference:
        able = [other for other in guidance_names() if guidance_class(other).needs_reference]
        raise InputError(
            f"Reference {path} came and guidance {name} takes none: choose --guidance {', '.join(able[:-1])} or "
            f"{able[-1]}, or leave --reference out."
        )
    clip = read_clip(path, multiple=1, say=say)
    if (clip.frames, clip.height, clip.width) != size:
        raise InputError(
            f"{path} has {clip.frames} frames of {clip.width} x {clip.height} pixels and {settings.frames} of "
            f"{settings.width} x {settings.height} are to be made: both must agree, so set --frames, --height and "
            "--width, or cut the clip."
        )
    return clip


def encoded(
    clip: Clip,
    model: WanBackbone,
    settings: GenerateSettings,
    loras: Sequence[Mapping[str, Any]],
    *,
    blank: Prompt,
    latent: Latent | None = None,
) -> Reference:
    """The reference's latent, and a store for what depends on it, the model and these LoRAs (their `facts`) alone.

    `blank` is the empty caption: embedded with the others, since the text encoder is put away after them. `latent` is
    the clip's, where it was encoded before the network was loaded.
    """
    latent = model.encode(clip) if latent is None else latent
    digest = sha256(latent.cpu().contiguous().numpy().tobytes()).hexdigest()
    strengths = [f"{lora['sha256']} at {lora['strength']}{lora.get('expert', '')}" for lora in loras]
    rounded = [ROUNDED[settings.memory]] if settings.memory in ROUNDED else []
    network = (model.fingerprint, model.parts.text_hash, str(model.dtype), model.device.type, settings.attention)
    folder = None if settings.cache is None else settings.cache / "guidance"
    kept = Kept(folder, content_key("guidance", *network, *rounded, *strengths, digest))
    kept.tensors[BLANK] = {BLANK: blank.embeds}
    file = None if settings.reference is None else str(settings.reference)
    facts = {"file": file, "content": clip.content_hash(), "caption": clip.caption}
    return Reference(latent, kept, facts)
