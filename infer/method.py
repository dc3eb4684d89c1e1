"""A method of a comparison, as people write it: `none`, `lora:0.5`, `flowmotion:lr=0.01,share=0.4`, `lora+flowmotion`.

Every guidance is a method by its name (`guidance_list.py`). Controls are methods, too: `static`, `reference`, and those
of a METHOD: `wrong:METHOD` is given another clip's motion, `reversed:METHOD` its own clip backwards, `dose:METHOD` and
`redose:METHOD` two random moves of the same size in each step. Imports no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ValidationError

from motionlora.data.complaint import sentence
from motionlora.data.errors import InputError, meant
from motionlora.data.yaml_file import Located, parsed_yaml
from motionlora.infer.guidance import GuidanceSettings
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.guide_none import NoGuidance

Control = Literal["none", "static", "reference", "wrong", "reversed", "dose", "redose"]
OF_A_METHOD: tuple[Control, ...] = ("wrong", "reversed", "dose", "redose")
OF_A_GUIDANCE: tuple[Control, ...] = OF_A_METHOD[1:]
"""A LoRA of the clip backwards would be another training, and a LoRA moves no latent by a dose."""
PLAIN = "none"
"""The method that everything is compared with: no transfer."""


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: as it was written, without spaces.
        guidance: how the reference steers; `guidance_name` is its name in `--guidance`.
        lora: whether the clip's own LoRA is loaded.
        strength: of that LoRA; None leaves it to the captions file and the LoRA's header.
        control: `static` is the first frame of no transfer, standing; `reference` the reference itself as if it were an
            output; `wrong` has the motion of another clip, `reversed` that of the clip backwards; `dose` and `redose`
            move the latent at random, each in its own directions, as far as `guidance` moves it.
    """

    name: str
    guidance: GuidanceSettings = field(default_factory=NoGuidance)
    guidance_name: str = PLAIN
    lora: bool = False
    strength: float | None = None
    control: Control = "none"

    @property
    def takes_motion(self) -> bool:
        """Whether anything of the reference, or of a LoRA that learned from it, goes into the clip."""
        return self.lora or type(self.guidance).needs_reference

    def forwards(self, steps: int, passes: int, blocks: int) -> float:
        """Forwards of the model that a clip takes; a static clip is made of one of no transfer that is there anyway."""
        guidance = NoGuidance() if self.control in ("dose", "redose") else self.guidance
        return 0.0 if self.control in ("static", "reference") else guidance.forwards(steps, passes, blocks)

    def gradients(self, steps: int, blocks: int) -> float:
        """Gradients likewise."""
        steered = self.control in ("none", "wrong", "reversed")
        return self.guidance.gradients(steps, blocks) if steered else 0.0


def parsed_methods(texts: Sequence[str], *, controls: bool, selective: bool = False) -> tuple[Method, ...]:
    """The methods, no transfer always first; with `controls`, those of every method behind them.

    `selective` adds what selectivity needs: each guidance with the clip backwards, and its two random controls.

    Raises:
        InputError: an unknown method or setting, or one method twice.
    """
    methods = [parsed_method(text) for text in texts]
    moving = [method for method in methods if method.takes_motion and method.control == "none"]
    wanted = ["static", *(f"wrong:{method.name}" for method in moving), "reference"] if controls else []
    if selective:
        steered = [method.name for method in moving if not method.lora]
        wanted += [f"{control}:{name}" for name in steered for control in OF_A_GUIDANCE]
    given = {method.name for method in methods}
    methods += [parsed_method(text) for text in wanted if text not in given]
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"method {name} came twice: name each once.")
    return tuple(methods if PLAIN in names else [Method(PLAIN), *methods])


def parsed_method(text: str) -> Method:
    """One method.

    Raises:
        InputError: no such method, a setting that its guidance does not have or allow, or a control of nothing.
    """
    name = "".join(text.split())
    if name in ("static", "reference"):
        return Method(name, control=name)
    head, _, rest = name.partition(":")
    if head in OF_A_METHOD:
        inner = parsed_method(rest)
        if not inner.takes_motion or inner.control != "none":
            raise InputError(f"method {name}: {rest or 'nothing'} takes its motion from no clip, so it has no {head}.")
        if inner.lora and head in OF_A_GUIDANCE:
            raise InputError(f"method {name}: {head} is a control of a guidance alone, without a LoRA.")
        return Method(name, inner.guidance, inner.guidance_name, inner.lora, inner.strength, head)
    parts = dict(_part(part, name) for part in re.split(r"\+(?=[a-z])", name))
    guidances = [part for part in parts if part not in ("lora", PLAIN)]
    if len(guidances) > 1:
        raise InputError(f"method {name} has two guidances: one walk is steered by one.")
    guidance_name = guidances[0] if guidances else PLAIN
    guidance = _guidance(guidance_name, parts.get(guidance_name, ""), name)
    return Method(name, guidance, guidance_name, "lora" in parts, _strength(parts.get("lora", ""), name))


def _part(part: str, name: str) -> tuple[str, str]:
    word, _, values = part.partition(":")
    known = ("lora", *guidance_names())
    if word not in known:
        allowed = (*known, "static", "reference", *(f"{control}:METHOD" for control in OF_A_METHOD))
        raise InputError(
            f"method {name!r}: there is no method {word!r}: name one of {', '.join(allowed)}, or lora+GUIDANCE "
            f"({meant(word, known)})."
        )
    return word, values


def _strength(text: str, name: str) -> float | None:
    if not text:
        return None
    try:
        strength = float(text)
    except ValueError:
        strength = float("nan")
    if not -4 <= strength <= 4:
        raise InputError(f"method {name!r}: {text!r} should be the LoRA's strength, from -4 to 4, as in lora:0.5.")
    return strength


def _guidance(guidance: str, text: str, name: str) -> GuidanceSettings:
    """The guidance with its settings, SETTING=VALUE parted by commas; a list as in blocks=[0,1]."""
    cls, values = guidance_class(guidance), Located()
    for item in re.split(r",(?=\w+=)", text) if text else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"method {name!r}: {item!r} should be SETTING=VALUE, as in flowmotion:lr=0.01,share=0.4.")
        try:
            values[key] = parsed_yaml(value, name)
        except InputError:
            raise InputError(f"method {name!r}: {value!r} is no value; write a number, a word or [A,B].") from None
    if "save" in values:
        raise InputError(
            f"method {name!r}: a comparison makes many clips and would write {values['save']} over and over: "
            "save with `motionlora generate`."
        )
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise InputError(f"method {name!r}: {sentence(error.errors()[0], cls, values, {}, guidance)}") from None
