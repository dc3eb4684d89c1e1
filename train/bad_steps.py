"""Steps whose loss or gradient is NaN or infinite: skipped and counted, and after a few in a row the end of the run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from motionlora.data.errors import NumbersError
from motionlora.train.checkpoint import checkpoints

if TYPE_CHECKING:
    from accelerate import Accelerator

LIMIT = 3
"""Bad steps in a row that end a run: one is a matter of chance, of three the fourth will not be better."""


@dataclass
class BadSteps:
    """What went wrong in one stage so far.

    Attributes:
        lr: of the stage, which is the likeliest cause.
        checkpoints: where the last good weights are.
        say: called once for every skipped step.
    """

    stage: str
    lr: float
    checkpoints: Path
    say: Callable[[str], None]
    in_a_row: int = 0
    total: int = 0

    def good(self, step: int, loss: Tensor, norm: Any, accelerator: "Accelerator") -> bool:
        """Whether loss and gradient norm of step `step`, from 0, are finite on every process; a bad one is counted.

        Raises:
            NumbersError: the last `LIMIT` steps were all bad, or the optimiser has taken this one already (DeepSpeed).
        """
        value, size = float(loss.detach()), float(norm)
        bad = not (math.isfinite(value) and math.isfinite(size))
        if accelerator.num_processes > 1:
            flags: Any = accelerator.gather(torch.tensor([int(bad)], device=accelerator.device))
            bad = bool(flags.max())
        if not bad:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        what = f"a loss of {value:.3g} and a gradient norm of {size:.3g} at step {step + 1}"
        taken = accelerator.state.deepspeed_plugin is not None
        if self.in_a_row >= LIMIT or taken:
            raise NumbersError(self._end(what, taken=taken))
        self.say(f"The {self.stage} stage gave {what}, which was skipped: the weights are those of the step before.")
        return False

    def tell(self, steps: int) -> None:
        """Say at the end how many steps were skipped, if any."""
        if self.total:
            self.say(f"{self.total} of {steps} steps of the {self.stage} stage were skipped: their numbers were bad.")

    def _end(self, what: str, *, taken: bool) -> str:
        found = checkpoints(self.checkpoints, self.stage)
        last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        came = "which DeepSpeed has taken" if taken else f"bad step {self.in_a_row} in a row, none of them taken"
        return (
            f"The {self.stage} stage gave {what}, {came}; {last}. Likely causes: a learning rate that is too high "
            f"({self.stage}.lr is {self.lr:g}), a damaged clip or cache (try --cache None), or --mixed-precision. "
            "Change that and train with another --out, or go on with --resume latest."
        )
