"""The VAE and the text encoder of a checked Wan folder, on the device only while they are used; and which they are."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from einops import rearrange
from jaxtyping import UInt8
from safetensors import SafetensorError
from torch import Tensor

from motionlora.data.settings import InputError
from motionlora.heads.wan_folder import first_line, read_json

if TYPE_CHECKING:
    from torch import nn

    from motionlora.data.clip import Clip
    from motionlora.heads.backbone import Latent

TEXT_LENGTH = 512
"""Tokens of a prompt, zeros after its end included: `WanPipeline.__call__`'s default (`encode_prompt`'s own is 226)."""
TEXT = ("tokenizer", "text_encoder")
SMALL_BYTES = 2**30
"""A text encoder below this size stays in main memory between uses; a larger one is dropped."""
_SAMPLE_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class WanParts:
    """What surrounds the transformer in a checked folder. Copies of a backbone share one of these."""

    vae_class: ClassVar[Any] = AutoencoderKLWan
    pipeline_class: ClassVar[Any] = WanPipeline
    text_length: ClassVar[int] = TEXT_LENGTH
    folder: Path
    device: torch.device
    dtype: torch.dtype
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's settings, the class's defaults filled in (the hub's file names no scale factors)."""
        defaults = inspect.signature(self.vae_class.__init__).parameters
        given = read_json(self.folder / "vae" / "config.json")
        return {name: given.get(name, default.default) for name, default in defaults.items() if name != "self"}

    @cached_property
    def token_times(self) -> bool:
        """The network is fed a time for every token (TI2V-5B); for text-to-video they are all the same."""
        return bool(read_json(self.folder / "model_index.json").get("expand_timesteps"))

    @cached_property
    def vae_hash(self) -> str:
        """Which VAE this is: its latents are cached under this name."""
        return sampled_hash(self.folder / "vae")

    @cached_property
    def text_hash(self) -> str:
        """Which tokenizer and text encoder these are, and in which dtype: prompts are cached under this name."""
        return f"{sampled_hash(self.folder / 'text_encoder')} {sampled_hash(self.folder / 'tokenizer')} {self.dtype}"

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's settings as the folder has them; its class is under "_class_name"."""
        return read_json(self.folder / "scheduler" / "scheduler_config.json")

    @contextmanager
    def vae(self) -> Iterator[Any]:
        """The VAE in fp32 on the device; back in main memory afterwards. Not to be shared between threads."""
        if "vae" not in self._kept:
            self._kept["vae"] = loaded(self.vae_class, self.folder / "vae", torch.float32)
        vae = self._kept["vae"]
        try:
            yield vae.to(self.device)
        finally:
            vae.to("cpu")

    @torch.no_grad()
    def encoded(self, clip: Clip) -> Latent:
        """The clip's normalised latent "1 c f h w", fp32: `(mode - mean) / std` (methods.md 1.4)."""
        pixels = rearrange(torch.from_numpy(clip.pixels), "f h w c -> 1 c f h w").float() / 127.5 - 1
        with self.vae() as vae:
            raw = vae.encode(pixels.to(self.device)).latent_dist.mode()
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    @torch.no_grad()
    def decoded(self, latent: Latent) -> UInt8[Tensor, "f h w c"]:
        """The pixels of one normalised latent "1 c f h w", rounded, on the CPU."""
        latent = latent.to(self.device, torch.float32)
        mean, std = self._statistics(latent)
        # Divided by the reciprocal as WanPipeline does, so that the pixels are the stock ones bit for bit.
        inverse_std = 1.0 / std
        with self.vae() as vae:
            pixels = vae.decode(latent / inverse_std + mean).sample[0]
        bytes_ = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return rearrange(bytes_, "c f h w -> f h w c").contiguous().cpu()

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw latents, "1 c 1 1 1", from the VAE's config."""
        mean, std = (torch.tensor(self.vae_config[name]).to(like) for name in ("latents_mean", "latents_std"))
        return rearrange(mean, "c -> 1 c 1 1 1"), rearrange(std, "c -> 1 c 1 1 1")

    @contextmanager
    def text(self) -> Iterator[Callable[[str], Tensor]]:
        """A function from one caption to its embedding "1 l d"; tokenizer and text encoder load at the first call.

        The encoding is the stock pipeline's `encode_prompt` itself, one caption at a time, so that a caption's
        embedding does not depend on its neighbours.
        """
        pipelines: list[Any] = []

        def embedding(caption: str) -> Tensor:
            if not pipelines:
                pipelines.append(self._text_pipeline())
            _refuse_long(pipelines[0].tokenizer, caption, self.text_length)
            with torch.no_grad():
                return pipelines[0].encode_prompt(
                    caption, do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.device
                )[0]

        try:
            yield embedding
        finally:
            for pipeline in pipelines:
                self._put_away(pipeline)

    def _text_pipeline(self) -> Any:
        import transformers

        pipeline = self._kept.get("text")
        if pipeline is None:
            index = read_json(self.folder / "model_index.json")
            tokenizer_class, encoder_class = (getattr(transformers, index[part][1]) for part in TEXT)
            with _quiet_bars():
                encoder = loaded(encoder_class, self.folder / "text_encoder", self.dtype)
            tokenizer = tokenizer_class.from_pretrained(self.folder / "tokenizer", local_files_only=True)
            absent: Any = None
            pipeline = self.pipeline_class(tokenizer, encoder, vae=absent, scheduler=absent, transformer=absent)
        pipeline.text_encoder.to(self.device)
        return pipeline

    def _put_away(self, pipeline: Any) -> None:
        encoder = pipeline.text_encoder
        if sum(weight.nbytes for weight in encoder.parameters()) < SMALL_BYTES:
            encoder.to("cpu")
            self._kept["text"] = pipeline
        else:
            pipeline.text_encoder = None


def loaded(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A frozen model of `folder` in eval mode; what its class keeps in fp32 stays in fp32.

    Raises:
        InputError: the weights do not fit the class, or some are missing.
    """
    try:
        # Building the class draws weights that are then overwritten: the run's own draws must not move with that.
        with torch.random.fork_rng(devices=[]):
            model, report = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded ({first_line(error)}); copy the model again.") from error
    absent = sorted(set(report["missing_keys"]) | {str(key) for key in report.get("mismatched_keys", ())})
    if absent:
        raise InputError(
            f"{folder} lacks {len(absent)} weights of a {cls.__name__}, {absent[0]} for one; copy it again (fused "
            "attention projections must be unfused before saving)."
        )
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def sampled_hash(folder: Path) -> str:
    """Hash of every JSON and weight file of a part: whole up to 16 MiB, of a larger file 4096 evenly spread pages."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".model")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for page in range(4096):
                file.seek(page * (size - 4096) // 4095)
                digest.update(file.read(4096))
    return digest.hexdigest()[:32]


def weights_fingerprint(transformer: Any) -> str:
    """Which model this is, whatever the dtype it was loaded in: 16 hex digits, before any adapter is attached.

    Hash of the configuration and of every parameter's name, shape and first 64 numbers in bfloat16; ours, because a
    hash of 14 B parameters would take longer than scoring the heads.
    """
    config = {key: value for key, value in dict(transformer.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    for name, weight in transformer.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        first = weight.detach().reshape(-1)[:64].to(torch.bfloat16)
        digest.update(first.contiguous().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _refuse_long(tokenizer: Any, caption: str, most: int) -> None:
    tokens = len(tokenizer(caption, truncation=False, verbose=False).input_ids)
    if tokens > most:
        raise InputError(f"The caption has {tokens} tokens and at most {most} are allowed: shorten it.")


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """No bar of transformers' own: runs have one progress display."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
