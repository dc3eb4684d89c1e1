"""A pre-training run that can be stopped at any step: schedule, log, moving average of weights, and state on disk."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm


class Progress:
    """Iterates over the steps that are left; `update` takes the loss, does the optimiser step, logs and saves.

    A linear warm-up, the full rate for the share `hold` of all steps, then cosine decay to zero. Under torchrun all
    processes take the step of their mean gradient. The state (weights, moments, step) is one safetensors file, written
    to a temporary name and renamed, so a killed run resumes where it last saved.
    """

    def __init__(
        self,
        folder: Path,
        modules: Mapping[str, nn.Module],
        *optimizers_and_plan,
        warmup: int,
        hold: float = 0.0,
        save_every: int = 200,
    ):
        *optimizers, self.steps, self.lr = optimizers_and_plan
        self.folder, self.modules, self.optimizers = folder, modules, optimizers
        self.warmup, self.hold, self.save_every = warmup, hold, save_every
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.state = folder / "state.safetensors"
        if self.state.exists():
            self._load()

    def __iter__(self) -> Iterator[int]:
        silent = process() > 0
        self.bar = tqdm(total=self.steps, initial=self.step, desc=self.folder.name, mininterval=5, disable=silent)
        self.log = (Path(os.devnull) if silent else self.folder / "log.jsonl").open("a")
        self.started = time.perf_counter()
        while self.step < self.steps:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group.get("initial_lr", self.lr) * self.shape()
                optimizer.zero_grad(set_to_none=True)
            yield self.step
            self.step += 1
            if self.step % self.save_every == 0 or self.step == self.steps:
                self._save()
        self.bar.close()
        self.log.close()

    def shape(self) -> float:
        """The schedule's factor in 0..1 at the present step."""
        warm = min(1.0, (self.step + 1) / self.warmup)
        falling = max(0.0, self.step / self.steps - self.hold) / (1 - self.hold)
        return warm * 0.5 * (1 + math.cos(math.pi * falling))

    def update(self, loss: Tensor, figures: dict[str, float], *, clip: float = 1.0) -> None:
        """Backward, clip, optimiser step; one line in the log."""
        loss.backward()
        parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        _average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"the gradient is not finite at step {self.step} of {self.folder.name}")
        for optimizer in self.optimizers:
            optimizer.step()
        row = {"step": self.step, "loss": loss.item(), "norm": float(norm), **figures}
        row["seconds"] = round(time.perf_counter() - self.started, 2)
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        self.bar.update()
        self.bar.set_postfix({key: f"{value:.3g}" for key, value in row.items() if key not in ("step", "seconds")})

    def _save(self) -> None:
        if process() > 0:
            return
        tensors = {f"{n}.{k}": v.contiguous() for n, m in self.modules.items() for k, v in m.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, entry in optimizer.state_dict()["state"].items():
                for key, value in entry.items():
                    tensors[f"optimizer{number}.{index}.{key}"] = torch.as_tensor(value).contiguous()
        temporary = self.state.with_suffix(".part")
        save_file({key: value.clone() for key, value in tensors.items()}, temporary, {"step": str(self.step)})
        os.replace(temporary, self.state)

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.state, "pt") as file:
            self.step = int(file.metadata()["step"])
        tensors = load_file(self.state)
        for name, module in self.modules.items():
            module.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            )
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer{number}."):
                    _, index, field = key.split(".")
                    state.setdefault(int(index), {})[field] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def process() -> int:
    """The number of this process among those that train together: 0 writes, and is the only one without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean over processes, where there are several: each then takes the same step."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
