"""One forward by several processes, each with a part of the clip's tokens: Ulysses attention, by diffusers' hooks.

Everything but self-attention looks at a token alone. For self-attention each process trades its part of all heads for
all tokens of its part of the heads, and back (DeepSpeed-Ulysses, arXiv 2309.14509, section 3.2): the numbers are those
of one process. Ring attention needs the row normalisers, which diffusers' native attention does not give. Run by two
processes on a CPU over gloo; not on GPUs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import TYPE_CHECKING, Any

from motionlora.data.errors import InputError
from motionlora.heads.capture import unwrapped

if TYPE_CHECKING:
    from motionlora.heads.wan import WanBackbone


@contextmanager
def sharing(model: WanBackbone, processes: int) -> Iterator[None]:
    """Inside, all processes of the default group make every forward of `model` together, and each gets all of it.

    They must ask for the same forwards in the same order, and have the same weights. What is read inside of the network
    is of a process's own tokens alone, so nothing may be captured. One process is left alone; no gradients.
    """
    if processes == 1:
        yield
        return
    import torch.distributed as dist
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks import apply_context_parallel
    from diffusers.hooks.context_parallel import remove_context_parallel
    from torch.distributed.device_mesh import init_device_mesh

    network: Any = unwrapped(model.transformer)
    split = ContextParallelConfig(ulysses_degree=processes)
    mesh = init_device_mesh(model.device.type, split.mesh_shape, mesh_dim_names=split.mesh_dim_names)
    # `enable_parallelism` would do what follows, but divides by the number of GPUs, on a CPU by 0.
    parallel = ParallelConfig(context_parallel_config=split)
    parallel.setup(dist.get_rank(), processes, model.device, mesh=mesh)
    # Of what the network is called with ("") only a time for every token is split; one for all is not.
    plan = {name: how for name, how in network._cp_plan.items() if name or model.parts.token_times}
    processors = list(network.attn_processors.values())
    for processor in processors:
        processor._parallel_config = parallel
    apply_context_parallel(network, split, plan)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*all_gather_tensor.* is deprecated", FutureWarning)  # diffusers' call
            yield
    finally:
        remove_context_parallel(network, plan)
        for processor in processors:
            processor._parallel_config = None


def refuse_unshareable(model: WanBackbone, tokens: int, backend: str, processes: int) -> None:
    """Refuses what `sharing` could not do; `model` may be without weights, `tokens` are those of a clip.

    Raises:
        InputError: diffusers has no plan for the network, the attention backend cannot be split, or the number of
            processes does not divide the heads and the tokens.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    if getattr(unwrapped(model.transformer), "_cp_plan", None) is None:
        raise InputError(
            f"{model.name} is a {type(unwrapped(model.transformer)).__name__}, whose tokens diffusers cannot share "
            "among processes: set --context-parallel none, in one process, or take a Wan."
        )
    used = AttentionBackendName(Registry.get_active_backend()[0]).value if backend == "native" else backend
    if used not in Registry._supports_context_parallel:
        able = ", ".join(sorted(Registry._supports_context_parallel))
        raise InputError(f"Attention backend {used!r} cannot be shared among processes: choose one of {able}.")
    both = gcd(model.heads, tokens)
    if both % processes:
        able = ", ".join(str(count) for count in range(2, both + 1) if both % count == 0)
        raise InputError(
            f"{processes} processes were launched to share {model.heads} heads and the clip's {tokens} tokens, which "
            f"must both be multiples of their number: {f'launch {able}, or ' if able else ''}change --height or "
            "--width."
        )
