"""Heads trained in PyTorch: their losses read what the drafters read, and they run in MLX as they were trained."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from mlx.utils import tree_flatten  # noqa: E402

from specstream_convert.base.model import open_base  # noqa: E402
from specstream_mlx import load  # noqa: E402
from specstream_torch.checkpoint import load_base  # noqa: E402
from specstream_torch.heads import KINDS, HeadConfig, train_head, trainer  # noqa: E402
from specstream_torch.heads.reading import Reading  # noqa: E402
from specstream_torch.heads.trainer import HeadShape  # noqa: E402
from specstream_torch.loss import Example  # noqa: E402
from specstream_torch.packed.llama import PackedLlama  # noqa: E402
from specstream_torch.packed.packing import iterate_steps, pack  # noqa: E402
from specstream_torch.testing import make_tiny_checkpoint  # noqa: E402
from tests.drafters import reference  # noqa: E402
from tests.tiny import NumberTokenizer, our_tokens, plain_tokens  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
VOCAB = 97
BUDGET = {"row_tokens": 48, "step_tokens": 96, "vocab_frequent": 97, "vocab_random": 97, "save_dtype": "float32"}


def cycles(count: int, seed: int = 0) -> list[Example]:
    """Texts that count up: anything that can be learned is learned in a few steps."""
    chance = random.Random(seed)
    starts = [chance.randrange(3, VOCAB - 24) for _ in range(count)]
    return [Example(tuple(range(s, s + 6)), (*range(s + 6, s + 15), 2)) for s in starts]


@pytest.fixture(autouse=True)
def _one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is faster is timed, and the tests compare numbers."""
    monkeypatch.setattr(trainer, "fastest_dtype", lambda device, size: torch.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny_checkpoint("llama", tmp_path_factory.mktemp("tiny"), tie_word_embeddings=True)


def shape_of(base: Any, depth: int = 3) -> HeadShape:
    return HeadShape(base.config, depth, 1, torch.arange(0, VOCAB, 2))


def reading_of(base: Any, kind: Any, shape: HeadShape, examples: list[Example], branches: int) -> Reading:
    fast = PackedLlama(base, torch.float32)
    source = iterate_steps(examples, seed=0, max_branches=branches, row_tokens=48, step_tokens=400)
    batch = pack(next(source), 1, random.Random(0))
    states = fast.hidden_states(batch, tuple(dict.fromkeys(kind.taps(shape)))) if kind.whole_rows else {}
    main, _ = fast(batch, None, 0)
    return Reading(batch, main, states, fast.embedding, fast.head, torch.arange(VOCAB))


@pytest.mark.parametrize("branches", [1, 4])
def test_targets_lie_in_the_same_answer(tiny: Any, branches: int) -> None:
    """Break: count across the end of an answer."""
    examples = cycles(8)
    base = load_base(tiny.base)
    reading = reading_of(base, KINDS["medusa"], shape_of(base), examples, branches)
    ahead, exists = reading.ahead(3)
    of_answer = {}
    for example in examples:
        for index, token in enumerate(example.answer):
            of_answer.setdefault(token, set()).add(example.answer[index + 1 : index + 4])
    for entry, token in enumerate(reading.batch.main_targets.tolist()):
        following = tuple(ahead[entry][exists[entry]].tolist())
        assert any(following == tail[: len(following)] for tail in of_answer[token])
        assert bool(exists[entry].all()) == (len(following) == 3)
    assert int(exists.sum()) == sum(max(len(e.answer) - 1 - k, 0) for e in examples for k in range(3))


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_layer_reads_a_packed_row_as_its_text_alone(tiny: Any, kind: str) -> None:
    """Break: shift tokens within another example; see another example's rows."""
    base = load_base(tiny.base)
    shape, examples = shape_of(base), cycles(5)
    torch.manual_seed(1)
    head = KINDS[kind].make(shape, base.lm_head.weight.detach())
    together = reading_of(base, KINDS[kind], shape, examples, 1)
    noise = [torch.Generator().manual_seed(0) for _ in range(6)]
    if kind == "eagle":
        import specstream_torch.heads.eagle as module

        module.NOISE, before = 0.0, module.NOISE
    try:
        whole = KINDS[kind].loss(head, together, noise[0])
        alone = [
            KINDS[kind].loss(head, reading_of(base, KINDS[kind], shape, [example], 1), generator)
            for example, generator in zip(examples, noise[1:], strict=True)
        ]
    finally:
        if kind == "eagle":
            module.NOISE = before
    means = np.mean([one.losses for one in alone], axis=0)  # every text is of one length
    assert np.allclose(whole.losses, means, atol=1e-5)


def shifted(rows: Any, steps: int) -> Any:
    return torch.cat([rows[:, steps:], rows[:, :steps]], 1)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_layer_that_knows_the_next_features_is_always_right(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Break: hold a row against its own feature, or against the one after the next."""
    base = load_base(tiny.base)
    shape = shape_of(base)
    reading = reading_of(base, KINDS[kind], shape, cycles(5), 1)
    final = reading.states[max(reading.states)]
    if kind == "eagle":
        monkeypatch.setattr("specstream_torch.heads.eagle.NOISE", 0.0)

        class Oracle(torch.nn.Module):
            def forward(self, features: Any, embedded: Any, positions: Any, visible: Any) -> Any:
                return shifted(features, 1)

        result = KINDS[kind].loss(Oracle(), reading, torch.Generator())
        assert result.losses[0] == 0
        assert result.agreement == [1.0]
        return

    class Step(torch.nn.Module):
        def forward(self, features: Any, embedded: Any, positions: Any, visible: Any, kept: list[Any]) -> Any:
            kept.append(None)
            return shifted(final, len(kept))

    head: Any = KINDS[kind].make(shape, base.lm_head.weight.detach())
    head.midlayer, head.norm = Step(), torch.nn.Identity()
    assert KINDS[kind].loss(head, reading, torch.Generator()).agreement == [1.0] * 3


def test_the_layers_are_those_of_the_formulas(tiny: Any) -> None:
    """EAGLE's rows, and EAGLE-3's steps as a draft would make them. Break: a step sees a later row's step before it."""
    base = load_base(tiny.base)
    shape, length = shape_of(base), 9
    torch.manual_seed(2)
    settings = KINDS["eagle"].settings(shape)
    features, embedded = torch.randn(1, length, 64), torch.randn(1, length + 3, 64)
    positions, visible = torch.arange(length)[None], torch.ones(1, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        eagle: Any = KINDS["eagle"].make(shape, base.lm_head.weight)
        found = eagle(features, embedded[:, :length], positions, visible)[0]
        expected = reference.eagle(eagle.state_dict(), settings, features[0], embedded[0, :length])
        assert torch.allclose(found, expected, atol=1e-5)
        eagle3: Any = KINDS["eagle3"].make(shape, base.lm_head.weight)
        kept: list[Any] = []
        steps = [features]
        for step in range(3):
            shifted = embedded[:, step : step + length]
            steps.append(eagle3.midlayer(steps[-1], shifted, positions + step, visible, kept))
        for row in range(length):
            path = features[0, : row + 1]
            for step in range(3):
                out = reference.eagle3(eagle3.state_dict(), settings, path, embedded[0, : row + 1 + step])[-1]
                assert torch.allclose(steps[step + 1][0, row], out, atol=1e-5), (row, step)
                path = torch.cat([path, out[None]])


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_mlx_runs_what_was_trained(tiny: Any, tmp_path: Path, kind: str) -> None:
    """The written directory loads over the converted base; its tokens are plain decoding's."""
    config = HeadConfig(kind, num_steps=40, depth=3, draft_vocab_size=64, learning_rate=5e-3, **BUDGET)
    out = train_head(tiny.base, cycles(60), tmp_path / "run", config, log_steps=5, report=lambda line: None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["agreement"][0] > lines[0]["agreement"][0] + 0.1
    model, _ = load(mlx_base(tiny.base, tmp_path / "mlx"), adapter=out)
    assert model.drafter.name == kind
    held = torch_tensors(out)
    found = dict(tree_flatten(model.drafter.weights.parameters()))
    assert set(found) == set(held)
    assert all(np.array_equal(np.array(found[name]), held[name]) for name in held)
    prompt = list(range(11, 17))
    options = {"drafter": kind, "draft": "tree", "tokenizer": NumberTokenizer([2])}
    assert our_tokens(model, prompt, 14, **options) == plain_tokens(model.base, prompt, 14, end_of_text=[2])
    training = json.loads((out / "drafter_config.json").read_text())["training"]
    assert training["steps"] == 40
    assert training["base_tflops"] > 0


def torch_tensors(directory: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    tensors: dict[str, Any] = load_file(str(directory / "drafter.safetensors"))
    return tensors


def mlx_base(hugging_face: Path, path: Path) -> Path:
    """The tiny base as an MLX directory."""
    base = open_base(hugging_face, "base")
    path.mkdir()
    (path / "config.json").write_text(json.dumps(base.config))
    mx.save_safetensors(str(path / "model.safetensors"), {n: t.read_float32() for n, t in base.tensors.items()})
    for file in hugging_face.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_a_head_learns_the_own_answers_of_a_fine_tune(tiny: Any, tmp_path: Path) -> None:
    """The LoRA of the fine-tune belongs to the base. Break: forget it."""
    config = HeadConfig("eagle", num_steps=1, own_prompts=5, own_max_tokens=6, **BUDGET)
    examples, answers = cycles(20), {}
    for name, fine_tune in (("bare", None), ("tuned", tiny.adapter)):
        out = train_head(tiny.base, examples, tmp_path / name, config, fine_tune=fine_tune, report=lambda line: None)
        answers[name] = json.loads((tmp_path / name / "own.json").read_text())
        training = json.loads((out / "drafter_config.json").read_text())["training"]
        assert training["fine_tuned_base"] is (fine_tune is not None)
        assert training["examples"] <= 5
    assert [prompt for prompt, _ in answers["bare"]] == [prompt for prompt, _ in answers["tuned"]]
    assert answers["bare"] != answers["tuned"]


def test_medusa_2_trains_a_lora_along(tiny: Any, tmp_path: Path) -> None:
    """Break: the LoRA gets no gradient, of its own loss or of the heads'."""
    config = HeadConfig("medusa", num_steps=3, depth=2, lora_rank=2, **BUDGET)
    train_head(tiny.base, cycles(12), tmp_path / "run", config, report=lambda line: None)
    from safetensors.torch import load_file

    tensors = load_file(str(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    moved = [name for name, value in tensors.items() if "lora_B" in name and bool(value.abs().max() > 0)]
    assert len(moved) == len(tensors) / 2


@pytest.mark.parametrize("kind", ["medusa", "eagle3"])
def test_a_run_goes_on_where_it_was_broken_off(tiny: Any, tmp_path: Path, kind: str) -> None:
    """The same tensors as in one go; other settings are refused."""
    config = HeadConfig(kind, num_steps=6, depth=2, draft_vocab_size=64, **BUDGET)
    silent = {"report": lambda line: None, "save_minutes": 0.0}
    whole = torch_tensors(train_head(tiny.base, cycles(30), tmp_path / "whole", config, **silent))

    class Broken(Exception):
        pass

    def break_off(line: str) -> None:
        if '"steps": 4' in line:
            raise Broken

    with pytest.raises(Broken):
        train_head(tiny.base, cycles(30), tmp_path / "parts", config, report=break_off, save_minutes=0.0, log_steps=1)
    with pytest.raises(ValueError, match="depth: 2 -> 3"):
        train_head(tiny.base, cycles(30), tmp_path / "parts", replace(config, depth=3), **silent)
    parts = torch_tensors(train_head(tiny.base, cycles(30), tmp_path / "parts", config, **silent))
    assert all(np.allclose(whole[name], parts[name], atol=1e-6) for name in whole)
