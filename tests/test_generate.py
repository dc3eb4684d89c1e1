"""Laws of `generate`: files that tell how they were made, strengths as asked, and refusals before any work."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image

from motionlora.data.clip import Clip, read_clip
from motionlora.data.errors import InputError, NumbersError, StorageError
from motionlora.heads.lora import MotionLora, load_into, set_strengths, strengths, unload
from motionlora.heads.lora_file import save_lora
from motionlora.heads.wan import WanBackbone
from motionlora.infer import generate as room
from motionlora.infer.generate import generate, generate_clip, slug
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.order import loaded_lora, settled
from motionlora.infer.sample import new_walk, sample
from motionlora.infer.settings import GenerateSettings, LoraChoice, SampleSettings, lora_choice
from motionlora.infer.sheet import TILE, contact_sheet

CAPTIONS = ("a red circle over a dark background", "A blue star, left!")
SIZE: dict[str, Any] = {"frames": 5, "height": 16, "width": 32}


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the twin that changes much, and recommends 0.75."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for module in ("blocks.0.attn1.to_q", "blocks.0.attn1.to_v", "blocks.2.attn1.to_out.0"):
        weights[f"{module}.lora_A.weight"] = torch.randn(4, 48, generator=generator)
        weights[f"{module}.lora_B.weight"] = torch.randn(48, 4, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "temporal.safetensors"
    save_lora(MotionLora(weights, 4, 4.0, stage="temporal", provenance={"strength": 0.75, "caption": "who"}), path)
    return path


@pytest.fixture
def settings(twin_folder: Path, tmp_path: Path) -> GenerateSettings:
    return GenerateSettings(
        model=str(twin_folder), caption=CAPTIONS[:1], out=tmp_path / "out", device="cpu", cache=None, fps=12,
        sample=SampleSettings(steps=2, scale=3.0), **SIZE,
    )  # fmt: skip


def quiet(line: str) -> None:
    del line


def changed(settings: GenerateSettings, **values: Any) -> GenerateSettings:
    return GenerateSettings.model_validate({**settings.model_dump(), **values})


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("The model was loaded.")


def test_every_caption_with_every_seed_is_a_file_with_its_story(
    settings: GenerateSettings, lora_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(settings, caption=CAPTIONS, seed=(0, 12), lora=(f"{lora_file}:0.25",), negative="grey")
    paths = generate(settings)
    names = [f"{name}-seed{seed}" for name in (slug(CAPTIONS[0]), "a-blue-star-left") for seed in (0, 12)]
    assert [path.name for path in paths] == [f"{name}.mp4" for name in names]
    assert sorted(path.name for path in settings.out.iterdir()) == sorted(
        f"{name}.{suffix}" for name in names for suffix in ("mp4", "json")
    )
    story = json.loads(paths[3].with_suffix(".json").read_text())
    assert (story["caption"], story["seed"]) == (CAPTIONS[1], 12)
    acted_to_the_end = changed(settings, sample=settings.sample.model_copy(update={"lora_until": 0.0}))
    assert GenerateSettings.model_validate({**story["settings"], "guidance": {}}) == acted_to_the_end
    assert story["settings"]["guidance"] == {"name": "NoGuidance"}
    assert set(story["seconds"]) == {"load", "embed", "sample", "decode"}
    assert set(story["versions"]) >= {"torch", "diffusers", "peft"}
    (lora,) = story["loras"]
    assert (lora["strength"], lora["stage"], lora["rank"]) == (0.25, "temporal", 4)
    assert lora["provenance"]["caption"] == "who"
    with av.open(str(paths[3])) as container:
        inside = json.loads(container.metadata["comment"])
    assert inside == {key: story[key] for key in ("caption", "seed", "settings")}
    clip = read_clip(paths[3], multiple=8, frames=5, fps=12, height=16, width=32, say=quiet)
    assert clip.pixels.shape == (5, 16, 32, 3)
    said = capsys.readouterr()
    assert "4 clips of 5 frames 32x16, 2 steps" in said.out
    assert "temporal.safetensors at 0.25" in said.out
    assert "clip 4/4" in said.err


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_other_kinds_of_file(settings: GenerateSettings, suffix: str) -> None:
    (path,) = generate(changed(settings, suffix=suffix), say=quiet)
    assert path.suffix == f".{suffix}"
    with Image.open(path) as image:
        assert (image.size, getattr(image, "n_frames", 1)) == ((32, 16), 5)


def test_the_same_call_gives_the_same_pixels_and_takes_the_place_of_the_old_file(settings: GenerateSettings) -> None:
    settings = changed(settings, suffix="webp")
    (path,) = generate(settings, say=quiet)
    before = path.read_bytes()
    path.write_bytes(b"old")
    (again,) = generate(settings, say=quiet)
    assert again.read_bytes() == before
    assert [file for file in settings.out.iterdir() if file.suffix not in (".webp", ".json")] == []


def latent(twin: WanBackbone, seed: int = 4, until: float = 0.0) -> torch.Tensor:
    prompt, negative = twin.embed([CAPTIONS[0]]), twin.embed([""])
    how = SampleSettings(steps=3, scale=3.0, lora_until=until)
    walk = new_walk(twin, prompt, negative, seed=seed, sample=how, **SIZE)
    return sample(walk, NoGuidance())


def test_a_lora_at_zero_is_the_base_bit_for_bit_and_acts_in_proportion(twin: WanBackbone, lora_file: Path) -> None:
    plain, lora = latent(twin), loaded_lora(str(lora_file), 0.5).lora
    far = {}
    for strength in (0.0, 0.25, 1.0):
        load_into(twin.transformer, lora, "lora0", strength)
        try:
            far[strength] = (latent(twin) - plain).abs().max().item()
        finally:
            unload(twin.transformer, "lora0")
    assert far[0.0] == 0
    assert 1e-4 < far[0.25] < far[1.0]
    assert torch.equal(latent(twin), plain)


@pytest.mark.parametrize("acting", [1, 2, 4])
def test_below_its_noise_level_a_lora_rests_and_is_back_after_the_walk(
    twin: WanBackbone, lora_file: Path, acting: int
) -> None:
    how = SampleSettings(steps=4, scale=3.0)
    walk = new_walk(twin, twin.embed([CAPTIONS[0]]), twin.embed([""]), seed=4, sample=how, **SIZE)
    until = float(walk.times[acting - 1])  # the last time at which it still acts
    walk = replace(walk, lora_until=until)
    load_into(twin.transformer, loaded_lora(str(lora_file), 0.5).lora, "lora0", 0.5)
    try:
        found = sample(walk, NoGuidance())
        assert strengths(twin.transformer) == {"lora0": 0.5}
        with pytest.raises(NumbersError):
            sample(replace(walk, noise=walk.noise * float("nan")), NoGuidance())
        assert strengths(twin.transformer) == {"lora0": 0.5}
        wanted = walk.noise
        for step, (now, then) in enumerate(pairwise(walk.times)):
            set_strengths(twin.transformer, {"lora0": 0.5 if step < acting else 0.0})
            wanted = wanted + (then - now) * walk.velocity(wanted, now)
    finally:
        unload(twin.transformer, "lora0")
    assert torch.equal(found, wanted)


def test_loras_rest_where_their_training_ended_unless_they_are_told(lora_file: Path, tmp_path: Path) -> None:
    lora, levels = loaded_lora(str(lora_file), 0.5).lora, {}
    for name, until in (("a", {"until": 0.8}), ("b", {"until": 0.8}), ("c", {}), ("d", {"until": 0})):
        save_lora(replace(lora, provenance=until), tmp_path / f"{name}.safetensors")
        levels[name] = loaded_lora(str(tmp_path / f"{name}.safetensors"), 0.5)
    own, asked = SampleSettings(), SampleSettings(lora_until=0.3)
    for names, until in (("", 0.0), ("a", 0.8), ("ab", 0.8), ("c", 0.0), ("cd", 0.0)):
        loras = [levels[name] for name in names]
        assert settled(own, loras) == SampleSettings(lora_until=until)
        assert settled(asked, loras) == asked
    with pytest.raises(InputError, match=r"a\.safetensors rests below noise 0\.8, c\.safetensors rests below noise 0,"):
        settled(own, [levels["a"], levels["c"]])
    assert settled(SampleSettings(lora_until=0.0), [levels["a"], levels["c"]]).lora_until == 0.0
    for wrong in ("never", 1.5, -0.1, None, [0.8]):
        save_lora(replace(lora, provenance={"until": wrong}), tmp_path / "e.safetensors")
        with pytest.raises(InputError, match=r"e\.safetensors says in its header that it rests below noise"):
            loaded_lora(str(tmp_path / "e.safetensors"), 0.5)


def test_generate_takes_the_level_of_the_file_and_writes_it_down(
    settings: GenerateSettings, lora_file: Path, tmp_path: Path
) -> None:
    lora = loaded_lora(str(lora_file), 0.5).lora
    save_lora(replace(lora, provenance={"until": 0.95}), tmp_path / "a.safetensors")
    pixels = {}
    for until in (None, 0.95, 0.0):
        how = settings.sample.model_copy(update={"lora_until": until})
        said: list[str] = []
        (path,) = generate(changed(settings, lora=(str(tmp_path / "a.safetensors"),), sample=how), say=said.append)
        assert ("a.safetensors at 0.5 (resting below noise 0.95)" in "".join(said)) == (until != 0.0)
        story = json.loads(path.with_suffix(".json").read_text())
        assert story["settings"]["sample"]["lora_until"] == (0.95 if until is None else until)
        pixels[until] = read_clip(path, multiple=1, caption="", say=quiet).pixels
    assert np.array_equal(pixels[None], pixels[0.95])
    assert not np.array_equal(pixels[None], pixels[0.0])


@pytest.mark.parametrize("until", [0.0, 0.85])
def test_the_stock_pipeline_with_the_same_file_and_strength_gives_the_same_latents(
    twin: WanBackbone, twin_folder: Path, lora_file: Path, until: float
) -> None:
    load_into(twin.transformer, loaded_lora(str(lora_file), 0.5).lora, "lora0", 0.5)
    try:
        ours = latent(twin, until=until)
    finally:
        unload(twin.transformer, "lora0")
    stock = WanPipeline.from_pretrained(twin_folder)
    stock.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config, shift=3.0)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(lora_file), adapter_name="temporal")
    stock.set_adapters(["temporal"], [0.5])

    def rest(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:  # as README has it
        if pipe.scheduler.sigmas[step + 1] < until:
            pipe.disable_lora()
        return tensors

    callback: Any = rest  # its annotation there is wrong
    theirs: Any = stock(
        prompt=CAPTIONS[0], negative_prompt="", height=16, width=32, num_frames=5, num_inference_steps=3,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(4), output_type="latent",
        callback_on_step_end=callback,
    )  # fmt: skip
    assert torch.allclose(ours, theirs.frames, atol=1e-5)


def test_a_clip_by_a_loaded_model_is_that_of_the_command(twin: WanBackbone, settings: GenerateSettings) -> None:
    prompt, negative = twin.embed(CAPTIONS[:1]), twin.embed([""])
    clip = generate_clip(
        twin, prompt, negative, seed=0, fps=12, sample=settings.sample, guidance=NoGuidance(), caption="it", **SIZE
    )
    assert (clip.pixels.shape, clip.fps, clip.caption) == ((5, 16, 32, 3), 12, "it")
    (path,) = generate(changed(settings, suffix="webp"), say=quiet)
    written = read_clip(path, multiple=8, frames=5, fps=12, height=16, width=32, say=quiet)
    assert np.abs(written.pixels.astype(int) - clip.pixels.astype(int)).mean() < 25  # lossy, but the same picture


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("a.safetensors", LoraChoice(Path("a.safetensors"), None)),
        ("runs/a.safetensors:0.5", LoraChoice(Path("runs/a.safetensors"), 0.5)),
        ("a:-1", LoraChoice(Path("a"), -1.0)),
        ("a b.safetensors:1e-1", LoraChoice(Path("a b.safetensors"), 0.1)),
        (r"C:\loras\a.safetensors", LoraChoice(Path(r"C:\loras\a.safetensors"), None)),
        (r"C:\loras\a.safetensors:0.5", LoraChoice(Path(r"C:\loras\a.safetensors"), 0.5)),
        ("C:/loras/a.safetensors", LoraChoice(Path("C:/loras/a.safetensors"), None)),
        ("clip:v2/a.safetensors:2", LoraChoice(Path("clip:v2/a.safetensors"), 2.0)),
    ],
)
def test_a_strength_is_what_follows_the_last_colon(text: str, choice: LoraChoice) -> None:
    assert lora_choice(text) == choice


@pytest.mark.parametrize("text", ["", " ", ":0.5", "a:", "a:half", "a:nan", "a:inf", "a:5"])
def test_no_strength_is_no_guess(text: str) -> None:
    with pytest.raises(InputError, match="FILE:STRENGTH"):
        lora_choice(text)
    with pytest.raises(ValueError, match="FILE:STRENGTH"):
        GenerateSettings(lora=(text,))


def test_a_file_with_a_colon_in_its_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "take:2"
    path.write_bytes(b"")
    assert lora_choice(str(path)) == LoraChoice(path, None)


def test_the_header_recommends_a_strength_and_the_setting_stands_in(lora_file: Path, tmp_path: Path) -> None:
    assert loaded_lora(f"{lora_file}:0.1", 0.5).strength == 0.1
    assert loaded_lora(f"{lora_file}:0", 0.5).strength == 0
    assert loaded_lora(str(lora_file), 0.5).strength == 0.75
    strangers = tmp_path / "other.safetensors"
    lora = loaded_lora(str(lora_file), 0.5).lora
    save_lora(MotionLora(lora.weights, 4, 4.0), strangers)
    assert loaded_lora(str(strangers), 0.3).strength == 0.3


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"caption": ()}, "No caption was given"),
        ({"caption": ("a star", "A star!")}, "would be one file, a-star-seed0.mp4"),
        ({"seed": (3, 3)}, "with seed 3 came twice"),
        ({"lora": ("nowhere.safetensors:1",)}, "There is no LoRA file nowhere.safetensors"),
        ({"lora": (str(Path(__file__)),)}, "test_generate.py"),
        ({"out": Path(__file__)}, "is a file, but clips go into a folder"),
        ({"device": "toaster"}, "Device 'toaster' cannot be used"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_model_is_loaded(
    settings: GenerateSettings, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(room, "loaded_model", never)
    with pytest.raises(InputError) as refused:
        generate(changed(settings, **values), say=quiet)
    assert reason in str(refused.value)
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"frames": 50}, "4k + 1, as 49 or 53 are"),
        ({"seed": (-1,)}, "0 or above"),
        ({"seed": ()}, "one or more"),
        ({"caption": ("a star", " ")}, "no empty caption"),
        ({"sample": {"steps": 0}}, "greater than or equal to 1"),
        ({"sample": {"shift": 0}}, "greater than 0"),
        ({"strenght": 1}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("+", r"\+")):
        GenerateSettings.model_validate(values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"height": 36}, "multiples of 8, got 36 x 32: the nearest is 32 x 32"),
        ({"attention": "telepathy"}, "telepathy"),
        ({"model": "/nowhere"}, "nowhere"),
    ],
)
def test_what_only_the_model_knows_is_refused_before_any_clip(
    settings: GenerateSettings, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        generate(changed(settings, **values), say=quiet)
    assert not settings.out.exists()


def test_a_folder_that_cannot_be_made_is_refused_before_any_clip(settings: GenerateSettings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose another --out"):
        generate(changed(settings, out=tmp_path / "file" / "out"), say=quiet)


def test_slugs_are_short_and_differ() -> None:
    assert slug("A red circle, over a dark_background!") == "a-red-circle-over-a-dark-background"
    assert slug("一颗红色的星") == "一颗红色的星"
    assert slug("!?") == "clip"
    long = "a circle " * 40
    assert len(slug(long).encode()) <= 67
    assert slug(long + "left") != slug(long + "right")


def test_a_sheet_has_a_labelled_row_a_clip(tmp_path: Path) -> None:
    wide = Clip(np.full((49, 32, 64, 3), 200, np.uint8), 12.0, "")
    short = Clip(np.stack([np.full((64, 64, 3), 80 * index, np.uint8) for index in range(3)]), 12.0, "")
    contact_sheet([("reference " * 40, wide), ("", short)], tmp_path / "new" / "sheet.png", frames=5)
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 5 * TILE
    last = pixels[-TILE // 2, : 3 * TILE]
    assert [tuple(last[column * (TILE + 4) + TILE // 2]) for column in range(3)] == [(0,) * 3, (80,) * 3, (160,) * 3]
    with pytest.raises(InputError, match="0 rows"):
        contact_sheet([], tmp_path / "none.png")
