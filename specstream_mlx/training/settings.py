"""Every setting of a training run, checked before anything is loaded."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from specstream_mlx.errors import UsageError
from specstream_mlx.formats.config import MAX_GAMMA, Prune, StreamConfig, StreamId, StreamInit
from specstream_mlx.options import Mode, Optimizer, StreamPosition

_COUNTS = (
    "num_stream_layers",
    "stream_init_rank",
    "prune_rank",
    "rank",
    "iters",
    "batch_size",
    "grad_accumulation_steps",
    "max_anchors",
    "rows_per_chunk",
    "steps_per_report",
    "steps_per_eval",
    "save_every",
)
_RATE, _RATE_SIZE = 5e-4, 2048  # LoRA's default learning rate, at this size of the hidden states
_CHOICES = {"mode": get_args(Mode), "stream_position": get_args(StreamPosition), "optimizer": get_args(Optimizer)}


@dataclass(frozen=True)
class TrainSettings:
    """What decides the result of a training, model and data aside; names follow ``mlx_lm lora``.

    Attributes:
        num_stream_layers: ``N_s``; None for a quarter of the layers, at least 2 and at most 8.
        stream_init_rank: rank of ``f_eta``; None for the identity.
        prune_rank: rank of the early-exit pruner; None for none.
        pruner_only: train the pruner and nothing else, on streams that are trained already.
        rank, scale: of LoRA.
        lora_keys: modules that get LoRA, by their paths in a block or in the model, as in mlx-lm's
            ``lora_parameters``; None for every linear layer.
        num_layers: shared mode: LoRA in so many blocks from the top, -1 for all.
        optimizer_config: further arguments by optimizer, as in mlx-lm: ``{"adamw": {"weight_decay": 0.01}}``.
        learning_rate: peak of LoRA's; it rises over ``warmup`` updates and falls linearly to zero; None: what
            ``for_hidden_size`` gives.
        stream_lr_scale: the learning rate of all stream tensors, times LoRA's; None: the stream embeddings' is
            ``trainer.STREAM_STEP`` of the size of the hidden states that they are added to, the others' is LoRA's.
        lr_schedule: mlx-lm's ``{name, arguments, warmup}`` instead of that schedule.
        stream_weight, prune_weight, latent_weight: of the parts of the loss (``LossWeights``).
        max_grad_norm: gradients are scaled down to it, the pruner's apart from the others.
        max_anchors: random anchors per sequence and step; None for all.
        rows_per_chunk: most stream rows that pass, and most rows whose logits exist, at once.
        val_batches: of a validation, -1 for all; 0: no row is held out, and nothing is validated.
        grad_checkpoint: keep the input of each block only, and compute the rest again for the gradient.
    """

    mode: Mode = "lossless"
    gamma: int = 4
    num_stream_layers: int | None = None
    value_rotation: float | None = None
    stream_init_rank: int | None = None
    stream_position: StreamPosition = "anchor_plus_j"
    prune_rank: int | None = None
    pruner_only: bool = False
    rank: int = 32
    scale: float = 2.0
    num_layers: int = -1
    lora_keys: list[str] | None = None
    iters: int = 1000
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    optimizer: Optimizer = "adamw"
    optimizer_config: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    stream_lr_scale: float | None = None
    warmup: int = 0
    lr_schedule: dict[str, Any] | None = None
    stream_weight: float = 0.1
    prune_weight: float = 1.0
    latent_weight: float = 0.0
    max_grad_norm: float = 1.0
    max_seq_length: int = 2048
    max_anchors: int | None = None
    rows_per_chunk: int = 1024
    grad_checkpoint: bool = False
    val_batches: int = 25
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{flag(name)}: got {value}, expected at least 1")
        if not 1 <= self.gamma <= MAX_GAMMA:
            problems.append(f"--gamma: got {self.gamma}, expected 1..{MAX_GAMMA}")
        if self.value_rotation is not None and not math.isfinite(self.value_rotation):
            problems.append(f"--value-rotation: got {self.value_rotation}, expected a finite number")
        for name in ("scale", "learning_rate", "stream_lr_scale", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                problems.append(f"{flag(name)}: got {value}, expected a number above 0")
        for name in ("stream_weight", "prune_weight", "latent_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                problems.append(f"{flag(name)}: got {getattr(self, name)}, expected a number of at least 0")
        if self.max_seq_length < 4:
            problems.append(f"--max-seq-length: got {self.max_seq_length}, expected at least 4")
        if self.val_batches < -1:
            problems.append(f"--val-batches: got {self.val_batches}, expected -1 (all), 0 (none) or more")
        if not 0 <= self.warmup < max(1, self.num_updates):
            problems.append(
                f"--warmup: got {self.warmup}, expected at least 0 and less than the {self.num_updates} updates"
            )
        if self.grad_accumulation_steps > self.iters >= 1:
            problems.append(
                f"--grad-accumulation-steps: got {self.grad_accumulation_steps}, more than the {self.iters} "
                "iterations; nothing would be updated"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                problems.append(f"{flag(name)}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        optimizers = _CHOICES["optimizer"]
        for name, value in self.optimizer_config.items():
            if name not in optimizers or not isinstance(value, dict | None):
                problems.append(
                    f"optimizer_config: got {name}: {value!r}, expected the arguments of an optimizer under its name, "
                    f"one of {', '.join(optimizers)}"
                )
        if self.lora_keys is not None and (
            not self.lora_keys or not all(isinstance(key, str) for key in self.lora_keys)
        ):
            problems.append(f"{flag('lora_keys')}: got {self.lora_keys!r}, expected names such as self_attn.q_proj")
        if not 0 <= self.seed <= 2**31:
            problems.append(f"--seed: got {self.seed}, expected 0..{2**31}")
        if self.num_layers < -1 or self.num_layers == 0:
            problems.append(f"--num-layers: got {self.num_layers}, expected at least 1, or -1 for all")
        elif self.mode == "lossless" and self.num_layers != -1:
            problems.append("--num-layers: has no meaning in lossless mode, where LoRA acts in the stream layers")
        if self.pruner_only and self.prune_rank is None:
            problems.append("--pruner-only: needs --prune-rank")
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the run."""
        return max(1, self.iters // max(1, self.grad_accumulation_steps))

    @property
    def peak_learning_rate(self) -> float:
        """LoRA's; before the model is known, that of a hidden size of 2,048."""
        return _RATE if self.learning_rate is None else self.learning_rate

    def for_hidden_size(self, hidden_size: int) -> "TrainSettings":
        """With a learning rate for LoRA, which falls with the root of the hidden size, where none was chosen."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=_RATE * math.sqrt(_RATE_SIZE / hidden_size))

    def stream_config(self, num_layers: int, base_model: Mapping[str, Any]) -> StreamConfig:
        """The streams' configuration for a base of ``num_layers`` blocks that ``base_model`` describes."""
        num_stream_layers = self.num_stream_layers
        if num_stream_layers is None:
            num_stream_layers = min(num_layers, max(2, min(8, num_layers // 4)))
        stream_id = StreamId("embedding")
        if self.value_rotation is not None:
            stream_id = StreamId("value_rotation", self.value_rotation)
        stream_init = StreamInit("identity")
        if self.stream_init_rank is not None:
            stream_init = StreamInit("low_rank", self.stream_init_rank)
        prune = None
        if self.prune_rank is not None:
            prune = Prune(self.prune_rank, num_layers - num_stream_layers)
        return StreamConfig(
            gamma=self.gamma,
            num_stream_layers=num_stream_layers,
            mode=self.mode,
            stream_id=stream_id,
            stream_init=stream_init,
            stream_position=self.stream_position,
            prune=prune,
            base_model=dict(base_model),
            training=asdict(self),
            lora={"rank": self.rank, "scale": self.scale},
        )


def flag(name: str) -> str:
    """What a setting is called where users give it."""
    return "lora_parameters.keys" if name == "lora_keys" else "--" + name.replace("_", "-")
