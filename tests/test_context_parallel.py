"""Laws of clips that several processes make together: the numbers of one, files from the first, nobody left waiting."""

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import together

from motionlora.data.clip import write_clip
from motionlora.data.errors import InputError
from motionlora.heads.backbone import Prompt
from motionlora.heads.context_parallel import sharing
from motionlora.heads.load import load_model
from motionlora.heads.memory import sampling_memory
from motionlora.heads.wan import WanBackbone
from motionlora.infer import generate as room
from motionlora.infer import workers as processes
from motionlora.infer.context_parallel import FROM_OUTSIDE
from motionlora.infer.generate import generate
from motionlora.infer.guidance_list import guidance_class, guidance_names
from motionlora.infer.order import loaded_lora
from motionlora.infer.settings import GenerateSettings, SampleSettings
from motionlora.infer.workers import Workers, joined
from motionlora.train.command import main

SIZE: dict[str, Any] = {"frames": 9, "height": 32, "width": 32}
TWO = Workers(0, 2)
"""Of two processes the first, before they talk."""


@torch.no_grad()
def velocity(model: WanBackbone, time: float) -> torch.Tensor:
    draws = torch.Generator().manual_seed(4)
    latent = torch.randn(1, model.channels, 3, 4, 12, generator=draws)
    return model.velocity(latent, torch.tensor([time]), Prompt(torch.randn(1, 512, 32, generator=draws)))


def test_every_wan_says_to_two_processes_what_it_says_to_one(
    twin_folder: Path, twin_5b_folder: Path, experts_folder: Path, strong_lora: Path, tmp_path: Path
) -> None:
    seen: list[int] = []

    def work(rank: int) -> None:
        del rank
        tuned = WanBackbone.load(twin_folder)
        loaded_lora(f"{strong_lora}:0.5", 0.0).load_onto(tuned, "lora0")
        fp8 = load_model(twin_folder, memory=sampling_memory("lowest", gpu=True))
        with joined("cpu", tensors=True) as workers:
            for model in (tuned, fp8, WanBackbone.load(twin_5b_folder), WanBackbone.load(experts_folder)):
                alone = [velocity(model, time) for time in (0.95, 0.5)]
                seen.clear()
                layer: Any = model.transformer.get_submodule("blocks.2.ffn")
                watch = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
                with sharing(model, workers.count):
                    shared = [velocity(model, time) for time in (0.95, 0.5)]
                watch.remove()
                assert seen == [3 * 2 * 6 / 2] * 2, "each process has half of the tokens"
                torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)
                torch.testing.assert_close([velocity(model, 0.95), velocity(model, 0.5)], alone, atol=1e-5, rtol=0)

    together(work, tmp_path)


@pytest.fixture
def words(twin_folder: Path, strong_lora: Path) -> list[str]:
    said = (
        f"generate --model {twin_folder} --lora {strong_lora}:0.5 --frames 9 --height 32 --width 32 --fps 12 --seed 0 1"
    )
    return [*f"{said} --sample.steps 2 --sample.scale 3 --memory fast --device cpu --caption".split(), "a red circle"]


def latents_into(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every latent that is decoded is left in `folder`, by the process's number; what it decodes to is a clip."""
    decode, numbers = WanBackbone.decode, iter(range(99))

    def decoded(self: WanBackbone, latent: torch.Tensor, fps: float) -> Any:
        np.save(folder / f"latent-{os.environ.get('RANK', '0')}-{next(numbers)}.npy", latent.numpy())
        return decode(self, latent, fps)

    monkeypatch.setattr(WanBackbone, "decode", decoded)


@pytest.mark.parametrize("guidance", ["none", "flowmotion"])
def test_two_processes_make_the_clips_of_one_and_the_first_one_writes(
    words: list[str], random_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: str
) -> None:
    if guidance != "none":
        write_clip(random_clip(9, 32, 32), tmp_path / "clip.mp4")
        words += ["--guidance", guidance, "--guidance.share", "1", "--reference", str(tmp_path / "clip.mp4")]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    cache = tmp_path / "cache"
    with monkeypatch.context() as patched:
        latents_into(one, patched)
        assert main([*words, "--out", str(one / "out"), "--cache", str(cache)]) == 0

    def work(rank: int) -> int:
        latents_into(two, monkeypatch)
        # What the one process left is known to the first of the two alone.
        known = str(cache if rank == 0 else tmp_path / "empty")
        return main([*words, "--context-parallel", "ulysses", "--out", str(two / "out"), "--cache", known])

    said = together(work, two)
    names = sorted(path.name for path in one.glob("latent-*"))
    assert len(names) == 2
    assert names == sorted(path.name for path in two.glob("latent-*")), "the first one decodes, the other does not"
    for name in names:
        np.testing.assert_allclose(np.load(two / name), np.load(one / name), atol=2e-5)
    assert not np.array_equal(np.load(two / names[0]), np.load(two / names[1]))
    assert sorted(path.name for path in (two / "out").iterdir()) == sorted(
        path.name for path in (one / "out").iterdir()
    )
    assert "each shared by 2 processes" in said[0]
    assert "a-red-circle-seed1.mp4" in said[0]
    assert said[1] == ""
    about = json.loads((two / "out/a-red-circle-seed1.json").read_text())
    assert (about["processes"], about["settings"]["context_parallel"]) == (2, "ulysses")


def test_a_process_that_is_killed_ends_the_other_with_a_sentence(words: list[str], tmp_path: Path) -> None:
    def work(rank: int) -> int:
        real, begun = room.walked, iter(range(99))

        def walked(*args: Any) -> Any:
            if (rank, next(begun)) == (1, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        room.walked = walked
        out = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
        return main([*words, "--context-parallel", "ulysses", *out])

    said = together(work, tmp_path, codes=(1, -9))[0]
    assert "motionlora: Process 0 of 2 had to end: " in said
    assert f"clips that were finished are in {tmp_path / 'out'}" in said
    assert "Traceback" not in said
    assert [path.name for path in (tmp_path / "out").glob("*.mp4")] == ["a-red-circle-seed0.mp4"]


@pytest.fixture
def settings(twin_folder: Path, tmp_path: Path) -> GenerateSettings:
    return GenerateSettings(
        model=str(twin_folder), caption=("a red circle",), out=tmp_path / "out", device="cpu", cache=None,
        sample=SampleSettings(steps=2), context_parallel="ulysses", **SIZE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "workers", "reason"),
    [
        ({"context_parallel": "none"}, TWO, "2 processes were launched, and each would make every clip"),
        ({}, Workers(), "there is one process: start several with `accelerate launch"),
        ({"memory": "auto"}, TWO, "plans are made for one process alone: set --memory fast"),
        ({"positions": Path("found.safetensors")}, TWO, "--positions works inside of the network"),
        ({"attention": "_native_efficient"}, TWO, "'_native_efficient' cannot be shared.*choose one of .*native"),
        ({}, Workers(0, 3), r"3 processes .* 4 heads and the clip's 48 tokens.*: launch 2, 4, or change --height"),
        (
            {"height": 24, "width": 24, "frames": 1},
            TWO,
            r"2 processes .* 4 heads and the clip's 9 tokens.*: change --h",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_loaded(
    settings: GenerateSettings, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], workers: Workers, reason: str
) -> None:
    monkeypatch.setattr(room, "loaded_model", pytest.fail)
    with pytest.raises(InputError, match=reason):
        generate(settings.model_copy(update=values), workers=workers)
    assert not settings.out.exists()


def test_guidance_that_looks_into_the_network_is_refused_and_cogvideox_too(
    settings: GenerateSettings, cogvideox_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "loaded_model", pytest.fail)
    inside = {name for name in guidance_names() if not issubclass(guidance_class(name), FROM_OUTSIDE)}
    assert inside >= {"ditflow", "fastvmt", "inject", "moft", "motionclone", "s2v2v", "smm"}
    for name in inside:
        guided = settings.model_copy(update={"guidance": guidance_class(name)()})
        with pytest.raises(InputError, match=r"--guidance .* works inside of the network.*set --context-parallel none"):
            generate(guided, workers=TWO)
    with pytest.raises(InputError, match=r"CogVideoXTransformer3DModel, whose tokens diffusers cannot share"):
        generate(settings.model_copy(update={"model": str(cogvideox_folders["5B"])}), workers=TWO)
    assert not settings.out.exists()


def test_a_backend_chosen_by_the_environment_is_looked_at_too(settings: GenerateSettings) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    with (
        attention_backend("_native_math"),
        pytest.raises(InputError, match="'_native_math' cannot be shared"),
    ):
        generate(settings, workers=TWO)


@pytest.mark.parametrize(
    ("tensors", "device", "gpu", "talk"),
    [
        (True, "auto", True, "cpu:gloo,cuda:nccl"),
        (True, "cpu", True, "gloo"),
        (True, "auto", False, "gloo"),
        (False, "auto", True, "gloo"),
    ],
)
def test_only_tensors_of_gpus_go_over_nccl(
    monkeypatch: pytest.MonkeyPatch, tensors: bool, device: str, gpu: bool, talk: str
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_choose_gpu", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: iter([(None, 1, 2)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **how: asked.update(how, backend=backend)
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with joined(device, tensors=tensors) as workers:
        assert (workers.index, workers.count) == (1, 2)
    assert asked["backend"] == talk
    assert asked["timeout"] == (timedelta(hours=1) if tensors else processes.PATIENCE)


@pytest.mark.slow
def test_accelerate_launches_it_as_the_readme_says(words: list[str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = f"accelerate launch --multi_gpu --num_processes 2 --main_process_port {port} --no_python motionlora"
    out = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [*launcher.split(), *words, "--context-parallel", "ulysses", *out]
    launched = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    assert launched.stdout.count("each shared by 2 processes") == 1
