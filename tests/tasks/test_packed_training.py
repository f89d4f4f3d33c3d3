"""The packed trainer against the plain one: the same numbers, the same gradients, and a run that can be broken off."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from specstream_torch.checkpoint import load_checkpoint  # noqa: E402
from specstream_torch.loss import Example, make_batch  # noqa: E402
from specstream_torch.modeling import forward_hidden, stream_module  # noqa: E402
from specstream_torch.packed import trainer  # noqa: E402
from specstream_torch.packed.answers import own_answers  # noqa: E402
from specstream_torch.packed.llama import PackedLlama  # noqa: E402
from specstream_torch.packed.loss import packed_loss  # noqa: E402
from specstream_torch.packed.packing import iterate_steps, make_groups, pack, shared_length  # noqa: E402
from specstream_torch.packed.trainer import PackedConfig, train_packed  # noqa: E402
from specstream_torch.testing import make_tiny_checkpoint  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*past_key_values.*is deprecated:FutureWarning"),
]
GAMMA, LAYERS, VOCAB = 3, 2, 97
SETTINGS = PackedConfig(
    num_steps=4,
    gamma=GAMMA,
    num_stream_layers=LAYERS,
    rank=2,
    lora_layers=3,
    row_tokens=40,
    step_tokens=80,
    vocab_frequent=8,
    vocab_random=8,
)


def rows_of_examples(seed: int = 0) -> list[Example]:
    """Three prompts that share nothing, with three answers each whose prompts share all but two tokens."""
    chance = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(3, VOCAB) for _ in range(count))

    return [Example(start + ids(2), (*ids(3 + extra), 2)) for start in (ids(7), ids(9), ids(8)) for extra in range(3)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny_checkpoint(
        "llama", tmp_path_factory.mktemp("tiny"), gamma=GAMMA, num_stream_layers=LAYERS, tie_word_embeddings=True
    )


@pytest.fixture
def model(tiny: Any) -> Any:
    return load_checkpoint(tiny.base, tiny.adapter, trainable=True)


@pytest.fixture
def packed() -> Any:
    rows = next(iterate_steps(rows_of_examples(), seed=0, max_branches=2, row_tokens=48, step_tokens=1000))
    examples = [example for row in rows for group in row for example in group.examples]
    assert any(len(group.examples) == 2 for row in rows for group in row)
    assert len(examples) == 9
    return pack(rows, GAMMA, random.Random(0)), examples


def plain_hidden(model: Any, examples: list[Example]) -> tuple[Any, dict[int, Any]]:
    """What the plain forward gives example by example: main rows in order, and the streams of each of them."""
    main, streams = [], {}
    for example in examples:
        batch = make_batch([example], GAMMA)
        hidden = forward_hidden(model, batch.input_ids, batch.anchors)
        start = sum(len(part) for part in main)
        main.append(hidden.main[0, len(example.prompt) - 1 :][: len(example.answer)])
        streams |= {start + i: hidden.streams[0, i] for i in range(len(example.answer) - 1)}
    return torch.cat(main), streams


def test_packed_rows_have_the_plain_numbers_and_gradients(model: Any, packed: Any) -> None:
    batch, examples = packed
    main, streams = PackedLlama(model, torch.float32)(batch, stream_module(model).stream_embeddings, LAYERS)
    plain_main, plain_streams = plain_hidden(model, examples)
    torch.testing.assert_close(main, plain_main, atol=2e-5, rtol=1e-4)  # sums in another order

    row_of = {int(row): entry for entry, row in enumerate(batch.main_rows)}
    places = [(r, a) for r in range(len(batch.anchors)) for a in range(batch.anchors.shape[1]) if batch.anchored[r, a]]
    own = torch.stack([streams[place] for place in places])
    entries = [row_of[r * batch.tokens.shape[1] + int(batch.anchors[r, a])] for r, a in places]
    plain = torch.stack([plain_streams[entry] for entry in entries])
    assert len(places) > 20
    torch.testing.assert_close(own, plain, atol=2e-5, rtol=1e-4)

    parameters = [p for p in model.parameters() if p.requires_grad]
    weight = torch.linspace(-1, 1, main.shape[-1])
    gradients = torch.autograd.grad((main * weight).sin().sum() + (own * weight).sin().sum(), parameters)
    expected = torch.autograd.grad((plain_main * weight).sin().sum() + (plain * weight).sin().sum(), parameters)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-3 * float(right.abs().max()) + 1e-6, rtol=1e-3)


def test_the_short_head_gives_the_loss_and_the_gradient_of_cross_entropy(model: Any, packed: Any) -> None:
    batch, _ = packed
    fast = PackedLlama(model, torch.float32)
    main, streams = fast(batch, stream_module(model).stream_embeddings, LAYERS)
    everything = torch.arange(VOCAB)
    loss = packed_loss(main, streams, fast.head, batch, everything, stream_weight=0.2, distill=0.0).loss
    right = F.cross_entropy(main @ fast.head.T, batch.main_targets)
    for j in range(GAMMA):
        exists = batch.stream_targets[:, :, j] >= 0
        logits = streams[:, :, j][exists] @ fast.head.T
        right = right + 0.2 * F.cross_entropy(logits, batch.stream_targets[:, :, j][exists])
    torch.testing.assert_close(loss, right)
    inputs = (main, streams)
    for found, expected in zip(
        torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(right, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_distilled_targets_mix_the_token_with_what_main_says_there(model: Any, packed: Any) -> None:
    batch, _ = packed
    fast = PackedLlama(model, torch.float32)
    main, streams = fast(batch, stream_module(model).stream_embeddings, LAYERS)
    loss = packed_loss(main, streams, fast.head, batch, torch.arange(VOCAB), stream_weight=1.0, distill=0.3).loss
    teacher = (main @ fast.head.T).softmax(-1).detach()
    right = F.cross_entropy(main @ fast.head.T, batch.main_targets)
    for j in range(GAMMA):
        exists = batch.stream_targets[:, :, j] >= 0
        logits = (streams[:, :, j][exists] @ fast.head.T).log_softmax(-1)
        soft = -(teacher[batch.stream_main[:, :, j][exists]] * logits).sum(-1).mean()
        right = right + 0.7 * F.nll_loss(logits, batch.stream_targets[:, :, j][exists]) + 0.3 * soft
    torch.testing.assert_close(loss, right)
    found, expected = (torch.autograd.grad(value, streams, retain_graph=True)[0] for value in (loss, right))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_rows_that_do_not_count_move_main_by_nothing(model: Any) -> None:
    rows = next(iterate_steps(rows_of_examples(), seed=0, max_branches=2, row_tokens=48, step_tokens=1000))
    batch = pack(rows, GAMMA, random.Random(0), main_counts=False)
    fast = PackedLlama(model, torch.float32)
    main, streams = fast(batch, stream_module(model).stream_embeddings, LAYERS)
    loss = packed_loss(main, streams, fast.head, batch, torch.arange(VOCAB), stream_weight=0.2, distill=0.5).loss
    gradient = torch.autograd.grad(loss, main)[0]
    assert not gradient.any()


def test_groups_share_prompts_and_keep_every_example() -> None:
    examples = rows_of_examples()
    groups = make_groups(examples, 2, random.Random(1))
    kept = [example for group in groups for example in group.examples]
    assert sorted(kept, key=repr) == sorted(examples, key=repr)
    assert max(len(group.examples) for group in groups) == 2
    for group in groups:
        assert group.shared == shared_length(group.examples)
        assert all(
            example.prompt[: group.shared] == group.examples[0].prompt[: group.shared] for example in group.examples
        )


def test_steps_depend_on_the_seed_alone() -> None:
    def steps(seed: int) -> list[Any]:
        source = iterate_steps(rows_of_examples(), seed=seed, max_branches=2, row_tokens=40, step_tokens=80)
        return [next(source) for _ in range(6)]

    assert steps(3) == steps(3)
    assert steps(3) != steps(4)


def test_own_answers_are_greedy_decoding_one_prompt_at_a_time(tiny: Any) -> None:
    model = load_checkpoint(tiny.base, tiny.adapter).eval()
    prompts = sorted({example.prompt[:length] for example in rows_of_examples() for length in (2, 5)})[::2]
    eos_id, limit = 5, 12
    found = {
        e.prompt: e.answer
        for e in own_answers(PackedLlama(model, torch.float32), prompts, max_tokens=limit, eos_id=eos_id, batch_size=4)
    }
    ended = 0
    for prompt in prompts:
        answer: list[int] = []
        while len(answer) < limit and (not answer or answer[-1] != eos_id):
            with torch.no_grad():
                answer.append(int(model(torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()))
        if answer[-1] == eos_id:
            ended += 1
            assert found[prompt] == tuple(answer)
        else:
            assert prompt not in found
    assert len(found) == ended


def test_a_run_that_was_broken_off_ends_as_if_it_had_not_been(tiny: Any, tmp_path: Path) -> None:
    examples = rows_of_examples()
    whole = train_packed(tiny.base, examples, tmp_path / "whole", SETTINGS, report=lambda line: None)

    class BrokenOff(Exception):
        pass

    def stop(line: str) -> None:
        if '"step": 2' in line:
            raise BrokenOff

    more = {"save_minutes": -1.0, "log_steps": 1}
    with pytest.raises(BrokenOff):
        train_packed(tiny.base, examples, tmp_path / "parts", SETTINGS, report=stop, **more)  # type: ignore[arg-type]
    assert (tmp_path / "parts" / "restart").exists()
    parts = train_packed(tiny.base, examples, tmp_path / "parts", SETTINGS, report=lambda line: None)
    first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, parts))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=0.02, rtol=0.02)  # bfloat16 products where they are fast
    assert not (tmp_path / "parts" / "restart").exists()


def test_other_settings_do_not_go_on(tiny: Any, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if '"step": 2' in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_packed(tiny.base, rows_of_examples(), tmp_path, SETTINGS, report=stop, save_minutes=-1.0, log_steps=1)
    with pytest.raises(ValueError, match=r"rank: 2 -> 3"):
        train_packed(tiny.base, rows_of_examples(), tmp_path, replace(SETTINGS, rank=3), report=lambda line: None)


def test_own_answers_teach_the_streams_and_lora_alone_takes_the_same_rows(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, num_steps=2, own_prompts=4, own_step_tokens=60)
    monkeypatch.setattr(trainer, "own_answers", lambda fast, prompts, **more: rows_of_examples(1))
    lines: list[str] = []
    first = train_packed(tiny.base, rows_of_examples(), tmp_path / "own", settings, report=lines.append, log_steps=1)
    assert any(line.startswith("9 of 4 prompts answered to the end") for line in lines)
    training = json.loads((first / "specstream_config.json").read_text())["training"]
    alone = replace(SETTINGS, num_steps=2, num_stream_layers=0)
    second = train_packed(tiny.base, rows_of_examples(), tmp_path / "alone", alone, report=lambda line: None)
    counts = json.loads((second / "training.json").read_text())
    assert (counts["tokens"], counts["steps"]) == (training["tokens"], training["steps"])
    assert not any("specstream" in name for name in load_file(second / "adapter_model.safetensors"))


def test_a_later_task_starts_from_an_earlier_checkpoint(tiny: Any, tmp_path: Path) -> None:
    examples = rows_of_examples()
    first = train_packed(tiny.base, examples, tmp_path / "first", SETTINGS, report=lambda line: None)
    deeper = replace(SETTINGS, num_steps=1, num_stream_layers=3, learning_rate=0.0, stream_learning_rate=0.0)
    second = train_packed(tiny.base, examples, tmp_path / "second", deeper, start=first, report=lambda line: None)
    assert json.loads((second / "specstream_config.json").read_text())["num_stream_layers"] == 3
    before, after = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    with pytest.raises(ValueError, match="has 3 streams, 5 are asked for"):
        train_packed(
            tiny.base, examples, tmp_path / "third", replace(deeper, gamma=5), start=first, report=lambda line: None
        )


@pytest.mark.parametrize("settings", [{}, {"num_steps": 1, "hours": 1.0}])
def test_a_budget_is_either_steps_or_hours(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="either num_steps or hours"):
        PackedConfig(**settings)


def test_a_model_that_never_ends_an_answer_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "own_answers", lambda fast, prompts, **more: [])
    settings = replace(SETTINGS, own_prompts=4, own_step_tokens=60)
    with pytest.raises(ValueError, match="no answer of the model ended"):
        train_packed(tiny.base, rows_of_examples(), tmp_path, settings, report=lambda line: None)
