"""What files and sentences may tell: a model's folder unless that is private, tokens and keys never.

Imports no torch: the command line uses it for every sentence that it prints.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motionlora.data.errors import InputError

SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
"""How variables of the environment are called whose values nobody may see: HF_TOKEN, WANDB_API_KEY."""
SHORTEST = 8
"""Characters of a secret; shorter values (`1`, `none`) are settings, and hiding them would maim ordinary words."""


def refuse_secrets(tree: Mapping[str, Any], environ: Mapping[str, str] = os.environ, prefix: str = "--") -> None:
    """InputError naming a setting that holds a token or key of the environment: it would be written into files."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, environ, f"{prefix}{name}.")
        elif found := next((key for key, secret in secrets(environ).items() if secret in str(value)), None):
            raise InputError(
                f"{prefix}{name} holds the value of {found}, and settings are written into files: take it out; "
                f"libraries read {found} from the environment by themselves."
            )


def without_secrets(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with `<HF_TOKEN>` in place of that variable's value, and so on: errors of libraries may quote it."""
    for name, secret in secrets(environ).items():
        text = text.replace(secret, f"<{name}>")
    return text


def secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Variable -> value of all tokens and keys, the longest value first: one may be part of another."""
    found = {name: value for name, value in environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def model_name(name: str, source: str | Path, private: bool) -> str:
    """What files call the model: its name, or in a private run nothing of a folder of this machine."""
    return "a local folder" if private and source != "tiny" and Path(source).exists() else name
