"""What must agree between an adapter, its streams and the base before anything is computed."""

from pathlib import Path

import mlx.core as mx

from specstream_convert.adapter.peft_config import PeftConfig, layer_of
from specstream_convert.base.model import Base
from specstream_convert.changes.kinds import Lora
from specstream_convert.changes.mapping import FineTune
from specstream_convert.files.stored import StoredTensor
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.base_model import base_problems
from specstream_mlx.formats.config import StreamConfig
from specstream_mlx.formats.fingerprint import fingerprint as mark_of
from specstream_mlx.formats.messages import escaped, listing, refuse
from specstream_mlx.formats.safetensors import mlx_dtype

OTHER_BASE = "give the base it was trained on with --hf-path"


def fingerprint(
    base: Base, tensor: str, dtype: str | None = None, replaced: StoredTensor | None = None
) -> dict[str, str]:
    """The mark of one tensor of ``base``, which tells bases of equal shape apart.

    ``dtype`` is the one the tensor is written in, when that differs from the base's; ``replaced`` is written instead.
    """
    own = base.tensors[tensor]
    held = (replaced or own).read_float32().astype(mlx_dtype(dtype or own.dtype)).astype(mx.float32)
    return mark_of(tensor, held)


def check_base_matches(config: StreamConfig, where: Path, base: Base, vocab_size: int | None = None) -> None:
    """Refuse a base other than the one that ``specstream_config.json`` was trained on.

    ``vocab_size`` is the one that the adapter resized the vocabulary to; the trainer may have recorded either.
    """
    recorded, actual = config.base_model, base.summary()
    if vocab_size is not None and recorded.get("vocab_size") == vocab_size:
        actual["vocab_size"] = vocab_size

    def tensor(name: str) -> mx.array | None:
        held = base.tensors.get(base.hugging_face.name(name))
        return None if held is None else held.read_float32()

    problems = base_problems(
        config, where, actual, base.num_layers, tensor, base=f"the base {base.path}", hint=OTHER_BASE, strict=True
    )
    refuse(problems)


def check_coverage(peft: PeftConfig, items: tuple[Lora, ...], base: Base, config: StreamConfig | None) -> None:
    """Refuse an adapter that lacks modules its own configuration asks for; a partial save looks fluent and is wrong."""
    expected = peft.expected_modules([*base.linear, *base.embeddings, *([base.family.HEAD] if base.tied else [])])
    if expected is None or not items:
        return
    missing = expected - {item.module for item in items}
    if config is not None and config.mode == "lossless":
        first = base.num_layers - config.num_stream_layers
        missing = {name for name in missing if (layer := layer_of(name)) is not None and layer >= first}
    if missing:
        file = items[0].a.file.path
        raise InvalidInputError(
            listing(
                f"{file}: no LoRA for {name}, which target_modules of adapter_config.json covers; the save is "
                "incomplete, or the base has more layers than the one trained"
                for name in sorted(missing)
            )
        )


def check_lossless_settings(peft: PeftConfig) -> None:
    """Refuse an adapter whose own configuration says that it trained the main stream."""
    trained = {"modules_to_save": ", ".join(peft.modules_to_save), "bias": "" if peft.bias == "none" else peft.bias}
    problems = [
        f"{peft.path}: {name} is {escaped(value)}: mode lossless leaves the base as it is, and this would change the "
        "main stream; retrain without it or use mode shared"
        for name, value in trained.items()
        if value
    ]
    refuse(problems)


def check_lossless(fine_tune: FineTune, config: StreamConfig, base: Base) -> None:
    """In lossless mode there may only be LoRA, where stream rows are: in the top ``num_stream_layers`` layers."""
    problems = lossless_problems(fine_tune.loras, config, base.num_layers)
    problems += [
        f"{changes[0].tensors[0].place}: mode lossless leaves {name} as the base has it; this would change the "
        "main stream, retrain without it or use mode shared"
        for name, changes in fine_tune.others.items()
    ]
    refuse(problems)


def lossless_problems(items: tuple[Lora, ...], config: StreamConfig, num_layers: int) -> list[str]:
    """LoRA that :func:`check_lossless` refuses, for a base of ``num_layers`` layers."""
    first = num_layers - config.num_stream_layers
    problems = []
    for item in items:
        layer = layer_of(item.module)
        if layer is None or layer < first:
            problems.append(
                f"{item.a.place}: mode lossless allows LoRA only in layers {first} to "
                f"{num_layers - 1}; this one would change the main stream, retrain without it or use mode shared"
            )
        elif item.magnitude is not None:
            problems.append(
                f"{item.magnitude.place}: mode lossless allows plain LoRA only; retrain without use_dora or use mode "
                "shared"
            )
    return problems
