"""How strongly a LoRA file wants to act: alpha, which a file may tell in five places, twice, or not at all.

The update of a module is alpha / rank * b a. A loader that finds no alpha takes it for the rank, so that a file without
it may act at twice or half of what was trained, without a word. Here that is an error with the option that settles it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from motionlora.data.json_text import parsed_json
from motionlora.data.settings import InputError
from motionlora.heads.lora_layouts import TO_NATIVE, renamed

METADATA = "lora_adapter_metadata"
"""Header key in which diffusers keeps ranks and alphas."""
FINETRAINERS = "lora_config"
"""Header key of finetrainers, the same without a prefix."""
FORMAT = "motionlora.lora/1"
"""What `motion.format` says in a file of ours, whose native layout always has alpha = rank."""
BESIDE = "adapter_config.json"
"""What peft writes beside its weights."""

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, re.error)
"""What a configuration written by others may end in when it is read."""

Alpha: TypeAlias = float | Literal["rank"] | None
"""What the user knows: the alpha of every module, that it equals the rank, or nothing."""


@dataclass(frozen=True)
class Strength:
    """alpha / rank of every module, and where that stands; `doubt` says why there is none."""

    scales: Mapping[str, float]
    source: str = ""
    doubt: str = ""

    def refuse_doubt(self) -> None:
        """InputError where the file leaves its strength open."""
        if self.doubt:
            raise InputError(self.doubt)


def strength_of(
    path: Path, ranks: Mapping[str, int], alphas: Mapping[str, float], header: Mapping[str, str], given: Alpha
) -> Strength:
    """What a file says about its strength, or what `given` settles.

    Args:
        ranks: of every module of the file.
        alphas: what its `.alpha` tensors say.

    Raises:
        InputError: the metadata is damaged, or `given` is no number above 0.
    """
    if given is not None:
        return _given(given, ranks)
    partly = alphas and alphas.keys() != ranks.keys()
    said = [] if partly else list(_told(path, ranks, alphas, header))
    anew = f"write it anew with `motionlora lora convert {path} --out NEW --alpha A`, where A is"
    if not said:
        every = ", ".join(map(str, sorted(set(ranks.values()))))
        why = f"{path} does not say the alpha of every module, so that its strength is unknown (rank {every})"
        cure = "the alpha that it was trained with, or `rank` if that was its rank, which other loaders assume"
        return Strength({}, doubt=f"{why}: {anew} {cure}.")
    first, *others = said
    for other in others:
        for module, rank in ranks.items():
            one, two = first.scales[module] * rank, other.scales[module] * rank
            if not math.isclose(one, two, rel_tol=1e-6):
                what = f"alpha is {one:g} by {first.source} and {two:g} by {other.source} for {module}"
                return Strength({}, doubt=f"{path} says two things about its strength: {what}; {anew} the right one.")
    return Strength(first.scales, f"{first.source} and {others[0].source}, which agree" if others else first.source)


def _given(given: float | Literal["rank"], ranks: Mapping[str, int]) -> Strength:
    if given == "rank":
        return Strength(dict.fromkeys(ranks, 1.0), "--alpha rank")
    if not (math.isfinite(given) and given > 0):
        raise InputError(f"alpha is {given:g}: give a number above 0, or `rank`.")
    return Strength({module: given / rank for module, rank in ranks.items()}, f"--alpha {given:g}")


def _told(
    path: Path, ranks: Mapping[str, int], alphas: Mapping[str, float], header: Mapping[str, str]
) -> Iterator[Strength]:
    """Every place that tells the alpha of all modules, the surest first; a weaker one only where no other does."""
    if alphas:
        yield Strength({module: alphas[module] / rank for module, rank in ranks.items()}, "its .alpha tensors")
    fields = [key for key in (METADATA, FINETRAINERS) if key in header]
    for key in fields:
        yield Strength(_from_fields(path, key, header[key], ranks), f"the header's {key}")
    if alphas or fields:
        return
    alpha, as_trained = header.get("ss_network_alpha", ""), dict.fromkeys(ranks, 1.0)
    if header.get("motion.format") == FORMAT and alpha == header.get("ss_network_dim"):
        yield Strength(as_trained, "motionlora's header, which folds alpha into the weights")
    elif (beside := path.parent / BESIDE).is_file() and (scales := _from_beside(beside, ranks)):
        yield Strength(scales, f"{BESIDE} beside it")
    elif {alpha.removesuffix(".0")} == set(map(str, ranks.values())):  # another could be folded into the weights or not
        yield Strength(as_trained, "the header's ss_network_alpha, which is the rank")


def _from_fields(path: Path, key: str, text: str, ranks: Mapping[str, int]) -> dict[str, float]:
    """alpha / rank by the fields of a peft configuration in the header."""
    try:
        fields = parsed_json(text)
        return _by_config({name.removeprefix("transformer."): value for name, value in fields.items()}, ranks)
    except DAMAGE as error:
        raise InputError(
            f"{path} has damaged {key} ({error!r:.200}), so its strength is unknown: save it anew."
        ) from None


def _from_beside(beside: Path, ranks: Mapping[str, int]) -> dict[str, float]:
    """alpha / rank by peft's own file; nothing where it is damaged or belongs to other weights."""
    try:
        fields = parsed_json(beside.read_text(encoding="utf-8"))
        pattern = fields.get("rank_pattern") or {}
        same = all(_by_pattern(pattern, module, fields["r"]) == rank for module, rank in ranks.items())
        return _by_config(fields, ranks) if same else {}
    except DAMAGE:
        return {}


def _by_config(fields: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """As peft computes it: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    patterned = fields.get("alpha_pattern") or {}
    default = float(fields["lora_alpha"])
    power = 0.5 if fields.get("use_rslora") else 1.0
    scales = {module: _by_pattern(patterned, module, default) / rank**power for module, rank in ranks.items()}
    if not all(map(math.isfinite, scales.values())):
        raise ValueError("infinite alpha")
    return scales


def _by_pattern(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """The value of the first pattern that a module ends in, as peft matches them, by its name here or in Wan's code."""
    names = (module, renamed(module, TO_NATIVE) or module)
    slow = next((key for key in patterns if len(key) > 200 or re.search(r"\)\s*[*+{]", key)), None)
    if slow is not None:
        raise re.error(f"the pattern {slow!r:.100} repeats a group, which can take for ever")
    fitting = (value for key, value in patterns.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
    return float(next(fitting, default))
