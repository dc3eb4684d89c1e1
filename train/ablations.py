"""The ablations of the main method: LoRAs that differ from it in one thing, and what the paper says of them.

Imports no torch. The main method is a recipe, the settings of a training run; whatever a recipe sets is one value of
each sweep, and stands first in its table, so that everything is compared with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from motionlora.data.errors import InputError, meant
from motionlora.data.yaml_file import overlaid
from motionlora.train.settings import Motion, PositionKind, TrainSettings

Ranking = Literal["scored", "exchanged", "random"]
"""Which heads count as temporal: those that are, those that are not, or as many drawn at random."""


@dataclass(frozen=True)
class Variant:
    """The main method with one thing changed.

    Attributes:
        name: as tables call it; no colon.
        changes: settings of `train` by dotted name.
        ranking: of the heads, where they are split.
        strength: of the temporal LoRA when clips are made; None takes the one that its header recommends.
        spatial: strength of the spatial LoRA beside it; 0 leaves it out, as the method does.
        at: place on the axis of a sweep.
    """

    name: str
    changes: tuple[tuple[str, Any], ...] = ()
    ranking: Ranking = "scored"
    strength: float | None = None
    spatial: float = 0.0
    at: float | None = None

    def settings(self, recipe: TrainSettings) -> TrainSettings:
        """The recipe with the changes; pydantic's ValidationError where a value is impossible."""
        return TrainSettings.model_validate(overlaid(recipe.model_dump(), dict(self.changes)))

    def is_main(self, recipe: TrainSettings) -> bool:
        """Whether nothing is changed."""
        same = (self.ranking, self.strength, self.spatial) == ("scored", None, 0.0)
        return same and self.settings(recipe).model_dump() == recipe.model_dump()


@dataclass(frozen=True)
class Claim:
    """What the paper found: `better` than `worse`, by motion fidelity; or as good as it for less (`equal`)."""

    better: str
    worse: str
    found: str
    equal: bool = False


@dataclass(frozen=True)
class Ablation:
    """Variants in the order of a table, the main method first. `axis` names what a sweep varies, "" for no sweep."""

    name: str
    question: str
    variants: tuple[Variant, ...]
    axis: str = ""
    claims: tuple[Claim, ...] = ()


def ablations(recipe: TrainSettings) -> tuple[Ablation, ...]:
    """All of them, those first on which most depends."""
    made = (
        _heads(), _positions(), _frames(recipe), _motion(), _rule(recipe), _rank(), _rate(recipe), _strength(recipe),
        _loras(), _steps(recipe),
    )  # fmt: skip
    return tuple(replace(ablation, variants=main_first(ablation.variants, recipe)) for ablation in made)


def chosen_ablations(names: Sequence[str], recipe: TrainSettings) -> tuple[Ablation, ...]:
    """Those of these names, in their order; all for none.

    Raises:
        InputError: an unknown name, or one twice.
    """
    known = {ablation.name: ablation for ablation in ablations(recipe)}
    for name in names:
        if name not in known:
            hint = meant(name, list(known))
            raise InputError(f"there is no ablation {name!r}: name some of {', '.join(known)} ({hint}).")
        if names.count(name) > 1:
            raise InputError(f"ablation {name} came twice: name each once.")
    return tuple(known[name] for name in names or known)


def main_first(variants: Sequence[Variant], recipe: TrainSettings) -> tuple[Variant, ...]:
    """The variants with the main method in front, which is added where none of them is it."""
    main = [variant for variant in variants if variant.is_main(recipe)][:1] or [Variant("main method")]
    return (*main, *(variant for variant in variants if not variant.is_main(recipe)))


def _heads() -> Ablation:
    split, alone = ("heads.heads", "split"), ("spatial.steps", 0)
    return Ablation(
        "heads",
        "Does it matter which heads learn, and does the spatial stage help? Random heads are as many as temporal ones.",
        (
            Variant("all heads", (("heads.heads", "all"),)),
            Variant("split, spatial stage first", (split,)),
            Variant("random split, spatial stage first", (split,), "random"),
            Variant("temporal heads alone", (split, alone)),
            Variant("spatial heads alone", (split, alone), "exchanged"),
            Variant("random heads alone", (split, alone), "random"),
        ),
        claims=(Claim("split, spatial stage first", "all heads", "0.976 against 0.542"),),
    )


def _positions() -> Ablation:
    variants = tuple(Variant(f"positions {kind}", (("temporal.positions", kind),)) for kind in get_args(PositionKind))
    claim = Claim("positions paper", "positions none", "0.976 against 0.658")
    return Ablation("positions", "Where shall the kept frames stand in time?", variants, claims=(claim,))


def _frames(recipe: TrainSettings) -> Ablation:
    """Every stride that leaves 4k + 1 frames, at equal steps; all frames also at as many tokens as the recipe sees."""
    strides = [n for n in range(1, 9) if (recipe.frames - 1) % (4 * n) == 0]
    variants = [Variant(f"stride {n}", (("temporal.stride", n),), at=n) for n in strides]
    steps = round(recipe.temporal.steps * latent_frames(recipe.frames, recipe.temporal.stride))
    steps = max(1, round(steps / latent_frames(recipe.frames, 1)))
    equal = Variant("all frames, as many tokens", (("temporal.stride", 1), ("temporal.steps", steps)))
    claims = ()
    if recipe.temporal.stride > 1:
        claims = (
            Claim(f"stride {recipe.temporal.stride}", "stride 1", "0.976 against 0.979, 2.6 times as fast", True),
        )
    return Ablation("frames", "Sparse clips against all frames, at equal steps.", (*variants, equal), "stride", claims)


def _motion() -> Ablation:
    variants = tuple(Variant(f"motion loss {kind}", (("temporal.motion", kind),)) for kind in get_args(Motion))
    return Ablation("motion", "Does the motion loss help, and which?", variants)


def _rule(recipe: TrainSettings) -> Ablation:
    ratio = recipe.heads.ratio
    wanted = [("code", n) for n in (1.0, ratio, 2.0)] + [("paper", n) for n in (ratio, 2.0, 4.0)]
    variants = tuple(
        Variant(f"rule {rule} {n:g}", (("heads.heads", "split"), ("heads.rule", rule), ("heads.ratio", n)))
        for rule, n in dict.fromkeys(wanted)
    )
    question = "Which heads are temporal? Rule paper with ratio r is rule code with 1 / r, but for ties."
    return Ablation("rule", question, variants)


def _rank() -> Ablation:
    variants = tuple(Variant(f"rank {n}", (("lora.rank", n),), at=n) for n in (4, 8, 16, 32, 64))
    return Ablation("rank", "How many ranks does a motion need?", variants, "rank")


def _rate(recipe: TrainSettings) -> Ablation:
    rates = [recipe.temporal.lr * factor for factor in (0.1, 0.3, 1, 2)]
    variants = tuple(Variant(f"lr {rate:g}", (("temporal.lr", rate),), at=rate) for rate in rates)
    return Ablation("lr", "Which learning rate does the temporal stage need at these steps?", variants, "lr")


def _strength(recipe: TrainSettings) -> Ablation:
    own = recipe.lora.strength
    wanted = dict.fromkeys((0.25, 0.5, 0.75, 1.0, 1.25, 1.5, own))
    variants = tuple(Variant(f"strength {n:g}", strength=None if n == own else n, at=n) for n in wanted)
    return Ablation("strength", "How strongly shall the LoRA act when clips are made?", variants, "strength")


def _loras() -> Ablation:
    # Both act in one file, in which neither can rest alone: so both learn all noise levels and act to the end.
    split = (("heads.heads", "split"), ("temporal.until", 0.0))
    variants = (
        Variant("temporal LoRA", split),
        Variant("temporal LoRA at 0.5", split, strength=0.5),
        Variant("both LoRAs", split, strength=1.0, spatial=1.0),
        Variant("both LoRAs at 0.5", split, strength=0.5, spatial=0.5),
        Variant("spatial LoRA", split, strength=0.0, spatial=1.0),
    )
    return Ablation("loras", "The temporal LoRA alone, or both?", variants)


def _steps(recipe: TrainSettings) -> Ablation:
    counts = dict.fromkeys(max(1, round(recipe.temporal.steps * share)) for share in (0.125, 0.25, 0.5, 1, 2))
    variants = tuple(Variant(f"{n} steps", (("temporal.steps", n),), at=n) for n in counts)
    return Ablation("steps", "How many steps does a motion take?", variants, "steps")


def latent_frames(frames: int, stride: int) -> int:
    """Of a clip of 4k + 1 frames of which every stride-th is kept."""
    return (frames - 1) // stride // 4 + 1


def work_of(settings: TrainSettings, spatial: bool) -> float:
    """Latent frames that go through the model, a step of training counted as three passes."""
    temporal, single = settings.temporal, settings.spatial
    frames = temporal.steps * temporal.batch * latent_frames(settings.frames, temporal.stride)
    return 3.0 * settings.gradient_accumulation * (frames + single.steps * single.batch * spatial)
