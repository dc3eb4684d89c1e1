"""Settings of a comparison: which clips, captions, methods and seeds; and of the sprite protocol. Imports no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from motionlora.data.limits import Limits
from motionlora.data.manifest import BenchmarkName
from motionlora.data.settings import Settings
from motionlora.infer.method import parsed_methods
from motionlora.infer.settings import SampleSettings


class StudioSettings(Settings):
    """How the clips of a table are made and measured, whatever they are of."""

    model: str = "tiny"
    """`tiny` (embedded), a diffusers folder or a hub id: Wan (2.1, 2.2 TI2V-5B, 2.2 T2V-A14B) or CogVideoX (2B, 5B)."""
    negative: str = ""
    """What the clips shall not show."""
    sample: SampleSettings = SampleSettings()
    """The walk from noise to a clip."""
    out: Path = Path("runs/compare")
    """Folder for table, page and clips; what is there and still right is used again."""
    points: int = Field(default=55, ge=0, le=200)
    """Points a side that are tracked for motion fidelity (papers: 55); 0 leaves it out."""
    exact: bool = False
    """Keep every pixel of the clips (lossless, some 10 times larger, not for browsers); else H.264 is measured."""
    encoders: str = ""
    """Weights of text and quality measures: a folder of them, or hub; none leaves these measures out, which is told."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; else a torch device name."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the model: `auto` is bf16 on a GPU and fp32 on a CPU. LoRA layers are always fp32."""
    attention: str = "native"
    """Attention backend of diffusers' dispatcher."""
    memory: Literal["fast", "low", "4bit", "lowest"] = "fast"
    """What is given for memory, as in generate: `fast` nothing, `low` time, `4bit` digits, `lowest` both."""
    cache: Path | None = Path("runs/cache")
    """Latents and prompts are kept here, found by content; none computes them anew."""
    private: bool = False
    """Leave the command and a model's own folder out of tables and page; the folder `cells` is not for sharing."""
    dry_run: bool = False
    """Only say what would be made and how many forwards that takes."""
    limits: Limits = Field(default=Limits(), exclude=True)
    """How large an input may be."""


class GridSettings(StudioSettings):
    """What is common to every comparison of methods, whatever its clips."""

    methods: tuple[str, ...] = ()
    """`lora` (each clip's own), a name of `motionlora guidance list`, or both as in lora+flowmotion; settings behind a
    colon, lora:0.5, flowmotion:lr=0.01,share=0.4. `none` (no transfer) is always made. None given: every guidance."""
    loras: Path | None = None
    """Folder with a LoRA for each clip, NAME.safetensors or NAME/temporal.safetensors, where the captions name none."""
    controls: bool = True
    """Also make the controls: a standing clip, each method with another clip's motion, the reference as an output."""
    selective: bool = False
    """Also measure selectivity: each guidance is given the clip backwards too, and beside it stand two random moves of
    the same size in each step, which tell the chance level. Three more clips for each."""

    @field_validator("methods")
    @classmethod
    def _methods_exist(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        parsed_methods(methods, controls=False)
        return methods


class CompareSettings(GridSettings):
    """Every method on every clip with every caption and seed, then tables and a page."""

    clips: Path | None = None
    """Folder with the clips that give the motion: video files, or folders of numbered images."""
    captions: Path | None = None
    """Which caption goes with which clip (.txt, .yaml, .json, .jsonl); none looks for captions.* among the clips."""
    benchmark: BenchmarkName | None = None
    """A paper's benchmark that the captions file is of: classes are checked, and clips that are not there are listed
    at the head of every table, in place of a refusal. davis, motionbench, mtbench, loveu."""
    strength: float = Field(default=0.5, ge=-4, le=4)
    """Of a LoRA that is given without one and whose header recommends none (Follow-Your-Motion: 0.5)."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the starting noise, the same for every method."""
    frames: int = Field(default=81, ge=5)
    """Pixel frames of a clip, 4k + 1."""
    height: int = Field(default=480, ge=16)
    """Pixels; a multiple of 16, of 8 for the tiny."""
    width: int = Field(default=832, ge=16)
    """Pixels; a multiple of 16, of 8 for the tiny."""
    fps: float = Field(default=16.0, gt=0, le=1000)
    """Frames a second to which clips are resampled (Wan 2.1: 16)."""
    rankings: tuple[Path, ...] = ()
    """Files that people saved in the page's blind mode: they are summed up against `out`, and nothing is made."""

    @field_validator("seeds")
    @classmethod
    def _seeds_can_be_used(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**63 for seed in seeds):
            raise ValueError("it should be one or more different whole numbers, 0 or above and below 2^63")
        return seeds


class SpriteStudioSettings(StudioSettings):
    """The tiny's own walk and number of points; a test holds the walk to configs/tiny.yaml."""

    sample: SampleSettings = SampleSettings(steps=20, scale=3.0, shift=2.0)
    """The walk from noise to a clip."""
    points: int = Field(default=20, ge=0, le=200)
    """Points a side that are tracked for motion fidelity; 0 leaves it out."""
    exact: bool = True
    """Keep every pixel of the clips (lossless, not for browsers); else H.264 is measured."""


class BenchSpritesSettings(SpriteStudioSettings, GridSettings):
    """The sprite protocol: sixteen made-up clips whose motion is known exactly, by guidances and by LoRAs of them."""

    form: Literal["short", "sweep", "objects", "standard", "full"] = "standard"
    """short: 4 references, 1 seed. sweep: the 8 object motions, 1 seed; objects: the same with 2. standard: all 16, 2
    seeds. full: 3 captions each."""
    out: Path = Path("runs/bench-sprites")
    """Folder for table, page and clips; what is there and still right is used again."""


class AblationSettings(SpriteStudioSettings):
    """What each part of the main method is worth: LoRAs that differ in one thing, on the sprite protocol."""

    recipe: str = "tiny"
    """The main method: the `train` part of this configuration, NAME or FILE."""
    only: tuple[str, ...] = ()
    """Names of ablations, in the order in which they shall run; none given runs all. --dry-run names them."""
    form: Literal["sweep", "standard"] = "sweep"
    """sweep: the 8 object motions, 1 seed. standard: all 16 references, 2 seeds; for what decides a default."""
    references: int | None = Field(default=None, ge=1)
    """Only the first so many references of the form; with 1 there is no control with a wrong motion."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of the temporal stage; none takes the recipe's. Sweeps of the steps go from an eighth to twice as many."""
    out: Path = Path("runs/ablation")
    """Folder for tables, plots, pages, LoRAs and clips; what is there and still right is used again."""
