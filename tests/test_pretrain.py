"""What the embedded model's recipe stands on: exact encoder, exact pads, exact resuming, orthogonal updates."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from motionlora.data.sprites import SHAPES, random_scene, render
from motionlora.heads.short_text import folding, shortened
from motionlora.heads.tiny import TINY
from motionlora.train.block_codec import Z, new_vae, normalised, raw_latent
from motionlora.train.muon import Muon, orthogonal
from motionlora.train.pretrain import (
    Recipe,
    new_transformer,
    quicken,
    train_transformer,
    write,
)
from motionlora.train.pretrain_data import draw, noise_levels, scenes
from motionlora.train.pretrain_decoder import decoded, fast_norms, start_near_linear
from motionlora.train.pretrain_text import TEXT_LENGTH, WAN_TEXT_LENGTH, Text, listening
from motionlora.train.progress import Progress


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return new_vae().eval()


def pixels_of(frames: int, *, seed: int = 3) -> np.ndarray:
    return render(random_scene(np.random.default_rng(seed), frames=frames, speed=3.0)).pixels


def signed(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_written_encoder_is_the_block_transform(vae, frames: int) -> None:
    pixels = pixels_of(frames)
    latent = vae.encode(signed(pixels)).latent_dist.mode()[0]
    assert latent.shape == (Z, 1 + (frames - 1) // 4, 16, 16)
    assert latent.std() > 0.1
    torch.testing.assert_close(latent, raw_latent(pixels), atol=1e-3, rtol=0)


def test_the_config_normalises_latents_as_training_did(vae) -> None:
    raw = raw_latent(pixels_of(5))
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(normalised(raw), (raw - mean) / std)


@torch.no_grad()
def test_the_decoder_that_trains_is_the_one_that_ships(vae) -> None:
    start_near_linear(vae.decoder)
    latent = raw_latent(pixels_of(5)[:, :32, :32])[None]
    shipped = vae.decode(latent).sample
    with fast_norms():
        trained = decoded(vae, latent).clamp(-1, 1)
    assert shipped.std() > 0.01
    torch.testing.assert_close(trained, shipped, atol=1e-4, rtol=0)


def test_fast_norms_leave_no_trace() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    stock = WanRMS_norm.forward
    with fast_norms():
        assert WanRMS_norm.forward is not stock
    assert WanRMS_norm.forward is stock
    with pytest.raises(ZeroDivisionError), fast_norms():
        _ = 1 / 0
    assert WanRMS_norm.forward is stock


@torch.no_grad()
def test_folded_pads_equal_the_stock_512_tokens() -> None:
    torch.manual_seed(1)
    transformer, text = new_transformer().eval(), Text().eval()
    for name, weight in transformer.named_parameters():  # sharp attention to large values shows a pad's wrong weight
        if name.endswith("attn2.to_k.bias"):
            weight.normal_()
        if name.endswith("attn2.to_v.weight"):
            weight.mul_(10)
    captions = [
        "",
        "a red circle on a dark background",
        "a red star and a blue star behind a grey bar on a light background",
    ]
    embeds = text(captions)
    assert embeds.shape[1] == WAN_TEXT_LENGTH
    latent, time = torch.randn(3, Z, 2, 8, 8), torch.tensor([1000.0, 500.0, 10.0])
    stock = transformer(latent, time, embeds, return_dict=False)[0]
    with folding(transformer):
        short = shortened(transformer, embeds)
        folded = transformer(latent, time, short, return_dict=False)[0]
    unfolded = transformer(latent, time, short, return_dict=False)[0]
    assert short.shape[1] < 30
    torch.testing.assert_close(folded, stock, atol=1e-5, rtol=1e-5)
    assert (unfolded - stock).abs().max() > 1e-3, "the pads matter in this test"


def test_training_scenes_are_normalised_latents_with_their_captions() -> None:
    latent, captions = scenes(3, np.random.default_rng(0), frames=5)
    assert latent.shape == (3, Z, 2, 16, 16)
    assert all(caption.endswith("background") for caption in captions)
    again, _ = scenes(3, np.random.default_rng(0), frames=5)
    assert torch.equal(latent, again)


@pytest.mark.parametrize(
    ("frames", "share", "band"), [(1, 0.65, (0.72, 0.97)), (5, 0.65, (0.78, 0.98)), (13, 0.4, (0.78, 0.98))]
)
def test_most_steps_train_where_shapes_are_decided_and_the_others_see_every_noise_level(
    frames: int, share: float, band: tuple[float, float]
) -> None:
    generator, latent = np.random.default_rng(0), torch.zeros(4, 1, frames, 1, 1)
    levels = torch.stack([noise_levels(latent, generator) for _ in range(2000)])
    deciding = ((levels >= band[0]) & (levels <= band[1])).all(dim=1)
    assert deciding.float().mean() == pytest.approx(share, abs=0.03)
    assert levels.min() >= 0
    assert levels.max() <= 1
    below_half = (levels[~deciding] < 0.5).float().mean()
    assert below_half == pytest.approx(0.25, abs=0.02), "shift 3 puts the first quarter there"
    assert (levels[deciding].diff(dim=1) > 0.04).all(), "spread over the band within a batch"


def test_scenes_hold_pairs_bars_and_stars_as_often_as_said() -> None:
    _, captions = scenes(600, np.random.default_rng(0), frames=1)
    share = {word: np.mean([f" {word}" in caption for caption in captions]) for word in ("and", "bar", *SHAPES)}
    named = 1 - (0.5 * 0.75 + 0.5 * 0.75**2)
    assert share["and"] == pytest.approx(0.5, abs=0.06)
    assert share["bar"] == pytest.approx(0.2, abs=0.05)
    assert share["star"] == pytest.approx(0.2 + 0.8 * named, abs=0.06)
    assert share["square"] == pytest.approx(0.8 * named + 0.2 * 0.5 * 0.25, abs=0.06), "one of a pair stays"


def test_single_frames_come_first_and_every_length_comes_always() -> None:
    for early, frames in ((True, [1, 1, 1, 13, 1, 5, 1, 1, 13, 1]), (False, [1, 13, 13, 1, 13, 13, 1, 13, 5, 13])):
        batches = [draw(step, np.random.default_rng(step), early=early)[0] for step in range(10)]
        assert [latent.shape[2] for latent in batches] == frames


def test_the_recipe_starts_early_and_ends_late(tmp_path: Path) -> None:
    """The real loop, a step of each kind: what it trains is what it writes, and it goes on from there."""
    recipe = Recipe(work=tmp_path, steps=10, compile=False)
    moved, _ = train_transformer(recipe)
    rows = [json.loads(line) for line in (tmp_path / "wan" / "log.jsonl").read_text().splitlines()]
    assert [row["frames"] for row in rows] == [1, 1, 1, 13, 13, 13, 1, 13, 5, 13]
    assert all(0.2 < row["loss"] < 20 for row in rows)
    start = new_transformer().state_dict()
    shares = [not torch.equal(value, start[name]) for name, value in moved.state_dict().items()]
    assert np.mean(shares) > 0.9
    kept, _ = train_transformer(recipe, finished=True)
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in moved.state_dict().items())


def test_training_goes_on_from_a_folder_and_writes_one_that_the_pipeline_loads(tmp_path: Path) -> None:
    """Written before any step, it has every weight of the folder it started from."""
    out = tmp_path / "out"
    write(Recipe(work=tmp_path / "work", out=out, base=TINY, compile=False))
    for part in ("transformer", "text_encoder", "vae"):
        (name,) = (path.name for path in (TINY / part).glob("*.safetensors"))
        made, started = load_file(out / part / name), load_file(TINY / part / name)
        assert made.keys() == started.keys()
        assert all(torch.equal(value, started[key]) for key, value in made.items()), part
    assert WanPipeline.from_pretrained(out).transformer.config.num_layers == 6


def test_an_encoder_that_listens_keeps_its_words_and_tells_whose_colour_it_is() -> None:
    text = Text()
    orders = ["a red star and a blue circle on a dark background", "a blue star and a red circle on a dark background"]
    ids, mask = text.tokens(orders)
    silent, heard = listening(text, orders, strength=0.0), listening(text, orders)
    before, kept, now = (encoder(orders)[:, :TEXT_LENGTH] for encoder in (text, silent, heard))
    assert torch.equal(heard.tokens(orders)[0], ids)
    assert not kept[mask == 0].any()
    star = int(ids[0][2])
    assert (ids[:, 2] == star).all()
    assert torch.equal(kept[0, 2], kept[1, 2]), "nothing but the word itself"
    of_mean = nn.functional.cosine_similarity(kept[0, 2], before[:, 2].mean(0), dim=0)
    assert of_mean > 0.99, "each word means what the former encoder made of it"
    size = kept[0, 2].norm()
    assert 0.2 * size < (now[0, 2] - now[1, 2]).norm() < 1.5 * size, "a star is told by the colour before it"
    assert 0.2 * size < (now[0, 2] - kept[0, 2]).norm() < size


def test_the_recipe_listens_where_it_is_told_to(tmp_path: Path) -> None:
    def last_ears(*, listen: bool) -> torch.Tensor:
        _, text = train_transformer(Recipe(work=tmp_path, base=TINY, listen=listen, compile=False), finished=True)
        encoder: Any = text.encoder.encoder
        return encoder.block[-1].layer[0].SelfAttention.o.weight

    assert last_ears(listen=False).any(), "those of the base"
    assert not last_ears(listen=True).any(), "nothing to add yet"


def test_from_a_base_on_whole_clips_come_at_once(tmp_path: Path) -> None:
    train_transformer(Recipe(work=tmp_path, base=TINY, steps=5, compile=False))
    rows = [json.loads(line) for line in (tmp_path / "wan" / "log.jsonl").read_text().splitlines()]
    assert [row["frames"] for row in rows] == [1, 13, 13, 1, 13]
    assert rows[0]["loss"] < 1, "an untrained network starts above"


def test_products_in_bf16_are_those_of_fp32_to_its_rounding_and_train_the_same_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    quick, stock = new_transformer(), new_transformer()
    stock.load_state_dict(quick.state_dict())
    names = [name for name, _ in quick.named_parameters()]
    quicken(quick, compile=False)
    latent, embeds = torch.randn(2, Z, 2, 8, 8, generator=generator), torch.randn(2, 7, 64, generator=generator)
    found = []
    for network in (quick, stock):
        out = network(latent, torch.tensor([900.0, 500.0]), embeds, return_dict=False)[0]
        out.square().mean().backward()
        weight: Any = network.blocks[0]
        found.append((out.detach(), weight.attn1.to_q.weight.grad))
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == torch.float32
        error = float((mine - theirs).norm() / theirs.norm())
        assert 1e-5 < error < 0.03, "bf16 keeps 8 bits, which is seen"
    assert [name for name, _ in quick.named_parameters()] == names


@pytest.mark.parametrize("hold", [0.0, 0.75])
def test_the_rate_warms_up_holds_and_falls_to_zero(tmp_path: Path, hold: float) -> None:
    net = network()
    progress = Progress(tmp_path, {"net": net}, *optimizers_of(net), 100, 0.02, warmup=10, hold=hold)
    factors = []
    for step in range(101):
        progress.step = step
        factors.append(progress.shape())
    assert factors[4] == pytest.approx(0.5, abs=0.01)
    held = [factor for factor in factors if factor == 1.0]
    assert len(held) == (0 if hold == 0 else 67), "from the last step of warming up to the last that is held"
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def optimizers_of(net: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.02, betas=(0.9, 0.99))]


def progress_of(folder: Path, net: nn.Module) -> Progress:
    return Progress(folder, {"net": net}, *optimizers_of(net), 12, 0.02, warmup=3, save_every=4)


def train(folder: Path, *, stop_at: int | None = None) -> Progress:
    net = network()
    progress = progress_of(folder, net)
    for step in progress:
        if step == stop_at:
            progress.bar.close()
            break
        batch = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        progress.update((net(batch) - batch[:, :3]).square().mean(), {})
    return progress


def everything_in(progress: Progress) -> dict[str, Tensor]:
    """Weights and moments by name."""
    found = dict(progress.modules["net"].state_dict())
    for number, optimizer in enumerate(progress.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            found |= {f"{number}.{index}.{key}": value for key, value in state.items()}
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stop_at", [5, 8, 11])
def test_stop_and_resume_end_bit_identical(tmp_path: Path, stop_at: int) -> None:
    straight = train(tmp_path / "straight")
    stopped = train(tmp_path / "stopped", stop_at=stop_at)
    assert not same(everything_in(stopped), everything_in(straight))
    net = network()
    assert progress_of(tmp_path / "stopped", net).step == 4 * (stop_at // 4), "goes on from where it last saved"
    resumed = train(tmp_path / "stopped")
    assert same(everything_in(resumed), everything_in(straight))
    assert len(everything_in(resumed)) == 4 + 2 * 1 + 2 * 3, (
        "four weights, Muon's one moment, AdamW's two and its count"
    )


def test_a_finished_run_has_nothing_left_and_its_log_is_complete(tmp_path: Path) -> None:
    weights = everything_in(train(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert not list(tmp_path.glob("*.part"))
    assert same(everything_in(train(tmp_path)), weights)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    net = network()
    progress = progress_of(tmp_path, net)
    for _ in progress:
        with pytest.raises(FloatingPointError, match="step 0"):
            progress.update(net(torch.full((1, 6), torch.nan)).sum(), {})
        progress.bar.close()
        break


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_makes_matrices_orthogonal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.2, 1, min(shape))) @ vh
    turned = u.T @ orthogonal(3.0 * matrix) @ vh.T
    values = turned.diagonal()
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(turned, torch.diag(values), atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonal(matrix.T), orthogonal(matrix).T, atol=1e-5, rtol=0)


def test_the_size_of_muons_update_does_not_depend_on_the_gradient() -> None:
    gradient = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    updates = []
    for size in (1.0, 1e-3):
        weight = nn.Parameter(torch.zeros(16, 48))
        weight.grad = size * gradient
        Muon([weight], lr=0.1, weight_decay=0.0).step()
        updates.append(weight.detach())
    assert updates[0].square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.25)
    assert (updates[0] * gradient).sum() < 0
    torch.testing.assert_close(*updates, rtol=1e-3, atol=1e-5)


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from safetensors.torch import save_file
from motionlora.train.progress import Progress
dist.init_process_group("gloo")
rank, module = dist.get_rank(), torch.nn.Linear(3, 1, bias=False)
torch.nn.init.zeros_(module.weight)
progress = Progress(Path(sys.argv[1]), {"m": module}, torch.optim.SGD(module.parameters(), lr=0.1), 1, 0.1, warmup=1)
for _ in progress:
    progress.update((module.weight * (rank + 1)).sum(), {}, clip=100.0)
save_file({"weight": module.weight.detach()}, f"{sys.argv[1]}/{rank}.safetensors")
"""


def test_two_processes_take_the_step_of_their_mean_gradient_and_one_of_them_writes(tmp_path: Path) -> None:
    script, folder = tmp_path / "two.py", tmp_path / "run"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, str(script), str(folder)], check=True, capture_output=True)
    for rank in (0, 1):
        weight = load_file(folder / f"{rank}.safetensors")["weight"]
        torch.testing.assert_close(weight, torch.full((1, 3), -0.1 * 1.5))
    assert len((folder / "log.jsonl").read_text().splitlines()) == 1
