"""What a training writes is what generation loads, and what PEFT and the converter read."""

from pathlib import Path
from typing import Any

import pytest

from specstream_convert import inspect_checkpoint
from specstream_mlx import load, stream_generate
from specstream_mlx.errors import UnsupportedError
from specstream_mlx.formats.adapter_directory import read_adapter
from specstream_mlx.training.batches import make_batch
from specstream_mlx.training.datasets import Dataset
from specstream_mlx.training.loss import LossWeights, loss_only
from tests.tiny import random_prompt
from tests.tolerances import FLOAT32
from tests.training.training_cases import prepared, rows, same, save_base, write_rows

DATA = Dataset(rows(11), rows(5))
CASES: dict[str, dict[str, Any]] = {
    "lossless": {"mode": "lossless", "scale": 0.3, "rank": 7},
    "shared": {"mode": "shared", "prune_rank": 2, "stream_init_rank": 3},
    "shared-top-3": {"mode": "shared", "num_layers": 3, "value_rotation": 0.2},
}


def generated(base: Path, adapter: Path | None, draft: str) -> tuple[list[int], int]:
    model, tokenizer = load(base, adapter)
    responses = list(stream_generate(model, tokenizer, random_prompt(6, seed=1), 20, draft=draft))
    return [token for response in responses for token in response.tokens], responses[-1].stream_passes


@pytest.mark.parametrize(
    ("family", "case", "quantised"),
    [
        *(("llama", case, quantised) for case in CASES for quantised in (False, True)),
        ("gemma2", "shared", False),
        ("gemma3_text", "lossless", False),
        ("qwen3_moe", "lossless", True),
        ("qwen3_moe", "shared", False),
    ],
)
def test_the_adapter_loads_at_once_and_computes_what_training_computed(
    family: str, case: str, quantised: bool, tmp_path: Path
) -> None:
    """Red when: a tensor, the scale or the configuration in the directory is not the trained one."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    base = save_base(tmp_path / "base", family, **sizes)
    if quantised:
        from mlx_lm import convert as quantise

        quantise(str(base), str(tmp_path / "q"), quantize=True, q_bits=4, q_group_size=64)
        base = tmp_path / "q"
    run = prepared(base, tmp_path / "out", **CASES[case], iters=3, val_batches=0)
    run.train(DATA)
    batch = make_batch(rows(4), 3)
    expected = loss_only(run.model, batch, LossWeights(main=1.0))
    model, _ = load(base, tmp_path / "out")
    found = loss_only(model, batch, LossWeights(main=1.0))
    relative = 2e-2 if quantised else 1e-6  # a quantised base computes in 16 bits, and so do loaded streams
    assert found.loss == pytest.approx(expected.loss, rel=relative, abs=FLOAT32)
    assert found.main == pytest.approx(expected.main, rel=relative, abs=FLOAT32)
    plain, _ = generated(base, tmp_path / "out", "off")
    drafted, stream_passes = generated(base, tmp_path / "out", "chain")
    assert drafted == plain
    assert stream_passes > 0
    if CASES[case]["mode"] == "lossless":
        assert plain == generated(base, None, "off")[0]
    inspected = inspect_checkpoint(tmp_path / "out")
    assert inspected.problems == ()
    assert (inspected.mode, inspected.gamma) == (CASES[case]["mode"], 3)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_families_with_learned_positions_train_within_their_context(family: str, tmp_path: Path) -> None:
    """Red when: a family's own names are missed, or rows reach past the table of positions."""
    length = {"n_positions": 12} if family == "gpt2" else {"max_position_embeddings": 12}
    base = save_base(tmp_path / "base", family, **length)
    run = prepared(base, tmp_path / "out")
    assert run.max_seq_length == 12
    long = write_rows(tmp_path / "rows.jsonl", 24)
    data = run.read(str(long))
    assert max(len(example) for example in [*data.train, *data.valid]) == 12
    run.train(data)
    plain, _ = generated(base, None, "off")
    drafted, stream_passes = generated(base, tmp_path / "out", "chain")
    assert drafted == plain
    assert stream_passes > 0
    config, _ = read_adapter(tmp_path / "out")
    assert (config.base_model["hidden_size"], config.base_model["num_hidden_layers"]) == (32, 4)
    assert "fingerprint" in config.base_model


def test_a_model_with_a_live_lora_is_refused(tmp_path: Path) -> None:
    """Red when: streams are trained on a LoRA that the written adapter then replaces."""
    base = save_base(tmp_path / "base")
    prepared(base, tmp_path / "tuned", mode="shared").train(DATA)
    (tmp_path / "tuned" / "adapters").rename(base / "adapters")
    with pytest.raises(UnsupportedError, match="live LoRA in adapters/; fuse it first"):
        prepared(base, tmp_path / "out").train(DATA)


def test_streams_of_a_model_with_streams_are_replaced(tmp_path: Path) -> None:
    """Red when: a lossless LoRA that the model carries stays under the new one."""
    base = save_base(tmp_path / "base")
    prepared(base, tmp_path / "first").train(DATA)
    for file in ("specstream.safetensors", "specstream_config.json"):
        (base / file).write_bytes((tmp_path / "first" / file).read_bytes())
    plain = save_base(tmp_path / "plain")
    prepared(base, tmp_path / "again", gamma=2).train(DATA)
    prepared(plain, tmp_path / "fresh", gamma=2).train(DATA)
    assert same(read_adapter(tmp_path / "again")[1], read_adapter(tmp_path / "fresh")[1])
