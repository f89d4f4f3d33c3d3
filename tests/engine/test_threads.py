"""One model in several threads and several generators: every text is what it is when it is made alone.

MLX keeps streams and random keys by thread, and what is not evaluated can be evaluated in its own thread alone.
"""

import functools
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx import DraftOptions, SpecStreamModel, stream_generate
from specstream_mlx.planning.plan import make_plan
from specstream_mlx.target.target import Target
from tests.adapter_cases import save_adapter, save_live_lora
from tests.drafter_cases import DRAFTERS, ByPlace, drafter_of
from tests.tiny import NumberTokenizer, make_base, make_model, plain_tokens, random_prompt

GENERATE = sys.modules[stream_generate.__module__]
DRAFTS = {
    "off": ("off", None, None),
    "chain": ("chain", None, "leaf"),
    "tree": ("tree", "cartesian:3x2x1", "deferred"),
    "best-first": ("tree", "best-first:9", "parallel"),
    "auto": ("auto", None, None),
    "pruned": ("tree", "cartesian:3x2x2", "leaf"),
}
MAX_TOKENS = 20


@functools.cache
def model():
    """Evaluated, as ``load`` leaves it."""
    made = make_model("llama", seed=51)
    mx.eval(made.parameters(), made.streams.parameters())
    return made


def options_of(draft, drafter):
    mode, tree, way = DRAFTS[draft]
    threshold = 0.012 if draft == "pruned" else None
    return {
        "draft": mode,
        "drafter": drafter,
        "draft_options": DraftOptions(tree, way if way in drafter.ways else None, threshold),
    }


def begin(prompt, max_tokens=MAX_TOKENS, **more):
    return stream_generate(model(), NumberTokenizer(end_of_text=()), prompt, max_tokens, **more)


def tokens_of(responses):
    return [token for response in responses for token in response.tokens]


def in_turn(responses, workers):
    """Every response from another thread."""
    for worker in itertools.cycle(workers):
        response = worker.submit(next, responses, None).result()
        if response is None:
            return
        yield response


@pytest.fixture
def workers():
    """Three threads, and one that is new for every task."""
    pools = [ThreadPoolExecutor(1) for _ in range(3)]
    yield [*pools, _FreshThreads()]
    for pool in pools:
        pool.shutdown()


class _FreshThreads:
    def submit(self, *task):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(*task)


@pytest.fixture
def steered(monkeypatch):
    """Auto drafts, or does not, by the place in the text: plain passes, some in a row, among trees and ways."""
    steer = GENERATE.steer

    def by_place(mode, model, drafter, options):
        if mode != "auto":
            return steer(mode, model, drafter, options)
        return make_plan("auto", drafter.max_depth, ways=drafter.ways), ByPlace(drafter.ways, 7)

    monkeypatch.setattr(GENERATE, "steer", by_place)


@pytest.mark.usefixtures("steered")
@pytest.mark.parametrize("temp", [0.0, 0.9])
@pytest.mark.parametrize(
    ("name", "draft"),
    [(name, draft) for name in DRAFTERS for draft in DRAFTS if draft != "pruned" or "streams" in name],
)
def test_a_generator_moves_between_threads(workers, name, draft, temp):
    """Red when: a graph that was built in one thread and not evaluated there is needed in another one."""
    prompt = random_prompt(5, seed=1) * 2
    more = {"sampler": make_sampler(temp), "seed": 5} if temp else {}
    if temp and draft == "tree":
        more["logits_processors"] = make_logits_processors({7: 1.5}, 1.3)
    text = plain_tokens(model().base, prompt, MAX_TOKENS, end_of_text=(), **more)
    more |= options_of(draft, drafter_of(name, model(), text, len(prompt), seed=1))
    responses = list(in_turn(begin(prompt, **more), workers))
    assert tokens_of(responses) == text
    here = list(begin(prompt, **more))
    assert [response.logprobs.tolist() for response in responses] == [r.logprobs.tolist() for r in here]


@pytest.mark.usefixtures("steered")
@pytest.mark.parametrize("draft", ["off", "chain", "auto"])
@pytest.mark.parametrize("name", ["streams", "prompt-lookup", "itself"])
def test_a_generator_is_closed_in_another_thread(workers, name, draft):
    """Red when: the rows of a pass under way stay in the caches, or cannot be used elsewhere."""
    prompt, second = random_prompt(5, seed=1) * 2, random_prompt(3, seed=2)
    for count in range(1, 6):
        caches = model().make_cache()
        more = options_of(draft, drafter_of(name, model(), [], 0)) | {"prompt_cache": caches}
        responses = begin(prompt, 40, **more)
        tokens = tokens_of(itertools.islice(in_turn(responses, workers), count))
        workers[1].submit(responses.close).result()
        assert {cache.offset for cache in caches} == {len(prompt) + len(tokens)}
        text = plain_tokens(model().base, [*prompt, *tokens, *second], 6, end_of_text=())
        assert tokens_of(in_turn(begin(second, 6, **more), workers)) == text


def several():
    """A generation with every drafter, half of them sampled: what to call, and the text."""
    for number, name in enumerate((*DRAFTERS, *DRAFTERS)):
        prompt = random_prompt(4, seed=number) * 2
        more = {"sampler": make_sampler(0.9), "seed": number} if number % 2 else {}
        text = plain_tokens(model().base, prompt, MAX_TOKENS, end_of_text=(), **more)
        more |= options_of(("tree", "auto", "chain")[number % 3], drafter_of(name, model(), text, len(prompt)))
        yield functools.partial(begin, prompt, **more), text


@pytest.mark.usefixtures("steered")
def test_several_generators_at_once_in_threads():
    """Red when: two passes that are built at once see each other's layers, rows or draws."""
    calls, texts = zip(*several(), strict=True)
    together = threading.Barrier(len(calls))

    def run(call):
        together.wait()
        return tokens_of(call())

    with ThreadPoolExecutor(len(calls)) as pool:
        assert list(pool.map(run, calls)) == list(texts)


@pytest.mark.usefixtures("steered")
def test_several_generators_in_turn():
    """Red when: a generation leaves something behind in the model, the drafter or the thread between two passes."""
    calls, texts = zip(*several(), strict=True)
    running = {number: call() for number, call in enumerate(calls)}
    found = [[] for _ in calls]
    while running:
        for number, responses in list(running.items()):
            response = next(responses, None)
            if response is None:
                del running[number]
            else:
                found[number] += response.tokens
    assert found == list(texts)


def test_unseeded_generations_in_one_thread_share_no_noise():
    """Red when: a generation that begins later draws with the keys of one that is under way, or moves them."""
    prompt, sampler = random_prompt(6, seed=3), make_sampler(1.0)
    alone = plain_tokens(model().base, prompt, MAX_TOKENS, seed=3, end_of_text=(), sampler=sampler)
    for drafts in itertools.product(("off", "tree"), repeat=2):
        mx.random.seed(3)
        both = [begin(prompt, sampler=sampler, draft=draft) for draft in drafts]
        texts = [[], []]
        for number in itertools.islice(itertools.cycle((0, 1)), 2 * MAX_TOKENS):
            response = next(both[number], None)
            texts[number] += response.tokens if response is not None else []
        assert texts[0] == alone
        assert texts[1] != alone
        assert len(texts[1]) == MAX_TOKENS


def test_an_unseeded_generation_begins_with_the_same_noise_wherever_another_one_is():
    """Red when: what a generation draws from is left in the thread for others."""
    prompt, sampler = random_prompt(6, seed=3), make_sampler(1.0)
    texts = []
    for steps in (1, 2, 5):
        mx.random.seed(3)
        under_way = begin(prompt, sampler=sampler, draft="off")
        list(itertools.islice(under_way, steps))
        texts.append(tokens_of(begin(prompt, sampler=sampler, draft="off")))
        under_way.close()
    assert texts[0] == texts[1] == texts[2]


def test_unseeded_generations_in_new_threads_share_no_noise():
    """Red when: a thread that nothing has seeded starts from the key that all such threads have."""
    prompt, sampler = random_prompt(6, seed=3), make_sampler(1.0)
    texts = []
    for draft in ("off", "tree", "off"):
        with ThreadPoolExecutor(1) as pool:
            texts.append(
                tuple(pool.submit(lambda d=draft: tokens_of(begin(prompt, sampler=sampler, draft=d))).result())
            )
    assert len(set(texts)) == 3


def test_an_unseeded_generation_keeps_its_noise_in_another_thread(workers):
    """Red when: the key of the thread decides instead of the key of the generation."""
    prompt, sampler = random_prompt(6, seed=3), make_sampler(1.0)
    mx.random.seed(3)
    expected = tokens_of(begin(prompt, sampler=sampler, draft="tree"))
    workers[0].submit(mx.random.seed, 3).result()
    assert tokens_of(in_turn(begin(prompt, sampler=sampler, draft="tree"), workers)) == expected


def test_generations_with_different_adapters_in_threads(tmp_path, workers):
    """Red when: a pass is built with the layers of another generation's adapter, or with those used meanwhile."""
    base = make_base("llama", seed=52)
    shared = SpecStreamModel(base, base.model_type)
    kinds = {
        "tuned": save_live_lora(tmp_path / "tuned", base, 1),
        "tuned otherwise": save_live_lora(tmp_path / "otherwise", base, 2),
        "lossless": save_adapter(tmp_path / "lossless", base, 3, mode="lossless"),
        "streams": save_adapter(tmp_path / "streams", base, 4),
    }
    for name, path in kinds.items():
        shared.load_adapter(path, name)
    names, prompt = [*kinds, None], random_prompt(7, seed=4)

    def start(name):
        shared.use_adapter(name)
        responses = stream_generate(shared, NumberTokenizer(end_of_text=()), prompt, 30)
        return next(responses).tokens, responses

    alone = []
    for name in names:
        first, responses = start(name)
        alone.append(first + tokens_of(responses))
    assert len(set(map(tuple, alone))) == 3, "two fine-tunes, and the base"
    begun = [start(name) for name in names]
    stop = threading.Event()

    def switch():
        for name in itertools.cycle(names):
            if stop.is_set():
                return
            shared.use_adapter(name)

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            assert list(pool.map(lambda pair: pair[0] + tokens_of(pair[1]), begun)) == alone
    finally:
        stop.set()
        switching.join()
    begun = [start(name) for name in names]
    assert [first + tokens_of(in_turn(responses, workers)) for first, responses in begun] == alone


def test_a_generation_begins_with_the_whole_of_an_adapter(tmp_path, monkeypatch):
    """Red when: another thread can change the adapter between the choice of the drafter and that of the layers."""
    base = make_base("llama", seed=53)
    shared = SpecStreamModel(base, base.model_type)
    for number, name in enumerate(("one", "two")):
        path = save_adapter(tmp_path / name, base, number, mode="lossless")
        shared.load_adapter(path, name)
    begun, mounted, make = [], Target.mounted, GENERATE.Session

    def slowly_read(target):
        mount = mounted.fget(target)
        if not others:
            others.append(threading.Thread(target=shared.use_adapter, args=("two",)))
            others[0].start()
            others[0].join(0.05)  # it waits for the generation
        return mount

    def noted(target, drafter, *more, **named):
        begun.append((drafter, named["mount"]))
        return make(target, drafter, *more, **named)

    others = []
    shared.use_adapter("one")
    drafter, mount = shared.drafter, shared.mounted
    monkeypatch.setattr(Target, "mounted", property(slowly_read))
    monkeypatch.setattr(GENERATE, "Session", noted)
    next(stream_generate(shared, NumberTokenizer(), random_prompt(3, 1), 3))
    others[0].join()
    assert begun == [(drafter, mount)]
    assert shared.adapter == "two"
