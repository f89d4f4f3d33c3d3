"""Prompts as users have them: one reader of files, one way from text to ids, one rule for the chat template."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from specstream_mlx import InvalidInputError, UsageError
from specstream_mlx.calibration.measure import find_samples
from specstream_mlx.formats.chat_template import RESERVED, ChatTemplate, answer_message
from specstream_mlx.formats.jsonl import read_jsonl
from specstream_mlx.formats.prompts import encode_prompt, prompt_ids, read_prompts, text_ids
from specstream_mlx.training import distill
from specstream_mlx.training.datasets import read_rows

ODD = "a\u2028b\u0085c\x0bd\x0ce\x1cf"  # all of them ends of lines for str.splitlines


class Letters:
    """A tokenizer whose ids are code points, with a beginning-of-text token."""

    bos_token, bos_token_id, eos_token_id, has_chat_template = "<s>", 1, 2, False

    def encode(self, text, add_special_tokens=True):
        ids = [1] if text.startswith("<s>") else []
        return [1] * add_special_tokens + ids + [ord(c) for c in text.removeprefix("<s>")]


class Chatty(Letters):
    """The same with a chat template, which shows its messages one after the other."""

    has_chat_template, name_or_path = True, "nowhere"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, continue_final_message=False, **more):
        assert tokenize is False
        assert continue_final_message is not add_generation_prompt
        parts = []
        for message in messages:
            if "<|channel|>" in message["content"]:
                raise ValueError("You have passed a message containing <|channel|> tags in the content field")
            content = message["content"].strip() if more.get("strip") else message["content"]
            parts.append(f"[{message['role'][0]}]{content}")
        return "".join(parts) + ("" if continue_final_message else "|[a]") + "".join(sorted(set(more) - {"strip"}))


def test_every_reader_of_json_lines_has_one_rule(tmp_path):
    """Red when: U+2028 or U+0085 ends a line, a byte order mark spoils the first one, or a reader has its own rule."""
    file = tmp_path / "train.jsonl"
    rows = [{"prompt": ODD, "completion": "x"}, {"prompt": "p", "completion": ODD}]
    text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for mark in ("", "\ufeff"):
        file.write_bytes((mark + text).encode())
        assert read_jsonl(file) == [(1, rows[0]), (3, rows[1])]
        assert read_rows(file) == rows
        prompts = read_prompts(file)
        assert [(prompt.place, prompt.text) for prompt in prompts] == [(f"{file}:1", ODD), (f"{file}:3", "p")]
        assert distill.read_prompts(file, Letters()) == [tuple(text_ids(Letters(), row["prompt"])) for row in rows]
        assert distill._rows(file) == rows
    plain = tmp_path / "prompts.txt"
    plain.write_bytes(f"\ufeff{ODD}\r\n \nq\n".encode())
    assert [(prompt.place, prompt.text) for prompt in read_prompts(plain)] == [(f"{plain}:1", ODD), (f"{plain}:3", "q")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}', ":2: \\ud800 alone is no character; drop the row"),
        (b'{"prompt": "\\udc00\\ud800"}', ":1: \\udc00 alone is no character; drop the row"),
        (b'{"prompt": "a"}\n\n{"prompt"', ":3: not JSON ("),
        (b'{"prompt": "a"}\n"b"', ":2: a str, expected a JSON object with a 'prompt' that is not empty"),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', ":2: cannot be read ('utf-8' codec can't decode byte 0xe9"),
        (b'{"prompt": ""}\n{"p": 1}', ":1: expected a JSON object with a 'prompt' that is not empty\n"),
        (b"", ": no prompts in it"),
        (b"\n \n", ": no prompts in it"),
        (None, ": cannot be read (no such file)"),
    ],
)
def test_a_bad_line_is_named(content, reason, tmp_path):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(file)
    assert str(caught.value).startswith(f"{file}{reason}")


def test_the_name_or_the_first_line_says_what_a_file_holds(tmp_path):
    for name, content, texts in (
        ("a.jsonl", '{"prompt": "x"}', ["x"]),
        ("a", '\n{"prompt": "x"}', ["x"]),
        ("a", "x\n{y", ["x", "{y"]),
        ("a.txt", '{"prompt": "x"}', ['{"prompt": "x"}']),
        ("a.md", "x", ["x"]),
    ):
        (tmp_path / name).write_text(content)
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == texts


def test_messages_are_prompts_too(tmp_path):
    file = tmp_path / "a.jsonl"
    turns = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    file.write_text("\n".join(json.dumps(row) for row in ({"messages": turns}, {"prompt": turns[1:2], "tools": [1]})))
    first, second = read_prompts(file)
    assert (first.messages, first.text, first.asked) == (tuple(turns[:2]), "u", turns)
    assert encode_prompt(Chatty(), first) == [ord(c) for c in "[s]s[u]u|[a]"]
    assert encode_prompt(Chatty(), second) == [ord(c) for c in "[u]u|[a]tools"]
    with pytest.raises(InvalidInputError, match="messages need a chat template, and this tokenizer has none"):
        encode_prompt(Letters(), first)


def test_a_text_begins_once():
    """Red when: a beginning-of-text token stands twice, or in the middle of what a cache goes on with."""
    assert text_ids(Letters(), "ab") == [1, 97, 98]
    assert text_ids(Letters(), "<s>ab") == [1, 97, 98]
    assert text_ids(Letters(), "ab", begins=False) == [97, 98]
    assert prompt_ids(Letters(), "ab", 200, begins=False) == [97, 98]
    assert prompt_ids(Letters(), [1, 97], 200, begins=False) == [1, 97]
    assert encode_prompt(Letters(), "ab") == [1, 97, 98]
    assert encode_prompt(Chatty(), "ab") == [ord(c) for c in "[u]ab|[a]"]


@pytest.mark.parametrize("text", ["a\ud800", "\udc00b"])
def test_half_a_character_is_no_text(text):
    with pytest.raises(InvalidInputError, match=r"prompt: \\ud[8c]00 alone is no character; remove it"):
        prompt_ids(Letters(), text, 10)


class BatchEncoding(dict):
    """What transformers' tokenizers return, near enough."""


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        mx.array([5, 6]),
        np.array([5, 6]),
        np.array([5, 6], dtype=np.uint8),
        [np.int64(5), 6],
        BatchEncoding(input_ids=[5, 6], attention_mask=[1, 1]),
        BatchEncoding(input_ids=np.array([5, 6])),
    ],
)
def test_ids_of_one_prompt(prompt):
    assert prompt_ids(Letters(), prompt, 10) == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ([[5, 6]], "1 rows of ids; give prompt[0]"),
        (mx.array([[5, 6], [7, 8]]), "2 rows of ids; give one of them"),
        (BatchEncoding(input_ids=[[5, 6]]), "1 rows of ids; give prompt[0]"),
        ({"ids": [5]}, "a mapping without 'input_ids'"),
        (b"ab", "b'ab'"),
        (7, "7"),
        (None, "None"),
        (mx.array(7), "array(7"),
        ([5, "a"], "a list with 'a' in it"),
        ([5, 2.5], "a list with 2.5 in it"),
        ([5, None], "a list with None in it"),
        ([True], "a list with True in it"),
        (["a", "b"], "a list with 'a' in it"),
        (np.array([0.5]), "with 0.5 in it"),
        (SimpleNamespace(input=1), "namespace(input=1)"),
    ],
)
def test_what_is_no_prompt_is_one_usage_error(prompt, found):
    with pytest.raises(UsageError) as caught:
        prompt_ids(Letters(), prompt, 10)
    assert str(caught.value).startswith("prompt is ")
    assert found in str(caught.value)
    assert "expected a text, or the token ids of one prompt as a list or an array" in str(caught.value)


@pytest.mark.parametrize("system", [None, "a <query> b", "AB", "Q"])
@pytest.mark.parametrize("prefill", [None, "X is", "Q", "A"])
@pytest.mark.parametrize("question", ["Q", "A", "B", "Query <query>", "[u]"])
def test_what_follows_a_prompt_cache_begins_at_the_question(system, prefill, question):
    """Red when: the question is dropped, or a system prompt or an answer's beginning moves the cut."""
    template = ChatTemplate(system, prefill=prefill)
    after = template.after_cache(Chatty(), question)
    assert after == question + ("|[a]" if prefill is None else f"[a]{prefill}")
    before = ("" if system is None else f"[s]{system}") + "[u]"
    assert before + after == template.render(Chatty(), template.asked(question))


def test_a_question_that_the_template_strips_follows_a_cache_stripped():
    template = ChatTemplate(arguments={"strip": True})
    assert template.after_cache(Chatty(), " Q ") == "Q|[a]"


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_arguments_that_are_decided_here_are_not_blamed_on_the_template(name):
    with pytest.raises(UsageError, match=f"chat template arguments: '{name}' is decided by this program"):
        ChatTemplate(arguments={name: True})


def test_channels_of_an_answer_become_what_the_template_wants():
    """Red when: the second turn of gpt-oss is refused by its template."""
    thought = "<|channel|>analysis<|message|>Hm, 4.<|end|>"
    whole = f"{thought}<|start|>assistant<|channel|>final<|message|>It is 4."
    assert answer_message(whole) == {"role": "assistant", "content": "It is 4.", "thinking": "Hm, 4."}
    assert answer_message(whole + "<|return|>") == answer_message(whole)
    assert answer_message(thought.removesuffix("<|end|>")) == {
        "role": "assistant",
        "content": "",
        "thinking": "Hm, 4.",
    }
    assert answer_message("4 <b>") == {"role": "assistant", "content": "4 <b>"}
    user = {"role": "user", "content": "2+2?"}
    ChatTemplate().render(Chatty(), [user, answer_message(whole), user])
    with pytest.raises(InvalidInputError, match=r"refused the messages \(You have passed a message containing"):
        ChatTemplate().render(Chatty(), [user, {"role": "assistant", "content": whole}, user])


def test_samples_are_found_in_a_directory(tmp_path):
    assert find_samples(tmp_path) is None
    (tmp_path / "samples.jsonl").write_text("")
    assert find_samples(tmp_path) == tmp_path / "samples.jsonl"
