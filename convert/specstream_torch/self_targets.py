"""The base model's own greedy answers: what lossless streams are to predict.

In lossless mode the text is the base's, so a stream that learns a data set's answers instead is accepted less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .loss import Example


def greedy_answers(
    model: Any, examples: Sequence[Example], *, max_new_tokens: int, eos_id: int, batch_size: int = 16
) -> list[Example]:
    """Replace every answer by the model's greedy continuation of the prompt, end-of-text included.

    A continuation that is still going after ``max_new_tokens`` stays without end-of-text. Prompts run in batches
    of like length, padded on the left. The order of the examples is kept.
    """
    device = next(model.parameters()).device
    answers: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].prompt))
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(examples[rows[-1]].prompt)
        input_ids = torch.full((len(rows), width), eos_id)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            prompt = torch.tensor(examples[row].prompt)
            input_ids[i, width - len(prompt) :] = prompt
            attention_mask[i, width - len(prompt) :] = 1
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )
        for row, tokens in zip(rows, output[:, width:].tolist(), strict=True):
            end = tokens.index(eos_id) + 1 if eos_id in tokens else len(tokens)
            answers[row] = tuple(tokens[:end])
    model.train(was_training)
    return [replace(example, answer=answers[row]) for row, example in enumerate(examples)]
