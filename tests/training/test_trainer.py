"""The loop: interrupted, diverged, out of disk, resumed; and that streams do learn."""

import errno
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.formats import atomic
from specstream_mlx.formats.adapter_directory import read_adapter
from specstream_mlx.formats.output import replaced_directory
from specstream_mlx.training import trainer
from specstream_mlx.training.batches import Example
from specstream_mlx.training.datasets import Dataset
from specstream_mlx.training.forward import forward_main
from specstream_mlx.training.log import LOG, TrainingLog, _draw, plot, read_log
from specstream_mlx.training.settings import TrainSettings
from specstream_mlx.training.trainable import attach, trained_tensors
from tests.tiny import active_memory
from tests.tolerances import FLOAT32
from tests.training.training_cases import prepared, rows, same, save_base

DATA = Dataset(rows(11), rows(5))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("tiny") / "base")


def whole(base: Path, target: Path, **changes: Any) -> dict[str, mx.array]:
    """The tensors of a run that nothing interrupts."""
    prepared(base, target, **changes).train(DATA)
    return read_adapter(target)[1]


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    base: Path, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: the optimizer's state, the schedule, the rates, the batches' order or the chosen anchors start over."""
    changes = {"mode": mode, "grad_accumulation_steps": 2, "iters": 12, "prune_rank": 2, "stream_init_rank": 2}
    expected = whole(base, tmp_path / "whole", **changes)

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["iteration"] == 5:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in mid-accumulation

    target = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        prepared(base, target, **changes).train(DATA, report=interrupt)
    assert not target.exists()
    points = target.with_name("cut.checkpoints")
    assert sorted(path.name for path in points.glob("step-*")) == ["step-0000004", "step-0000006"]
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(trainer, "hidden_rms", lambda *_: 1e3)  # as after another start, or on another machine
    prepared(base, target, **changes).train(DATA, resume=True, report=events.append)
    assert next(e["iteration"] for e in events if e["event"] == "train") == 7
    assert same(read_adapter(target)[1], expected)
    assert not points.exists()

    def curve(directory: Path) -> list[tuple[int, float]]:
        return [(e["iteration"], e["loss"]) for e in read_log(directory / LOG) if e["event"] == "train"]

    assert curve(target) == curve(tmp_path / "whole")
    assert [iteration for iteration, _ in curve(target)] == list(range(1, 13))


def test_a_restart_point_is_an_adapter_and_wants_the_same_run(base: Path, tmp_path: Path) -> None:
    """Red when: other data or settings are mixed into a run, or a restart point cannot be used by itself."""
    target = tmp_path / "out"

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "saved":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(base, target).train(DATA, report=interrupt)
    point = target.with_name("out.checkpoints") / "step-0000002"
    from specstream_mlx import load

    assert load(base, point)[0].gamma == 3
    with pytest.raises(UsageError, match=r"learning_rate 0.005 -> 0.01"):
        prepared(base, target, learning_rate=0.01).train(DATA, resume=True)
    with pytest.raises(UsageError, match="other data"):
        prepared(base, target).train(Dataset(DATA.train[1:], []), resume=True)
    other = save_base(tmp_path / "other", num_hidden_layers=5)
    with pytest.raises(UsageError, match="other base"):
        prepared(other, target).train(DATA, resume=True)
    weights = point / "specstream.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(
        InvalidInputError, match=r"specstream.safetensors: the header needs \d+ bytes, the file has 50;"
    ):
        prepared(base, target).train(DATA, resume=True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(
    base: Path, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: NaN reaches the parameters, or the message does not say where the good state is."""
    real, calls = trainer.loss_and_gradients, 0

    def poisoned(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        report, gradients = real(*arguments, **options)
        calls += 1
        if calls == 6 and what == "loss":
            report.loss = float("nan")
        elif calls == 6:
            gradients["streams"]["stream_embeddings"] *= float("nan")
        return report, gradients

    monkeypatch.setattr(trainer, "loss_and_gradients", poisoned)
    run = prepared(base, tmp_path / "out")
    with pytest.raises(InvalidInputError, match=rf"iteration 6: the {what} is nan.*step-0000004.*--learning-rate"):
        run.train(DATA)
    tensors = read_adapter(tmp_path / "out.checkpoints" / "step-0000004")[1]
    assert all(mx.isfinite(value).all().item() for value in tensors.values())


def test_a_full_disk_loses_nothing_that_was_saved(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when: a save destroys the one before, leaves pieces, or fails with more than a line."""
    target = tmp_path / "out"
    points = target.with_name("out.checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: dict[str, Any]) -> None:
        if event["event"] == "saved" and event["iteration"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # the log still fits, tensors do not

    try:
        with pytest.raises(UsageError, match=r"step-0000006: cannot be written .*what was saved before is as it was"):
            prepared(base, target).train(DATA, report=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in points.iterdir() if path.is_dir()) == ["step-0000002", "step-0000004"]
    prepared(base, target).train(DATA, resume=True)
    assert same(read_adapter(target)[1], whole(base, tmp_path / "whole"))

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = read_adapter(target)[1]
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UsageError, match="No space left on device"), replaced_directory(target) as temporary:
        (temporary / "half").write_text("written")
    assert same(read_adapter(target)[1], before)
    monkeypatch.undo()
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)  # where two directories cannot be swapped at once
    rename = Path.rename

    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        def refuse_new(path: Path, goal: Path, error: BaseException = error) -> Path:
            if ".partial-" in path.name:
                raise error
            return rename(path, goal)

        monkeypatch.setattr(Path, "rename", refuse_new)
        with pytest.raises((UsageError, KeyboardInterrupt)), replaced_directory(target) as temporary:
            (temporary / "whole").write_text("written")
        assert same(read_adapter(target)[1], before)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def interrupt(path: Path, goal: Path) -> Path:
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt), replaced_directory(target) as temporary:
        (temporary / "whole").write_text("written")
    assert same(read_adapter(target)[1], before)


def test_what_a_kill_left_aside_is_there_again_whatever_becomes_of_the_next_attempt(tmp_path: Path) -> None:
    """Red when: a replacement clears what it finds under a hidden name without a look at what is in place."""
    target = tmp_path / "out"
    for name in (".out.replaced-0123456789ab", ".out.partial-0123456789ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(UsageError, match="cannot be written"), replaced_directory(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "file").read_text() == ".out.replaced-0123456789ab"
    assert list(tmp_path.iterdir()) == [target]


def test_a_log_that_cannot_be_written_again_stays(tmp_path: Path) -> None:
    """Red when: a training that goes on on a full disk first empties its log."""
    with TrainingLog(tmp_path, 0) as log:
        for iteration in range(200):
            log.write({"event": "train", "iteration": iteration, "loss": 0.5})
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"training_log.jsonl: cannot be written"):
            TrainingLog(tmp_path, 150)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before
    with TrainingLog(tmp_path, 150) as log:
        log.write({"event": "train", "iteration": 151})
    assert [event["iteration"] for event in read_log(log.path)] == list(range(152))


def test_an_interruption_while_the_adapter_is_written_finds_it_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when: Ctrl-C in the last moment throws away what was trained since the last restart point."""
    real = trainer.write_adapter

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(trainer, "write_adapter", interrupted)
    try:
        written = whole(base, tmp_path / "out")
    except KeyboardInterrupt:
        pytest.fail("interrupted")
    monkeypatch.undo()
    assert same(written, whole(base, tmp_path / "whole"))


def test_streams_learn_a_rule_that_the_answers_follow(base: Path, tmp_path: Path) -> None:
    """Red when: gradients have the wrong sign, targets are shifted, or the validation measures something else."""
    counting = [Example((10 + i,), tuple(10 + (i + k) % 20 for k in range(1, 12))) for i in range(20)]
    run = prepared(base, tmp_path / "out", iters=100, batch_size=10, rank=8, stream_lr_scale=10.0, learning_rate=2e-2)
    found = run.train(Dataset(counting, counting))
    assert found is not None
    checks = [event for event in read_log(tmp_path / "out" / LOG) if event["event"] == "validation"]
    assert checks[0]["tokens_per_pass"] < 1.2
    assert found.tokens_per_pass > 2.5
    assert min(found.acceptance) > 0.8
    assert checks[-1]["tokens_per_pass"] == found.tokens_per_pass


def test_stream_embeddings_learn_at_the_scale_of_the_hidden_states(tmp_path: Path) -> None:
    """Red when: the default rate ignores the states, follows LoRA's, or moves LoRA or the pruner too."""
    steps, sizes = {}, {}
    for size in (1.0, 50.0):
        base = save_base(tmp_path / f"base-{size}")
        weights = mx.load(str(base / "model.safetensors"))
        assert isinstance(weights, dict)
        weights["model.embed_tokens.weight"] = size * weights["model.embed_tokens.weight"]
        mx.save_safetensors(str(base / "model.safetensors"), weights)
        changes = {"num_stream_layers": 1, "prune_rank": 2, "iters": 1, "warmup": 0, "learning_rate": 1e-3}
        run = prepared(base, tmp_path / f"out-{size}", **changes)
        start = prepared(base, tmp_path / "start", **changes)
        attach(start.model, start.config(), rank=2, scale=2.0, seed=start.settings.seed)
        events: list[dict[str, Any]] = []
        run.train(DATA, report=events.append)
        ids = [example.prompt + example.answer for example in DATA.train]
        norms = [mx.sqrt(forward_main(start.model, mx.array([row])).trunk.square().mean(axis=-1)) for row in ids]
        sizes[size] = float(np.median(np.concatenate([np.array(norm).reshape(-1) for norm in norms])))
        assert events[0]["hidden_rms"] == pytest.approx(sizes[size], rel=1e-5, abs=FLOAT32)
        before, after = trained_tensors(start.model), read_adapter(run.target)[1]
        steps[size] = {name: mx.abs(after[name] - before[name]).max().item() for name in before}
    assert sizes[50.0] > 1.5 * sizes[1.0]
    for size, moved in steps.items():
        step = 0.02 * sizes[size]  # Adam's first step is the learning rate, less its epsilon's share
        assert moved["specstream.stream_embeddings"] == pytest.approx(step, rel=0.01, abs=FLOAT32)
        others = {name: step for name, step in moved.items() if name != "specstream.stream_embeddings"}
        assert max(others.values()) <= 1.01e-3  # type: ignore[type-var]


def test_loras_learning_rate_follows_the_hidden_size(base: Path, tmp_path: Path) -> None:
    """Red when: a small model gets the rate of a large one, in what is trained, logged or recorded."""
    events: list[dict[str, Any]] = []
    prepared(base, tmp_path / "out", learning_rate=None, iters=1, warmup=0).train(DATA, report=events.append)
    expected = pytest.approx(5e-4 * 8)  # the hidden size is 32, a sixty-fourth of 2,048
    assert next(event["learning_rate"] for event in events if event["event"] == "train") == expected
    assert read_adapter(tmp_path / "out")[0].training["learning_rate"] == expected


def test_every_step_draws_its_own_anchors(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when: the anchors that are left out are left out in every step."""
    real, seen = trainer.make_batch, []

    def note(*arguments: Any, **options: Any) -> Any:
        seen.append(real(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(trainer, "make_batch", note)
    row = Example((10,), tuple(range(11, 31)))
    prepared(base, tmp_path / "out", batch_size=1).train(Dataset([row], []))
    anchors = {tuple(batch.anchors[0].tolist()) for batch in seen}
    assert len(seen) == 7
    assert len(anchors) > 4
    assert {len(chosen) for chosen in anchors} == {4}


def test_accumulated_gradients_take_the_memory_of_one(base: Path, tmp_path: Path) -> None:
    """Red when: the sum is left for later, so that every summand stays."""
    in_use: list[int] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            in_use.append(active_memory())

    changes = {"mode": "shared", "rank": 64, "iters": 8, "grad_accumulation_steps": 8, "batch_size": 1, "warmup": 0}
    prepared(base, tmp_path / "out", **changes).train(DATA, report=note)
    size = sum(value.nbytes for value in read_adapter(tmp_path / "out")[1].values())
    assert in_use[6] < in_use[1] + size


@pytest.mark.parametrize(("mode", "rows_per_chunk"), [("shared", 1024), ("shared", 12), ("lossless", 12)])
def test_a_pruner_that_trains_along_changes_nothing_else(
    base: Path, mode: str, rows_per_chunk: int, tmp_path: Path
) -> None:
    """Red when: its gradient counts where the others' are clipped, or its start changes another tensor's."""
    changes = {"mode": mode, "rows_per_chunk": rows_per_chunk, "max_grad_norm": 0.05, "stream_init_rank": 2}
    without = whole(base, tmp_path / "without", **changes)
    beside = whole(base, tmp_path / "beside", **changes, prune_rank=2)
    assert beside.keys() - without.keys() == {"specstream.prune.down.weight", "specstream.prune.up.weight"}
    assert same({name: beside[name] for name in without}, without)
    assert mx.abs(beside["specstream.prune.up.weight"]).max().item() > 0


def test_the_start_of_a_tensor_depends_on_its_name_and_the_seed_alone(base: Path, tmp_path: Path) -> None:
    """Red when: keys go by order, so that an option that adds a tensor changes the others'."""
    starts = []
    for changes in ({}, {"num_stream_layers": 3, "stream_init_rank": 2, "prune_rank": 2}, {"seed": 4}):
        run = prepared(base, tmp_path / "out", **changes)
        attach(run.model, run.config(), rank=2, scale=2.0, seed=run.settings.seed)
        starts.append(trained_tensors(run.model))
    few, many, other = starts
    assert same({name: many[name] for name in few}, few)
    assert not any(mx.array_equal(other[name], few[name]).item() for name in few if not name.endswith("lora_b"))
    drawn = [value for name, value in few.items() if name.endswith("lora_a") and value.shape == (32, 2)]
    assert len(drawn) > 4
    assert not any(mx.array_equal(drawn[0], value).item() for value in drawn[1:])


def test_the_pruner_can_be_trained_afterwards_alone(base: Path, tmp_path: Path) -> None:
    """Red when: training the pruner moves a stream or a LoRA tensor, or nothing, or is told as the streams' failure."""
    for mode in ("lossless", "shared"):
        first = whole(base, tmp_path / f"streams-{mode}", mode=mode)
        start = tmp_path / f"streams-{mode}"
        changes = {
            "mode": mode,
            "prune_rank": 2,
            "pruner_only": True,
            "optimizer_config": {"adamw": {"weight_decay": 0.1}},
        }
        run = prepared(base, tmp_path / f"pruned-{mode}", start, **changes)
        events: list[dict[str, Any]] = []
        run.train(DATA, report=events.append)
        assert [event["agreement"] for event in events if event["event"] == "train"] == [[]] * 7
        config, tensors = read_adapter(tmp_path / f"pruned-{mode}")
        assert config.prune is not None
        assert same({name: tensors[name] for name in first}, first)
        assert mx.abs(tensors["specstream.prune.up.weight"]).max().item() > 0
        assert tensors.keys() - first.keys() == {"specstream.prune.down.weight", "specstream.prune.up.weight"}


def test_an_adapter_to_start_from_is_one_of_this_base_and_kind(base: Path, tmp_path: Path) -> None:
    """Red when: tensors of another base, or maps that mean something else here, are trained on in silence."""
    start = tmp_path / "start"
    whole(base, start, stream_init_rank=2, iters=3)
    assert prepared(base, tmp_path / "out", start).model.adapters == {}
    other = save_base(tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.save_safetensors(str(other / "model.safetensors"), weights | {"model.norm.weight": mx.full((32,), 0.5)})
    with pytest.raises(InvalidInputError, match="this is another base or revision than 'base'"):
        prepared(other, tmp_path / "out", start)
    config = start / "specstream_config.json"
    config.write_text(config.read_text().replace('"residual": true', '"residual": false'))
    with pytest.raises(UnsupportedError, match="stream_init or prune is not as train makes it"):
        prepared(base, tmp_path / "out", start)


def test_resume_without_a_restart_point_starts_and_latent_consistency_pulls(base: Path, tmp_path: Path) -> None:
    """Red when: the latent part has no gradient, or is not what the report says."""
    distances = []
    for weight in (1e-9, 30.0):
        events: list[dict[str, Any]] = []
        run = prepared(base, tmp_path / str(weight), latent_weight=weight, iters=30, max_anchors=None)
        run.train(DATA, resume=True, report=events.append)
        distances.append([event["latent_loss"] for event in events if event["event"] == "train"])
    assert distances[0][0] == pytest.approx(distances[1][0], rel=1e-5, abs=FLOAT32)
    assert distances[1][-1] < 0.9 * distances[0][-1]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd", "adafactor"])
def test_every_optimizer_of_mlx_lm_resumes_to_the_same_bits(base: Path, optimizer: str, tmp_path: Path) -> None:
    """Red when: an optimizer's state does not survive the file."""
    schedule = {"name": "cosine_decay", "arguments": [1e-3, 7], "warmup": 2}
    changes = {"optimizer": optimizer, "lr_schedule": schedule, "iters": 5}
    expected = whole(base, tmp_path / "whole", **changes)

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "saved":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(base, tmp_path / "cut", **changes).train(DATA, report=interrupt)
    prepared(base, tmp_path / "cut", **changes).train(DATA, resume=True)
    assert same(read_adapter(tmp_path / "cut")[1], expected)


def test_the_log_is_json_and_the_plot_needs_matplotlib(base: Path, tmp_path: Path) -> None:
    """Red when: a NaN gets into the log, or a missing matplotlib stops a training."""
    whole(base, tmp_path / "out")
    lines = (tmp_path / "out" / LOG).read_text().splitlines()
    events = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert [event["iteration"] for event in events if event["event"] == "validation"] == [0, 4, 7]
    drawn = plot(events, tmp_path / "plot.png")
    assert drawn == (tmp_path / "plot.png").exists() == (tmp_path / "out" / "training.png").exists()


def test_the_plot_shows_what_was_measured_and_no_more() -> None:
    """Red when: a run without validation gets an empty plot, or many depths a legend over the edge."""
    figure = pytest.importorskip("matplotlib.figure")
    steps: list[dict[str, Any]] = [{"event": "train", "iteration": i, "loss": 2.0 - i / 10} for i in (1, 2)]
    alone = figure.Figure()
    _draw(alone, steps)
    assert [axes.get_ylabel() for axes in alone.axes] == ["loss"]
    checks = [{"event": "validation", "iteration": i, "loss": 1.0, "acceptance": [0.5] * 32} for i in (0, 2)]
    both = figure.Figure(layout="constrained")
    _draw(both, steps + checks)
    both.draw_without_rendering()
    axes = both.axes[1]
    legend = axes.get_legend().get_window_extent()
    assert axes.get_window_extent().contains(legend.x0, legend.y0)
    assert axes.get_window_extent().contains(legend.x1, legend.y1)


def test_the_optimizer_takes_its_own_arguments_and_no_others() -> None:
    """Red when: ``optimizer_config`` is not read as mlx-lm reads it, by the optimizer's name."""
    chosen = {"adamw": {"weight_decay": 0.25}, "sgd": {"nonsense": 1}, "adam": None}
    made = trainer.make_optimizer(TrainSettings(optimizer_config=chosen))
    assert [optimizer.weight_decay for optimizer in made.optimizers] == [0.25, 0.25]
    trainer.make_optimizer(TrainSettings(optimizer_config=chosen, optimizer="adam"))
    with pytest.raises(UsageError, match="optimizer_config: sgd refuses it"):
        trainer.make_optimizer(TrainSettings(optimizer_config=chosen, optimizer="sgd"))
    with pytest.raises(UsageError, match=r"optimizer_config: got weight_decay: 0.1, expected the arguments of"):
        TrainSettings(optimizer_config={"weight_decay": 0.1})
