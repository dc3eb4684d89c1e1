"""The model seen as a grid of attention heads: backbones, scores, LoRA on heads, LoRA files."""
