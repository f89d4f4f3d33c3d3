"""What a fine-tune directory holds: PEFT's configuration and tensors, and the streams."""
