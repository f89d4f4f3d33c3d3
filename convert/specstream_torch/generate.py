"""Reference logits in float32: the oracle that the MLX runtime is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .checkpoint import load_base, load_checkpoint
from .modeling import forward_hidden, lm_head, prune_hidden, stream_module


class ReferenceLogits(NamedTuple):
    """Float32 logits of one sequence; row ``t`` of ``main`` and of ``pruner`` predicts token ``t + 1``."""

    main: npt.NDArray[np.float32]  # (L, V)
    streams: npt.NDArray[np.float32]  # (gamma, V); row j - 1 predicts token anchor + 1 + j
    pruner: npt.NDArray[np.float32] | None  # (L, V): z = LMHead(final_norm(o(M^{N-N_s}))); None without a pruner


def load_reference(base: str | Path, adapter: str | Path, *, attention: str = "sdpa") -> Any:
    """Load a base directory and a checkpoint of form A or B on the CPU in float32, for evaluation."""
    return load_checkpoint(load_base(base, attention=attention), adapter).eval()


def reference_logits(model: nn.Module, input_ids: Sequence[int], anchor: int | None = None) -> ReferenceLogits:
    """Run one sequence with the streams of one anchor, by default the last token."""
    tokens = torch.tensor([list(input_ids)])
    position = tokens.shape[1] - 1 if anchor is None else anchor
    if not 0 <= position < tokens.shape[1]:
        raise ValueError(f"anchor is {position}, expected 0..{tokens.shape[1] - 1}")
    with torch.no_grad():
        hidden = forward_hidden(model, tokens, torch.tensor([[position]]))
        pruner = None
        if stream_module(model).config.prune_rank is not None:
            pruner = lm_head(model, prune_hidden(model, hidden.trunk))[0].float().numpy()
        return ReferenceLogits(
            lm_head(model, hidden.main)[0].float().numpy(), lm_head(model, hidden.streams)[0, 0].float().numpy(), pruner
        )
