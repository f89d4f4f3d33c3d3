"""Restart points: complete adapters with the optimizer's state beside, from which a training goes on bit for bit."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats.adapter_directory import read_adapter, write_adapter
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.output import replaced_directory, write_json
from specstream_mlx.formats.safetensors import check_safetensors
from specstream_mlx.formats.tensor_writer import save_tensors
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training.batches import Example
from specstream_mlx.training.log import LOG
from specstream_mlx.training.settings import TrainSettings
from specstream_mlx.training.trainable import set_trained_tensors, trained_tensors

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
_KEPT = 2
_FREE = ("val_batches", "steps_per_report", "steps_per_eval", "save_every", "rows_per_chunk", "grad_checkpoint")
"""Settings that a continued run may change. The last two change the rounding, not the mathematics."""


class RestartPoints:
    """The directory beside an output, ``OUT.checkpoints``, with ``step-<iteration>`` directories and the log."""

    def __init__(self, output: Path, settings: TrainSettings, examples: Sequence[Example], base: object) -> None:
        """``base``: what identifies the base model, compared on resume."""
        self.directory = output.with_name(output.name + ".checkpoints")
        self._identity = {
            "settings": {key: value for key, value in asdict(settings).items() if key not in _FREE},
            "data": _digest(examples),
            "base": base,
        }

    def newest(self) -> Path | None:
        """The restart point to go on from."""
        found = sorted(path for path in self.directory.glob("step-*") if (path / STATE).exists())
        return found[-1] if found else None

    def hidden_rms(self, point: Path) -> float:
        """What the learning rates of a restart point's run are made from; measured again it could come out otherwise.

        Raises:
            InvalidInputError: it is not there.
        """
        value = read_json(point / STATE).get("hidden_rms")
        if not isinstance(value, float):
            raise InvalidInputError(f"{point / STATE}: has no hidden_rms; give --overwrite to start again")
        return value

    def save(self, iteration: int, model: SpecStreamModel, optimizer: optim.Optimizer, hidden_rms: float) -> Path:
        """Write a restart point and drop all but the newest ones.

        Raises:
            UsageError: it cannot be written; the older ones stay.
        """
        assert model.stream_config is not None
        target = self.directory / f"step-{iteration:07d}"
        with replaced_directory(target) as temporary:
            write_adapter(temporary, model.stream_config, trained_tensors(model), len(model.layers))
            save_tensors(temporary / OPTIMIZER, dict(tree_flatten(optimizer.state)))
            write_json(temporary / STATE, {"iteration": iteration, "hidden_rms": hidden_rms} | self._identity)
        for old in sorted(self.directory.glob("step-*"))[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def restore(self, point: Path, model: SpecStreamModel, optimizer: optim.Optimizer) -> int:
        """Put a restart point's tensors and optimizer state in place and return its iteration.

        Raises:
            UsageError: it was made with other settings, other data or another base.
            InvalidInputError: a file of it is damaged.
        """
        state = read_json(point / STATE)
        # As JSON, because a tuple comes back as a list.
        now = json.loads(json.dumps(self._identity))
        before: dict[str, Any] = state.get("settings", {})
        changed = [
            f"{key} {before.get(key)!r} -> {value!r}"
            for key, value in now["settings"].items()
            if before.get(key) != value
        ]
        changed += [f"other {key}" for key in ("data", "base") if state.get(key) != now[key]]
        if changed:
            raise UsageError(
                f"{point}: cannot be resumed with {', '.join(changed)}; give the same options, or --overwrite to start "
                "again"
            )
        check_safetensors(point / OPTIMIZER)
        set_trained_tensors(model, read_adapter(point)[1])
        tensors: dict[str, mx.array] = mx.load(str(point / OPTIMIZER))  # type: ignore[assignment]
        optimizer.state = tree_unflatten(list(tensors.items()))
        return int(state["iteration"])

    def remove(self) -> None:
        """Delete all restart points and the log, once the output is in place; what others put there stays."""
        for path in (*self.directory.glob("step-*"), *self.directory.glob(".step-*")):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.directory / LOG).unlink(missing_ok=True)
            self.directory.rmdir()


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt, example.answer):
            digest.update(np.array([len(ids), *ids], dtype="<i4").tobytes())
    return digest.hexdigest()
