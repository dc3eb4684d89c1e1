"""The subcommands that compare: the few lines that call the rooms for the work, imported when they run."""

from motionlora.infer.compare_settings import AblationSettings, BenchSpritesSettings, CompareSettings


def compare(settings: CompareSettings) -> None:
    """Compares methods, or sums up what people ranked."""
    if settings.rankings:
        from motionlora.infer.rankings import sum_up

        sum_up(settings.rankings, settings.out)
        return
    from motionlora.infer.compare import compare

    compare(settings)


def bench_sprites(settings: BenchSpritesSettings) -> None:
    """Runs a form of the sprite protocol."""
    from motionlora.infer.bench_sprites import bench_sprites

    bench_sprites(settings)


def ablation(settings: AblationSettings) -> None:
    """Runs the ablations of the main method."""
    from motionlora.train.ablate import ablate

    ablate(settings)
