"""The times of a walk, read from the scheduler that the stock pipeline would walk with.

Wan is trained on straight paths from clip to noise. CogVideoX is trained on variance-preserving ones, x = a x0 + b eps
with a^2 + b^2 = 1: the same points but for a factor, z = x / (a + b) = (1 - s) x0 + s eps at our time s = b / (a + b).
"""

import math
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
PRESERVING = {
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
}
"""The same for CogVideoX: walks begin in pure noise (a = 0), which the network knows, and end in the clip."""


def euler_times(scheduler_config: Mapping[str, Any], steps: int, shift: float) -> "Float[Tensor, ' steps+1']":
    """Noise levels from 1 down to 0 for plain Euler, fp32 on the CPU: `FlowMatchEulerDiscreteScheduler.sigmas`.

    Of a variance-preserving scheduler (CogVideoX): the levels of its time steps. An Euler step between two of them is
    the DDIM step (arXiv 2010.02502, eq. 12 without noise), whose point is (1 - s) x0 + s eps but for a factor.

    Not a formula of our own, because that scheduler shifts its smallest level twice (methods.md section 1.2) and a walk
    has to be the stock pipeline's bit for bit.

    Args:
        scheduler_config: of any flow-matching scheduler of diffusers, or of CogVideoX; keys that the scheduler does not
            know are left out.
        steps: 1 or more.
        shift: k in s = k u / (1 + (k - 1) u), above 0; takes the place of the configured one. That of CogVideoX is the
            square root of its `snr_shift_scale`, which divides a^2 / b^2.

    Raises:
        InputError: a scheduler whose levels do not fall from 1 to 0, or that feeds the network other than 1000 times
            the level.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if preserves_variance(scheduler_config):
        return _ddim_times(scheduler_config, steps, shift)
    known = {
        key: value for key, value in scheduler_config.items() if key in _settings_of(FlowMatchEulerDiscreteScheduler)
    }
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
    """The time shift that a model's folder names: `shift` (Euler) or `flow_shift` (UniPC); 3 where it names none.

    Of CogVideoX: the square root of its `snr_shift_scale`.
    """
    if preserves_variance(scheduler_config):
        return math.sqrt(scheduler_config.get("snr_shift_scale", 3.0))
    return float(scheduler_config.get("shift") or scheduler_config.get("flow_shift") or 3.0)


def preserves_variance(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether the model was trained on variance-preserving paths (CogVideoX), not on straight ones."""
    return str(scheduler_config.get("_class_name")).startswith("CogVideoX")


def trained_times(scheduler_config: Mapping[str, Any], shift: float | None = None) -> "Float[Tensor, ' 1000']":
    """The noise level of each time step that a variance-preserving model knows, rising to 1, fp32 on the CPU.

    Args:
        shift: as in `euler_times`; None leaves the configured one.

    Raises:
        InputError: the path does not end in pure noise, or the network does not predict a eps - b x0 (`v_prediction`).
    """
    cumulative = _ddim(scheduler_config, shift).alphas_cumprod.double()
    clean, noise = cumulative.sqrt(), (1 - cumulative).sqrt()
    return (noise / (clean + noise)).float()


def trained_weight(scheduler_config: Mapping[str, Any], time: "Float[Tensor, ' b']") -> "Float[Tensor, ' b']":
    """What squared errors of our velocity are multiplied by in the loss that the model was trained with.

    1 on straight paths. On variance-preserving ones the network predicts v = a eps - b x0, and an error of v is one of
    eps - x0 divided by a + b: (1 - s)^2 + s^2. diffusers' training of CogVideoX weights the error of x0 by 1 / b^2,
    which is the same: the error of v.
    """
    return (1 - time) ** 2 + time**2 if preserves_variance(scheduler_config) else time.new_ones(time.shape)


def _ddim_times(scheduler_config: Mapping[str, Any], steps: int, shift: float) -> "Float[Tensor, ' steps+1']":
    from torch import cat, zeros

    known = len(times := trained_times(scheduler_config, shift))
    if steps > known:
        raise InputError(
            f"{steps} steps were asked for and the model knows {known} noise levels: take {known} or less."
        )
    scheduler = _ddim(scheduler_config, shift)
    scheduler.set_timesteps(steps)
    return cat([times[scheduler.timesteps], zeros(1)])


def _ddim(scheduler_config: Mapping[str, Any], shift: float | None) -> Any:
    from diffusers import CogVideoXDDIMScheduler

    odd = [key for key, plain in PRESERVING.items() if scheduler_config.get(key) != plain]
    if odd:
        raise InputError(
            f"The model's scheduler has {odd[0]} = {scheduler_config.get(odd[0])}, and only {PRESERVING[odd[0]]} is "
            "supported: choose CogVideoX 2B or 5B."
        )
    own = own_shift(scheduler_config)
    scale = own**2 if shift is None or math.isclose(shift, own, rel_tol=1e-3) else shift**2
    known = {key: value for key, value in scheduler_config.items() if key in _settings_of(CogVideoXDDIMScheduler)}
    return CogVideoXDDIMScheduler.from_config({**known, "snr_shift_scale": scale})


def _settings_of(scheduler: Any) -> set[str]:
    import inspect

    return set(inspect.signature(scheduler.__init__).parameters) - {"self"}
