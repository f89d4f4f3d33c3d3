"""Convert a PyTorch Speculative Streaming fine-tune into an MLX model directory."""
