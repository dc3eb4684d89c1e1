"""On what a figure was measured or a clip made."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version


def machine() -> str:
    """Processor, cores or GPU, torch and the date; no name and no path of this machine."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"
    return f"{platform.machine()}, {gpu}, torch {torch.__version__}, {date.today()}"


def versions() -> dict[str, str]:
    """Of the packages that a clip's pixels depend on."""
    found = {}
    for package in ("motionlora", "torch", "diffusers", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
