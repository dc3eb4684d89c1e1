"""`--guidance NAME`: a choice that is a class of settings is read first, so that its own options are known after it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, create_model, model_validator

from motionlora.data.errors import InputError, meant
from motionlora.data.settings import take_flag
from motionlora.data.yaml_file import config_path, read_yaml
from motionlora.infer.guidance_list import guidance_class, guidance_names

GUIDANCES = guidance_names()
"""Every way to steer a walk, which is its own settings class; `--guidance NAME` chooses before options are read."""


def with_guidance(cls: type[BaseModel], argv: Sequence[str], config: str) -> tuple[type[BaseModel], list[str]]:
    """`cls` with the class of the guidance that `--guidance NAME`, else the file, names; and `argv` without it.

    Raises:
        InputError: no such guidance.
    """
    chosen, rest = take_flag(argv, "guidance")
    if take_flag(rest, "guidance.name")[0] is not None:
        raise InputError("--guidance.name is not an option of its own: choose with --guidance NAME.")
    section = read_yaml(config_path(take_flag(argv, "config")[0] or config)).get("generate")
    given = section.get("guidance") if isinstance(section, dict) else None
    name = chosen or str(given.get("name", "none") if isinstance(given, dict) else "none")
    if name not in GUIDANCES:
        names = GUIDANCES
        raise InputError(f"there is no guidance {name!r:.80}: name one of {', '.join(names)} ({meant(name, names)}).")
    asked = [word.partition("=")[0] for word in rest if word.startswith("--guidance.")]
    if name == "none" and asked:
        raise InputError(
            f"{asked[0]} sets a guidance and none was chosen: add --guidance NAME ({', '.join(GUIDANCES)})."
        )
    base = guidance_class(name)
    tag: Any = (Literal[name], Field(default=name, description=f"Chosen by --guidance NAME: {', '.join(GUIDANCES)}."))

    def own(values: Any) -> Any:
        """Without the file's settings for another guidance than the one chosen."""
        foreign = isinstance(values, Mapping) and values.get("name", name) != name
        return {} if foreign else values

    checks: Any = {"own": model_validator(mode="before")(own)}
    concrete = create_model(base.__name__, __base__=base, __doc__=base.__doc__, __validators__=checks, name=tag)
    return create_model(cls.__name__, __base__=cls, __doc__=cls.__doc__, guidance=(concrete, concrete())), rest
