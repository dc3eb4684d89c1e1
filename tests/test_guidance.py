"""Laws of every guidance: no trace, plain sampling when off, counted as announced; and `generate --guidance`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motionlora.data.clip import Clip, read_clip, write_clip
from motionlora.data.errors import InputError
from motionlora.data.say import silent
from motionlora.heads.capture import layers_of
from motionlora.heads.wan import WanBackbone
from motionlora.infer import generate as room
from motionlora.infer.effort import walked
from motionlora.infer.guidance import GuidanceSettings, Walk
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.guide_none import NoGuidance
from motionlora.infer.sample import new_walk, sample
from motionlora.infer.settings import SampleSettings
from motionlora.train.command import main, settings_of

NAMES = guidance_names()
STEERING = [name for name in NAMES if guidance_class(name).needs_reference]
RECOMPUTING = [name for name in NAMES if "recompute" in guidance_class(name).model_fields]
SIZE: dict[str, Any] = {"frames": 9, "height": 16, "width": 32}
CAPTION, NEGATIVE = "a red circle over a dark background", "a blue star"
EAGER: dict[str, Any] = {"share": 1.0, "start": 0.9, "channels": 0.25, "iterations": 2}
"""Settings of these names let a guidance act in the few steps, and few channels, of a test."""
OFF: dict[str, Any] = {"share": 0.0, "lr": 0.0, "iterations": 0, "start": 1.0, "blocks": ()}
"""Settings of these names at these values let it do nothing."""
STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> WanBackbone:
    """A random twin of two blocks."""
    from motionlora.heads.tiny import random_twin

    return WanBackbone.load(random_twin(tmp_path_factory.mktemp("twin") / "wan", blocks=2, seed=3))


@pytest.fixture(scope="module")
def prompts(model: WanBackbone) -> Any:
    return model.embed([CAPTION]), model.embed([NEGATIVE])


def eager(name: str, **values: Any) -> GuidanceSettings:
    """The guidance of that name, with settings under which it acts."""
    cls = guidance_class(name)
    return cls(**{key: value for key, value in (EAGER | values).items() if key in cls.model_fields})


def walk_on(model: WanBackbone, prompts: Any, *, seed: Any = 3, steps: int = STEPS, scale: float = 3.0) -> Walk:
    reference = torch.randn(1, 16, 3, 4, 8, generator=torch.Generator().manual_seed(99))
    how = SampleSettings(steps=steps, scale=scale)
    return new_walk(model, *prompts, seed=seed, sample=how, reference=reference, **SIZE)


def state_of(model: WanBackbone) -> list[Any]:
    """Everything about a model, and about torch, that a guidance could leave changed."""
    modules = list(model.transformer.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [[len(getattr(module, kind)) for kind in hooks] for module in modules],
        [(module.training, sorted(vars(module))) for module in modules],
        [id(processor) for module in modules if (processor := getattr(module, "processor", None))],
        [(weight.requires_grad, weight.grad is None) for weight in model.transformer.parameters()],
        [torch.is_grad_enabled(), torch.random.get_rng_state().tolist()],
    ]


@contextmanager
def failing(model: WanBackbone, after: int) -> Iterator[None]:
    """The forward after so many fails in its first block."""
    calls = iter(range(10_000))

    def fail(_module: Any, _args: Any) -> None:
        if next(calls) == after:
            raise RuntimeError("on purpose")

    handle = layers_of(model.transformer)[0].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_no_trace_and_no_weight_changed(model: WanBackbone, prompts: Any, name: str) -> None:
    before, weights = state_of(model), {key: w.clone() for key, w in model.transformer.state_dict().items()}
    sample(walk_on(model, prompts), eager(name))
    assert state_of(model) == before
    assert all(torch.equal(w, weights[key]) for key, w in model.transformer.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
def test_it_leaves_no_trace_when_the_model_fails(model: WanBackbone, prompts: Any, name: str, after: int) -> None:
    before, walk = state_of(model), walk_on(model, prompts)
    plain = model.velocity(walk.noise, walk.times[:1], walk.prompt)
    with failing(model, after), pytest.raises(RuntimeError, match="on purpose"):
        sample(walk, eager(name))
    assert state_of(model) == before
    assert torch.equal(model.velocity(walk.noise, walk.times[:1], walk.prompt), plain)


def off(name: str) -> list[GuidanceSettings]:
    """Every way to let it do nothing."""
    fields = guidance_class(name).model_fields
    return [eager(name, **{key: value}) for key, value in OFF.items() if key in fields]


@pytest.mark.parametrize("name", STEERING)
def test_at_strength_zero_it_is_plain_sampling_bit_for_bit(model: WanBackbone, prompts: Any, name: str) -> None:
    walk = walk_on(model, prompts)
    plain = sample(walk, NoGuidance())
    assert not torch.equal(sample(walk_on(model, prompts), eager(name)), plain)
    assert off(name), f"{name} has no setting of {', '.join(OFF)}: nothing can switch it off."
    for guidance in off(name):
        assert torch.equal(sample(walk_on(model, prompts), guidance), plain), guidance


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_result(model: WanBackbone, prompts: Any, name: str) -> None:
    one, same, other = (sample(walk_on(model, prompts, seed=seed), eager(name)) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_seeds_is_each_alone(model: WanBackbone, prompts: Any, name: str) -> None:
    together = sample(walk_on(model, prompts, seed=[7, 8]), eager(name))
    for index, seed in enumerate((7, 8)):
        alone = sample(walk_on(model, prompts, seed=seed), eager(name))
        # Adam follows the sign of a gradient, however small: single elements may go the other way.
        assert (together[index : index + 1] - alone).abs().mean() < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lr", [0.003, 0.1])
def test_the_dose_stays_below_its_bound(model: WanBackbone, prompts: Any, name: str, lr: float) -> None:
    guidance = eager(name, lr=lr)
    bound = guidance.dose_bound(STEPS)
    _, effort = walked(walk_on(model, prompts), guidance, model.transformer)
    assert effort.dose_rms <= effort.dose_max
    if bound is not None:
        assert 0.3 * bound <= effort.dose_max <= bound * (1 + 1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "scale"), [(3, 3.0), (2, 1.0)])
def test_it_costs_what_it_says(model: WanBackbone, prompts: Any, name: str, steps: int, scale: float) -> None:
    for guidance in (eager(name), eager(name, share=0.5), *off(name)):
        _, effort = walked(walk_on(model, prompts, steps=steps, scale=scale), guidance, model.transformer)
        assert effort.forwards == guidance.forwards(steps, 2 if scale > 1 else 1, 2), guidance
        assert effort.gradients == guidance.gradients(steps, 2), guidance


def test_a_walk_that_is_counted_is_the_same_walk(model: WanBackbone, prompts: Any) -> None:
    latent, _ = walked(walk_on(model, prompts), eager("flowmotion"), model.transformer)
    assert torch.equal(latent, sample(walk_on(model, prompts), eager("flowmotion")))


@pytest.mark.parametrize("name", NAMES)
def test_no_graph_is_kept_and_no_weight_gets_a_gradient(model: WanBackbone, prompts: Any, name: str) -> None:
    """Outside of `sample`, with gradients on and weights that ask for them."""
    guidance, walk, tracked = eager(name), walk_on(model, prompts), []
    watch = layers_of(model.transformer)[0].register_forward_hook(
        lambda _module, _args, out: tracked.append((out[0] if isinstance(out, tuple) else out).requires_grad)
    )
    model.transformer.requires_grad_(True)
    try:
        with torch.enable_grad(), guidance.steering(walk) as steer:
            for now in walk.times[:-1]:
                moved = steer(walk.noise, now)
                assert moved.grad_fn is None
                assert not moved.requires_grad
        assert all(weight.grad is None for weight in model.transformer.parameters())
        assert any(tracked) == (guidance.gradients(STEPS, 2) > 0)
    finally:
        model.transformer.requires_grad_(False)
        watch.remove()


@pytest.mark.parametrize("name", RECOMPUTING)
def test_blocks_that_are_computed_again_give_the_same_clip(model: WanBackbone, prompts: Any, name: str) -> None:
    before, guidance = state_of(model), eager(name, recompute=True)
    plain = sample(walk_on(model, prompts), eager(name))
    latent, effort = walked(walk_on(model, prompts), guidance, model.transformer)
    assert torch.equal(latent, plain)
    assert (effort.forwards, effort.gradients) == (guidance.forwards(STEPS, 2, 2), guidance.gradients(STEPS, 2))
    assert effort.forwards == eager(name).forwards(STEPS, 2, 2) + effort.gradients
    with failing(model, 4), pytest.raises(RuntimeError, match="on purpose"):
        sample(walk_on(model, prompts), guidance)
    assert state_of(model) == before


@pytest.mark.parametrize("name", STEERING)
def test_a_reference_that_does_not_fit_is_refused(model: WanBackbone, prompts: Any, name: str) -> None:
    walk = walk_on(model, prompts)
    for reference in (None, torch.zeros(1, 16, 2, 4, 8), torch.zeros(2, 16, 3, 4, 8)):
        wrong = Walk(**{**vars(walk), "reference": reference})
        with pytest.raises(InputError, match=r"give the walk a reference|take a reference of as many frames"):
            sample(wrong, eager(name))


@pytest.mark.parametrize("name", STEERING)
def test_the_reference_matters(model: WanBackbone, prompts: Any, name: str) -> None:
    walk = walk_on(model, prompts)
    assert walk.reference is not None
    other = Walk(**{**vars(walk_on(model, prompts)), "reference": walk.reference.flip(2)})
    assert not torch.equal(sample(walk, eager(name)), sample(other, eager(name)))


def test_every_guidance_is_one_class_in_one_file_and_says_where_it_is_from() -> None:
    folder = Path(room.__file__).parent
    assert set(NAMES) == {path.stem.removeprefix("guide_") for path in folder.glob("guide_*.py")}
    assert NAMES[0] == "none"
    for name in STEERING:
        assert "arXiv" in guidance_class(name).paper
        assert len((guidance_class(name).__doc__ or "").splitlines()[0]) < 115


def test_the_list_tells_every_guidance_and_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guidance", "list", "--steps", "50", "--blocks", "30"]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if line.split()[:1] and line.split()[0] in NAMES}
    assert list(rows) == list(NAMES)
    assert "170 (1.70x)" in rows["flowmotion"]
    assert all(guidance_class(name).paper in row for name, row in rows.items())


def test_a_file_for_another_guidance_gives_way_to_the_one_chosen(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("generate:\n  guidance:\n    name: flowmotion\n    lr: 0.01\n")
    config = ["--config", str(tmp_path / "mine.yaml")]
    for words, lr in (([], 0.01), (["--guidance", "flowmotion", "--guidance.lr", "1"], 1.0)):
        guidance: Any = settings_of("generate", [*config, *words]).guidance
        assert (guidance.name, guidance.lr) == ("flowmotion", lr)
    for name in set(NAMES) - {"flowmotion"}:
        guidance = settings_of("generate", [*config, "--guidance", name]).guidance
        assert guidance.model_dump(exclude={"name"}) == guidance_class(name)().model_dump()
    guidance = settings_of("generate", ["--guidance", "inject", "--guidance.blocks", "0", "1"]).guidance
    assert guidance.blocks == (0, 1)


@pytest.fixture
def command(model: WanBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`generate` by the twin, with a reference of its size at ref.webp."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 32, 3), dtype=np.uint8)
    write_clip(Clip(pixels, 12.0, ""), Path("ref.webp"))
    size = [word for name, value in SIZE.items() for word in (f"--{name}", str(value))]
    words = ["--model", str(model.source), "--caption", CAPTION, "--out", "out", "--suffix", "webp", "--device", "cpu"]
    return ["generate", *words, *size, "--sample.steps", "2", "--sample.scale", "3"]


@pytest.mark.parametrize("name", STEERING)
def test_generate_steers_by_a_clip_and_tells_what_it_took(
    command: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command, "--guidance", name, "--reference", "ref.webp", "--seed", "0", "1"]
    eager_words = [[f"--guidance.{key}", str(value)] for key, value in EAGER.items()]
    words += [word for part in eager_words if part[0][11:] in guidance_class(name).model_fields for word in part]
    assert main(words) == 0
    said = capsys.readouterr().out
    stories = [json.loads(path.read_text()) for path in sorted(Path("out").glob("*.json"))]
    guidance = eager(name)
    for story in stories:
        effort = story["effort"]
        assert story["settings"]["guidance"] == {"name": name, **guidance.model_dump(mode="json")}
        assert story["reference"]["file"] == "ref.webp"
        assert {"rms", "max"} <= {key.removeprefix("dose_") for key in effort}
        assert f"{effort['forwards']:.4g} forwards, {effort['gradients']:.4g} gradients, dose rms" in said
    assert stories[0]["effort"]["forwards"] == guidance.forwards(2, 2, 2)
    assert stories[1]["effort"]["forwards"] <= stories[0]["effort"]["forwards"]
    assert "encode" in stories[0]["seconds"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--guidance", "flowmotion"], ["Guidance flowmotion", "--reference"]),
        (["--reference", "ref.webp"], ["guidance none takes none", "flowmotion", "leave --reference out"]),
        (["--guidance", "inject", "--reference", "nowhere.mp4"], ["nowhere.mp4"]),
        (
            ["--guidance", "sdedit", "--reference", "ref.webp", "--frames", "13"],
            ["9 frames of 32 x 16", "13 of 32 x 16"],
        ),
        (
            ["--guidance", "sdedit", "--reference", "ref.webp", "--height", "32"],
            ["9 frames of 32 x 16", "9 of 32 x 32"],
        ),
        (["--guidance", "flowmotoin"], ["did you mean flowmotion?"]),
        (["--guidance", "flowmotion", "--guidance.share", "2"], ["--guidance.share"]),
        (["--guidance", "flowmotion", "--guidance.rate", "2"], ["--guidance.rate", "did you mean"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_does_not_fit_is_one_sentence_before_the_model_is_loaded(
    command: list[str],
    words: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(room, "loaded_model", lambda *_: pytest.fail("the model was loaded"))
    assert main([*command, *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert [part for part in parts if part not in said] == [], said
    assert not Path("out").exists()


def test_a_second_call_knows_what_the_first_computed(command: list[str]) -> None:
    words = [*command, "--guidance", "flowmotion", "--guidance.share", "1", "--reference", "ref.webp"]
    story = Path("out") / "a-red-circle-over-a-dark-background-seed0.json"
    spent, pictures = [], []
    for more in ([], [], ["--seed", "0", "--guidance.lr", "0.1"], ["--cache", "None"]):
        assert main([*words, *more]) == 0
        spent.append(json.loads(story.read_text())["effort"]["forwards"])
        pictures.append(hash_of_pixels(story.with_suffix(".webp")))
    assert spent == [18, 16, 16, 18]
    assert pictures[0] == pictures[1] == pictures[3] != pictures[2]


def hash_of_pixels(path: Path) -> str:
    """The hash of a file's pixels: its metadata tell the settings, which differ."""
    return read_clip(path, multiple=1, say=silent).content_hash()
