"""One drafter of every kind for a tiny model, and a control that no clock and no history decides for."""

import functools
import random

import mlx.core as mx

from specstream_mlx import SpecStreamModel
from specstream_mlx.drafters.prompt_lookup import PromptLookup
from specstream_mlx.drafters.scripted import Scripted
from specstream_mlx.drafters.two_model import TwoModel
from specstream_mlx.target.tree import DraftTree
from tests.tiny import make_base

DRAFTERS = ("streams", "scripted-streams", "prompt-lookup", "two-model", "itself", "scripted")
TREES = [DraftTree.chain(depth) for depth in (1, 2, 4)]
TREES += [DraftTree.from_paths(paths) for paths in ([(0, 0), (1,)], [(0, 0, 0), (0, 1), (2,)], [(0,), (1, 0, 0, 1)])]


@functools.cache
def draft_model():
    """A smaller random model of the same vocabulary, which guesses right now and then."""
    base = make_base("qwen2", seed=77, num_hidden_layers=2)
    mx.eval(base.parameters())
    return SpecStreamModel(base, base.model_type)


def drafter_of(name, model, continuation, prompt_length, seed=0):
    """A drafter by name; "itself" is the target in both places, so that every guess of a greedy text is right.

    ``continuation``: the text that follows ``prompt_length`` tokens, cached ones counted. "scripted" knows it, and so
    does "scripted-streams", whose streams run all the same and are right most of the time.
    """
    if name == "streams":
        return model.drafter
    if name == "prompt-lookup":
        return PromptLookup(4)
    if name == "two-model":
        return TwoModel(draft_model(), 4)
    if name == "itself":
        return TwoModel(model, 4)
    beside = model.drafter if name == "scripted-streams" else None
    accuracy = 1.0 if seed % 3 == 1 else 0.7
    return Scripted(continuation, prompt_length, accuracy, seed, beside=beside)


class ByPlace:
    """A control for which the place in the text alone decides: any tree, any way, or plain passes."""

    wants_times = False

    def __init__(self, ways, seed):
        self.ways, self.seed = ways, seed
        self.place = None  # of the root of the pass that is read back next
        self.chosen = []

    @property
    def stays_plain(self):
        return self.at(self.place + 1) is None

    def at(self, place):
        rng = random.Random(1000 * self.seed + place)
        if random.Random(1000 * self.seed + place // 3).random() < 0.3:  # three plain passes in a row, or more
            return None
        return rng.choice(TREES), rng.choice(self.ways)

    def choose(self, context):
        if self.place is None:
            self.place = context
        self.chosen.append(self.at(context))
        return self.chosen[-1]

    def record(self, drafted, tree, nodes):
        self.place += len(nodes)

    def observe(self, drafted, tree, seconds):
        pass
