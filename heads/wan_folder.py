"""A Wan folder in diffusers' format: found, and refused early where it is not one that we can use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from motionlora.data.json_text import parsed_json
from motionlora.data.settings import InputError
from motionlora.heads.tiny import TINY

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
SUPPORTED = "Wan 2.1 or Wan 2.2 TI2V-5B, text-to-video"


def found_folder(source: str | Path, *, weights: bool = True) -> Path:
    """The checked folder of `source`: a folder, a hub id, or "tiny" for the embedded one.

    `weights` False asks for the configuration files alone: nothing large is fetched, no weight is checked.

    Raises:
        InputError: it is not there, not complete, damaged, or not text-to-video of Wan 2.1 or TI2V-5B.
    """
    folder = TINY if str(source) == "tiny" else Path(source).expanduser()
    if folder is TINY and not (TINY / "model_index.json").is_file():
        raise InputError(
            "The embedded tiny Wan is not in this installation: make it with `python -m motionlora.train.pretrain`, or "
            "name another model."
        )
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        folder = _from_hub(str(source), weights=weights)
    _check_folder(folder, weights=weights)
    return folder


def _from_hub(hub_id: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = "*" if weights else "*.json"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["model_index.json", *(f"{p}/{wanted}" for p in _PARTS)]))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{hub_id} is neither a folder here nor a model that could be fetched ({first_line(error)}); name a "
            "folder in diffusers' format, or a hub id while online."
        ) from error


def _check_folder(folder: Path, *, weights: bool) -> None:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}: name a Wan 2.1 folder in diffusers' format, a hub id, or tiny.")
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} has no model_index.json, so it is not a model in diffusers' format; name the folder that holds "
            "transformer, vae and text_encoder."
        )
    _check_kind(folder, read_json(folder / "model_index.json"))
    for part in ("transformer", "vae", "text_encoder") if weights else ():
        _check_weights(folder / part)


def _check_kind(folder: Path, index: dict[str, Any]) -> None:
    """One transformer, text in, no picture in."""
    missing = [part for part in _PARTS if not (folder / part).is_dir()]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}; copy the whole model again.")
    classes = {part: (index.get(part) or [None, None])[1] for part in _PARTS}
    if classes["transformer"] != "WanTransformer3DModel" or classes["text_encoder"] != "UMT5EncoderModel":
        raise InputError(
            f"{folder} holds a {classes['transformer']} with a {classes['text_encoder']}; supported is "
            f"{SUPPORTED} (WanTransformer3DModel, UMT5EncoderModel): choose such a model."
        )
    config = read_json(folder / "transformer" / "config.json")
    inputs, outputs = config.get("in_channels", 16), config.get("out_channels") or config.get("in_channels", 16)
    if inputs != outputs or config.get("image_dim") is not None:
        raise InputError(
            f"{folder} is an image-to-video model ({inputs} channels in, {outputs} out); supported is "
            f"{SUPPORTED}: choose such a model."
        )
    if (index.get("transformer_2") or [None])[0]:
        raise InputError(f"{folder} is a Wan 2.2 model of two experts; supported is {SUPPORTED}: choose such a model.")


def _check_weights(part: Path) -> None:
    files = {path.name for path in part.glob("*.safetensors")}
    for path in part.glob("*.safetensors.index.json"):
        files |= set(read_json(path).get("weight_map", {}).values())
    if not files:
        raise InputError(f"{part} has no weights in safetensors format; copy or convert the model again.")
    for name in sorted(files):
        try:
            with safe_open(part / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{part / name} is missing or damaged ({first_line(error)}); copy it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError where it is missing or damaged."""
    try:
        content = parsed_json(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged ({first_line(error)}); copy the model again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; copy the model again.")
    return content


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough to quote."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
