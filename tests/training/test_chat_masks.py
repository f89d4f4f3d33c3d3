"""Chat data: the loss is on exactly what generation would be asked for, and the masks are mlx-lm's."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tuner.datasets import create_dataset

from specstream_mlx import load
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.training.batches import IGNORE, Example, make_batch
from specstream_mlx.training.datasets import Dataset, read_dataset
from specstream_mlx.training.distill import read_prompts
from tests.training.training_cases import save_base

# Turns in w2x ... w49, end-of-text after every answer, tools at the top, thoughts of earlier answers left out.
TEMPLATE = (
    "{% if tools %}w40 {% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}w43 {% if loop.last and m.thought %}{{ m.thought }} {% endif %}{{ m.content }} w5 "
    "{% else %}{{ {'system': 'w41', 'user': 'w42', 'tool': 'w44'}[m.role] }} {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w43{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "w80"}}, {"type": "function", "function": {"name": "w81"}}]


def turns(*contents: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in contents]


ONE = turns(("user", "w10 w11"), ("assistant", "w12 w13"))
SYSTEM = turns(("system", "w14"), ("user", "w10"), ("assistant", "w12"))
MANY = turns(("user", "w10"), ("assistant", "w20 w21"), ("user", "w11"), ("assistant", "w22 w23 w24"))
CALLED = turns(("user", "w10"), ("assistant", "w20"), ("tool", "w15 w16"), ("assistant", "w22"))
THOUGHT = [*MANY[:-1], MANY[-1] | {"thought": "w30 w31"}]
ROWS: dict[str, tuple[dict[str, Any], Example]] = {
    "one turn": ({"messages": ONE}, Example((42, 10, 11, 43), (12, 13, 5))),
    "a system message": ({"messages": SYSTEM}, Example((41, 14, 42, 10, 43), (12, 5))),
    "many turns": ({"messages": MANY}, Example((42, 10, 43, 20, 21, 5, 42, 11, 43), (22, 23, 24, 5))),
    "tools": (
        {"messages": CALLED, "tools": TOOLS},
        Example((40, 80, 81, 42, 10, 43, 20, 5, 44, 15, 16, 43), (22, 5)),
    ),
    "a thought": ({"messages": THOUGHT}, Example((42, 10, 43, 20, 21, 5, 42, 11, 43), (30, 31, 22, 23, 24, 5))),
    "completions": ({"prompt": "w10 w11", "completion": "w12"}, Example((42, 10, 11, 43), (12, 5))),
    "completions with tools": (
        {"prompt": "w10", "completion": "w12", "tools": TOOLS},
        Example((40, 80, 81, 42, 10, 43), (12, 5)),
    ),
    "the user last": ({"messages": MANY[:-1]}, Example((42, 10, 43, 20, 21, 5), (42, 11))),  # as mlx-lm has it
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = save_base(tmp_path_factory.mktemp("chat") / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    return load(base)[1]


def read(rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path, mask_prompt: bool | None = None) -> Dataset:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return read_dataset(str(file), tokenizer, mask_prompt=mask_prompt, max_seq_length=64, seed=0)


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_is_on_the_last_answer_alone(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Red when: a prompt is learned, an answer's first or last token is not, or mlx-lm masks other tokens."""
    row, expected = ROWS[name]
    (found,) = read([row], tokenizer, tmp_path).train
    assert found == expected

    class Asked:
        mask_prompt = True

    tokens, offset = create_dataset([row], tokenizer, Asked).process(row)
    assert (offset, tuple(tokens)) == (len(found.prompt), found.prompt + found.answer)
    batch = make_batch([found], gamma=2)
    learned = [(at + 1, target) for at, target in enumerate(batch.main_targets[0].tolist()) if target != IGNORE]
    assert learned == list(enumerate(tokens))[offset:]
    assert batch.anchors[0].tolist() == list(range(offset - 1, len(tokens) - 2))
    if name != "the user last":
        (tmp_path / "asked.jsonl").write_text(json.dumps(row))
        assert read_prompts(tmp_path / "asked.jsonl", tokenizer) == [found.prompt]
    (whole,) = read([row], tokenizer, tmp_path, mask_prompt=False).train
    assert (len(whole.prompt), whole.prompt + whole.answer) == (1, tuple(tokens))


def test_text_is_learned_whole(tokenizer: Any, tmp_path: Path) -> None:
    """Red when: the chat template reaches plain text."""
    assert read([{"text": "w10 w11"}], tokenizer, tmp_path).train == [Example((10,), (11, 5))]


@pytest.mark.parametrize("messages", [[], "w10", ["w10"], [{"content": "w10"}], None])
def test_messages_that_are_none_are_one_line(messages: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Red when: a row that no template takes gives a traceback or is trained on."""
    with pytest.raises(InvalidInputError, match=r"rows\.jsonl: row 2: ") as caught:
        read([{"messages": ONE}, {"messages": messages}], tokenizer, tmp_path)
    assert "\n" not in str(caught.value)
