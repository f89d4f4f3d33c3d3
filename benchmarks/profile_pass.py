"""Where the time of one drafted pass goes, beside a plain step: building graphs, waiting for the device, the host.

    scripts/with-openblas python -m benchmarks.profile_pass [--model DIR] [--tree chain:4] [--insertion leaf]

The loop's own passes on the model's first sample, all in turn, medians in milliseconds. *build* is Python making the
graph, *wait* what the device needs after that. In the loop the next pass's graph is built while the stream pass runs,
so a cycle costs less than the sum of its parts. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream

from specstream_mlx import DraftOptions, load, stream_generate
from specstream_mlx.calibration.measure import find_samples
from specstream_mlx.drafters.protocol import Anchor, Wish
from specstream_mlx.engine.acceptance import accept
from specstream_mlx.engine.sampling import TargetSampler
from specstream_mlx.engine.session import prefill
from specstream_mlx.engine.steering import steer
from specstream_mlx.formats.prompts import encode_prompt, read_prompts
from specstream_mlx.models.load import model_directory
from specstream_mlx.options import Insertion
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.tree import DraftTree

STEPS = 32  # plain steps timed together


class Laps:
    """Seconds of named stretches."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add what the block takes."""
        started = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def medians(self) -> dict[str, float]:
        """Milliseconds."""
        return {name: 1000 * statistics.median(seconds) for name, seconds in self.seconds.items()}


def profile(model: Any, tokenizer: Any, prompt: list[int], options: DraftOptions, repeats: int) -> dict[str, float]:
    """Medians of every stretch, in milliseconds."""
    caches = model.make_cache()
    prefill(model, prompt[:-1], caches, 2048, None, len(prompt))
    start = caches[0].offset
    drafter = model.drafter
    plan, _ = steer("tree", model, drafter, options)
    tree = plan.tree or DraftTree.chain(model.gamma)
    wish = Wish(tree.max_depth, tree, plan.budget, plan.way)
    state = drafter.begin(model, prompt)
    sampler = TargetSampler(None, None, model.vocab_size)
    laps = Laps()
    answer = [r.tokens for r in stream_generate(model, tokenizer, prompt, max_tokens=STEPS, draft="off")]
    tokens = [token for group in answer for token in group]
    for _ in range(repeats):
        for cache in caches:
            cache.offset = start
        with laps.time("mlx-lm plain step"):
            steps = list(generate_step(mx.array(prompt[-1:]), model.base, max_tokens=STEPS, prompt_cache=caches))
        laps.seconds["mlx-lm plain step"][-1] /= len(steps)
        for cache in caches:
            cache.offset = start
        node_tokens = mx.array([prompt[-1], *[tokens[min(depth, len(tokens)) - 1] for depth in tree.depths[1:]]])
        mx.eval(node_tokens)
        draft = Draft(tree, node_tokens)
        with laps.time("cycle, its parts one after another"), mx.stream(generation_stream):
            with laps.time("verification: build"):
                passed = model.verify(draft, caches, riders=state.riders(wish), taps=drafter.taps)
                drawn = sampler.draw(passed.logits, tree, node_tokens, None).tokens
            with laps.time("verification: wait"):
                mx.eval(drawn)
            with laps.time("read back and accept"):
                found = accept(tree, node_tokens.tolist(), drawn.tolist())  # type: ignore[arg-type]
            with laps.time("commit"):
                model.commit(passed, found.nodes, caches)
                mx.eval([cache.keys for cache in caches])
            with laps.time("streams: build"):
                root = mx.array([found.tokens[-1]])
                drafted = state.propose(Anchor(passed, found.nodes[-1], root, caches), wish).tokens
            with laps.time("streams: wait"):
                mx.eval(drafted)
        with laps.time("detokenise"):
            detokenizer = tokenizer.detokenizer
            for token in found.tokens:
                detokenizer.add_token(token)
            _ = detokenizer.last_segment
        with laps.time("whole answer, ours"):
            responses = list(stream_generate(model, tokenizer, prompt, max_tokens=STEPS, draft_options=options))
        laps.seconds["whole answer, ours"][-1] -= responses[-1].prompt_tokens / responses[-1].prompt_tps
        laps.seconds["whole answer, ours"][-1] /= max(responses[-1].target_passes - 1, 1)
    medians = laps.medians()
    medians["cycle in the loop"] = medians.pop("whole answer, ours")
    return medians


def main() -> int:
    """Print the table and the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="MLX model directory with streams; default: the bundled model")
    parser.add_argument("--tree", default="chain:4", help="the tree of the pass")
    parser.add_argument("--insertion", default="leaf", choices=get_args(Insertion))
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    samples = find_samples(model_directory(arguments.model))
    text = read_prompts(samples)[0].text if samples is not None else "Once upon a time"
    options = DraftOptions(tree=arguments.tree, insertion=arguments.insertion)
    found = profile(model, tokenizer, encode_prompt(tokenizer, text), options, arguments.repeats)
    for name, milliseconds in found.items():
        print(f"{name:36}{milliseconds:9.3f} ms  {milliseconds / found['mlx-lm plain step']:6.2f} plain steps")
    print(json.dumps({"tree": arguments.tree, "insertion": arguments.insertion, "milliseconds": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
