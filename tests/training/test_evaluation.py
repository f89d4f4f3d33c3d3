"""What a validation says of the streams against what they do while the model generates."""

from pathlib import Path

import numpy as np
import pytest

from specstream_mlx import load, stream_generate
from specstream_mlx.training.batches import Example
from specstream_mlx.training.datasets import Dataset
from specstream_mlx.training.evaluation import chain_passes, validate
from specstream_mlx.training.loss import LossWeights
from tests.tiny import random_prompt
from tests.training.training_cases import prepared, save_base

MAX_TOKENS = 14


def test_tokens_per_pass_and_acceptance_are_those_of_generation(tmp_path: Path) -> None:
    """Red when: validation reads other anchors, shifts a target, or miscounts passes, ends or reached depths."""
    base = save_base(tmp_path / "base")
    model, tokenizer = load(base)
    prompts = [random_prompt(2 + i % 5, seed=i) for i in range(9)]
    answers = [[t for r in stream_generate(model, tokenizer, p, MAX_TOKENS) for t in r.tokens] for p in prompts]
    rows = [Example(tuple(p), tuple(a)) for p, a in zip(prompts, answers, strict=True)]
    found = prepared(
        base, tmp_path / "out", iters=25, batch_size=9, rank=8, learning_rate=2e-2, max_anchors=None
    ).train(Dataset(rows, rows))
    assert found is not None
    model, tokenizer = load(base, tmp_path / "out")
    tokens = passes = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        made = list(stream_generate(model, tokenizer, prompt, MAX_TOKENS, draft="chain"))
        assert [token for response in made for token in response.tokens] == answer
        tokens += made[-1].generation_tokens
        passes += made[-1].target_passes
    assert found.tokens_per_pass == pytest.approx(tokens / passes)
    assert 1.3 < found.tokens_per_pass < 3.9, "too easy or too hard to prove anything"
    first = validate(model, rows, LossWeights(0.0), batch_size=2, num_batches=2)
    assert first.num_answers == 4
    assert first.to_dict()["main_loss"] is None


def test_chain_passes_are_counted_as_generation_counts_them() -> None:
    """Red when: the prefill or the last pass is left out, or a wrong stream does not end a chain."""
    right, wrong = [True] * 3, [False] * 3
    assert chain_passes(np.array([right] * 9), 1) == 1
    assert chain_passes(np.array([wrong] * 9), 10) == 10
    assert chain_passes(np.array([right] * 9), 10) == 4  # 1 + 4 + 4 + 1
    assert chain_passes(np.array([[True, False, True]] * 9), 10) == 6  # 1 + 2 + 2 + 2 + 2 + 1
