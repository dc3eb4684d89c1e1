"""The tiny Wan's encoder: a separable block transform, written into the weights of an ordinary `AutoencoderKLWan`.

A block of 4 x 4 pixels x 4 frames x 3 colours (192 numbers) becomes 16: the strongest principal components of a 4 x 4
patch, each as its mean over the four frames and, for the strongest ones, three Haar differences in time. The first
frame is a block of its own without differences, as the causal VAE wants it. It keeps 31.3 dB on random sprite clips,
where 24 numbers would keep 32.9; but a token of four blocks must pass through the transformer's width with room to
spare (results/log.md). The decoder is trained.

The network is made exactly linear: residual branches end in zeros, the last norm sees one huge constant channel, and
the last activation sees each feature with both signs, since silu(a) - silu(-a) = a.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from torch import Tensor, nn

from motionlora.data.sprites import random_scene, render

MEANS, SLOW, FAST, FASTEST = 10, 4, 1, 1
"""Patch components kept for the mean over four frames, last minus first pair, within pairs, and their change."""
Z = MEANS + SLOW + FAST + FASTEST
CONSTANT = 1000.0


def new_vae() -> AutoencoderKLWan:
    """Three levels, so that space and time shrink 4x: 64 x 64 pixels become 16 x 16 latents, 8 x 8 tokens."""
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=6, z_dim=Z, dim_mult=[3, 4, 7], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[True, True], latents_mean=[0.0] * Z, latents_std=[1.0] * Z,
        scale_factor_spatial=4, scale_factor_temporal=4,
    )  # fmt: skip
    write_encoder(vae)
    mean, std = latent_statistics()
    vae.register_to_config(latents_mean=mean, latents_std=std)
    return vae


@cache
def patch_basis() -> Tensor:
    """Principal components of 4 x 4 x 3 patches of the sprite world, "component (y x colour)", strongest first."""
    generator = np.random.default_rng(17)
    frames = np.concatenate([render(random_scene(generator, frames=2)).pixels for _ in range(600)])
    patches = rearrange(_signed(frames), "n (h p) (w q) c -> (n h w) (p q c)", p=4, q=4)
    centred = patches - patches.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred / len(centred))[1].flip(1)[:, :MEANS].T
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return (vectors * largest.sign()).contiguous()


def raw_latent(pixels: np.ndarray) -> Tensor:
    """What the VAE's encoder gives for uint8 "frame height width 3", frames 4k + 1, without running it: "z f h w"."""
    patches = rearrange(_signed(pixels), "f (h p) (w q) c -> f h w (p q c)", p=4, q=4) @ patch_basis().T
    first, rest = patches[:1], rearrange(patches[1:], "(f pair t) h w k -> t pair f h w k", pair=2, t=2)
    mean, within = (rest[0] + rest[1]) / 2, (rest[1] - rest[0]) / 2
    parts = [(mean[0] + mean[1]) / 2, ((mean[1] - mean[0]) / 2)[..., :SLOW]]
    parts += [((within[0] + within[1]) / 2)[..., :FAST], ((within[1] - within[0]) / 2)[..., :FASTEST]]
    zeros = first.new_zeros(*first.shape[:-1], Z - MEANS)
    return rearrange(torch.cat([torch.cat([first, zeros], -1), torch.cat(parts, -1)]), "f h w z -> z f h w")


@cache
def latent_statistics() -> tuple[list[float], list[float]]:
    """Mean and scale of each channel for the VAE's config.

    The scale grows with std^0.6 of the channel: weak channels stay weaker than strong ones, so that the transformer
    spends itself on what is seen; together they have unit variance.
    """
    generator = np.random.default_rng(7)
    scenes = [random_scene(generator, frames=17, speed=float(generator.uniform(0.5, 3))) for _ in range(200)]
    latent = torch.stack([raw_latent(render(scene).pixels) for scene in scenes])
    mean, std = latent[:, :, 1:].mean((0, 2, 3, 4)), latent[:, :, 1:].std((0, 2, 3, 4))
    mean[MEANS:] = 0
    scale = std**0.6
    return mean.tolist(), (scale * (std / scale).square().mean().sqrt()).tolist()


def normalised(latent: Tensor) -> Tensor:
    """A raw latent "z f h w" as the transformer sees it."""
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in latent_statistics())
    return (latent - mean) / std


@torch.no_grad()
def write_encoder(vae: AutoencoderKLWan) -> None:
    """Writes the transform into the encoder's weights; the decoder stays as it is."""
    encoder: Any = vae.encoder
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.zero_()
            _bias(module).zero_()
    level0, down0, level1, down1, level2 = encoder.down_blocks
    _point(encoder.conv_in)[:3] = torch.eye(3, encoder.conv_in.in_channels)
    _point(level0.conv_shortcut)[:3, :3] = torch.eye(3)
    for dy in range(2):
        for dx in range(2):
            for colour in range(3):
                down0.resample[1].weight[(dy * 2 + dx) * 3 + colour, colour, dy, dx] = 1
    _haar(down0.time_conv, [(k, k, 12 + k) for k in range(12)])
    _point(level1.conv_shortcut)[:24, :24] = torch.eye(24)
    basis = rearrange(patch_basis(), "k (ey dy ex dx c) -> ey ex k (dy dx c)", ey=2, dy=2, ex=2, dx=2)
    for ey in range(2):
        for ex in range(2):
            down1.resample[1].weight[:MEANS, :12, ey, ex] = basis[ey, ex]
            down1.resample[1].weight[24 : 24 + FASTEST, 12:24, ey, ex] = basis[ey, ex, :FASTEST]
    slow, fast = MEANS, MEANS + SLOW
    _haar(down1.time_conv, [(k, k, slow + k if k < SLOW else None) for k in range(MEANS)])
    _haar(down1.time_conv, [(24 + k, fast + k if k < FAST else None, fast + FAST + k) for k in range(FASTEST)])
    for k in range(Z):
        _point(level2.conv_shortcut)[2 * k : 2 * k + 2, k] = torch.tensor([1.0, -1.0])
    _bias(level2.conv_shortcut)[-1] = CONSTANT
    gain = CONSTANT / encoder.conv_out.in_channels**0.5
    for k in range(Z):
        _point(encoder.conv_out)[k, 2 * k : 2 * k + 2] = torch.tensor([gain, -gain])
    _bias(encoder.conv_out)[Z:] = -20.0
    vae.quant_conv.weight.copy_(torch.eye(2 * Z)[:, :, None, None, None])
    _bias(vae.quant_conv).zero_()
    encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


def _signed(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).float() / 127.5 - 1


def _bias(module: nn.Module) -> Tensor:
    assert isinstance(module.bias, Tensor)
    return module.bias


def _point(conv: nn.Module) -> Tensor:
    """The weights "out in" that see the present frame and the pixel itself."""
    assert isinstance(conv, nn.Conv3d)
    _, _, t, h, w = conv.weight.shape
    return conv.weight[:, :, t - 1, h // 2, w // 2]


def _haar(conv: nn.Module, routes: list[tuple[int, int | None, int | None]]) -> None:
    """For each (channel, where its mean over a pair of frames goes, where half its change goes)."""
    assert isinstance(conv, nn.Conv3d)
    for source, mean, change in routes:
        if mean is not None:
            conv.weight[mean, source, 1:, 0, 0] = 0.5
        if change is not None:
            conv.weight[change, source, 1:, 0, 0] = torch.tensor([-0.5, 0.5])
