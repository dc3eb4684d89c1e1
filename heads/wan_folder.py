"""A Wan folder in diffusers' format: found, and refused early where it is not one that we can use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open

from motionlora.data.json_text import parsed_json
from motionlora.data.settings import InputError
from motionlora.heads.settings import Expert
from motionlora.heads.tiny import TINY

_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
SUPPORTED = "Wan 2.1, Wan 2.2 TI2V-5B or Wan 2.2 T2V-A14B, text-to-video"
COGVIDEOX = "CogVideoX 2B or 5B, text-to-video (CogVideoXPipeline)"
NETWORKS: dict[Expert, str] = {"high": "transformer", "low": "transformer_2"}
"""Where diffusers keeps the experts; a model of one network has the first alone."""


def found_folder(
    source: str | Path, *, weights: bool = True, expert: Expert | None = None, cogvideox: bool = False
) -> Path:
    """The checked folder of `source`: a folder, a hub id, or "tiny" for the embedded one.

    `weights` False asks for the configuration files alone: nothing large is fetched, no weight is checked. Where
    `expert` names one of two, the other's weights are neither fetched nor checked. CogVideoX 2B and 5B are found only
    where `cogvideox` asks for them, too.

    Raises:
        InputError: it is not there, not complete, damaged, not of a kind in `SUPPORTED`, or has no expert of that name.
    """
    folder = TINY if str(source) == "tiny" else Path(source).expanduser()
    if folder is TINY and not (TINY / "model_index.json").is_file():
        raise InputError(
            "The embedded tiny Wan is not in this installation: make it with `python -m motionlora.train.pretrain`, or "
            "name another model."
        )
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        folder = _from_hub(str(source), _weighty(expert) if weights else ())
    _check_folder(folder, cogvideox=cogvideox)
    if expert == "low" and not boundary_of(folder):
        raise InputError(f"{source} is one network for all noise levels and has no low-noise expert: leave it at high.")
    for part in ("vae", "text_encoder", *_weighty(expert)) if weights else ():
        if part != NETWORKS["low"] or boundary_of(folder):
            _check_weights(folder / part)
    return folder


def boundary_of(folder: Path) -> float:
    """The noise level from which on the high-noise expert answers, in (0, 1); 0 where one network has all levels."""
    index = read_json(folder / "model_index.json")
    return index["boundary_ratio"] if _has_second(index) else 0.0


def _has_second(index: dict[str, Any]) -> bool:
    return bool((index.get(NETWORKS["low"]) or [None])[0])


def _weighty(expert: Expert | None) -> list[str]:
    """Folders of the networks whose weights are wanted."""
    return [folder for name, folder in NETWORKS.items() if expert in (None, name)]


def _from_hub(hub_id: str, networks: Sequence[str]) -> Path:
    """Fetches a model; without `networks` its configuration alone."""
    from huggingface_hub import snapshot_download

    parts = {*_PARTS, *NETWORKS.values()}
    whole = {*networks, *(parts - {*NETWORKS.values()})} if networks else set()
    try:
        patterns = ["model_index.json", *(f"{part}/{'*' if part in whole else '*.json'}" for part in sorted(parts))]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{hub_id} is neither a folder here nor a model that could be fetched ({first_line(error)}); name a "
            "folder in diffusers' format, or a hub id while online."
        ) from error


def is_cogvideox(folder: Path) -> bool:
    """Whether a model is of the CogVideoX family."""
    return str(read_json(folder / "model_index.json").get("_class_name")).startswith("CogVideoX")


def _check_folder(folder: Path, *, cogvideox: bool) -> None:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}: name a model's folder in diffusers' format, a hub id, or tiny.")
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} has no model_index.json, so it is not a model in diffusers' format; name the folder that holds "
            "transformer, vae and text_encoder."
        )
    index = read_json(folder / "model_index.json")
    missing = [part for part in _PARTS if not (folder / part).is_dir()]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}; copy the whole model again.")
    if is_cogvideox(folder):
        _check_cogvideox(folder, index, wanted=cogvideox)
    else:
        _check_kind(folder, index)
        _check_experts(folder, index)


def _check_kind(folder: Path, index: dict[str, Any]) -> None:
    """Text in, no picture in."""
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


def _check_cogvideox(folder: Path, index: dict[str, Any], *, wanted: bool) -> None:
    """Text in, no picture in, and of the first generation, whose tokens cover one latent frame."""
    if not wanted:
        raise InputError(f"{folder} is a CogVideoX, and this is for {SUPPORTED}: choose such a model.")
    classes = {part: (index.get(part) or [None, None])[1] for part in _PARTS}
    if classes["transformer"] != "CogVideoXTransformer3DModel" or classes["text_encoder"] != "T5EncoderModel":
        raise InputError(
            f"{folder} holds a {classes['transformer']} with a {classes['text_encoder']}; supported is "
            f"{COGVIDEOX} (CogVideoXTransformer3DModel, T5EncoderModel): choose such a model."
        )
    config = read_json(folder / "transformer" / "config.json")
    pictures = config.get("in_channels", 16) != config.get("out_channels", 16) or config.get("ofs_embed_dim")
    if index["_class_name"] != "CogVideoXPipeline" or pictures or config.get("use_learned_positional_embeddings"):
        raise InputError(
            f"{folder} is made for {index['_class_name']}, which takes pictures or clips; supported is {COGVIDEOX}, "
            "which takes text alone: choose such a model."
        )
    if config.get("patch_size_t") is not None:
        raise InputError(f"{folder} is a CogVideoX 1.5; supported is {COGVIDEOX}: choose such a model.")


def _check_experts(folder: Path, index: dict[str, Any]) -> None:
    """Two networks that differ in their weights alone, and a boundary between them; or one network and none."""
    boundary, two = index.get("boundary_ratio"), _has_second(index)
    if two != (isinstance(boundary, float) and 0 < boundary < 1):
        raise InputError(
            f"{folder} has {'two experts (Wan 2.2)' if two else 'one transformer'} and boundary_ratio {boundary} in "
            "model_index.json, where a model of two has a number between 0 and 1 (T2V-A14B: 0.875) and one of one has "
            "none: copy the whole model again."
        )
    if not two:
        return
    high, low = (
        {key: value for key, value in read_json(folder / part / "config.json").items() if not key.startswith("_")}
        for part in NETWORKS.values()
    )
    if odd := sorted(key for key in high.keys() | low.keys() if high.get(key) != low.get(key)):
        raise InputError(
            f"The experts of {folder} differ in {odd[0]} ({high.get(odd[0])} and {low.get(odd[0])}), and only two of "
            "one architecture are supported: copy the whole model again."
        )


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
        content = parsed_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged ({first_line(error)}); copy the model again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; copy the model again.")
    return content


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough to quote."""
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200, placeholder=" ...").rstrip(".")
