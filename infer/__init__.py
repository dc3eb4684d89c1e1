"""From noise to clip: the walk, guidance, and measures."""
