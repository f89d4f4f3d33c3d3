"""Parity with the PyTorch twin: a tiny PEFT fine-tune, converted, gives the twin's main and stream logits.

The twin merges nothing: its logits come from the base with live LoRA on Hugging Face modules. float32; the tolerance
of 1e-4 (on logits of size 1 to 10) allows for the order of summation and for LoRA merged against LoRA applied.
"""

from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from specstream_convert import ConvertOptions, convert
from specstream_mlx import load
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.options import Insertion
from specstream_mlx.target.tree import DraftTree
from tests.passes import early_exit_logits, stream_logits, trunk_of, verify
from tests.tiny import FAMILIES

pytest.importorskip("torch", reason="the parity tests need the torch extra")

from specstream_torch.generate import load_reference, reference_logits
from specstream_torch.testing import make_tiny_checkpoint
from tests.tolerances import LOGITS

pytestmark = pytest.mark.parity

CASES = {
    "identity": {},
    "low-rank-anchor-pruner": {"stream_init": "low_rank", "stream_position": "anchor", "prune": True},
    "residual-tied-form-b": {"stream_init": "low_rank_residual", "tie_word_embeddings": True, "form": "B"},
    "value-rotation": {"stream_id": "value_rotation", "num_stream_layers": 3, "use_rslora": True},
    "lossless": {"mode": "lossless", "num_stream_layers": 2},
}


def our_logits(
    model: SpecStreamModel, tokens: list[int], anchor: int, insertion: Insertion
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Logits at ``anchor`` (main), of the streams attached to it, and of the early exit there."""
    caches = model.make_cache()
    if anchor:
        model(mx.array([tokens[:anchor]]), cache=caches)
    root = mx.array(tokens[anchor : anchor + 1])
    verified = verify(model, root, DraftTree.chain(0), caches, insertion=insertion)
    model.commit(verified, [0], caches)
    pruner = np.array(early_exit_logits(model, trunk_of(model, verified))[0]) if model.stream_config.prune else None
    return np.array(verified.logits[0]), np.array(stream_logits(model, verified, 0, caches)), pruner


# All cases where the families' code and PEFT's modules differ most; elsewhere two of them, in turn.
GRID = [
    (family, case)
    for i, family in enumerate(FAMILIES)
    for j, case in enumerate(CASES)
    if family in ("llama", "opt", "gpt2") or (j - 2 * i) % len(CASES) < 2
]


@pytest.mark.parametrize(("family", "case"), GRID)
def test_converted_checkpoints_give_the_twins_logits(family: str, case: str, tmp_path: Path) -> None:
    """Red when: a scale, a transposition, a rotary base, a stream position or the stream mask differs."""
    base, adapter = make_tiny_checkpoint(family, tmp_path, seed=3, **CASES[case])
    twin = load_reference(base, adapter)
    out = tmp_path / "out"
    convert(ConvertOptions(adapter_path=adapter, mlx_path=out, hf_path=str(base)))
    model, _ = load(out)
    tokens = [int(token) for token in np.random.default_rng(5).integers(3, 97, 23)]
    for anchor in (0, 11, 22):
        reference = reference_logits(twin, tokens, anchor)
        for insertion in get_args(Insertion):
            main, streams, pruner = our_logits(model, tokens, anchor, insertion)
            assert np.abs(main - reference.main[anchor]).max() <= LOGITS
            assert np.abs(streams - reference.streams).max() <= LOGITS
            if reference.pruner is not None:
                assert np.abs(pruner - reference.pruner[anchor]).max() <= LOGITS
        assert np.abs(reference.streams).max() > 0.5, "logits too small to prove anything"
