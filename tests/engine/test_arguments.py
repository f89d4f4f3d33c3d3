"""Arguments of a generation: one form each, and one clear refusal."""

import numpy as np
import pytest

from specstream_mlx import UsageError, generate, load, stream_generate
from specstream_mlx.engine import arguments
from tests.tiny import NumberTokenizer, make_model, random_prompt


@pytest.fixture(scope="module")
def model():
    return make_model("llama", seed=15)


PROMPT = random_prompt(9, seed=13)


def text_of(model, **options):
    return generate(model, NumberTokenizer(end_of_text=()), PROMPT, 12, **options)


@pytest.mark.parametrize("draft", ["off", "tree"])
def test_one_string_is_one_stop_string_and_none_is_none(model, draft):
    """Red when: a text stops at the first letter of a stop string."""
    free = text_of(model, draft=draft)
    stop = free.split(" ", 2)[2][:4]
    expected = free[: free.index(stop)]
    for given in (stop, [stop], (stop,), {stop}, iter([stop])):
        assert text_of(model, draft=draft, stop=given) == expected
    for given in (None, [], (), iter([])):
        assert text_of(model, draft=draft, stop=given) == free


def test_integers_of_other_libraries_are_integers(model):
    free = text_of(model)
    found = generate(model, NumberTokenizer(end_of_text=()), PROMPT, np.int64(12), seed=np.uint32(3))
    assert found == free
    assert arguments.logits_processors(()) is arguments.logits_processors(None) is None
    assert arguments.max_tokens(-1) == -1
    assert arguments.seed(2**64 - 1) == 2**64 - 1


def processor(tokens, logits):
    return logits


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stop", b"from", "stop is b'from', expected a string, a list of strings, or None"),
        ("stop", [b"from"], "stop is b'from', expected a string, or strings in the list"),
        ("stop", ["a", 7], "stop is 7, expected a string, or strings in the list"),
        ("stop", 7, "stop is 7, expected a string, a list of strings, or None"),
        ("stop", "", "stop holds an empty string, which would stop at once; remove it"),
        ("stop", ["a", ""], "stop holds an empty string"),
        ("logits_processors", processor, "logits_processors is <function processor"),
        ("logits_processors", processor, "expected a list of functions, such as [processor], or None"),
        ("logits_processors", [processor, 0.5], "logits_processors is 0.5, expected functions of ids and logits"),
        ("logits_processors", "abc", "logits_processors is 'abc', expected a list of functions"),
        ("sampler", 0.7, "sampler is 0.7, expected a function such as mlx_lm.sample_utils.make_sampler(0.7)"),
        ("sampler", "greedy", "sampler is 'greedy', expected a function"),
        ("max_tokens", "10", "max_tokens is '10', expected an integer of at least 1, or -1 for no limit"),
        ("max_tokens", None, "max_tokens is None, expected an integer of at least 1, or -1 for no limit"),
        ("max_tokens", 2.5, "max_tokens is 2.5, expected an integer of at least 1"),
        ("max_tokens", True, "max_tokens is True, expected an integer of at least 1"),
        ("max_tokens", 0, "max_tokens is 0, expected at least 1, or -1 for no limit"),
        ("max_tokens", -2, "max_tokens is -2, expected at least 1"),
        ("seed", "7", "seed is '7', expected an integer from 0 to 18446744073709551615, or None"),
        ("seed", -1, "seed is -1, expected an integer from 0 to"),
        ("seed", 2**64, "seed is 18446744073709551616, expected an integer from 0 to"),
        ("seed", 1.0, "seed is 1.0, expected an integer from 0 to"),
        ("prefill_step_size", 0, "prefill_step_size is 0, expected at least 1"),
        ("prefill_step_size", "2", "prefill_step_size is '2', expected an integer of at least 1"),
        ("prompt_progress_callback", 5, "prompt_progress_callback is 5, expected a function, or None"),
        ("draft", "fast", "draft is 'fast', expected one of auto, tree, chain, off"),
        ("draft", None, "draft is None, expected one of auto"),
        ("draft", ["tree"], "draft is ['tree'], expected one of auto"),
    ],
)
def test_a_value_that_no_argument_takes_is_one_usage_error(model, name, value, message):
    options = {"max_tokens": 12} | {name: value}
    with pytest.raises(UsageError) as caught:
        list(stream_generate(model, NumberTokenizer(end_of_text=()), PROMPT, **options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everything_after_max_tokens_goes_by_its_name(model):
    with pytest.raises(TypeError):
        stream_generate(model, NumberTokenizer(), PROMPT, 12, None)


def test_a_text_that_goes_on_keeps_its_leading_space():
    """mlx-lm drops it; prompt and answer in one text would lose a space between them."""
    model, tokenizer = load()
    from specstream_mlx.bundled import sample_prompt

    prompt = sample_prompt()
    alone = generate(model, tokenizer, prompt, 64)
    behind = generate(model, tokenizer, prompt, 64, continues_text=True)
    assert alone.startswith("SELECT ")
    assert behind == f" {alone}"
    for draft in ("off", "chain"):
        assert generate(model, tokenizer, prompt, 64, continues_text=True, draft=draft) == behind


def test_a_text_behind_a_cache_has_no_beginning_in_its_middle():
    """Red when: a beginning-of-text token stands between what the cache holds and what follows."""
    model, tokenizer = load()
    whole = "CREATE TABLE lamp ( lamp_id INT );"
    expected = tokenizer.encode(whole)
    caches = model.make_cache()
    first, rest = "CREATE TABLE lamp", " ( lamp_id INT );"
    list(stream_generate(model, tokenizer, first, 1, prompt_cache=caches))
    held = caches[0].offset
    (response,) = list(stream_generate(model, tokenizer, rest, 1, prompt_cache=caches))
    assert held == len(tokenizer.encode(first)) + 1  # the token that was generated lies in it too
    assert response.prompt_tokens == len(tokenizer.encode(rest, add_special_tokens=False))
    assert tokenizer.bos_token_id == expected[0]
