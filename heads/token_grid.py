"""How tokens lie in a clip. Imports no torch: a head map is read and drawn without it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGrid:
    """How a clip's tokens lie in time and space; the only place that knows their order: (f h w), row-major."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens of the whole clip."""
        return self.frames * self.tokens_per_frame

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width
