"""The recipe of the bundled model with tiny settings: each step does its work, restarts, and is not done twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import sentencepiece  # noqa: E402
from mlx_lm import load as load_stock  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from benchmarks.tasks.text_to_sql import build, lossless  # noqa: E402
from benchmarks.tasks.text_to_sql.evaluate import acceptance_by_rank, evaluate, guess_ranks, read_examples, run  # noqa: E402
from benchmarks.tasks.text_to_sql.evaluate import main as measure  # noqa: E402
from benchmarks.tasks.text_to_sql.finetune import BASE_NAME, FinetuneSettings, finetune, fresh_examples  # noqa: E402
from benchmarks.tasks.text_to_sql.heldout import HELDOUT, write_heldout  # noqa: E402
from benchmarks.tasks.text_to_sql.pretrain import PretrainSettings, pretrain  # noqa: E402
from benchmarks.tasks.text_to_sql.prompts import BUNDLED_COUNT, write_prompts  # noqa: E402
from benchmarks.tasks.text_to_sql.rescale import rescale  # noqa: E402
from benchmarks.tasks.text_to_sql.stamps import is_current, write_stamp  # noqa: E402
from benchmarks.tasks.text_to_sql.tokenizer import ExampleEncoder  # noqa: E402
from specstream_cli.app import main as program  # noqa: E402
from specstream_mlx import default_model_path, load  # noqa: E402
from specstream_mlx.bundled import samples  # noqa: E402
from specstream_mlx.target.tree import DraftTree  # noqa: E402
from specstream_mlx.training.distill import PROMPTS_NAME, default_prompts  # noqa: E402
from tests.passes import stream_logits, verify  # noqa: E402

pytestmark = pytest.mark.parity

TINY_BASE = PretrainSettings(
    vocab_size=1024,
    tokenizer_examples=600,
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    intermediate_size=48,
    num_steps=4,
    cooldown_steps=2,
    batch_size=2,
    warmup_steps=1,
)
TINY_FINETUNE = FinetuneSettings(num_steps=3, batch_size=2, rank=4, prune_rank=2, warmup_steps=1)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, `base` and `text-to-sql-base`, its fine-tune, `adapter`, and the converted `model`."""
    directory = tmp_path_factory.mktemp("text_to_sql")
    base = rescale(pretrain(TINY_BASE, directory), directory / "text-to-sql-base")
    adapter = finetune(TINY_FINETUNE, base, directory, report=lambda line: None)
    build.convert_model(base, adapter, directory / "model")
    return directory


def test_an_interrupted_pretraining_ends_as_an_uninterrupted_one(out: Path, tmp_path: Path) -> None:
    """Catches optimizer state or a place among the batches that a checkpoint forgets."""
    pretrain(TINY_BASE, tmp_path, save_seconds=0, stop=2)
    assert not (tmp_path / "base").exists()
    pretrain(TINY_BASE, tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for name, tensor in load_file(out / "base" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_pretraining_with_other_settings_does_not_go_on(tmp_path: Path) -> None:
    pretrain(TINY_BASE, tmp_path, save_seconds=0, stop=1)
    with pytest.raises(SystemExit, match="other settings"):
        pretrain(replace(TINY_BASE, weight_decay=0.5), tmp_path)


def test_the_saved_tokenizer_is_the_sentencepiece_model(out: Path) -> None:
    """Catches merges in another order; text comes back as it was, newlines and unknown letters included."""
    encoder = ExampleEncoder(out / "base")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "base" / "tokenizer.model"))
    for example in read_examples(HELDOUT, 40):
        ids = encoder.tokenizer.encode(example["prompt"]).ids
        assert ids == [pieces.bos_id(), *pieces.encode(example["prompt"])]
        assert encoder.text(ids) == example["prompt"]
    assert encoder.text(encoder.tokenizer.encode("naïve 東\nx").ids) == "naïve 東\nx"


def test_rescaling_changes_no_bit_of_the_logits(out: Path) -> None:
    """Catches a weight, or the epsilon of a norm, that rescaling leaves out."""
    tokens = torch.arange(3, 60)[None]
    before, after = (LlamaForCausalLM.from_pretrained(out / name) for name in ("base", "text-to-sql-base"))
    assert not torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_finetuning_sees_whole_examples_of_its_own(out: Path) -> None:
    """Catches a prompt cut at the wrong token and a missing end-of-text."""
    encoder = ExampleEncoder(out / "base")
    rows = fresh_examples(encoder, TINY_FINETUNE)
    assert len(rows) == TINY_FINETUNE.num_steps * TINY_FINETUNE.batch_size
    for row in rows:
        assert encoder.text(list(row.prompt)).endswith("-- query:")
        assert encoder.text(list(row.answer)).strip().startswith("SELECT ")
        assert row.answer[-1] == encoder.eos_id
    assert rows != fresh_examples(encoder, replace(TINY_FINETUNE, seed=2))


def test_the_checkpoint_names_the_base_and_no_path(out: Path) -> None:
    for path in (*(out / "adapter").glob("*.json"), *(out / "model").glob("*.json"), out / "model" / "README.md"):
        assert str(out) not in path.read_text()
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE_NAME
    config = json.loads((out / "model" / "specstream_config.json").read_text())
    assert config["base_model"]["name_or_path"] == BASE_NAME
    assert (config["mode"], config["gamma"], config["prune"]["rank"]) == ("shared", 4, 2)


def test_what_is_done_is_not_done_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stamp that does not match what it was written for; fails when any step trains or converts."""

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("a step was done again")

    for target in (
        "benchmarks.tasks.text_to_sql.pretrain.make_model",
        "benchmarks.tasks.text_to_sql.finetune.train",
        "specstream_convert.convert",
    ):
        monkeypatch.setattr(target, fail)
    base = rescale(pretrain(TINY_BASE, out), out / "text-to-sql-base")
    adapter = finetune(TINY_FINETUNE, base, out)
    build.convert_model(base, adapter, out / "model")
    with pytest.raises(AssertionError, match="done again"):
        finetune(replace(TINY_FINETUNE, num_steps=5), base, out)


def test_restart_points_of_another_finetune_are_refused(out: Path, tmp_path: Path) -> None:
    """The newest restart point would otherwise be trained on with another base."""
    (tmp_path / "adapter.checkpoints").mkdir()
    write_stamp(tmp_path / "adapter.checkpoints", {"seed": -1})
    with pytest.raises(SystemExit, match="another base"):
        finetune(TINY_FINETUNE, out / "text-to-sql-base", tmp_path)


def test_an_output_is_current_only_for_what_it_was_made_from(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    write_stamp(output, {"model": "a"})
    assert not is_current(output, {"model": "a"})
    output.touch()
    assert is_current(output, {"model": "a"})
    assert not is_current(output, {"model": "b"})


def test_ranks_of_all_anchors_are_those_of_one_anchor_at_a_time(out: Path) -> None:
    """Stream j, anchored before `answer[i]`, guesses `answer[i + j]`; catches anchors or targets off by one."""
    model, _ = load(str(out / "model"))
    prompt, answer = [1, 40, 7, 300, 12], [19, 64, 500, 21, 33, 80, 2]
    caches = model.make_cache()
    model(mx.array(prompt[:-1])[None], cache=caches)
    for index, (node, ranks) in enumerate(zip([prompt[-1], *answer], guess_ranks(model, prompt, answer), strict=False)):
        verified = verify(model, mx.array([node]), DraftTree.chain(0), caches)
        model.commit(verified, [0], caches)
        order = mx.argsort(-stream_logits(model, verified, 0, caches), axis=-1).tolist()
        coming = answer[index + 1 : index + 5]
        assert ranks == [guesses.index(token) for guesses, token in zip(order, coming, strict=False)]


def test_ranks_say_how_many_passes_a_chain_takes() -> None:
    """The bundled model's generation, replayed from the ranks of its streams' guesses."""
    model, tokenizer = load(str(default_model_path()))
    for sample in samples()[:2]:
        answer, _, last = run(model, tokenizer, sample["prompt"], "chain")
        ranks = guess_ranks(model, list(tokenizer.encode(sample["prompt"])), answer)
        passes, known, accepted = 1, 1, 0
        while known < len(answer):
            right = next(index for index, rank in enumerate([*ranks[known - 1], -1]) if rank != 0)
            gained = min(right + 1, len(answer) - known)  # nothing comes after end-of-text
            passes, known, accepted = passes + 1, known + gained, accepted + gained - 1
        assert accepted == sum(last.accepted_by_depth)
        assert passes == last.target_passes


def test_the_figures_are_complete(out: Path) -> None:
    figures = evaluate(out / "model", read_examples(HELDOUT, 1))
    assert figures["num_examples"] == 1
    assert figures["tokens_per_pass"].keys() == {"off", "chain", "tree", "auto"}
    assert figures["tokens_per_pass"]["off"] == 1
    assert [len(row) for row in figures["acceptance_by_rank"]] == [4] * 4


def test_a_lossless_adapter_is_made_and_measured(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches answers that are not the bare base's, and a step that is done again."""
    shutil.copytree(out / "text-to-sql-base", tmp_path / "text-to-sql-base")
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(HELDOUT.read_text().splitlines()[:2]) + "\n")
    monkeypatch.setattr(lossless, "HELDOUT", few)
    commands: list[str] = []

    def in_this_process(arguments: list[Any]) -> None:
        command, *words = map(str, arguments[1:])
        commands.append(command)
        if command == "specstream_mlx":
            assert program(words) == 0
        else:
            measure(words)

    monkeypatch.setattr(lossless, "run_python", in_this_process)
    options = ["--num-prompts", "6", "--max-tokens", "6", "--num-stream-layers", "1", "--rank", "2"]
    options += ["--iters", "2", "--warmup", "1", "--out", str(tmp_path)]
    lossless.main(options)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["num_examples"], figures["same_as_bare_base"]) == (2, 2)
    assert figures["tokens_per_pass"].keys() == {"off", "chain", "tree", "auto"}
    adapted, _ = load(tmp_path / "text-to-sql-base-mlx", adapter=tmp_path / "lossless")
    assert figures["adapter_bytes"] > adapted.adapters["lossless"].num_bytes > 0
    lossless.main(options)
    assert commands == ["specstream_mlx", "benchmarks.tasks.text_to_sql.evaluate"]
    model, _ = load_stock(str(out / "model"))
    model.model.norm.weight = -model.model.norm.weight
    monkeypatch.setattr("benchmarks.tasks.text_to_sql.evaluate.load_stock", lambda path: (model, None))
    with pytest.raises(AssertionError, match="other tokens than mlx-lm's on example 1"):
        evaluate(tmp_path / "text-to-sql-base-mlx", read_examples(few), tmp_path / "lossless")


def test_acceptance_by_rank_follows_drafted_paths() -> None:
    """Row 1 counts anchors where stream 1 was among its first four; a short row has no deeper target."""
    table, counts = acceptance_by_rank([[0, 1], [3, 0], [9, 0], [0]], gamma=2)
    assert table == [[0.5, 0, 0, 0.25], [0.5, 0.5, 0, 0]]
    assert counts == [4, 2]


def test_the_bundle_holds_the_model_and_samples(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "text-to-sql"
    size = build.write_bundle(out / "model", HELDOUT, bundle)
    assert size == sum(path.stat().st_size for path in bundle.iterdir())
    samples = [json.loads(line) for line in (bundle / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == build.NUM_SAMPLES
    assert all(sample in read_examples(HELDOUT) for sample in samples)
    assert (bundle / PROMPTS_NAME).read_bytes() == (build.BUNDLE / PROMPTS_NAME).read_bytes()
    model, _ = load(str(bundle))
    assert model.gamma == 4
    monkeypatch.setattr(build, "MAX_BYTES", size - 1)
    with pytest.raises(SystemExit, match="at most"):
        build.write_bundle(out / "model", HELDOUT, bundle)
    assert (bundle / "samples.jsonl").exists()


def test_samples_with_long_answers_come_first() -> None:
    rows = [{"prompt": str(length), "answer": "x" * length} for length in (20, 40, 80, 81, 60)]
    assert [row["prompt"] for row in build.choose_samples(rows, len)] == ["40", "80", "60", "20", "81"]


def test_the_heldout_file_is_what_the_generator_writes(tmp_path: Path) -> None:
    """Catches a change of the task that leaves the published examples behind."""
    write_heldout(tmp_path / "heldout.jsonl")
    assert (tmp_path / "heldout.jsonl").read_bytes() == HELDOUT.read_bytes()


def test_the_bundled_model_brings_prompts_of_its_training_split(tmp_path: Path) -> None:
    """Red when: prompts and task have come apart, or the list left the package; held-out questions are not in it."""
    path = default_prompts(default_model_path())
    assert path is not None
    assert path.read_bytes() == write_prompts(tmp_path / "prompts.jsonl").read_bytes()
    prompts = {json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()}
    assert len(prompts) == BUNDLED_COUNT
    assert not prompts & {row["prompt"] for row in read_examples(HELDOUT)}
