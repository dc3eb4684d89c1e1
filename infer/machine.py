"""On what a figure was measured, in one line."""

import os
import platform
from datetime import date


def machine() -> str:
    """Processor, cores or GPU, torch and the date; no name and no path of this machine."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"
    return f"{platform.machine()}, {gpu}, torch {torch.__version__}, {date.today()}"
