"""What a stage's numbers depend on: settings, content and versions, and the refusal to go on with others."""

from importlib.metadata import version
from typing import Any

from motionlora.data.errors import InputError
from motionlora.train.settings import TrainSettings

IRRELEVANT = (
    "out", "clip", "caption", "model", "resume", "device", "cache", "tracker", "checkpoint_every", "keep_checkpoints",
    "log_every", "stages", "memory", "recompute_every", "lora.strength", "private", "deterministic",
    "expert", "clips", "together",
)  # fmt: skip
"""Settings that may change between a run and its continuation: they do not enter the numbers, or their content does."""
LATER = ("attention", "compile", "optimizer")
"""Settings that came after the first files: at their default they are left out, so that older runs can be continued."""


def identity(settings: TrainSettings, stage: str, **content: str) -> dict[str, Any]:
    """What a stage's numbers depend on: settings by dotted name, and `content` (hashes of clip, model, heads, LoRA)."""
    flat = flattened(settings.model_dump(mode="json"))
    apart = ("validation.", "temporal." if stage == "spatial" else "spatial.")
    kept = {name: value for name, value in flat.items() if name not in IRRELEVANT and not name.startswith(apart)}
    for name in LATER:
        if kept[name] == TrainSettings.model_fields[name].default:
            del kept[name]
    return kept | content


def refuse_changes(before: dict[str, Any], now: dict[str, Any], *, stage: str, what: str) -> None:
    """InputError naming the first thing that differs. With a level learning rate, `<stage>.steps` may differ."""
    may_differ = {f"{stage}.steps"} if now.get("schedule") == "constant" else set()
    for name in sorted((before.keys() | now.keys()) - may_differ):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{what} was made with {name} = {before.get(name)}, now it is {now.get(name)}: "
                f"set it back to continue, or train anew with another --out."
            )


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in ("motionlora", "torch", "diffusers", "peft", "accelerate")}
