"""Training: a loop in plain PyTorch, committed checkpoints, and the same loop on Ray."""
