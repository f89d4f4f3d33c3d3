"""LoRA that acts on stream rows alone, so that the main stream is the base's (lossless mode)."""

import mlx.core as mx
import mlx.nn as nn

from specstream_mlx.target.rotary import PassContext


class StreamLoRALinear(nn.Module):
    """A linear layer whose LoRA acts on stream rows only, so that the main stream is the base's (lossless mode)."""

    def __init__(
        self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, context: PassContext
    ) -> None:
        """``lora_a``: (in, r); ``lora_b``: (r, out)."""
        super().__init__()
        self.linear = linear
        self.lora_a = lora_a
        self.lora_b = lora_b
        self._scale = scale
        self._context = context

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, in) -> (B, L, out); main rows pass through the wrapped layer alone."""
        y = self.linear(x)
        num_main = self._context.num_main_rows
        if num_main is None:
            return y
        delta = (self._scale * ((x[:, num_main:] @ self.lora_a) @ self.lora_b)).astype(y.dtype)
        if num_main == 0:
            return y + delta
        return mx.concatenate([y[:, :num_main], y[:, num_main:] + delta], axis=1)
