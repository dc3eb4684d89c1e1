"""What is refused before it is read, since it would cost more memory or time than anyone meant; and how to allow it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pydantic import BaseModel, ConfigDict, Field

from motionlora.data.errors import InputError

MB = 2**20
LIBRARY_HEADER = 100_000_000
"""Bytes of a header that the safetensors library itself reads at most."""


class Limits(BaseModel):
    """How large an input may be; a larger one is refused in one sentence that names the limit to raise.

    They hold inside `with limits.used():`, which the command line opens around every subcommand; elsewhere the defaults
    hold. They never change a result, so they stand in no record of how something was made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    file_mb: int = Field(default=8192, ge=1)
    """Megabytes of a video, a picture or a LoRA file."""
    pixels: int = Field(default=40_000_000, ge=1)
    """Of one frame of a clip (8K UHD has 33 million)."""
    frames: int = Field(default=100_000, ge=1)
    """Of a clip, and taken of it (an hour at 25 fps has 90,000)."""
    memory_mb: int = Field(default=4096, ge=1)
    """Megabytes of a clip as it is taken, frames x height x width x 3 bytes; decoders get 4096 more."""
    seconds: float = Field(default=600.0, gt=0, le=1e6)
    """That the reading of one clip may take, so that a decoder that hangs does not hang the run."""
    header_mb: int = Field(default=16, ge=1, le=LIBRARY_HEADER // MB)
    """Megabytes of the header of a safetensors file."""
    caption: int = Field(default=4000, ge=1)
    """Characters of the caption of a clip."""

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, these limits hold for everything that this thread reads."""
        before = _USED.set(self)
        try:
            yield
        finally:
            _USED.reset(before)

    def refuse_over(self, limit: str, came: float, what: str, advice: str) -> None:
        """InputError where `came` is above the limit of this name; `what` says of what, as in "a.mp4 has {} frames"."""
        allowed = getattr(self, limit)
        if came > allowed:
            # Rounded up: what is just above a limit shall not read as if it were the limit.
            raise InputError(
                f"{what.format(f'{-(-came // 1):,.0f}')}, and at most {allowed:,} are allowed: {advice}, or raise the "
                f"limit with --limits.{limit.replace('_', '-')}."
            )


_USED: ContextVar[Limits] = ContextVar("limits", default=Limits())  # noqa: B039 (it is frozen)


def limits() -> Limits:
    """The limits that hold here."""
    return _USED.get()
