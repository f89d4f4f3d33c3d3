"""The recipe: it learns, it is deterministic, and an interrupted run ends as an uninterrupted one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from twin_models import tiny  # noqa: E402

from specstream_torch.checkpoint import load_base  # noqa: E402
from specstream_torch.finetune import (  # noqa: E402
    FinetuneConfig,
    finetune,
    iterate_batches,
    parse_arguments,
    read_examples,
)
from specstream_torch.generate import load_reference, reference_logits  # noqa: E402
from specstream_torch.loss import Example  # noqa: E402
from specstream_torch.self_targets import greedy_answers  # noqa: E402

EXAMPLES = [Example((1, 10 + i), (20 + i, 30 + i, 40 + i, 50 + i, 60 + i, 2)) for i in range(5)]


def settings(output: Path, **changes) -> FinetuneConfig:
    """Return a run of a second or two."""
    config = FinetuneConfig(
        model=str(tiny("llama").base),
        output=str(output),
        rank=8,
        batch_size=2,
        iters=30,
        log_every=1,
        learning_rate=1e-2,
        device="cpu",
    )
    return replace(config, **changes)


def losses(lines: list[str]) -> list[float]:
    """Read the losses out of progress lines."""
    return [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("iter")]


@pytest.mark.parametrize("mode", ["shared", "lossless"])
@pytest.mark.parametrize(("family", "share"), [("llama", 0.6), ("opt-projected", 0.8), ("gpt2", 0.8)])
def test_overfitting_lowers_the_loss(tmp_path: Path, family: str, share: float, mode: str) -> None:
    """Catches: frozen streams or LoRA, targets that do not belong to their rows; lossless is all stream loss."""
    lines: list[str] = []
    prune_rank = 2 if mode == "shared" else None
    config = settings(tmp_path / "out", model=str(tiny(family).base), mode=mode, prune_rank=prune_rank)
    out = finetune(config, EXAMPLES, report=lines.append)
    curve = losses(lines)
    assert len(curve) == 30
    assert sum(curve[-3:]) < share * sum(curve[:3])
    if mode == "shared" and family == "llama":
        model = load_reference(tiny(family).base, out)
        result = reference_logits(model, EXAMPLES[0].prompt)
        assert int(result.main[-1].argmax()) == EXAMPLES[0].answer[0]


def test_bf16_run_stays_near_float32(tmp_path: Path) -> None:
    """Catches: autocast that reaches the optimiser or the loss."""
    curves = []
    for bf16 in (False, True):
        lines: list[str] = []
        finetune(settings(tmp_path / "out", bf16=bf16, iters=8, max_anchors=2), EXAMPLES, report=lines.append)
        curves.append(losses(lines))
    assert curves[0] == pytest.approx(curves[1], rel=0.1, abs=0.1)  # losses of 4; bfloat16 has 8 bits
    assert curves[0] != curves[1]


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, mode: str) -> None:
    """Catches: a lost optimiser or schedule state, batches that start over, dropout noise that differs."""
    config = settings(tmp_path / "a", mode=mode, iters=7, save_every=2, dropout=0.1, accumulate=2)
    whole = finetune(config, EXAMPLES, report=lambda _: None)

    def interrupt(_: object, iteration: int) -> None:
        if iteration == 4:
            raise KeyboardInterrupt

    config = replace(config, output=str(tmp_path / "b"), resume=True)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, EXAMPLES, report=lambda _: None, after_save=interrupt)
    assert not (tmp_path / "b").exists()
    lines: list[str] = []
    resumed = finetune(config, EXAMPLES, report=lines.append)
    assert "from iteration 4" in lines[0]
    expected = load_file(whole / "adapter_model.safetensors")
    found = load_file(resumed / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert len(list((tmp_path / "b.checkpoints").iterdir())) == 2
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        finetune(replace(config, seed=1), EXAMPLES, report=lambda _: None)


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_a_pruner_that_trains_along_changes_nothing_else(tmp_path: Path, mode: str) -> None:
    """Catches: a norm that clips the pruner and the rest together, a start that depends on the pruner's."""
    config = settings(tmp_path / "without", mode=mode, iters=4, clip_norm=0.05)
    outputs = [config, replace(config, output=str(tmp_path / "beside"), prune_rank=2)]
    without, beside = (
        load_file(finetune(one, EXAMPLES, report=lambda _: None) / "adapter_model.safetensors") for one in outputs
    )
    assert len(beside) == len(without) + 2
    assert [key for key, value in without.items() if not torch.equal(value, beside[key])] == []


def test_a_run_can_start_from_a_checkpoint(tmp_path: Path) -> None:
    """Catches: a start that is ignored, or one whose streams are others than the settings say."""
    first = finetune(settings(tmp_path / "first"), EXAMPLES, report=lambda _: None)
    lines: list[str] = []
    finetune(settings(tmp_path / "second", start=str(first), iters=2), EXAMPLES, report=lines.append)
    fresh: list[str] = []
    finetune(settings(tmp_path / "fresh", iters=2), EXAMPLES, report=fresh.append)
    assert losses(lines)[0] < 0.7 * losses(fresh)[0]
    with pytest.raises(ValueError, match="gamma=3"):
        finetune(settings(tmp_path / "other", start=str(first), gamma=3), EXAMPLES)


def test_batches_cover_every_row_once_an_epoch_and_keep_lengths_together() -> None:
    """Catches: dropped rows, the same order each epoch, batches of mixed length."""
    rows = [Example((1,), (5,) * (1 + i % 10)) for i in range(40)]
    source = iterate_batches(rows, 4, seed=3)
    first, second = ([next(source) for _ in range(10)] for _ in range(2))
    for epoch in (first, second):
        assert sorted(row for batch in epoch for row in batch) == list(range(40))
        assert all(len({len(rows[row]) for row in batch}) == 1 for batch in epoch)
    assert first != second
    assert first == [batch for batch, _ in zip(iterate_batches(rows, 4, seed=3), range(10), strict=False)]


def test_command_line_and_jsonl(tmp_path: Path) -> None:
    """Catches: a prompt in the targets, an answer without end-of-text, an option that is not passed on."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "ab", "answer": "c"}\n\n{"prompt": "b", "completion": "ca"}\n')
    base = str(tiny("llama").base)
    words = "--output out --mode lossless --gamma 3 --num-stream-layers 1 --stream-init-rank 5 --prune-rank 8 --bf16"
    config = parse_arguments(["--model", base, "--data", str(data), "--form", "B", *words.split()])
    assert (config.mode, config.bf16, config.form) == ("lossless", True, "B")
    assert (config.streams.gamma, config.streams.init_rank, config.streams.prune_rank) == (3, 5, 8)
    a, b, c = (3 + ord(letter) - 32 for letter in "abc")
    assert read_examples(config) == [Example((a, b), (c, 2)), Example((b,), (c, a, 2))]
    data.write_text(json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(ValueError, match=r"data.jsonl:1: expected the text fields"):
        read_examples(config)
    lines: list[str] = []
    finetune(settings(tmp_path / "own", iters=1, self_targets=3), EXAMPLES, report=lines.append)
    assert len(losses(lines)) == 1
    with pytest.raises(ValueError, match="no example of 5 has at most 3 tokens"):
        finetune(replace(config, max_length=3), EXAMPLES)


@torch.no_grad()
def test_self_targets_are_the_base_models_own_greedy_answers() -> None:
    """Catches: padding that the model sees, answers in another order, tokens kept after end-of-text."""
    base = load_base(tiny("qwen2").base)
    rows = [Example(tuple(range(3, 3 + n)), (2,)) for n in (7, 2, 5, 1)]
    greedy = []
    for row in rows:
        tokens = list(row.prompt)
        for _ in range(6):
            tokens.append(int(base(torch.tensor([tokens])).logits[0, -1].argmax()))
        greedy.append(tuple(tokens[len(row.prompt) :]))
    never, early = 0, greedy[0][1]  # taken as end-of-text, `early` stops the first answer after two tokens
    assert never not in {token for answer in greedy for token in answer}
    for eos_id in (never, early):
        answers = greedy_answers(base, rows, max_new_tokens=6, eos_id=eos_id, batch_size=3)
        ends = [answer.index(eos_id) + 1 if eos_id in answer else 6 for answer in greedy]
        expected = [answer[:end] for answer, end in zip(greedy, ends, strict=True)]
        assert answers == [Example(row.prompt, answer) for row, answer in zip(rows, expected, strict=True)]
