"""How a tiny Wan is made, end to end: `torchrun --nproc_per_node 2 -m motionlora.train.pretrain`.

The VAE's encoder is written down (`block_codec.py`), so that the transformer trains on exact latents of endless random
sprite scenes without ever running it: mostly single frames first (appearance is cheap there), then mostly all 49, with
17 and the others always among them, since what is left out is forgotten. The VAE's decoder trains on the same latents.
Both resume where they stopped. The result is a diffusers folder. What a step is given is in `pretrain_data.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from motionlora.data.sprites import BACKGROUNDS, COLOURS, SHAPES, random_scene
from motionlora.heads.short_text import folding, shortened
from motionlora.heads.tiny import TINY, write_pipeline
from motionlora.train.block_codec import Z
from motionlora.train.muon import Muon
from motionlora.train.pretrain_data import BARS, draw, noise_levels
from motionlora.train.pretrain_decoder import DecoderRecipe, train_decoder
from motionlora.train.pretrain_text import Text, listening
from motionlora.train.progress import Progress, process

SHIFT = 2.0


@dataclass(frozen=True)
class Recipe:
    """What is trained, where, and for how long.

    Steps are those of each of two processes, whose gradients are averaged.

    The embedded model was made in four runs from the one before it: 12 000 steps by a script with this noise and rate
    (which fell on a straight line; bf16 by autocast around all but attention), 93 minutes; 4 200 at 4e-3 with the
    pairs and bars of now, single frames first, all sprites of a fifth of the scenes stars, 31 minutes; 2 400 by a
    script with `listening`, single frames alone, the last 1 500 all pairs, 18 minutes; and 8 000 at 4e-3 by this recipe
    with `base`, 63 minutes. The one before: 4 000 steps on an earlier sprite world (tilted shapes, textures of any
    period), then 1 800 of single frames, 600 of 17 and 4 600 of 49 on this one, noise from the shift alone. This
    recipe from nothing was not tried.
    """

    work: Path = Path("runs/pretrain")
    """State and logs; a stopped run goes on from here."""
    out: Path = TINY
    """The diffusers folder that is written at the end."""
    parts: tuple[Literal["transformer", "decoder", "write"], ...] = ("transformer", "decoder", "write")
    """What to do, in this order."""
    base: Path | None = None
    """A diffusers folder of this kind whose transformer and text encoder are trained on, with whole clips from the
    start, for it has learned looks; none starts anew."""
    listen: bool = False
    """Starts with a text encoder whose words hear the one before (`pretrain_text.listening`)."""
    steps: int = 12_000
    lr: float = 5e-3
    compile: bool = True
    """Blocks by `torch.compile`: faster steps after a minute of compiling."""
    seed: int = 0


def new_transformer() -> WanTransformer3DModel:
    """6 blocks, 4 heads of 32: 1.6 M parameters. Heads start local through their biases, which speeds up learning."""
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=Z, out_channels=Z, text_dim=64, freq_dim=256,
        ffn_dim=384, num_layers=6, rope_max_seq_len=64,
    )  # fmt: skip
    for block in transformer.blocks:
        attention: Any = block.attn1
        for projection in (attention.to_q, attention.to_k):
            projection.bias.data = local_bias().flatten()
    return transformer


def local_bias(strength: float = 3.0) -> Tensor:
    """Query and key biases "head lane": RoPE turns equal ones into a logit that falls with distance.

    Two heads near in time and space, one at the same place in every frame, one free. Of each axis' lanes (12 for time,
    10 for height, 10 for width) the two fastest pairs carry it, in their even lanes.
    """
    bias = torch.zeros(4, 32)
    for head, (time, space) in enumerate(((1.0, 1.0), (0.6, 0.6), (0.0, 0.8))):
        bias[head, [0, 2]] = strength * time
        bias[head, [12, 14, 22, 24]] = strength * space
    return bias


def train_transformer(recipe: Recipe, *, finished: bool = False) -> tuple[WanTransformer3DModel, Text]:
    """The averaged transformer and text encoder after all steps; `finished` takes what there is."""
    torch.manual_seed(recipe.seed)
    transformer, text = new_transformer(), Text()
    if recipe.base:
        for part, folder in ((transformer, "transformer"), (text.encoder, "text_encoder")):
            stored: Any = type(part).from_pretrained(recipe.base, subfolder=folder)
            part.load_state_dict(stored.state_dict())
    if recipe.listen:
        draws = np.random.default_rng(recipe.seed)
        text = listening(text, [random_scene(draws, frames=1, bars=BARS).caption for _ in range(300)])
    net = nn.ModuleDict({"transformer": transformer, "text": text})
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    modules = {"net": net, "average": average}
    plan = (recipe.steps, recipe.lr)
    progress = Progress(recipe.work / "wan", modules, *_optimizers(net, recipe.lr), *plan, warmup=200, hold=0.75)
    quicken(transformer, compile=recipe.compile)
    with folding(transformer):
        for step in () if finished else progress:
            generator = np.random.default_rng((recipe.seed, step, process()))
            latent, captions = draw(step, generator, early=recipe.base is None and step < 0.4 * recipe.steps)
            embeds = text(["" if generator.random() < 0.1 else caption for caption in captions])
            noise = torch.from_numpy(generator.standard_normal(latent.shape, dtype=np.float32))
            time = noise_levels(latent, generator).view(-1, 1, 1, 1, 1)
            told = (1000 * time.flatten(), shortened(transformer, embeds))
            velocity = transformer(latent.lerp(noise, time), *told, return_dict=False)[0]
            progress.update((velocity - (noise - latent)).square().mean(), {"frames": latent.shape[2]})
            average.update_parameters(net)
    best: Any = average.module
    return best["transformer"], best["text"]


class Bf16Product(nn.Linear):
    """A layer that multiplies in bf16. All else stays in fp32: attention's way back in bf16 is slow on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.bfloat16()
        return nn.functional.linear(input.bfloat16(), self.weight.bfloat16(), bias).float()


def quicken(transformer: WanTransformer3DModel, *, compile: bool) -> None:
    """Products inside the blocks in bf16 and, with `compile`, the blocks compiled; weights stay the same tensors."""
    for layer in transformer.blocks.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Bf16Product
    if compile:
        transformer.compile_repeated_blocks(dynamic=False)


def _optimizers(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all that goes in and out."""
    inside = [p for n, p in net.named_parameters() if p.ndim == 2 and ".blocks." in f".{n}"]
    chosen = {id(p) for p in inside}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    return [Muon(inside, lr=lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]


def make(recipe: Recipe) -> None:
    """Every part, resumed where it stopped and skipped where it is done."""
    if "transformer" in recipe.parts:
        train_transformer(recipe)
    if "decoder" in recipe.parts:
        train_decoder(recipe.work, DecoderRecipe())
    if "write" in recipe.parts and process() == 0:
        write(recipe)


def write(recipe: Recipe) -> None:
    """The diffusers folder, from whatever training has reached; with the embedded VAE where no decoder was trained."""
    transformer, text = train_transformer(recipe, finished=True)
    transformer.set_attn_processor(WanAttnProcessor())  # pyright: ignore[reportArgumentType]
    if (recipe.work / "decoder").exists():
        vae = train_decoder(recipe.work, DecoderRecipe(), finished=True)
    else:
        vae = AutoencoderKLWan.from_pretrained(TINY, subfolder="vae")
    write_pipeline(
        recipe.out,
        transformer=transformer.eval(),
        vae=vae,
        text_encoder=text.encoder.eval(),
        tokenizer=text.tokenizer,
        shift=SHIFT,
    )

    (recipe.out / "README.md").write_text(CARD)


CARD = f"""# The tiny Wan

A text-to-video diffusion model of the sprite world, in the classes of Wan 2.1 (`WanPipeline.from_pretrained` loads it
unchanged): transformer of 6 blocks and 4 heads of 32, VAE 4 x 4 x 4 with {Z} channels, UMT5 encoder with a tokenizer
made from a word list, Euler scheduler with shift {SHIFT}. Clips of 64 x 64 pixels and 49 frames at 12 a second.

* For: seeing and measuring motion transfer on a CPU in minutes. Not for anything else: it draws coloured shapes only.
* Captions: "a COLOUR SHAPE on a BACKGROUND background", with " and a COLOUR SHAPE" and " behind a grey bar" if wanted.
  Colours: {", ".join(COLOURS)}. Shapes: {", ".join(SHAPES)}. Backgrounds: {", ".join(BACKGROUNDS)}. Lower case.
* Made by `python -m motionlora.train.pretrain` (see its `Recipe`), from made-up clips only; the VAE's encoder is
  written, not trained.
* How good it is, measured: `results/tiny_wan.md` of the project. License: Apache-2.0.
"""


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    make(tyro.cli(Recipe))
    if dist.is_initialized():
        dist.destroy_process_group()
