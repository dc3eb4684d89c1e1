"""From clip to motion LoRA: the two stages, the loop they share, and the `motionlora` command."""
