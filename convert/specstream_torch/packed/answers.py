"""The model's own greedy answers, many prompts at a time: what its streams have to foresee."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from ..loss import Example
from .llama import PackedLlama


def own_answers(
    fast: PackedLlama,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_tokens: int,
    eos_id: int,
    batch_size: int = 64,
    cut_off: bool = False,
    tick: Callable[[int], None] = lambda done: None,
) -> list[Example]:
    """Answer every prompt greedily; answers not ended within `max_tokens` are left out, or with `cut_off` kept."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Example] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        with torch.no_grad():
            texts = _batch(fast, [prompts[i] for i in indices], max_tokens, eos_id)
        for index, answer in zip(indices, texts, strict=True):
            if answer and (cut_off or answer[-1] == eos_id):
                answers[index] = Example(prompts[index], tuple(answer))
        tick(min(start + batch_size, len(order)))
    return [answers[index] for index in sorted(answers)]


def _batch(fast: PackedLlama, prompts: Sequence[tuple[int, ...]], max_tokens: int, eos_id: int) -> list[list[int]]:
    """Left-padded prompts, one step for all of them at a time; those that have ended leave the batch."""
    device = fast.embedding.device
    length = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), length, dtype=torch.long, device=device)
    pads = torch.tensor([length - len(prompt) for prompt in prompts], device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt, device=device)
    at = torch.arange(length, device=device)
    real = at >= pads[:, None]  # (B, L)
    visible = (real[:, None, :] & real[:, :, None] & (at <= at[:, None])) | torch.eye(
        length, dtype=torch.bool, device=device
    )
    positions = (at - pads[:, None]).clamp(min=0)
    caches: list[tuple[torch.Tensor, torch.Tensor]] = []
    hidden = fast.embedding[tokens].float()
    cos, sin = fast.angles(positions)
    for layer in fast.layers:
        q, k, v = fast.qkv(layer, hidden, cos, sin)
        room = (0, 0, 0, max_tokens)
        caches.append((F.pad(k, room), F.pad(v, room)))
        repeats = q.shape[1] // fast.num_kv
        attended = F.scaled_dot_product_attention(
            q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), attn_mask=visible[:, None]
        )
        hidden = fast.rest(layer, hidden, attended.transpose(1, 2).flatten(2))
    answers: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=device)
    hidden = hidden[:, -1:]
    for step in range(max_tokens):
        normed = fast.final_norm(hidden)
        chosen = (normed[:, 0] @ fast.head.t()).argmax(-1)
        for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
            answers[row].append(token)
        going = chosen != eos_id
        if step == max_tokens - 1 or not going.any():
            break
        if not going.all():
            alive, chosen, pads = alive[going], chosen[going], pads[going]
            caches = [(k[going], v[going]) for k, v in caches]
        end = length + step + 1
        seen = torch.arange(end, device=device) >= pads[:, None]
        bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -1e9)[:, None, None, :]
        hidden = fast.embedding[chosen][:, None].float()
        cos, sin = fast.angles((end - 1 - pads)[:, None])
        for layer, (keys, values) in zip(fast.layers, caches, strict=True):
            q, k, v = fast.qkv(layer, hidden, cos, sin)
            keys[:, :, end - 1], values[:, :, end - 1] = k[:, :, 0], v[:, :, 0]
            grouped = q.view(len(chosen), fast.num_kv, -1, fast.head_dim) * fast.head_dim**-0.5
            scores = (grouped @ keys[:, :, :end].transpose(-1, -2)).float() + bias
            out = F.softmax(scores, -1).to(fast.dtype) @ values[:, :, :end]
            hidden = fast.rest(layer, hidden, out.reshape(len(chosen), 1, -1))
    return answers
