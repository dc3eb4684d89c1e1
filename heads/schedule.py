"""The times of a walk, read from the scheduler that the stock pipeline would walk with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from motionlora.data.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


PLAIN = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
"""What a scheduler must be for its levels to fall from 1 to 0 and for the network to be fed 1000 times the level."""


def euler_times(scheduler_config: Mapping[str, Any], steps: int, shift: float) -> "Float[Tensor, ' steps+1']":
    """Noise levels from 1 down to 0 for plain Euler, fp32 on the CPU: `FlowMatchEulerDiscreteScheduler.sigmas`.

    Not a formula of our own, because that scheduler shifts its smallest level twice (methods.md section 1.2) and a walk
    has to be the stock pipeline's bit for bit.

    Args:
        scheduler_config: of any flow-matching scheduler of diffusers; keys that Euler does not know are left out.
        steps: 1 or more.
        shift: k in s = k u / (1 + (k - 1) u), above 0; takes the place of the configured one.

    Raises:
        InputError: a scheduler whose levels do not fall from 1 to 0, or that feeds the network other than 1000 times
            the level.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    known = {key: value for key, value in scheduler_config.items() if key in _euler_settings()}
    odd = [key for key, plain in PLAIN.items() if known.get(key, plain) != plain]
    if odd:
        raise InputError(
            f"The model's scheduler has {odd[0]} = {known[odd[0]]}, and only {PLAIN[odd[0]]} is supported: choose a "
            "Wan 2.1 model."
        )
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(known, shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def own_shift(scheduler_config: Mapping[str, Any]) -> float:
    """The time shift that a model's folder names: `shift` (Euler) or `flow_shift` (UniPC); 3 where it names none."""
    return float(scheduler_config.get("shift") or scheduler_config.get("flow_shift") or 3.0)


def _euler_settings() -> set[str]:
    import inspect

    from diffusers import FlowMatchEulerDiscreteScheduler

    return set(inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters) - {"self"}
