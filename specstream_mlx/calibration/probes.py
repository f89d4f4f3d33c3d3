"""Small measurements of the engine on this machine: is the text exact, and what do a few passes cost.

The bundled model is run in the types of weights that users have; a model of a well-known shape with random weights, as
large as this machine runs quickly, shows what passes cost where weights decide.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.sample_utils import make_sampler

from specstream_mlx.bundled import default_model_path
from specstream_mlx.calibration.costs import measure_costs
from specstream_mlx.calibration.measure import find_samples
from specstream_mlx.calibration.shapes import DTYPES, SHAPES, random_model
from specstream_mlx.calibration.surroundings import Finding
from specstream_mlx.engine.exactness import SAFETY, check_exact, rounding
from specstream_mlx.engine.generate import stream_generate
from specstream_mlx.errors import VerificationError
from specstream_mlx.formats.prompts import encode_prompt, read_prompts
from specstream_mlx.models.load import load, load_base
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.planning.calibration import costs_to_dict
from specstream_mlx.target import machine

FOUR_BITS = "4-bit"
WEIGHTS = ("float32", "float16", "bfloat16", FOUR_BITS)
QUICK_WEIGHTS = ("float32", "bfloat16", FOUR_BITS)
GROUP_SIZE = 64
ROWS = (1, 2, 3, 5, 8, 16)
DRAFTED = 5  # rows of the pass that is judged: a root and four drafts
MOST_BREAK_EVEN = 2.5  # tokens that a pass of ``DRAFTED`` rows must yield; more is dear
LEAST_SINGLE_ROW = 0.8  # plain steps that a pass of one row takes at least, as the plain steps overlap
MOST_STEP_SECONDS = 0.03  # of a shape's plain step; a curve takes some hundred steps
MOST_MEMORY = 1 / 3  # of main memory, for a shape's weights in 16 bits while they are made
_SHAPES = ("llama-1b", "llama-100m", "llama-40m")  # from large to small
_TEMPERATURE = 0.8
_BYTES_PER_WEIGHT = 0.5625  # 4 bits, and a scale and a bias in 16 bits for a group
_PROBE = (1024, 2048)  # input and output size of a matrix; large enough for a GPU, small enough for a slow CPU
_PRODUCTS = 8
_MOST_GAP = 1e4  # stands for any larger one, which JSON could not hold

Progress = Callable[[str, int, int], None]


def bundled_as(weights: str) -> tuple[SpecStreamModel, Any, Any]:
    """The bundled model with its weights as one of ``WEIGHTS``, mlx-lm's of the same weights, and the tokenizer.

    Four bits are in groups of ``GROUP_SIZE`` beside bfloat16.
    """
    loaded, tokenizer = load()
    dtype = DTYPES["bfloat16" if weights == FOUR_BITS else weights]

    def changed(module: nn.Module) -> nn.Module:
        module.update(tree_map(lambda value: value.astype(dtype), module.parameters()))
        return module

    def base() -> Any:
        made = changed(load_base(default_model_path())[0])
        if weights == FOUR_BITS:
            nn.quantize(made, group_size=GROUP_SIZE, bits=4)
        return made

    own, plain = base(), base()
    plain.update(own.parameters())
    assert loaded.streams is not None
    changed(loaded.streams)
    model = SpecStreamModel(own, loaded.model_type, loaded.stream_config, loaded.streams)
    mx.eval(model.parameters())
    return model, plain.eval(), tokenizer


def measure_exactness(
    weights: str,
    *,
    answers: int = 4,
    max_tokens: int = 64,
    window: int = 32,
    seconds: float = 8.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Our tokens beside mlx-lm's plain decoding, greedy and sampled in turn, and how far rounding moves a logit.

    Args:
        weights: one of ``WEIGHTS``.
        answers, max_tokens: how many, and most tokens of each.
        window: tokens at the end of the first answer that ``rounding`` is measured on.
        seconds: no further answer is begun after so long, so that a slow machine ends, too.

    Returns:
        Counts of answers, whose prompts are the shortest samples; ``largest_gap`` over the answers that differ, None
        where none does; ``rounding`` on the end of the first prompt with its answer, and ``bound``, the largest gap
        that rounding explains.

    Raises:
        VerificationError: logits are not finite.
    """
    model, plain, tokenizer = bundled_as(weights)
    samples = find_samples(default_model_path())
    assert samples is not None
    found: dict[str, Any] = {"weights": weights, "answers": 0, "tokens": 0, "identical": 0, "ties": 0}
    found |= {"beyond_rounding": 0, "largest_gap": None, "differences": []}
    text: list[int] = []
    started = time.perf_counter()
    prompts = sorted((encode_prompt(tokenizer, prompt) for prompt in read_prompts(samples)), key=len)
    for index, ids in enumerate(prompts[:answers]):
        if index and time.perf_counter() - started > seconds:
            break
        drawn = {"sampler": make_sampler(_TEMPERATURE), "seed": index} if index % 2 else {}
        responses = stream_generate(model, tokenizer, ids, max_tokens, draft="tree", **drawn)
        tokens = [token for response in responses for token in response.tokens]
        difference = check_exact(plain, ids, tokens, **drawn)
        found["answers"] += 1
        found["tokens"] += len(tokens)
        kind = "identical" if difference is None else "ties" if difference.is_tie else "beyond_rounding"
        found[kind] += 1
        if difference is not None:
            found["largest_gap"] = max(min(difference.gap, _MOST_GAP), found["largest_gap"] or 0.0)
            found["differences"].append(str(difference))
        text = text or [*ids, *tokens]
        if progress is not None:
            progress(f"exact {weights}", index + 1, answers)
    found["rounding"] = rounding(plain, text[-window:])
    if not math.isfinite(found["rounding"]):
        raise VerificationError(f"logits of the bundled model in {weights} are not all finite")
    found["bound"] = 0.0 if weights == "float32" else SAFETY * found["rounding"]
    return found


def exactness_finding(found: dict[str, Any]) -> Finding:
    """The verdict: a difference that rounding does not explain is a problem, a tie within rounding is a note."""
    name = f"exact {found['weights']}"
    moved = f"rounding moves a logit by up to {found['rounding']:.2g}"
    if found["beyond_rounding"]:
        text = f"{found['beyond_rounding']} of {found['answers']} answers are not mlx-lm's: {found['differences'][0]}"
        return Finding(name, "problem", text, "report it with this output: it is a fault of specstream-mlx or MLX")
    if found["ties"]:
        text = f"{found['ties']} of {found['answers']} answers differ from mlx-lm's at a tie (gap "
        text += f"{found['largest_gap']:.2g}, bound {found['bound']:.2g}); {moved}"
        return Finding(name, "note", text, "nothing: such ties are normal below float32")
    return Finding(name, "ok", f"{found['tokens']} tokens of {found['answers']} answers, all mlx-lm's; {moved}")


def measure_curve(
    shape: str | None, *, rows: Sequence[int] = ROWS, repeats: int = 5, progress: Progress | None = None
) -> dict[str, Any]:
    """What passes cost: the bundled model in float32, or with ``shape`` random weights of it in 4 bits.

    Returns:
        ``costs_to_dict``'s form; ``model``, ``weights`` and ``weights_gb`` say of what; ``break_even`` is how many
        tokens a pass of ``DRAFTED`` rows with its streams must yield to be as fast as plain decoding.
    """
    model = load()[0] if shape is None else random_model(shape, "bfloat16", 4)
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    ((context, costs),) = measure_costs(model, [128], model.drafter, rows=rows, repeats=repeats, progress=progress)
    break_even = min(costs.leaf.at(DRAFTED), costs.deferred.at(DRAFTED)) / costs.plain
    about = {"model": shape or "bundled", "weights": FOUR_BITS if shape else "float32", "weights_gb": size / 1e9}
    return about | costs_to_dict(context, costs) | {"break_even": break_even}


def curve_finding(found: dict[str, Any]) -> Finding:
    """The verdict: a note where four drafts cost more than they can be expected to yield."""
    plain = found["plain"]
    rows = ", ".join(f"{count} rows {seconds / plain:.2f}" for count, seconds in found["chain"])
    text = f"plain step {1000 * plain:.2f} ms; {rows}; drafting pays from {found['break_even']:.2f} tokens a pass on"
    name = f"costs {found['model']} {found['weights']}"
    if found["chain"][0][1] < LEAST_SINGLE_ROW * plain:
        advice = "quit other programs, and run again: something disturbed the clock"
        return Finding(name, "note", text, advice)
    if found["break_even"] > MOST_BREAK_EVEN:
        advice = "rows are dear here: run 'specstream-mlx calibrate --model DIR', then only drafts that pay are made"
        return Finding(name, "note", text, advice)
    return Finding(name, "ok", text)


def seconds_per_byte() -> float:
    """How long a byte of 4-bit weights takes in a product with one row, on a matrix of two million weights."""
    inner, outer = _PROBE
    matrix = mx.quantize(mx.ones((outer, inner), dtype=mx.bfloat16), GROUP_SIZE, 4)
    row = mx.ones((1, inner), dtype=mx.bfloat16)
    mx.eval(matrix, row)

    def once() -> float:
        started = time.perf_counter()
        made = row
        for _ in range(_PRODUCTS):  # each waits for the one before, as layers do
            made = mx.quantized_matmul(made[:, :inner], *matrix, group_size=GROUP_SIZE, bits=4) / inner
        mx.eval(made)
        return (time.perf_counter() - started) / _PRODUCTS

    once()
    return min(once() for _ in range(2)) / sum(part.nbytes for part in matrix)


def choose_shape(per_byte: float, memory_gb: float) -> str | None:
    """The largest shape whose plain step is quick enough here and whose making fits; None: not even the smallest.

    Args:
        per_byte: from ``seconds_per_byte``.
    """
    for name in _SHAPES:
        count = _num_parameters(SHAPES[name])
        if count * _BYTES_PER_WEIGHT * per_byte <= MOST_STEP_SECONDS and 2 * count <= MOST_MEMORY * memory_gb * 1e9:
            return name
    return None


def _num_parameters(shape: dict[str, Any]) -> int:
    """Weights of the matrices; what is beside them does not count."""
    size, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = 2 * size * size * (1 + shape["num_key_value_heads"] / heads)
    layer = attention + 3 * size * shape["intermediate_size"]
    embeddings = shape["vocab_size"] * size * (1 if shape["tie_word_embeddings"] else 2)
    return int(shape["num_hidden_layers"] * layer + embeddings)


def memory_gb() -> float:
    """Main memory, 0 where the system does not say."""
    return machine.memory_bytes() / 1e9
