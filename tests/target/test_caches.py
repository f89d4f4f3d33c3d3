"""Caches: the contract of every kind, changes of kind in mid-text, and a kept prefix.

The reference for tokens is ``mlx_lm.generate.generate_step`` with the same arguments; each docstring names the break
that turns the test red.
"""

import functools
import inspect
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as mlx_caches
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_sampler

from specstream_mlx import DraftOptions, PrefixCache, stream_generate
from specstream_mlx.engine.session import prefill
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.target import prompt_cache
from specstream_mlx.target.caches import (
    REFUSED,
    SUPPORTED,
    CacheGrowth,
    arrays_of,
    check_caches,
    commit_rows,
    drop_rows,
)
from tests.cache_cases import HEADS, QUANTISED
from tests.tiny import NumberTokenizer, drafter, make_model, our_tokens, plain_tokens, random_prompt
from tests.tolerances import LOGITS

KINDS = {
    "full": KVCache,
    "8-bit": lambda: QuantizedKVCache(group_size=32, bits=8),
    "4-bit": lambda: QuantizedKVCache(group_size=64, bits=4),
    "quantised-later": lambda: KVCache().to_quantized(group_size=32, bits=4),
}
SIZE = 64  # of a head in the contract


def wide_model(family="llama", seed=3, **changes):
    return make_model(family, seed, HEADS[family], **changes)


def every_kind():
    return {name: kind for name, kind in vars(mlx_caches).items() if is_cache(kind)}


def is_cache(kind):
    base = mlx_caches._BaseCache
    return inspect.isclass(kind) and issubclass(kind, base) and kind is not base


def test_every_kind_of_mlx_lm_is_accepted_or_refused_with_a_reason():
    """Red when: mlx-lm has a new kind of cache and nobody decided about it."""
    accepted = {kind.__name__ for kind in SUPPORTED}
    assert accepted | set(REFUSED) == set(every_kind())
    assert not accepted & set(REFUSED)
    for name in REFUSED:
        cache = object.__new__(every_kind()[name])
        with pytest.raises(UnsupportedError, match=f"cache of layer 1: {name} cannot take back .*: it {REFUSED[name]}"):
            check_caches([KVCache(), cache])


def test_a_kind_nobody_knows_is_refused():
    with pytest.raises(UnsupportedError, match="Own cannot take back rejected rows: it is unknown"):
        check_caches([type("Own", (KVCache,), {})()])


def test_caches_of_unequal_length_are_refused():
    longer = KVCache()
    longer.offset = 3
    with pytest.raises(UnsupportedError, match="different numbers of tokens"):
        check_caches([KVCache(), longer])


def append(cache, noise, start, count):
    rows = noise[..., start : start + count, :]
    return cache.update_and_fetch(rows, rows + 1)


def fetched(pair):
    return [array for half in pair for array in (half if isinstance(half, tuple | list) else [half])]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.lists(st.integers(0, 6), unique=True, max_size=7).map(sorted)),
        st.tuples(st.just("drop"), st.just(0)),
        st.tuples(st.just("trim"), st.integers(0, 9)),
        st.tuples(st.just("save"), st.just(0)),
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(start=st.one_of(st.integers(0, 12), st.integers(250, 260)), steps=steps)
def test_the_cache_contract(tmp_path_factory, kind, start, steps):
    """After any appends, commits, drops, trims and reloads a cache equals a fresh one of the rows left.

    Red when: rows are misplaced, one of a quantised cache's arrays is forgotten, or an offset is off.
    """
    noise = mx.random.normal((1, 2, start + 8 * len(steps) + 3, SIZE), key=mx.random.key(start))
    cache, rows, used = KINDS[kind](), list(range(start)), start
    if start:
        append(cache, noise, 0, start)
    for what, argument in steps:
        before = len(rows)
        if what in ("commit", "drop"):
            append(cache, noise, used, 7)
            if what == "commit":
                commit_rows(cache, before, argument)
                rows += [used + row for row in argument]
            else:
                drop_rows(cache, before)
            used += 7
        elif what == "trim":
            assert trim_prompt_cache([cache], argument) == min(argument, before)
            del rows[max(before - argument, 0) :]
        elif cache.keys is not None:
            file = tmp_path_factory.mktemp("cache") / "one.safetensors"
            save_prompt_cache(str(file), [cache])
            (cache,) = load_prompt_cache(str(file))
        assert cache.offset == len(rows)
    found = fetched(append(cache, noise, used, 3))
    fresh = KINDS[kind]()
    expected = mx.take(noise, mx.array([*rows, used, used + 1, used + 2]), axis=2)
    for mine, other in zip(found, fetched(fresh.update_and_fetch(expected, expected + 1)), strict=True):
        assert mx.array_equal(mine, other)
    assert len(arrays_of(cache)) == (2 if kind == "full" else 6)


@pytest.mark.parametrize("kind", KINDS)
def test_committing_a_chain_moves_nothing(kind):
    cache = KINDS[kind]()
    rows = mx.ones((1, 2, 6, SIZE))
    cache.update_and_fetch(rows, rows)
    arrays = [id(array) for array in arrays_of(cache)]
    contents = [mx.array(array) for array in arrays_of(cache)]
    commit_rows(cache, 2, [0, 1])
    drop_rows(cache, 1)
    assert ([id(array) for array in arrays_of(cache)], cache.offset) == (arrays, 1)
    for array, before in zip(arrays_of(cache), contents, strict=True):
        assert mx.array_equal(array, before)


DRAFTS = {
    "off": ("off", None),
    "chain": ("chain", None),
    "cartesian": ("tree", "cartesian:3x2x2x1"),
    "best-first": ("tree", "best-first:10"),
    "auto": ("auto", None),
}


@pytest.mark.parametrize(
    ("family", "draft", "insertion"),
    [
        ("llama", "cartesian", "parallel"),
        ("llama", "auto", "leaf"),
        ("llama", "chain", "leaf"),
        ("qwen3", "best-first", "deferred"),
        ("qwen3", "cartesian", "leaf"),
        ("phi3", "chain", "parallel"),
        ("phi3", "off", "deferred"),
        ("opt", "cartesian", "deferred"),
        ("gpt2", "best-first", "parallel"),
    ],
)
def test_tokens_over_a_quantised_cache_are_mlx_lms(family, draft, insertion):
    """Red when: the cache is quantised a pass too early or late, or a pass reaches across that point.

    From the first token on, in mid-prompt, with the last token of the prompt, in mid-answer.
    """
    model = wide_model(family)
    prompt = random_prompt(11, seed=5)
    mode, tree = DRAFTS[draft]
    for start in (0, 6, 11, 17):
        kept = {**QUANTISED, "quantized_kv_start": start, "prefill_step_size": 4}
        expected = plain_tokens(model.base, prompt, 14, end_of_text=(), **kept)
        with drafter(model, expected, len(prompt), 0.8, seed=start):
            tokens = our_tokens(
                model,
                prompt,
                14,
                tokenizer=NumberTokenizer(end_of_text=()),
                draft=mode,
                draft_options=DraftOptions(tree=tree, insertion=insertion),
                **kept,
            )
        assert tokens == expected, start


def test_quantising_changes_the_text_where_it_is_asked_for():
    """The tests above would pass if nothing were ever quantised and nobody noticed."""
    model, prompt = wide_model(), random_prompt(30, seed=6)
    texts = [
        our_tokens(model, prompt, 30, tokenizer=NumberTokenizer(end_of_text=()), **more)
        for more in ({}, {"kv_bits": 2, "kv_group_size": 32, "quantized_kv_start": 0})
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("kept", ["full", "quantised"])
@pytest.mark.parametrize("draft", ["off", "tree", "auto"])
def test_a_prompt_cache_comes_back_as_mlx_lm_leaves_it(draft, kept):
    """Red when: a kept cache is quantised later than mlx-lm's, or keeps the rows of the last pass."""
    model = wide_model(seed=5)
    first, second = random_prompt(9, seed=10), random_prompt(4, seed=11)
    quantised = {**QUANTISED, "quantized_kv_start": 13}
    theirs, ours = (model.make_cache() for _ in range(2))
    if kept == "quantised":
        theirs, ours = ([cache.to_quantized(32, 4) for cache in caches] for caches in (theirs, ours))
    for prompt in (first, second):
        expected = plain_tokens(model.base, prompt, 8, end_of_text=(), prompt_cache=theirs, **quantised)
        tokenizer = NumberTokenizer(end_of_text=())
        with drafter(model, expected, ours[0].offset + len(prompt), 0.8):
            tokens = our_tokens(model, prompt, 8, tokenizer=tokenizer, draft=draft, prompt_cache=ours, **quantised)
        assert tokens == expected
        assert [(type(c), c.offset) for c in ours] == [(type(c), c.offset) for c in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for array, reference in zip(*(fetched(cache.keys_and_values()) for cache in (mine, other)), strict=True):
            assert mx.allclose(array.astype(mx.float32), reference.astype(mx.float32), atol=LOGITS)


def test_a_closed_generator_leaves_a_quantised_cache_at_what_was_yielded():
    """Red when: rows of a pass under way stay in the six arrays, or the last change of kind is forgotten."""
    for draft in ("off", "chain"):
        for start in (9, 11, 14, 15, 19):
            model, prompt = wide_model(seed=5), random_prompt(9, seed=12)
            caches = model.make_cache()
            responses = stream_generate(
                model,
                NumberTokenizer(end_of_text=()),
                prompt,
                20,
                draft=draft,
                prompt_cache=caches,
                **QUANTISED,
                quantized_kv_start=start,
            )
            tokens = next(responses).tokens + next(responses).tokens
            responses.close()
            length = len(prompt) + len(tokens)
            kind = QuantizedKVCache if length >= start else KVCache
            assert {(type(cache), cache.offset) for cache in caches} == {(kind, length)}


def test_value_rotation_over_a_quantised_cache():
    """Red when: the turned values go round the quantised cache, or main rows see them."""
    model = wide_model(seed=4, stream_id={"type": "value_rotation", "epsilon": 0.3})
    prompt = random_prompt(11, seed=2)
    for start in (0, 15):
        kept = {**QUANTISED, "quantized_kv_start": start}
        expected = plain_tokens(model.base, prompt, 24, **kept)
        for insertion in ("deferred", "parallel", "leaf"):
            options = DraftOptions(tree="best-first:6", insertion=insertion)
            with drafter(model, expected, len(prompt), 0.7):
                assert our_tokens(model, prompt, 24, draft="tree", draft_options=options, **kept) == expected


@functools.cache
def limited_reference(length, size, temp):
    """A model, and what mlx-lm makes of a prompt of it with a cache of this size."""
    model = make_model("qwen3", seed=6)
    limited = {"max_kv_size": size, "prefill_step_size": 6, "sampler": make_sampler(temp)}
    return model, plain_tokens(model.base, random_prompt(length, seed=length), 30, seed=3, end_of_text=(), **limited)


@pytest.mark.parametrize(("draft", "temp"), [*((draft, 0.0) for draft in DRAFTS), ("auto", 0.9)])
def test_a_size_limited_cache_forgets_as_mlx_lms_does(draft, temp):
    """Red when: a tree reaches past the size, or the full cache is turned round otherwise than mlx-lm's."""
    mode, tree = DRAFTS[draft]
    for length, size in ((9, 5), (9, 8), (9, 16), (9, 200), (1, 12), (23, 14)):
        prompt = random_prompt(length, seed=length)
        model, expected = limited_reference(length, size, temp)
        with drafter(model, expected, length, 0.8, seed=size):
            tokens = our_tokens(
                model,
                prompt,
                30,
                seed=3,
                tokenizer=NumberTokenizer(end_of_text=()),
                draft=mode,
                draft_options=DraftOptions(tree=tree, insertion="leaf" if length == 9 else None),
                max_kv_size=size,
                prefill_step_size=6,
                sampler=make_sampler(temp),
            )
        assert tokens == expected, (length, size)


def test_forgetting_changes_the_text_and_bounds_the_rows(monkeypatch):
    """Red when: the caches go on growing."""
    model, prompt = make_model("qwen3", seed=6), random_prompt(9, seed=9)
    made, original = [], CacheGrowth.make_caches
    monkeypatch.setattr(CacheGrowth, "make_caches", lambda *call: made.append(original(*call)) or made[-1])
    tokenizer = NumberTokenizer(end_of_text=())
    texts = [our_tokens(model, prompt, 50, tokenizer=tokenizer, max_kv_size=size) for size in (None, 16)]
    assert texts[0] != texts[1]
    assert [caches[0].keys.shape[2] for caches in made] == [256, 16]


def test_a_size_limit_that_mlx_lm_ignores_is_refused_where_it_would_count():
    """Stock llama makes its own caches, which know no size."""
    model, prompt = make_model("llama", seed=6), random_prompt(9, seed=9)
    expected = plain_tokens(model.base, prompt, 7)
    assert our_tokens(model, prompt, 7, max_kv_size=16) == expected
    for max_tokens, text in ((8, "of up to 17 tokens"), (-1, "without a limit")):
        with pytest.raises(UnsupportedError, match=f"max_kv_size is 16, for a text {text}: mlx-lm makes"):
            our_tokens(model, prompt, max_tokens, max_kv_size=16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kv_bits": 7}, UsageError, "kv_bits is 7, expected one of 2, 3, 4, 5, 6, 8"),
        ({"kv_bits": 4, "kv_group_size": 48}, UsageError, "kv_group_size is 48, expected one of 32, 64, 128"),
        ({"kv_bits": 4}, UnsupportedError, "kv_group_size is 64: heads of 32 numbers cannot be quantised"),
        ({"kv_bits": 4, "quantized_kv_start": -1}, UsageError, "quantized_kv_start is -1, expected at least 0"),
        ({"max_kv_size": 4}, UsageError, "max_kv_size is 4, expected more than 4"),
        ({"max_kv_size": 64, **QUANTISED}, UnsupportedError, "no quantised cache of limited size"),
    ],
)
def test_caches_that_cannot_be_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        our_tokens(wide_model(), [7, 8], 3, **arguments)


def test_windows_are_not_quantised(monkeypatch):
    """mlx-lm raises NotImplementedError in mid-text; red when we go on with a cache of another kind."""
    model = wide_model()
    monkeypatch.setattr(type(model.base), "make_cache", lambda base: [KVCache(), RotatingKVCache(8)] * 2)
    with pytest.raises(UnsupportedError, match="kv_bits: mlx-lm cannot quantise the cache of a layer with a sliding"):
        CacheGrowth(**QUANTISED).check(model, None, 9)


def test_a_prompt_cache_and_the_arguments_must_agree():
    model = wide_model()
    caches = [QuantizedKVCache(32, 8) for _ in model.layers]
    with pytest.raises(UsageError, match="the prompt cache has 8 bits in groups of 32"):
        our_tokens(model, [7, 8], 3, prompt_cache=caches, **QUANTISED)
    with pytest.raises(UsageError, match="max_kv_size goes with a fresh cache"):
        our_tokens(model, [7, 8], 3, prompt_cache=model.make_cache(), max_kv_size=9)
    for cache in (RotatingKVCache(9), ConcatenateKVCache()):
        with pytest.raises(UnsupportedError, match=type(cache).__name__):
            our_tokens(model, [7, 8], 3, prompt_cache=[cache] * 4)


def turn(kept, model, ids, count, **more):
    tokens, prompted = [], kept.reuse(ids)
    tokenizer = NumberTokenizer(end_of_text=())
    for response in stream_generate(model, tokenizer, prompted, count, prompt_cache=kept.caches, **more):
        kept.tokens += response.tokens
        tokens += response.tokens
    return tokens, len(prompted)


@pytest.mark.parametrize("draft", ["off", "tree", "auto"])
def test_a_kept_prefix_is_not_run_again(draft):
    """Red when: rows of the last answer survive a trim, or nothing is left to run."""
    model = make_model("qwen3", seed=8)
    kept = PrefixCache(model)
    first = random_prompt(12, seed=1)
    answer, prompted = turn(kept, model, first, 9, draft=draft)
    assert prompted == 12
    longer = first + answer + random_prompt(5, seed=2)
    for ids, rest in (
        (longer, 5),  # the conversation goes on
        (longer, 1),  # the same again: its last token gives the first logits
        (first + answer[:4] + random_prompt(6, seed=3), 6),  # the template renders an earlier turn otherwise
        (longer[:3], 1),
        (random_prompt(7, seed=4), 7),  # nothing in common
    ):
        expected = plain_tokens(model.base, ids, 9, end_of_text=())
        assert turn(kept, model, ids, 9, draft=draft) == (expected, rest)
        assert {cache.offset for cache in kept.caches} == {len(kept.tokens)} == {len(ids) + 9}


@pytest.mark.parametrize("call", [2, 10], ids=["prompt", "answer"])
def test_a_kept_prefix_outlives_an_interrupted_pass(call):
    """Red when: rows that only some layers got are believed."""
    model = make_model("qwen3", seed=8)
    kept = PrefixCache(model)
    prompt = random_prompt(12, seed=1)
    calls = []

    class Interrupted(Exception):
        pass

    def interrupt(*arguments):
        calls.append(0)
        if len(calls) == call:
            raise Interrupted
        return original(*arguments)

    layer = type(model.layers[0])
    original = layer.__call__
    layer.__call__ = interrupt
    try:
        with pytest.raises(Interrupted):
            turn(kept, model, prompt, 40, draft="chain")
    finally:
        layer.__call__ = original
    assert len({cache.offset for cache in kept.caches}) > 1, "the layers must disagree for this test to say something"
    ids = prompt + kept.tokens[12:] + [9, 8]
    assert turn(kept, model, ids, 9)[0] == plain_tokens(model.base, ids, 9, end_of_text=())


def test_a_stop_string_in_mid_pass_leaves_a_prefix_that_can_go_on():
    """Red when: tokens behind the stop string count as part of the conversation."""
    model = make_model("qwen3", seed=8)
    prompt = random_prompt(12, seed=1)
    free = plain_tokens(model.base, prompt, 20, end_of_text=())
    for index in range(1, 12):
        kept = PrefixCache(model)
        with drafter(model, free, len(prompt), 1.0):
            tokens, _ = turn(kept, model, prompt, 20, draft="chain", stop=[f"{free[index]} "])
        ids = prompt + tokens + [11, 12]
        assert turn(kept, model, ids, 6)[0] == plain_tokens(model.base, ids, 6, end_of_text=())


def test_a_kept_quantised_prefix_is_trimmed_like_mlx_lms():
    model = wide_model(seed=9)
    theirs, kept = make_prompt_cache(model.base), PrefixCache(model)
    prompt = random_prompt(12, seed=1)
    more = {**QUANTISED, "quantized_kv_start": 4}
    expected = plain_tokens(model.base, prompt, 6, end_of_text=(), prompt_cache=theirs, **more)
    assert turn(kept, model, prompt, 6, **more)[0] == expected
    ids = prompt + expected[:2] + [8, 9, 10]
    trim_prompt_cache(theirs, 4)
    assert turn(kept, model, ids, 6, **more) == (
        plain_tokens(model.base, ids[14:], 6, end_of_text=(), prompt_cache=theirs, **more),
        3,
    )


METADATA = {"model": "somewhere", "tokenizer_config": "{}"}


def filled(model, prompt, **growth):
    growth = CacheGrowth(**growth)
    caches = growth.make_caches(model, len(prompt))
    prefill(model, prompt, caches, 2048, None, len(prompt), growth)
    return caches


@pytest.mark.parametrize("quantised", [{}, {**QUANTISED, "quantized_kv_start": 0}], ids=["full", "quantised"])
@pytest.mark.parametrize("writer", ["ours", "mlx-lm"])
def test_prompt_caches_are_mlx_lms_in_both_directions(tmp_path, writer, quantised):
    """Red when: a file of ours cannot be read by mlx-lm or the other way round, or goes on otherwise."""
    model, prompt, query = wide_model(seed=11), random_prompt(21, seed=1), random_prompt(5, seed=2)
    file = tmp_path / "prompt.safetensors"
    caches = filled(model, prompt, **quantised)
    if writer == "ours":
        prompt_cache.save_prompt_cache(file, caches, prompt, METADATA)
        prompt_cache.save_prompt_cache(file, caches, prompt, METADATA)  # replaces the earlier one
    else:
        save_prompt_cache(str(file), caches, METADATA)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    theirs, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert {name: metadata[name] for name in METADATA} == METADATA
    assert {name: prompt_cache.read_metadata(file)[name] for name in METADATA} == METADATA
    expected = plain_tokens(model.base, query, 12, end_of_text=(), prompt_cache=theirs)
    for draft in ("off", "tree"):
        ours = prompt_cache.load_prompt_cache(file, model)
        tokenizer = NumberTokenizer(end_of_text=())
        assert our_tokens(model, query, 12, tokenizer=tokenizer, draft=draft, prompt_cache=ours) == expected


def test_an_unfinished_prompt_cache_is_never_left_behind(tmp_path, monkeypatch):
    """Red when: a full disk leaves a file, or destroys the earlier one."""
    model, prompt = make_model("llama"), random_prompt(9, seed=1)
    file = tmp_path / "prompt.safetensors"
    prompt_cache.save_prompt_cache(file, filled(model, prompt), prompt, METADATA)
    before = file.read_bytes()

    def cut_short(name, *arguments):
        save_prompt_cache(name, *arguments)
        Path(name).write_bytes(before[:3000])

    monkeypatch.setattr(prompt_cache, "save_stock", cut_short)
    with pytest.raises(UsageError, match="cannot be written"):
        prompt_cache.save_prompt_cache(file, filled(model, prompt), prompt, METADATA)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_only_a_prompt_cache_is_replaced(tmp_path):
    model = make_model("llama")
    weights = tmp_path / "model.safetensors"
    mx.save_safetensors(str(weights), {"weight": mx.zeros(3)})
    for path, message in (
        (weights, "exists and is no prompt cache"),
        (tmp_path / "cache.bin", "name ends in .safetensors"),
        (tmp_path / "missing" / "cache.safetensors", "no directory"),
    ):
        with pytest.raises(UsageError, match=message):
            prompt_cache.save_prompt_cache(path, model.make_cache(), [], METADATA)


def test_prompt_caches_that_do_not_fit_are_refused(tmp_path):
    """Red when: one of them is accepted, and the text goes on from rows that mean nothing."""
    model, prompt = wide_model(seed=11), random_prompt(21, seed=1)
    file = tmp_path / "prompt.safetensors"
    prompt_cache.save_prompt_cache(file, filled(model, prompt), prompt, METADATA)
    prompt_cache.load_prompt_cache(file, model)
    whole = file.read_bytes()
    other_weights = wide_model(seed=12)
    tuned = wide_model(seed=11)
    tuned.layers[0].self_attn.v_proj.weight = tuned.layers[0].self_attn.v_proj.weight * 1.5
    half = wide_model(seed=11)
    half.base.set_dtype(mx.float16)
    cases = [
        (other_weights, "compute other keys and values for its first 8 tokens"),
        (tuned, "compute other keys and values"),
        (half, "layer 0 is float32, this model makes float16"),
        (make_model("llama"), r"layer 0 has heads \(1, 1\) of \(32, 32\) numbers, this model \(2, 2\) of \(8, 8\)"),
        (make_model("llama", base_changes={"num_hidden_layers": 2}, num_stream_layers=1), "caches of 4 layers, this"),
    ]
    for wrong, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            prompt_cache.load_prompt_cache(file, wrong)
    for content, message in (
        (whole[:-100], r"expected \d+ bytes, the file has \d+; the file is incomplete, download or save it again"),
        (whole[:40], r"the header needs \d+ bytes, the file has 40; it is incomplete"),
        (b"", "the file is empty; download or save it again"),
    ):
        file.write_bytes(content)
        with pytest.raises(InvalidInputError, match=message):
            prompt_cache.load_prompt_cache(file, model)
    with pytest.raises(InvalidInputError, match="file not found"):
        prompt_cache.load_prompt_cache(tmp_path / "missing.safetensors", model)


def test_files_of_other_formats_and_kinds_are_refused(tmp_path):
    model, file = make_model("llama"), str(tmp_path / "prompt.safetensors")
    row = mx.ones((1, 2, 1, 8))

    def written(*caches):
        save_prompt_cache(file, list(caches), METADATA)
        return Path(file)

    rotating, full, wrong, batch = RotatingKVCache(9), KVCache(), KVCache(), KVCache()
    for cache in (rotating, full, wrong):
        cache.update_and_fetch(row, row)
    batch.update_and_fetch(mx.ones((2, 2, 1, 8)), mx.ones((2, 2, 1, 8)))
    with pytest.raises(UnsupportedError, match="cache of layer 0: RotatingKVCache cannot take back"):
        prompt_cache.load_prompt_cache(written(rotating), model)
    wrong.offset = 999
    uneven = KVCache()
    uneven.update_and_fetch(row, row)
    uneven.update_and_fetch(row, row)
    with pytest.raises(UnsupportedError, match="different numbers of tokens"):
        prompt_cache.load_prompt_cache(written(full, full, full, uneven), model)
    for caches in ([wrong] * 4, [batch] * 4):
        with pytest.raises(InvalidInputError, match="not a prompt cache"):
            prompt_cache.load_prompt_cache(written(*caches), model)
    for first in ("[", '["a"]', "[96, 97]", "[1, 2]", "{}"):
        save_prompt_cache(file, [full] * 4, {prompt_cache.FIRST_TOKENS: first})
        with pytest.raises(InvalidInputError, match="not a prompt cache"):
            prompt_cache.load_prompt_cache(Path(file), model)
    mx.save_safetensors(file, {"weight": mx.zeros(3)}, {"format": "mlx"})
    with pytest.raises(InvalidInputError, match="not a prompt cache"):
        prompt_cache.load_prompt_cache(Path(file), model)
