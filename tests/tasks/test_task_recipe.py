"""The recipe of the table, the curve and the ablation, each with tiny settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("sqlglot")

from safetensors.torch import load_file  # noqa: E402

from benchmarks.tasks import ablation, curve, finetune, recipe  # noqa: E402
from benchmarks.tasks.recipe import STAGES, Stage, stage_config  # noqa: E402
from benchmarks.tasks.task import find_task  # noqa: E402
from specstream_torch.packed.trainer import PackedConfig  # noqa: E402
from specstream_torch.testing import write_tiny_base  # noqa: E402

pytestmark = pytest.mark.parity
TINY = {"num_stream_layers": 2, "rank": 2, "lora_layers": 2, "row_tokens": 200, "step_tokens": 400}
ROWS = [
    {
        "prompt": f"How many heads are older than {age}?",
        "context": "CREATE TABLE head (age NUMBER)",
        "answer": f"SELECT count(*) FROM head WHERE age > {age}",
    }
    for age in range(50, 56)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("recipe")
    write_tiny_base("llama", path / "base", tie_word_embeddings=True)
    (path / "data" / "sql").mkdir(parents=True)
    for split in ("train", "test"):
        (path / "data" / "sql" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Two stages, both ways."""
    stages = (
        Stage("first", "sql", None, TINY | {"num_steps": 4}, stop_step=2),
        Stage("sql", "sql", "first", TINY | {"num_steps": 1, "seed": 1}),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "STAGES", stages)
        arguments = ["--out", str(folder / "out"), "--base", str(folder / "base"), "--data-dir", str(folder / "data")]
        recipe.main([*arguments, "--device", "cpu", "--limit", "1"])
    return folder / "out"


def test_the_stages_are_the_same_rows_and_steps_both_ways(trained: Path) -> None:
    for stage, steps in (("first", 2), ("sql", 1)):
        shared = json.loads((trained / "shared" / stage / "adapter" / "specstream_config.json").read_text())["training"]
        alone = json.loads((trained / "lora" / stage / "adapter" / "training.json").read_text())
        assert shared["steps"] == alone["steps"] == steps
        assert (shared["tokens"], shared["examples"]) == (alone["tokens"], alone["examples"])
        assert alone["num_stream_layers"] == 0
    figures = json.loads((trained / "figures.json").read_text())
    assert figures.keys() == {"sql lora", "sql shared"}
    assert "counted_tokens_per_pass" in figures["sql shared"]


def test_the_curve_goes_over_the_stages(trained: Path, folder: Path) -> None:
    runs = [trained / "shared" / "first", trained / "shared" / "sql"]
    assert [steps for _, steps, _ in curve.checkpoints_of(runs)] == [2, 3]
    found = curve.curve(find_task("sql"), ROWS[:1], folder / "base", runs, None)
    assert [point["steps"] for point in found["points"]] == [2, 3]


def test_an_ablation_takes_other_depths_and_other_numbers_of_streams(trained: Path, folder: Path) -> None:
    start = trained / "shared" / "sql" / "adapter"
    settings = PackedConfig(**TINY | {"num_steps": 1})
    task = find_task("sql")
    examples = finetune.encode_rows(task, ROWS, folder / "base")
    rows = ablation.ablate(task, folder / "base", start, examples, ROWS[:1], settings, layers=[1], streams=[6])
    assert [(row["group"], row["setting"]) for row in rows] == [("stream layers", "1"), ("streams", "6")]
    assert all(row["seconds_per_step"] >= 0 for row in rows)


@pytest.mark.parametrize("gamma", [2, 6])
def test_other_numbers_of_streams_begin_as_those_that_are_there(trained: Path, tmp_path: Path, gamma: int) -> None:
    start = trained / "shared" / "sql" / "adapter"
    made = ablation.with_streams(start, gamma, tmp_path / "start")
    before, after = (load_file(path / "adapter_model.safetensors")[ablation.EMBEDDINGS] for path in (start, made))
    assert len(after) == gamma
    assert torch.equal(after[: min(4, gamma)], before[: min(4, gamma)])
    assert all(torch.equal(row, before[-1]) for row in after[4:])


def test_every_stage_of_the_table_has_settings_that_hold(folder: Path) -> None:
    assert sum(stage.share for stage in STAGES) == pytest.approx(1)
    names = [stage.name for stage in STAGES]
    for number, stage in enumerate(STAGES):
        assert stage.start is None or stage.start in names[:number]
        config: Any = stage_config(stage, find_task(stage.task), minutes=None, batch=1)
        assert config.num_steps is not None
        quick = stage_config(stage, find_task(stage.task), minutes=8.0, batch=8)
        assert quick.hours is not None
        assert quick.step_tokens == 8 * config.step_tokens
