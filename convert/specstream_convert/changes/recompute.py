"""``--recompute-init``: LoRA modules that also take out of the base what their training started from."""

from collections.abc import Collection
from dataclasses import replace

from specstream_convert.adapter.peft_config import PeftConfig
from specstream_convert.base.model import Base
from specstream_convert.changes.initial import RESAVE, Initial
from specstream_convert.changes.kinds import Lora
from specstream_mlx.errors import UnsupportedError, UsageError
from specstream_mlx.formats.messages import refuse


def check_asked_for(config: PeftConfig, asked: bool) -> None:
    """Refuse to leave out, or to make up, an initialisation that the adapter's configuration names."""
    if config.initial is not None and not asked:
        raise UnsupportedError(
            f"{config.path}: init_lora_weights is {config.initial!r}: the base weights were changed at initialisation "
            f"and are not in this adapter; give --recompute-init to recompute the change from the base, or {RESAVE}"
        )
    if config.initial is None and asked:
        raise UsageError(
            f"--recompute-init: init_lora_weights of {config.path} is neither pissa nor olora, so there is nothing to "
            "recompute; leave it out"
        )


def with_initials(
    items: tuple[Lora, ...], config: PeftConfig, base: Base, mode: str | None, changed: Collection[str] = ()
) -> tuple[tuple[Lora, ...], list[str]]:
    """The modules with the factors they started from, all recomputed, and warnings.

    ``changed`` names the tensors of the base that the adapter replaces.

    Raises:
        UnsupportedError: a base that the training cannot have started from, or modules whose factors are not defined
            (all are listed).
    """
    if config.initial is None:
        return items, []
    if base.quantized:
        raise UnsupportedError(
            f"{base.path}: --recompute-init needs the weights the training started from, and these are quantised; give "
            "the full-precision base with --hf-path"
        )
    if mode == "lossless":
        raise UnsupportedError(
            f"{config.path}: init_lora_weights {config.initial!r} changed the base under the main stream too, which "
            "mode lossless must not; retrain with init_lora_weights true"
        )
    found, initials, problems = [], [], []
    for item in items:
        if item.embedding or item.weight not in base.tensors:
            problems.append(f"{item.a.place}: {config.initial} of an embedding has no defined result; {RESAVE}")
            continue
        if item.weight in changed:
            problems.append(
                f"{item.a.place}: the adapter also holds {item.weight} itself, from which nothing can be "
                f"recomputed; {RESAVE}"
            )
            continue
        initial = Initial(config.initial, base.tensors[item.weight], item.a.shape[0], item.scale)
        problem = initial.problem()
        if problem:
            problems.append(f"{initial.weight.place}: {problem}")
        initials.append(initial)
        found.append(replace(item, initial=initial))
    refuse(problems, UnsupportedError)
    return tuple(found), _warnings(config.initial, initials)


def _warnings(kind: str, initials: list[Initial]) -> list[str]:
    rounded = sorted({initial.weight.dtype for initial in initials if initial.weight.dtype != "F32"})
    if not rounded:
        return []
    return [
        f"the base is {' and '.join(rounded)}: PEFT rounded what {kind} left of each weight to the dtype it had loaded "
        "the base in, which is not recorded; the recomputed weights may differ by that one rounding"
    ]
