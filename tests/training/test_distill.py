"""The model's own answers: they are its own, they are kept, and they are made once."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from specstream_mlx import load
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.training import distill
from specstream_mlx.training.batches import Example
from specstream_mlx.training.datasets import Dataset
from specstream_mlx.training.distill import DistillSettings, base_identity, general_prompts, own_answers, read_prompts
from tests.tiny import END_OF_TEXT, NumberTokenizer, make_model, plain_tokens, random_prompt
from tests.training.training_cases import save_base, words

PROMPTS = [tuple(random_prompt(2 + i % 5, seed=i)) for i in range(13)]
SETTINGS = DistillSettings(samples=1, max_tokens=12, batch_size=4, temp=1.0, seed=1)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    base = save_base(tmp_path_factory.mktemp("tiny") / "base")
    return base, *load(base)


def answered(
    loaded: tuple[Path, Any, Any], file: Path, settings: DistillSettings = SETTINGS, **changes: Any
) -> Dataset:
    _, model, tokenizer = loaded
    options = {"identity": "tiny", "max_seq_length": 64, "split_seed": 0} | changes
    return own_answers(model, tokenizer, PROMPTS, settings, file, **options)


def test_greedy_answers_are_mlx_lms_and_end_with_end_of_text(
    loaded: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: batching changes an answer, end-of-text is lost, or answers go to other prompts."""
    early = plain_tokens(loaded[1].base, PROMPTS[0], 5)[3]
    monkeypatch.setattr(loaded[2], "_eos_token_ids", {END_OF_TEXT, early})
    found = answered(loaded, tmp_path / "answers.jsonl", max_seq_length=14)
    greedy = {
        prompt: tuple(plain_tokens(loaded[1].base, prompt, min(12, 14 - len(prompt)), end_of_text=(END_OF_TEXT, early)))
        for prompt in PROMPTS
    }
    assert len(found.valid) == 1
    assert found.valid[0] == Example(found.valid[0].prompt, greedy[found.valid[0].prompt])
    assert len(found.train) == 2 * 12
    assert {example.prompt: example.answer for example in found.train[:12]} == {
        prompt: greedy[prompt] for prompt in PROMPTS if prompt != found.valid[0].prompt
    }
    assert {answer[-1] in (END_OF_TEXT, early) for answer in greedy.values()} == {True, False}
    sampled = {example.prompt: example.answer for example in found.train[12:]}
    assert any(sampled[prompt] != greedy[prompt] for prompt in sampled)


def test_progress_is_told_within_a_batch_too(loaded: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Red when: a log hears of a batch only once all of it is answered, or counts an answer twice."""
    told: list[tuple[int, int]] = []
    answered(loaded, tmp_path / "answers.jsonl", progress=lambda done, total: told.append((done, total)))
    counts = [done for done, _ in told]
    assert {total for _, total in told} == {26}
    assert counts == sorted(counts)
    assert counts[-1] == 26
    assert len(counts) > 5 * SETTINGS.batch_size


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "llama-dynamic"])
def test_answers_of_models_that_mlx_lm_runs_in_batches_or_cannot(family: str) -> None:
    """Red when: a batch is asked of a model that mlx-lm cannot batch."""
    model = make_model(family, seed=3)
    prompts = [tuple(random_prompt(length, seed=length)) for length in (5, 9)]
    found = distill._answer(model, NumberTokenizer(), prompts, [8, 8], 0.0, 0)
    assert found == [tuple(plain_tokens(model.base, prompt, 8)) for prompt in prompts]


def test_answers_are_kept_and_an_interrupted_run_goes_on(
    loaded: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: answers are made twice, change on resume, or a line that was cut off stops everything."""
    whole = answered(loaded, tmp_path / "whole.jsonl")
    real, calls = distill._answer, 0

    def limited(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(distill, "_answer", limited)
    file = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answered(loaded, file)
    with file.open("a") as out:
        out.write('{"model": "half a li')
    calls = -100
    assert answered(loaded, file) == whole
    assert calls == -100 + 2 * 4 - 3
    assert answered(loaded, file) == whole
    assert calls == -100 + 2 * 4 - 3
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_answers_of_other_models_and_settings_are_not_used(
    loaded: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: another model's answers are trained on."""
    file = tmp_path / "answers.jsonl"
    answered(loaded, file)
    before = file.read_text()
    other = answered(loaded, file, identity="another")
    assert file.read_text().startswith(before)
    assert len(file.read_text()) > 1.6 * len(before)
    assert other.train
    hotter = DistillSettings(samples=1, max_tokens=12, batch_size=4, temp=3.0, seed=1)
    monkeypatch.setattr(distill, "_answer", lambda *a: [(7, 7)] * len(a[2]))
    mixed = answered(loaded, file, hotter)
    assert [example.answer == (7, 7) for example in mixed.train] == [False] * 12 + [True] * 12


def test_every_sample_is_another_answer(loaded: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Red when: the samples of a prompt share their random numbers, or the greedy one does not count apart."""
    twice = DistillSettings(samples=2, max_tokens=12, batch_size=4, temp=3.0, seed=1)
    found = answered(loaded, tmp_path / "answers.jsonl", twice).train
    assert len(found) == 3 * 12
    for one, other in ((0, 12), (0, 24), (12, 24)):
        pairs = zip(found[one : one + 12], found[other : other + 12], strict=True)
        assert sum(a.prompt == b.prompt and a.answer != b.answer for a, b in pairs) > 9


def test_answers_of_longer_rows_are_not_used(loaded: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Red when: a row is longer than asked for because it was once made so, or short because it was once cut."""
    lengths = [max(map(len, answered(loaded, tmp_path / "a", max_seq_length=most).train)) for most in (14, 9, 14)]
    assert lengths == [14, 9, 14]


def test_models_whose_answers_differ_have_other_identities(loaded: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Red when: a 4-bit copy, or another base of the same shape, is given the answers of the first."""
    base = loaded[0]
    described = {"name_or_path": "a", "fingerprint": {"sha256": "0"}}
    one = base_identity(base, described)
    assert one == base_identity(base, described | {"name_or_path": "b"})
    assert one != base_identity(base, described | {"fingerprint": {"sha256": "1"}})
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    assert one == base_identity(tmp_path, described)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-2000:-1000] = bytes(1000)  # a fine-tune, which may keep what the fingerprint is made of
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert one != base_identity(tmp_path, described)


def test_bad_files_are_one_line(loaded: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Red when: a damaged or foreign file gives a traceback."""
    file = tmp_path / "answers.jsonl"
    file.write_text('broken\n{"model": "x"}\n')
    with pytest.raises(InvalidInputError, match=r"answers.jsonl:1: not JSON"):
        answered(loaded, file)
    for text in ('{"text": "x"}', "[1, 2]", "7", '{"sample": 0, "prompt": "w10", "answer": [1]}'):
        file.write_text(text + "\n{}\n")
        with pytest.raises(InvalidInputError, match="not a file of answers"):
            answered(loaded, file)
    with pytest.raises(UsageError, match="cannot be read"):
        answered(loaded, tmp_path)
    with pytest.raises(InvalidInputError, match="leaves room"):
        answered(loaded, tmp_path / "new.jsonl", max_seq_length=3)
    with pytest.raises(
        UsageError, match="--max-tokens: got 1, expected at least 2\n--temp: got 0, expected a number above 0"
    ):
        DistillSettings(max_tokens=1, temp=0)


def test_prompts_come_from_text_and_jsonl(loaded: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Red when: an answer gets into a prompt, or a prompt is asked twice."""
    tokenizer = loaded[2]
    expected = [(10, 11), (12,)]
    text = tmp_path / "prompts.txt"
    text.write_text("w10 w11\n\nw12\nw10 w11\n")
    assert read_prompts(text, tokenizer) == expected
    jsonl = tmp_path / "train.jsonl"
    jsonl.write_text('{"prompt": "w10 w11", "completion": "w20"}\n{"prompt": "w12"}\n')
    assert read_prompts(jsonl, tokenizer) == expected
    assert read_prompts(tmp_path, tokenizer) == expected
    jsonl.write_text('{"messages": [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w20"}]}\n')
    with pytest.raises(InvalidInputError, match=r"train\.jsonl:1: messages need a chat template"):
        read_prompts(jsonl, tokenizer)
    tokenizer._tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w30"
    template, tokenizer.has_chat_template = tokenizer.has_chat_template, True
    try:
        assert read_prompts(jsonl, tokenizer) == [(10, 30)]
        assert read_prompts(text, tokenizer) == [(10, 11, 30), (12, 30)]
    finally:
        tokenizer.has_chat_template = template
    jsonl.write_text(json.dumps({"answer": words((10,))}) + "\n")
    with pytest.raises(InvalidInputError, match=":1: expected a JSON object with a 'prompt'"):
        read_prompts(jsonl, tokenizer)
    text.write_text("\n")
    with pytest.raises(InvalidInputError, match="no prompts in it"):
        read_prompts(text, tokenizer)


THINKING = (
    "{% for t in tools or [] %}w60 {{ t.name }} {% endfor %}"
    "{% for m in messages %}{{ raise_exception('no robots') if m.role == 'robot' }}"
    "{{ {'system': 'w61', 'user': 'w62', 'assistant': 'w63'}[m.role] }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}w63{% if enable_thinking %} w64"
    "{% endif %}{% endif %}"
)


@pytest.fixture
def chatty(tmp_path: Path) -> Any:
    base = save_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(THINKING)
    return load(base)[1]


def test_the_chat_template_is_asked_as_generation_asks_it(chatty: Any, tmp_path: Path) -> None:
    """Red when: flags, tools, system messages or earlier turns do not reach the template, or the answer does."""
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": role, "content": f"w{30 + i}"} for i, role in enumerate(["system", "user", "assistant", "user"])]
    tools = [{"name": "w70"}, {"name": "w71"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "w10\u2028w11"},
        {"prompt": "w10  w11", "tools": tools},
        {"messages": turns},
        {"messages": [*turns, {"role": "assistant", "content": "w99"}]},
        {"messages": turns, "tools": None},
    ]
    file.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    conversation = (61, 30, 62, 31, 63, 32, 62, 33, 63)
    expected = [(62, 10, 11, 63), (60, 70, 60, 71, 62, 10, 11, 63), conversation]
    assert read_prompts(file, chatty) == expected  # mlx-lm: no thinking where the vocabulary has no word for it
    assert read_prompts(file, chatty, {"enable_thinking": True}) == [(*prompt, 64) for prompt in expected]
    text = tmp_path / "prompts.txt"
    text.write_bytes("\ufeffw10\u2028w11\r\n \t\r\nw12\x0bw13\nw10 w11\n".encode())
    assert read_prompts(text, chatty) == [(62, 10, 11, 63), (62, 12, 13, 63)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"prompt": "w10"}\n{"prompt": ""}', ":2: expected a JSON object with a 'prompt'"),
        ('{"messages": ["w10"]}', ":1: expected a JSON object with a 'prompt'"),
        ('{"messages": []}', ":1: expected a JSON object with a 'prompt'"),
        ('{"messages": [{"role": "assistant", "content": "w10"}]}', ":1: expected a JSON object with a 'prompt'"),
        ('{"prompt": ["w10"]}', ":1: expected a JSON object with a 'prompt'"),
        ('{"messages": [{"role": "robot", "content": "w10"}]}', ":1: chat template: refused the messages (no robots)"),
        ('{"prompt": "\\ud800"}', ":1: \\ud800 alone is no character"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_one_line(text: str, reason: str, chatty: Any, tmp_path: Path) -> None:
    """Red when: a row that is no prompt, or that the template refuses, gives a traceback."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(file, chatty)
    assert str(caught.value).startswith(f"{file}{reason}")
    assert "\n" not in str(caught.value)


def test_a_prompt_without_a_token_is_named(loaded: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Red when: nothing is asked of the model, which mlx-lm refuses with a traceback."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w10"}\n{"prompt": "  "}\n')
    with pytest.raises(InvalidInputError, match=":2: the prompt has no token"):
        read_prompts(file, loaded[2])


def test_a_full_disk_keeps_the_answers_before(loaded: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """Red when: half an answer stays in the way, or those before it are made again."""
    whole = answered(loaded, tmp_path / "whole.jsonl")
    expected = (tmp_path / "whole.jsonl").read_bytes()
    file = tmp_path / "answers.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected) // 2, before[1]))
    try:
        with pytest.raises(UsageError, match=r"answers.jsonl: cannot be written \(.*\); the answers before are in it"):
            answered(loaded, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = file.read_bytes()
    assert expected.startswith(kept)
    assert len(kept) == len(expected) // 2
    assert answered(loaded, file) == whole
    assert file.read_bytes() == expected


def test_the_general_prompts_are_many_and_different() -> None:
    """Red when: the list is missing from the package or repeats itself."""
    prompts = general_prompts()
    assert len(prompts) == len(set(prompts)) >= 150
    assert all(10 < len(prompt) < 250 for prompt in prompts)
