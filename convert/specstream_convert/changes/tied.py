"""Tied embeddings: one tensor of the base with two uses, as embedding and as LM head.

PEFT trains the side that was named unless both were to stay equal. Both sides are mapped apart; the output keeps the
tie only where both end up with the same values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from specstream_convert.adapter.peft import Adapter
from specstream_convert.base.model import Base, can_untie
from specstream_convert.changes.kinds import Change, Lora, Replace, SetRows
from specstream_convert.changes.lora import merged_changes
from specstream_convert.changes.trained_tensors import same_values, weight_of
from specstream_convert.report import TensorFate
from specstream_mlx.errors import InvalidInputError, UnsupportedError


@dataclass(frozen=True)
class Sides:
    """The changes of a fine-tune once the two sides are joined, or parted (``untied``)."""

    loras: tuple[Lora, ...]
    others: dict[str, tuple[Change, ...]]
    untied: bool = False
    fates: tuple[TensorFate, ...] = ()
    notes: tuple[str, ...] = ()


def join_sides(
    loras: tuple[Lora, ...], others: Mapping[str, tuple[Change, ...]], adapter: Adapter, base: Base
) -> Sides:
    """Keep the embeddings tied when the LM head ends up with the embedding's values; otherwise untie them.

    Raises:
        InvalidInputError: the file contradicts ``ensure_weight_tying``.
        UnsupportedError: values apart in a family whose LM head is always the embedding.
    """
    head_module = base.family.HEAD
    embedding, head = weight_of(base.family.EMBEDDING), weight_of(head_module)
    merged = merged_changes(loras, others)
    of_embedding, of_head = merged.get(embedding, ()), merged.get(head, ())
    if not of_embedding and not of_head:
        return Sides(loras, dict(others))
    if adapter.config.ensure_weight_tying:
        _check_tying(of_embedding, of_head)
    if len(of_embedding) != len(of_head) or not all(map(_same_change, of_embedding, of_head)):
        if not can_untie(base):
            raise UnsupportedError(
                f"{(of_head or of_embedding)[0].tensors[0].place}: the adapter gives LM head and embedding values of "
                f"their own, and a {base.model_type} model has one tensor for both; retrain with ensure_weight_tying"
            )
        sides = "embedding and LM head apart" if of_embedding and of_head else "one of the two only"
        note = f"the base ties its LM head to the embedding and the adapter trained {sides}: the output's are not tied"
        return Sides(loras, dict(others), untied=True, notes=(note,))
    kept = {(tensor.file.path, tensor.raw) for change in of_embedding for tensor in change.tensors}
    fates = [
        tensor.fate("equal to the embedding's, which the LM head shares; dropped")
        for change in of_head
        for tensor in change.tensors
        if (tensor.file.path, tensor.raw) not in kept
    ]
    return Sides(
        loras=tuple(item for item in loras if item.module != head_module),
        others={target: changes for target, changes in others.items() if target != head},
        fates=tuple(fates),
    )


def _check_tying(of_embedding: tuple[Change, ...], of_head: tuple[Change, ...]) -> None:
    """With ensure_weight_tying PEFT saves the LoRA of the embedding a second time, as the LM head's."""
    ours = [change for change in of_embedding if isinstance(change, Lora)]
    theirs = [change for change in of_head if isinstance(change, Lora)]
    for one, other in ((of_embedding, of_head), (of_head, of_embedding)):
        if one and not other:
            raise InvalidInputError(
                f"{one[0].tensors[0].place}: ensure_weight_tying of adapter_config.json is true, but nothing was saved "
                "for the other side of the tied embeddings; the save is incomplete, or PEFT did not tie this family"
            )
    if len(ours) != len(theirs) or not all(map(_mirrored, ours, theirs)):
        changes = theirs or ours
        raise InvalidInputError(
            f"{changes[0].a.place}: differs from the LoRA of the other side of the tied embeddings, although "
            "ensure_weight_tying of adapter_config.json is true; save the adapter again"
        )


def _mirrored(embedding: Lora, head: Lora) -> bool:
    """Whether the LM head's A is the embedding's B transposed, and its B the embedding's A."""
    (a, b), (head_a, head_b) = embedding.read(), head.read()
    return (
        head_a.shape == b.T.shape
        and head_b.shape == a.T.shape
        and bool(mx.array_equal(head_a, b.T).item())
        and bool(mx.array_equal(head_b, a.T).item())
    )


def _same_change(embedding: Change, head: Change) -> bool:
    match embedding, head:
        case Replace(one), Replace(other):
            return same_values(one, other)
        case SetRows(one, rows), SetRows(other, other_rows):
            return rows == other_rows and same_values(one, other)
        case Lora(), Lora():
            return embedding.scale == head.scale and _mirrored(embedding, head)
    return False
