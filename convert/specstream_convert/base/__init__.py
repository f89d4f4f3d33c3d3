"""The base model: its configuration as mlx-lm reads it, its tensors, its names."""
