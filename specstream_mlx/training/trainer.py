"""The training loop: batches, loss, optimizer, validation, log, restart points."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import build_schedule
from mlx_lm.utils import maybe_set_recommended_wired_limit

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats.adapter_directory import write_adapter
from specstream_mlx.formats.output import replaced_directory
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training.batches import Example, iterate_batches, make_batch, mixed_seed
from specstream_mlx.training.evaluation import Validation, validate
from specstream_mlx.training.forward import forward_main
from specstream_mlx.training.log import TrainingLog
from specstream_mlx.training.loss import LossReport, LossWeights, loss_and_gradients
from specstream_mlx.training.restart import RestartPoints
from specstream_mlx.training.settings import TrainSettings
from specstream_mlx.training.trainable import trained_tensors

Report = Callable[[dict[str, Any]], None]
Schedule = Callable[[mx.array], mx.array]

_OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
# Adam's first steps are far too long without the correction, and the streams do not recover quickly.
_OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True, "weight_decay": 0.0},
    "adafactor": {"relative_step": False, "scale_parameter": False},
}
STREAM_STEP = 0.02
"""Default learning rate of the stream embeddings, as a share of the size of the hidden states that they are added to.

Adam moves a number by about its learning rate per update, and how far an embedding has to go depends on those states.
"""
_PRUNER = "streams.prune."
_SIZE_EXAMPLES = 16  # examples that the size is measured on
_CACHE_LIMIT = 4 << 30  # bytes of freed buffers that may wait for reuse


def train(
    model: SpecStreamModel,
    settings: TrainSettings,
    examples: Sequence[Example],
    validation: Sequence[Example],
    output: Path,
    *,
    resume: bool = False,
    report: Report | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Validation | None:
    """Train the streams and LoRA that ``attach`` gave ``model``, and write the adapter to ``output``.

    Depends on the arguments alone: an interrupted run that is resumed ends with the same bits on one machine.

    Args:
        model: with streams and LoRA attached.
        settings: of the run.
        examples: to train on.
        validation: to measure acceptance on; may be empty.
        output: directory to write; restart points and the log are beside it, in ``OUTPUT.checkpoints``, until then.
        resume: go on from the newest restart point, if there is one.
        report: told every event that the log gets, and ``{"event": "interrupted"}`` at once.
        progress: told ``(stage, done, total)``.

    Returns:
        The last validation; None without validation examples.

    Raises:
        KeyboardInterrupt: after saving a restart point.
        InvalidInputError: the loss is not a number any more.
        UsageError: a file cannot be written, or the restart point does not fit the settings.
    """
    assert model.stream_config is not None
    maybe_set_recommended_wired_limit()
    weights = loss_weights(settings)
    points = RestartPoints(output, settings, examples, model.stream_config.base_model)
    newest = points.newest() if resume else None
    rms = hidden_rms(model, examples) if newest is None else points.hidden_rms(newest)
    optimizer = make_optimizer(settings, rms)
    done = points.restore(newest, model, optimizer) if newest is not None else 0
    log = TrainingLog(points.directory, done, report)
    source = iterate_batches(examples, settings.batch_size, settings.seed)
    for _ in range(done):
        next(source)
    accumulated: Any = None
    interval = _Interval()
    last: Validation | None = None

    def measure(iteration: int) -> Validation | None:
        if not validation or settings.val_batches == 0:
            return None
        begin = time.perf_counter()
        found = validate(
            model,
            validation,
            weights,
            batch_size=settings.batch_size,
            num_batches=settings.val_batches,
            rows_per_chunk=settings.rows_per_chunk,
            progress=None if progress is None else lambda n, total: progress("validate", n, total),
        )
        log.write({"event": "validation", "iteration": iteration, **found.to_dict(), "seconds": _since(begin)})
        return found

    with log, _interruptible(report) as interrupted:
        if done == 0:
            log.write(
                {
                    "event": "start",
                    "iteration": 0,
                    "hidden_rms": rms,
                    "stream_lr_scale": stream_lr_scale(settings, rms),
                }
            )
            measure(0)
        for iteration in range(done + 1, settings.iters + 1):
            rows = next(source)
            batch = make_batch(
                [examples[row] for row in rows],
                settings.gamma,
                max_anchors=settings.max_anchors,
                seed=mixed_seed(settings.seed, iteration),
            )
            result, gradients = loss_and_gradients(
                model,
                batch,
                weights,
                rows_per_chunk=settings.rows_per_chunk,
                checkpoint=settings.grad_checkpoint,
            )
            _check_finite(result.loss, "loss", iteration, points)
            accumulated = gradients if accumulated is None else tree_map(mx.add, accumulated, gradients)
            mx.eval(accumulated)  # or every summand would stay in memory until the update
            if iteration % settings.grad_accumulation_steps == 0:
                _update(model, optimizer, accumulated, settings, iteration, points)
                accumulated = None
            interval.add(result, int(batch.answer_lengths.sum()))
            if mx.get_cache_memory() > _CACHE_LIMIT:
                mx.clear_cache()
            if progress is not None:
                progress("train", iteration, settings.iters)
            if iteration % settings.steps_per_report == 0 or iteration == settings.iters:
                log.write(interval.event(iteration, _learning_rate(optimizer)))
                interval = _Interval()
            if iteration % settings.steps_per_eval == 0 or iteration == settings.iters:
                last = measure(iteration) or last
            # Gradients that wait for their update are not saved, so a restart point lies where none do.
            if accumulated is None and iteration < settings.iters:
                if interrupted():
                    points.save(iteration, model, optimizer, rms)
                    raise KeyboardInterrupt
                if iteration % settings.save_every < settings.grad_accumulation_steps:
                    saved = points.save(iteration, model, optimizer, rms)
                    log.write({"event": "saved", "iteration": iteration, "path": str(saved)})
        with replaced_directory(output) as temporary:
            write_adapter(temporary, model.stream_config, trained_tensors(model), len(model.layers))
            log.copy_to(temporary)
    points.remove()
    return last


def loss_weights(settings: TrainSettings) -> LossWeights:
    """What the parts of the loss count in this mode."""
    if settings.pruner_only:
        return LossWeights(main=0.0, streams=0.0, prune=1.0)
    main = 1.0 if settings.mode == "shared" else 0.0
    return LossWeights(main, settings.stream_weight, settings.prune_weight, settings.latent_weight)


def hidden_rms(model: SpecStreamModel, examples: Sequence[Example]) -> float:
    """Root mean square of ``M^{N-N_s}``, where streams start: the median over the tokens of some examples."""
    sizes = []
    for example in examples[:_SIZE_EXAMPLES]:
        trunk = forward_main(model, mx.array([example.prompt + example.answer])).trunk
        sizes.append(np.array(mx.sqrt(trunk.astype(mx.float32).square().mean(axis=-1))).reshape(-1))
    return float(np.median(np.concatenate(sizes)))


def stream_lr_scale(settings: TrainSettings, rms: float) -> float:
    """The stream embeddings' learning rate, times LoRA's, for hidden states of this root mean square."""
    if settings.stream_lr_scale is None and settings.optimizer == "sgd":  # whose steps are as long as the gradient is
        return 1.0
    return settings.stream_lr_scale or STREAM_STEP * rms / settings.peak_learning_rate


def make_optimizer(settings: TrainSettings, rms: float = 1.0) -> optim.Optimizer:
    """mlx's optimizer, and another of its kind for tensors that have their own learning rate.

    Args:
        settings: of the run.
        rms: of the hidden states that streams start from.

    Raises:
        UsageError: mlx does not take the configuration.
    """
    schedule = _schedule(settings)
    scale = stream_lr_scale(settings, rms)
    own_rate = "streams.stream_embeddings" if settings.stream_lr_scale is None else "streams."
    kind = _OPTIMIZERS[settings.optimizer]
    options = _OPTIMIZER_DEFAULTS.get(settings.optimizer, {}) | (
        settings.optimizer_config.get(settings.optimizer) or {}
    )
    try:
        streams = kind(learning_rate=lambda step: scale * schedule(step), **options)
        others = kind(learning_rate=schedule, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer_config: {settings.optimizer} refuses it ({error})") from error
    return optim.MultiOptimizer([others, streams], [lambda path, _: not path.startswith(own_rate)])


def check_optimizer(settings: TrainSettings) -> None:
    """Make one update of a small matrix: mlx looks at much of a configuration only then.

    Raises:
        UsageError: mlx does not take the configuration, or the update or a learning rate is not a number.
    """
    start = {"probe": mx.ones((2, 2))}
    optimizer, schedule = make_optimizer(settings), _schedule(settings)
    try:
        rates = [float(schedule(mx.array(update))) for update in (0, settings.num_updates - 1)]
    except (TypeError, ValueError) as error:
        raise UsageError(f"lr_schedule: mlx-lm cannot run it ({type(error).__name__}: {error})") from error
    for rate in rates:
        if not (math.isfinite(rate) and rate >= 0):
            raise UsageError(f"lr_schedule: gives a learning rate of {rate}; correct its arguments")
    try:
        finite = mx.isfinite(optimizer.apply_gradients(start, start)["probe"]).all().item()
    except (TypeError, ValueError, IndexError) as error:
        raise UsageError(f"optimizer_config: {settings.optimizer} refuses it ({error})") from error
    if not finite:
        raise UsageError(f"optimizer_config: an update of {settings.optimizer} is not a number; correct its arguments")


def _schedule(settings: TrainSettings) -> Schedule:
    """Learning rate of LoRA by update: a linear rise and a linear fall to zero, or what ``lr_schedule`` asks for."""
    if settings.lr_schedule is not None:
        try:
            return build_schedule(settings.lr_schedule)
        except (KeyError, AttributeError, TypeError, IndexError, ValueError) as error:
            raise UsageError(f"lr_schedule: mlx-lm cannot build it ({type(error).__name__}: {error})") from error
    total, warmup = settings.num_updates, settings.warmup

    def linear(step: mx.array) -> mx.array:
        position = step.astype(mx.float32)
        rise, fall = (position + 1) / (warmup + 1), (total - position) / max(1, total - warmup)
        return settings.peak_learning_rate * mx.minimum(rise, fall)

    return linear


def _update(
    model: SpecStreamModel,
    optimizer: optim.Optimizer,
    gradients: Any,
    settings: TrainSettings,
    iteration: int,
    points: RestartPoints,
) -> None:
    steps = settings.grad_accumulation_steps
    mean = tree_map(lambda g: g / steps, gradients) if steps > 1 else gradients
    clipped, norm = clip_gradients(mean, settings.max_grad_norm)
    _check_finite(norm, "gradient", iteration, points)
    optimizer.update(model, clipped)
    mx.eval(model.trainable_parameters(), optimizer.state)


def clip_gradients(gradients: Any, max_norm: float) -> tuple[Any, float]:
    """Scale gradients down to a norm of at most ``max_norm``: the pruner's by its own, all others by theirs.

    The pruner shares no gradient with the rest, so it must not shorten the rest's steps either.

    Returns:
        The clipped gradients, and the norm that all had together.
    """
    groups: dict[bool, dict[str, mx.array]] = {True: {}, False: {}}
    for name, gradient in tree_flatten(gradients):
        groups[name.startswith(_PRUNER)][name] = gradient
    clipped: dict[str, mx.array] = {}
    norms = []
    for group in groups.values():
        scaled, norm = optim.clip_grad_norm(group, max_norm)
        clipped |= scaled
        norms.append(norm)
    return tree_unflatten(list(clipped.items())), math.hypot(*(float(norm) for norm in norms))


def _check_finite(value: float, what: str, iteration: int, points: RestartPoints) -> None:
    if not math.isfinite(value):
        newest = points.newest()
        kept = f"the last good state is {newest}" if newest is not None else "nothing was saved before"
        raise InvalidInputError(
            f"iteration {iteration}: the {what} is {value}, the training has diverged; {kept}. Lower "
            "--learning-rate or --stream-lr-scale, or give --warmup"
        )


def _learning_rate(optimizer: Any) -> float:
    rate: float = optimizer.learning_rate.item()
    return rate


def _since(begin: float) -> float:
    return round(time.perf_counter() - begin, 3)


class _Interval:
    """Averages over the steps between two reports."""

    def __init__(self) -> None:
        self.results: list[LossReport] = []
        self.tokens = 0
        self.begin = time.perf_counter()

    def add(self, result: LossReport, tokens: int) -> None:
        self.results.append(result)
        self.tokens += tokens

    def event(self, iteration: int, learning_rate: float) -> dict[str, Any]:
        seconds = time.perf_counter() - self.begin

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        counted = [result for result in self.results if result.stream_counts]
        event: dict[str, Any] = {
            "event": "train",
            "iteration": iteration,
            "loss": mean([result.loss for result in self.results]),
            "stream_losses": [mean(list(column)) for column in zip(*(r.streams for r in counted), strict=True)],
            "agreement": [mean(list(column)) for column in zip(*(r.agreement for r in counted), strict=True)],
            "learning_rate": learning_rate,
            "tokens_per_second": self.tokens / seconds,
            "iterations_per_second": len(self.results) / seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        for name in ("main", "prune", "latent"):
            value = mean([getattr(result, name) for result in self.results])
            if not math.isnan(value):
                event[f"{name}_loss"] = value
        return event


@contextlib.contextmanager
def _interruptible(report: Report | None) -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C, or SIGTERM or SIGHUP, sets a flag and says so; the second stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen = False
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}  # nohup

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        nonlocal seen
        seen = True
        restore()
        if report is not None:
            with contextlib.suppress(RuntimeError):  # the signal came while a line was being written
                report({"event": "interrupted"})

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: seen
    finally:
        restore()
