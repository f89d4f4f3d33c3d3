"""Our tokens beside plain decoding's on the same weights, and what a difference is worth.

In unquantised float32 no difference is allowed. Elsewhere kernels for different numbers of rows round differently, so
two tokens that tie within that rounding can swap. Whether a difference is such a tie is measured, on the model, the
text and the machine at hand:

* the gap: how far the logit of our token must rise in plain decoding for the same sampler with the same noise to draw
  it. For greedy decoding that is the distance between the two logits;
* the bound: ``SAFETY`` times the largest difference of any logit between passes of several rows and single rows,
  over the last ``WINDOW`` tokens before the difference, by the plain model alone. Two logits can move towards each
  other, which makes two; the passes measured are not exactly those that drafting ran, which makes it four.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tuner.utils import load_adapters

from specstream_mlx.bundled import default_model_path
from specstream_mlx.engine.sampling import LogitsProcessor, Sampler
from specstream_mlx.formats.adapter_directory import live_lora
from specstream_mlx.formats.places import ADAPTER_WEIGHTS, resolve
from specstream_mlx.models.load import load_base
from specstream_mlx.models.model import SpecStreamModel

SAFETY = 4.0
WINDOW = 64  # tokens
ROWS = (2, 4, 8, 16, 32)
_PREFILL_STEP = 512
_MOST_GAP = 1e4  # no rounding moves a logit so far


@dataclass(frozen=True)
class Difference:
    """The first token that is not plain decoding's.

    Attributes:
        position: its index among the generated tokens.
        token, plain_token: ours and plain decoding's.
        logit, plain_logit: of both in plain decoding, after the logits processors, as log-probabilities.
        gap: how far ``logit`` must rise for plain decoding to draw ``token``.
        bound: the largest gap that rounding explains; 0 in unquantised float32.
    """

    position: int
    token: int
    plain_token: int
    logit: float
    plain_logit: float
    gap: float
    bound: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.gap <= self.bound

    def __str__(self) -> str:
        verdict = "within" if self.is_tie else "above"
        return (
            f"token {self.position + 1} is {self.token}, in plain decoding by mlx-lm {self.plain_token}; their "
            f"log-probabilities there are {self.logit:.6g} and {self.plain_logit:.6g}, the gap {self.gap:.3g} is "
            f"{verdict} the bound {self.bound:.3g} of rounding"
        )


def plain_model(
    model: SpecStreamModel,
    path_or_repo: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
) -> Any:
    """mlx-lm's own model of the same directory, sharing the arrays of ``model``'s weights."""
    path = resolve(path_or_repo, revision) if path_or_repo is not None else default_model_path()
    plain, _ = load_base(path, lazy=True)
    # A LoRA on all rows is a fine-tune, which mlx-lm runs too. Streams and their LoRA leave mlx-lm the base.
    live = live_lora(resolve(adapter, weights=ADAPTER_WEIGHTS) if adapter is not None else path)
    if live is not None:
        plain = load_adapters(plain, str(live))
    plain.eval()
    in_use = model.adapter
    if live is None:
        model.use_adapter(None)
    ours = dict(tree_flatten(model.base.parameters()))
    model.use_adapter(in_use)
    shared = [(name, ours[name]) for name, _ in tree_flatten(plain.parameters()) if name in ours]
    plain.update(tree_unflatten(shared))
    return plain


def first_difference(tokens: Sequence[int], plain_tokens: Sequence[int]) -> int | None:
    """Index of the first token that differs, or that only one of both has; None when they are equal."""
    for index, (token, plain) in enumerate(zip(tokens, plain_tokens, strict=False)):
        if token != plain:
            return index
    return None if len(tokens) == len(plain_tokens) else min(len(tokens), len(plain_tokens))


def check_exact(
    plain: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Difference | None:
    """Compare ``tokens`` with what mlx-lm generates from ``prompt``, token by token.

    Args:
        plain: from ``plain_model``.
        prompt, tokens: ids; ``tokens`` are ours.
        sampler, logits_processors, seed: as they were for ``tokens``; they must not remember anything.
        options: of ``mlx_lm.generate.generate_step``, such as ``prefill_step_size``.

    Returns:
        None when all are equal, else the first difference.
    """
    sampler = sampler or greedy_sampler
    more = {"max_tokens": len(tokens), "logits_processors": list(logits_processors or ())} | options
    _seed(seed)
    plain_tokens = [token for token, _ in generate_step(mx.array(list(prompt)), plain, sampler=sampler, **more)]
    position = first_difference(tokens, plain_tokens)
    if position is None:
        return None
    seen: dict[int, tuple[mx.array, mx.array]] = {}
    calls = 0

    def recording(logprobs: mx.array) -> mx.array:
        nonlocal calls
        if calls == position:
            seen[position] = mx.array(mx.random.state[0]), logprobs  # type: ignore[index]
        calls += 1
        return sampler(logprobs)

    _seed(seed)
    more["max_tokens"] = position + 1
    for _ in generate_step(mx.array(list(prompt)), plain, sampler=recording, **more):
        pass
    key, logprobs = seen[position]
    token, plain_token = tokens[position], plain_tokens[position]
    pair: list[float] = logprobs[0][mx.array([token, plain_token])].astype(mx.float32).tolist()  # type: ignore[assignment]
    text = [*prompt, *plain_tokens[:position]]
    return Difference(
        position,
        token,
        plain_token,
        pair[0],
        pair[1],
        _gap(sampler, key, logprobs, token),
        0.0 if _is_float32(plain) else SAFETY * rounding(plain, text),
    )


def rounding(plain: Any, text: Sequence[int]) -> float:
    """The largest difference of any logit between passes of ``ROWS`` rows and of single rows, over the text's end."""
    single = _logits(plain, text, 1)
    largest: list[float] = [mx.abs(_logits(plain, text, rows) - single).max().item() for rows in ROWS]  # type: ignore[misc]
    return max(largest)


def _logits(plain: Any, text: Sequence[int], rows: int) -> mx.array:
    """(n, V) logits in float32 of the last n <= ``WINDOW`` tokens of ``text``, made ``rows`` tokens at a time."""
    ids, caches = mx.array(list(text)), make_prompt_cache(plain)
    begin = max(len(text) - WINDOW, 0)
    for start in range(0, begin, _PREFILL_STEP):
        plain(ids[start : min(start + _PREFILL_STEP, begin)][None], cache=caches)
        mx.eval([cache.state for cache in caches])
    made = []
    for start in range(begin, len(text), rows):
        made.append(plain(ids[start : start + rows][None], cache=caches)[0].astype(mx.float32))
        mx.eval(made[-1])
    return mx.concatenate(made)


def _gap(sampler: Callable[[mx.array], mx.array], key: mx.array, logprobs: mx.array, token: int) -> float:
    """How far the logit of ``token`` must rise for ``sampler`` to draw it with this random key, by bisection."""
    row = logprobs.astype(mx.float32)
    words: list[int] = key.tolist()  # type: ignore[assignment]

    def draws(rise: float) -> bool:
        mx.random.seed(words[0] << 32 | words[1])  # what it makes of the key's two words
        raised = row.at[:, token].add(rise)
        return bool(sampler(raised - mx.logsumexp(raised, keepdims=True)).item() == token)

    low, high = 0.0, 1e-6
    while not draws(high):
        low, high = high, 2 * high
        if high > _MOST_GAP:
            return float("inf")
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if draws(middle) else (middle, high)
    return high


def _seed(seed: int | None) -> None:
    if seed is not None:
        mx.random.seed(seed)


def _is_float32(plain: nn.Module) -> bool:
    floats = [value.dtype for _, value in tree_flatten(plain.parameters()) if mx.issubdtype(value.dtype, mx.floating)]
    quantized = any(hasattr(module, "bits") for _, module in plain.named_modules())
    return not quantized and all(dtype == mx.float32 for dtype in floats)
