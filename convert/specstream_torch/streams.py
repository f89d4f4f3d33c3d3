"""The stream tensors and how a stream starts: ``S_{t,j}^{N-N_s} = f_eta(M_t^{N-N_s}) + P_j``.

`SpecStream` holds exactly the tensors of the checkpoint contract, under the names they have there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FORMAT = "specstream"
FORMAT_VERSION = 1
MODES = ("shared", "lossless")
STREAM_IDS = ("embedding", "value_rotation")
STREAM_INITS = ("identity", "low_rank")
STREAM_POSITIONS = ("anchor_plus_j", "anchor")


@dataclass(frozen=True)
class StreamConfig:
    """What the trainer and the runtime must agree on; `to_json` writes it as ``specstream_config.json``.

    ``init_rank`` is eta and ``prune_rank`` is rho (``None``: no pruner). ``epsilon`` is the angle of the value
    rotation per stream, used with ``stream_id="value_rotation"`` only.
    """

    gamma: int = 4
    num_stream_layers: int = 2
    mode: str = "shared"
    stream_id: str = "embedding"
    epsilon: float = 0.1
    stream_init: str = "identity"
    init_rank: int | None = None
    init_residual: bool = True
    stream_position: str = "anchor_plus_j"
    prune_rank: int | None = None
    prune_residual: bool = True
    prune_final_norm: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}, expected one of {', '.join(legal)}"
            for name, value, legal in (
                ("mode", self.mode, MODES),
                ("stream_id", self.stream_id, STREAM_IDS),
                ("stream_init", self.stream_init, STREAM_INITS),
                ("stream_position", self.stream_position, STREAM_POSITIONS),
            )
            if value not in legal
        ]
        if not 1 <= self.gamma <= 32:
            problems.append(f"gamma is {self.gamma}, expected 1..32")
        if self.num_stream_layers < 1:
            problems.append(f"num_stream_layers is {self.num_stream_layers}, expected at least 1")
        if (self.stream_init == "low_rank") != (self.init_rank is not None):
            problems.append(f"init_rank is {self.init_rank} with stream_init {self.stream_init!r}")
        for name, rank in (("init_rank", self.init_rank), ("prune_rank", self.prune_rank)):
            if rank is not None and rank < 1:
                problems.append(f"{name} is {rank}, expected at least 1")
        if problems:
            raise ValueError("\n".join(problems))

    def to_json(
        self,
        model_config: Any,
        *,
        fingerprint: tuple[str, torch.Tensor] | None = None,
        training: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return ``specstream_config.json`` for a base with this Hugging Face config.

        ``fingerprint`` is the tensor of the base that is hashed, under its name in MLX.
        """
        num_layers = model_config.num_hidden_layers
        prune = None
        if self.prune_rank is not None:
            prune = {
                "type": "low_rank",
                "rank": self.prune_rank,
                "layer": num_layers - self.num_stream_layers,
                "residual": self.prune_residual,
                "final_norm": self.prune_final_norm,
            }
        stream_id: dict[str, Any] = {"type": self.stream_id}
        if self.stream_id == "value_rotation":
            stream_id["epsilon"] = self.epsilon
        stream_init: dict[str, Any] = {"type": self.stream_init}
        if self.stream_init == "low_rank":
            stream_init |= {"rank": self.init_rank, "residual": self.init_residual}
        base = {"name_or_path": model_config.name_or_path}
        if getattr(model_config, "_commit_hash", None):
            base["revision"] = model_config._commit_hash
        for name in (
            "model_type",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "tie_word_embeddings",
        ):
            base[name] = getattr(model_config, name)
        heads = getattr(model_config, "num_key_value_heads", None)
        base["num_key_value_heads"] = heads or model_config.num_attention_heads
        if fingerprint is not None:
            tensor, weight = fingerprint
            base["fingerprint"] = {"tensor": tensor, "sha256": tensor_sha256(weight)}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "gamma": self.gamma,
            "num_stream_layers": self.num_stream_layers,
            "mode": self.mode,
            "lora_rows": "all" if self.mode == "shared" else "streams",
            "stream_id": stream_id,
            "stream_init": stream_init,
            "stream_position": self.stream_position,
            "main_attends_streams": False,
            "prune": prune,
            "base_model": base,
            "training": training or {},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StreamConfig:
        """Read ``specstream_config.json`` back (the inverse of `to_json`, base_model and training aside)."""
        prune = data["prune"] or {}
        default = cls()
        return cls(
            gamma=data["gamma"],
            num_stream_layers=data["num_stream_layers"],
            mode=data["mode"],
            stream_id=data["stream_id"]["type"],
            epsilon=data["stream_id"].get("epsilon", default.epsilon),
            stream_init=data["stream_init"]["type"],
            init_rank=data["stream_init"].get("rank"),
            init_residual=data["stream_init"].get("residual", default.init_residual),
            stream_position=data["stream_position"],
            prune_rank=prune.get("rank"),
            prune_residual=prune.get("residual", default.prune_residual),
            prune_final_norm=prune.get("final_norm", default.prune_final_norm),
        )


class LowRank(nn.Module):
    """``up(down(x))``, plus ``x`` when residual; (..., D) -> (..., D). Weights keep ``nn.Linear`` orientation."""

    def __init__(self, hidden_size: int, rank: int, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)
        if residual:  # starts as the identity
            nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.down(x.to(self.down.weight.dtype))).to(x.dtype)
        return x + y if self.residual else y


class SpecStream(nn.Module):
    """The tensors that Speculative Streaming adds to a base model; always float32.

    ``stream_embeddings`` (gamma, D), row ``j - 1`` is ``P_j``; ``stream_init`` is ``f_eta``; ``prune`` is ``o``.
    Attach it as ``model.specstream`` *before* ``get_peft_model`` and name it in ``modules_to_save``: PEFT saves
    modules, so the bare parameter survives only because the module around it is named.
    """

    def __init__(self, hidden_size: int, config: StreamConfig) -> None:
        super().__init__()
        self.config = config
        if config.stream_id == "embedding":
            self.stream_embeddings = nn.Parameter(torch.empty(config.gamma, hidden_size))
            nn.init.normal_(self.stream_embeddings, std=0.02)
        if config.init_rank is not None:
            self.stream_init = LowRank(hidden_size, config.init_rank, residual=config.init_residual)
        if config.prune_rank is not None:
            with torch.random.fork_rng(devices=[]):  # what is drawn after it is what it would be without it
                self.prune = LowRank(hidden_size, config.prune_rank, residual=config.prune_residual)

    def init_streams(self, main: torch.Tensor) -> torch.Tensor:
        """Start gamma streams from each anchor's ``M_t^{N-N_s}``: (B, A, D) -> (B, A, gamma, D)."""
        start = self.stream_init(main) if self.config.init_rank is not None else main
        start = start[:, :, None, :].expand(-1, -1, self.config.gamma, -1)
        if self.config.stream_id == "embedding":
            return start + self.stream_embeddings.to(start.dtype)
        return start


def rotate_values(values: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn each row's value vectors by its angle (the variant without ``P_j``).

    ``values`` (B, rows, H_kv, D_h), ``angles`` (rows,). The halves of a head are the real and imaginary parts:
    ``(v1, v2) -> (v1 cos - v2 sin, v1 sin + v2 cos)``.
    """
    cos = angles.cos()[:, None, None].to(values.dtype)
    sin = angles.sin()[:, None, None].to(values.dtype)
    v1, v2 = values.chunk(2, dim=-1)
    return torch.cat((v1 * cos - v2 * sin, v1 * sin + v2 * cos), dim=-1)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the hexadecimal sha256 of a tensor as F32 little-endian bytes."""
    data = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(data.tobytes()).hexdigest()
