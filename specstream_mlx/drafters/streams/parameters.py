"""The streams' own parameters: initialisation, identity and early-exit pruner."""

import mlx.core as mx
import mlx.nn as nn

from specstream_mlx.formats.config import StreamConfig


class LowRank(nn.Module):
    """``up(down(x))``, plus ``x`` when residual; the paper's ``f_eta`` and ``o``."""

    def __init__(self, hidden_size: int, rank: int, residual: bool) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)
        self._residual = residual

    def __call__(self, x: mx.array) -> mx.array:
        """(..., D) -> (..., D), in the dtype of ``x`` also where the weights are trained in float32."""
        mapped = self.up(self.down(x))
        return (x + mapped if self._residual else mapped).astype(x.dtype)


class Streams(nn.Module):
    """The tensors of ``specstream.safetensors``; attribute names equal checkpoint keys."""

    def __init__(self, config: StreamConfig, hidden_size: int) -> None:
        super().__init__()
        self._gamma = config.gamma
        if config.stream_id.type == "embedding":
            self.stream_embeddings = mx.zeros((config.gamma, hidden_size))
        if config.stream_init.type == "low_rank":
            assert config.stream_init.rank is not None
            self.stream_init = LowRank(hidden_size, config.stream_init.rank, config.stream_init.residual)
        if config.prune is not None:
            self.prune = LowRank(hidden_size, config.prune.rank, config.prune.residual)

    def __call__(self, trunk: mx.array, num_streams: int | None = None) -> mx.array:
        """``S_{t,j}^{N-N_s} = f_eta(M_t^{N-N_s}) + P_j`` (method section 2).

        Args:
            trunk: (B, L, D), main rows after layer ``N - N_s``.
            num_streams: streams 1..num_streams of every row; None: all.

        Returns:
            (B, L * num_streams, D), the streams of one row after another, in the dtype of ``trunk``.
        """
        batch, length, size = trunk.shape
        count = self._gamma if num_streams is None else num_streams
        start = self.stream_init(trunk) if "stream_init" in self else trunk
        rows = mx.broadcast_to(start[:, :, None, :], (batch, length, count, size))
        if "stream_embeddings" in self:
            rows = rows + self.stream_embeddings[:count]
        return rows.reshape(batch, length * count, size).astype(trunk.dtype)
