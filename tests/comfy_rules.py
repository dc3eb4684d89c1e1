"""ComfyUI's published key rules (comfy/lora.py, comfy/lora_convert.py) applied by hand; ComfyUI itself is not run.

For every weight of the model there is the name `diffusion_model.<native>` and `lora_unet_<native with _>`; behind it
stands a pair of suffixes; `.alpha`, where there is one, is divided by the rank, else the update is taken as it is.
Nothing else is loaded.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from motionlora.heads.lora_layouts import native_name

SUFFIXES = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
)
"""Of b and a."""


def comfy_updates(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, Tensor]:
    """Our module -> update "o i", as those rules read a file for a model that has `modules`."""
    if "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in tensors:
        tensors = {re.sub("^lora_unet__", "lora_unet_", key): value for key, value in tensors.items()}
    found = {}
    for module in modules:
        for stem in (f"diffusion_model.{native_name(module)}", f"lora_unet_{flat(module)}"):
            for up, down in SUFFIXES:
                if stem + up in tensors:
                    b, a = tensors[stem + up].float(), tensors[stem + down].float()
                    alpha = tensors.get(f"{stem}.alpha")
                    found[module] = (1.0 if alpha is None else float(alpha) / a.shape[0]) * b @ a
    return found


def flat(module: str) -> str:
    """`blocks_N_self_attn_q` from our `blocks.N.attn1.to_q`."""
    return native_name(module).replace(".", "_")
