"""`run` on a tiny model with a real adapter directory: the JSON contract, equal texts, refusals, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("sqlglot")

from mlx_lm import load as load_stock  # noqa: E402

from benchmarks.tasks import adapter as adapters  # noqa: E402
from benchmarks.tasks import run, table  # noqa: E402
from benchmarks.tasks.base import fetch_gguf, mlx_name, write_hugging_face  # noqa: E402
from benchmarks.tasks.checkpoint import accepted_length, checkpoint_figures, num_passes  # noqa: E402
from benchmarks.tasks.examples import pass_line  # noqa: E402
from benchmarks.tasks.fused import write_fused  # noqa: E402
from benchmarks.tasks.paper import paper_rows  # noqa: E402
from benchmarks.tasks.task import Task, find_task, read_rows, task_names  # noqa: E402
from specstream_torch.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from specstream_torch.testing import make_tiny_checkpoint  # noqa: E402

pytestmark = pytest.mark.parity
KEYS = {
    "task",
    "drafter",
    "prompts",
    "tokens_per_pass",
    "accepted_by_depth",
    "same_text_as_plain",
    "metric",
    "extra_parameters",
}
ROWS = [
    {"prompt": "How many heads?", "context": "CREATE TABLE head (age NUMBER)", "answer": "SELECT count(*) FROM head"},
    {"prompt": "All ages", "context": "CREATE TABLE head (age NUMBER)", "answer": "SELECT age FROM head"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base in PyTorch and MLX form, a checkpoint with its LoRA rounded, and the adapter made of it."""
    from mlx_lm import convert

    folder = tmp_path_factory.mktemp("tiny")
    paths = make_tiny_checkpoint("llama", folder, tie_word_embeddings=True)
    config = json.loads((paths.base / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (paths.base / "config.json").write_text(json.dumps(config))
    convert(str(paths.base), str(folder / "mlx"), dtype="float32")
    model = load_checkpoint(paths.base, paths.adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.half().float())
    save_checkpoint(model, folder / "rounded", training={"rank": 4, "steps": 7, "lora_layers": 4})
    report = adapters.write_adapter(find_task("sql"), paths.base, folder / "rounded", folder / "made")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder, report


def arguments(folder: Path, *more: str) -> Any:
    return run.parse_arguments(
        [
            "--task",
            "sql",
            "--base",
            str(folder / "mlx"),
            "--data",
            str(folder / "rows.jsonl"),
            "--max-tokens",
            "12",
            *more,
        ]
    )


def test_the_adapter_is_verified_small_and_says_its_licences(tiny: Any) -> None:
    folder, report = tiny
    assert report["mode"] == "shared"
    card = (folder / "made" / "README.md").read_text()
    assert "Apache-2.0" in card
    assert "CC BY-SA 4.0" in card
    tensors = mx.load(str(folder / "made" / "adapters" / "adapters.safetensors"))
    assert {value.dtype for value in tensors.values()} == {mx.float16}  # type: ignore[union-attr]


def test_float16_that_would_change_the_lora_is_refused(tiny: Any, tmp_path: Path) -> None:
    folder, _ = tiny
    with pytest.raises(SystemExit, match="does not fit into float16"):
        adapters.write_adapter(find_task("sql"), folder / "base", folder / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_merged_directory_is_the_fine_tuned_model(tiny: Any, tmp_path: Path) -> None:
    folder, _ = tiny
    fused, _ = load_stock(str(write_fused(folder / "mlx", folder / "made", tmp_path / "fused")))[:2]
    model = load_checkpoint(folder / "base", folder / "rounded").eval()
    ids = [5, 17, 40, 8, 33, 61]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert abs(mx.array(expected) - fused(mx.array([ids]))[0]).max().item() <= 1e-4


def test_run_reports_what_the_contract_says(tiny: Any) -> None:
    folder, _ = tiny
    figures = run.run(arguments(folder, "--adapter", str(folder / "made"), "--time"))
    assert figures.keys() >= KEYS | {"speedup"}
    assert (figures["task"], figures["drafter"], figures["prompts"]) == ("sql", "streams", 2)
    assert figures["same_text_as_plain"] is True
    assert figures["extra_parameters"] == 4 * 64
    assert figures["metric"].keys() == {"exact match", "execution match"}
    assert 1 <= figures["tokens_per_pass"] <= 5
    json.dumps(figures)


def test_run_takes_a_bare_base_a_sampler_and_another_drafter(tiny: Any, tmp_path: Path) -> None:
    folder, _ = tiny
    bare = run.run(arguments(folder, "--adapter", "none", "--limit", "1"))
    assert (bare["drafter"], bare["tokens_per_pass"], bare["extra_parameters"]) == ("none", 1.0, 0)
    sampled = run.run(arguments(folder, "--adapter", str(folder / "made"), "--temp", "0.8"))
    assert sampled["same_text_as_plain"] is True
    answers = tmp_path / "answers.jsonl"
    lookup = run.run(
        arguments(
            folder,
            "--adapter",
            str(folder / "made"),
            "--drafter",
            "prompt-lookup",
            "--limit",
            "1",
            "--answers",
            str(answers),
        )
    )
    assert lookup["drafter"] == "prompt-lookup"
    assert lookup["extra_parameters"] == 0
    assert json.loads(answers.read_text())["prompt"] == ROWS[0]["prompt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('{"prompt": "p", "answer": "a"}', "'context' is missing"),
        ('{"prompt": "p", "context": "c"}', "neither 'answer' nor 'references'"),
        ("", "no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(SystemExit, match=message):
        read_rows(find_task("sql"), path)
    with pytest.raises(SystemExit, match="No such file"):
        read_rows(find_task("sql"), tmp_path / "other.jsonl")


def test_every_task_is_found_and_another_is_refused() -> None:
    assert {"sql", "e2e_nlg", "dialogsum", "text_to_sql"} <= set(task_names())
    assert all(isinstance(find_task(name), Task) for name in task_names())
    with pytest.raises(SystemExit, match="the tasks are"):
        find_task("nothing")


def test_a_checkpoint_is_measured_in_pytorch_too(tiny: Any) -> None:
    folder, _ = tiny
    figures, texts = checkpoint_figures(find_task("sql"), ROWS, folder / "base", folder / "rounded", batch_size=2)
    assert len(texts) == figures["prompts"] == 2
    assert figures["metric"]["exact match"]["n"] == 2


def test_passes_are_counted_as_drafting_counts_them() -> None:
    assert num_passes(5, [2, 2, 1, 1]) == 3  # answer[0] | 1 2 3 | 4
    assert num_passes(5, [0, 0, 0, 0]) == 5
    assert num_passes(1, []) == 1
    assert num_passes(5, [1, 0, 1, 0]) == 3


def test_a_tree_holds_the_likeliest_paths() -> None:
    guesses = [[10, 20], [11, 21], [12, 22]]
    weights = [[-0.1, -2.5], [-0.7, -0.8], [-0.2, -3.0]]
    assert accepted_length(guesses, weights, [10, 11, 13], 0) == 2
    assert accepted_length(guesses, weights, [10, 21, 12], 0) == 1
    # By probability: 10 (.1), 10 11 (.8), 10 21 (.9), 10 11 12 (1.0), 10 21 12 (1.1), 20 (2.5), ...
    for nodes, length in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3)):
        assert accepted_length(guesses, weights, [10, 21, 12], nodes) == length
    assert accepted_length(guesses, weights, [20], 5) == 0
    assert accepted_length(guesses, weights, [20], 6) == 1
    assert accepted_length(guesses, weights, [], 6) == 0


def test_the_table_is_written_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "sql" / "results"
    results.mkdir(parents=True)

    def checkpoint(mean: float, error: float) -> dict[str, Any]:
        metric = {"exact match": {"mean": mean, "standard_error": error, "n": 397}}
        return {"metric": metric, "prompts": 397, "products": "float32"}

    measured = {
        "prompts": 20,
        "tokens": 1000,
        "tokens_per_pass": 3.214,
        "metric": {"exact match": 44.0},
        "standard_error": {"exact match": 9.0},
        "extra_parameters": 2304,
        "drafted_by_depth": [4, 4],
        "accepted_by_depth": [3, 2],
        "draft": "best-first:15",
        "prompts_with_equal_text": 20,
        "speedup": 2.4,
        "speedup_total": 2.1,
    }
    shared = checkpoint(41.0, 2.4) | {"counted_tokens_per_pass": {"chain": 2.5}}
    for name, figures in (("lora", checkpoint(40.0, 2.5)), ("shared", shared), ("run", measured)):
        (results / f"{name}.json").write_text(json.dumps(figures))
    task = find_task("sql")
    monkeypatch.setattr("benchmarks.tasks.task.FOLDER", tmp_path)
    section = table.task_section(task, table.read_results(task))
    assert "| LoRA alone | 1.00 | 1.00 | 40.00 ± 2.50 | 0 |" in section
    assert "| Speculative Streaming | 2.40 | 3.21 | 41.00 ± 2.40 | 2.3e3 |" in section
    assert "*paper: Mistral-Instruct-7B* | Speculative Streaming | 2.93 | 3.67 | 84.50 | 8.2e4" in section
    assert "20 of 20" in section
    assert "chain 2.50" in section


def test_the_paper_has_four_methods_for_three_models_on_each_task() -> None:
    assert [len(paper_rows(name)) for name in table.TASKS] == [12, 12, 12]


def test_a_pass_shows_what_was_accepted_and_what_was_not() -> None:
    class Letters:
        def decode(self, tokens: list[int]) -> str:
            return "".join(map(chr, tokens))

    line = pass_line(Letters(), [97, 98, 99], [97, 98], [[120, 121], [97, 98, 100, 101]])
    assert line == "**`a` `b`** `c` ~~`d` `e`~~"
    assert pass_line(Letters(), [97], [], []) == "`a`"


def test_the_base_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [mlx_name("float32", False, 4), mlx_name("bfloat16", False, 4), mlx_name("float32", True, 4)] == [
        "mlx",
        "mlx-bfloat16",
        "mlx-4bit",
    ]
    with pytest.raises(SystemExit, match="no such file"):
        write_hugging_face(tmp_path / "none.gguf", tmp_path / "hf")
    monkeypatch.setattr("benchmarks.tasks.base.sys.executable", "/bin/false")
    with pytest.raises(SystemExit, match="give a copy of the file with --gguf"):
        fetch_gguf(tmp_path)
