"""How much time the phases of a clip took, and how much is left of a long row of cells."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from motionlora.data.say import Say


@dataclass(frozen=True, eq=False)
class Stopwatch:
    """Wall seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - began, 3)


@dataclass
class Pace:
    """How much time is left, from the seconds that a forward took so far, measuring included.

    Attributes:
        ahead: forwards of each cell, 0 where nothing is to be walked.
        processes: that share the cells; others may have `passed` some.
    """

    ahead: list[float]
    processes: int = 1
    seconds: float = 0.0
    forwards: float = 0.0
    passed: int = 0
    idle: list[float] = field(default_factory=list)

    @contextmanager
    def telling(self, title: str, say: Say) -> Iterator[list[str]]:
        """Around the work on one cell: says what the body adds to the list, and how much time is left."""
        began, told = time.perf_counter(), []
        yield told
        say(f"{title}: {', '.join(told)}; {self.after(time.perf_counter() - began)}")

    def after(self, seconds: float) -> str:
        """The time left after one more cell, in words."""
        walked = self.ahead[self.passed]
        self.passed += 1
        if walked:
            self.seconds, self.forwards = self.seconds + seconds, self.forwards + walked
        else:
            self.idle.append(seconds)
        rest = self.ahead[self.passed :]
        each = sum(self.idle) / len(self.idle) if self.idle else 0.0
        a_forward = self.seconds / self.forwards if self.forwards else 0.0
        left = (sum(rest) * a_forward + each * sum(not cost for cost in rest)) / self.processes
        return "the last" if not rest else f"about {spoken(left)} left"


def spoken(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
