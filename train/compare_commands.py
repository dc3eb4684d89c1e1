"""The subcommands that compare: the few lines that call the rooms for the work, imported when they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from motionlora.infer.compare_settings import AblationSettings, BenchSpritesSettings, CompareSettings, StudioSettings

if TYPE_CHECKING:
    from motionlora.infer.workers import Workers


def compare(settings: CompareSettings) -> None:
    """Compares methods, or sums up what people ranked."""
    if settings.rankings:
        from motionlora.infer.rankings import sum_up

        sum_up(settings.rankings, settings.out)
        return
    from motionlora.infer.compare import compare

    with launched(settings.device, _farewell(settings)) as workers:
        compare(settings, workers=workers)


def bench_sprites(settings: BenchSpritesSettings) -> None:
    """Runs a form of the sprite protocol."""
    from motionlora.infer.bench_sprites import bench_sprites

    with launched(settings.device, _farewell(settings)) as workers:
        bench_sprites(settings, workers=workers)


def ablation(settings: AblationSettings) -> None:
    """Runs the ablations of the main method."""
    from motionlora.train.ablate import ablate
    from motionlora.train.launch import alone, refuse_deepspeed

    refuse_deepspeed("an ablation makes a LoRA a process")
    with launched(settings.device, _farewell(settings)) as workers, alone():
        ablate(settings, workers=workers)


@contextmanager
def launched(device: str, farewell: str, *, tensors: bool = False) -> Iterator["Workers"]:
    """The processes of this launch (`joined`); where one is lost, the others end with a sentence, `farewell` last."""
    from motionlora.infer.workers import joined
    from motionlora.train.launch import ending_together

    with joined(device, tensors=tensors) as workers, ending_together(workers.index, workers.count, lambda: farewell):
        yield workers


def _farewell(settings: StudioSettings) -> str:
    return f"what is done is kept in {settings.out}, and the same command goes on from there."
