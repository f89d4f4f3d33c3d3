"""A PEFT adapter mapped onto a base: which tensor of the base every part of the fine-tune changes, and how."""

from dataclasses import dataclass, field

import mlx.core as mx

from specstream_convert.adapter import Adapter, LoraPair
from specstream_convert.base import Base
from specstream_convert.changes import Change, Factors
from specstream_convert.lora import Lora
from specstream_convert.messages import escaped, listing
from specstream_convert.peft_config import MERGE_IN_PEFT
from specstream_convert.report import TensorFate
from specstream_convert.safetensors_io import FLOATS
from specstream_convert.stored import StoredTensor
from specstream_mlx.errors import InvalidInputError, UnsupportedError


@dataclass(frozen=True)
class FineTune:
    """What an adapter does to a base.

    Attributes:
        loras: LoRA modules, which may be merged or stay live.
        others: changes to base tensors that a live adapter cannot hold, by mlx-lm's tensor name.
    """

    loras: tuple[Lora, ...] = ()
    others: dict[str, tuple[Change, ...]] = field(default_factory=dict)
    fates: tuple[TensorFate, ...] = ()
    notes: tuple[str, ...] = ()

    def merged(self) -> dict[str, tuple[Change, ...]]:
        """All changes by tensor, in the order in which they apply."""
        changes = dict(self.others)
        for item in self.loras:
            changes[item.weight] = changes.get(item.weight, ()) + item.merged()
        return changes


def map_adapter(adapter: Adapter, base: Base) -> FineTune:
    """Match PEFT's module paths and saved tensors with mlx-lm's; every one must exist and fit.

    Raises:
        InvalidInputError: a module or shape that the base does not have, or a tensor nobody knows; all are listed.
        UnsupportedError: a saved tensor with no exact result here.
    """
    loras, notes = _map_loras(adapter, base)
    fates = _saved_copies(adapter, base)
    return FineTune(loras=loras, fates=tuple(fates), notes=tuple(notes))


def _map_loras(adapter: Adapter, base: Base) -> tuple[tuple[Lora, ...], list[str]]:
    names = [base.layout.name(pair.module) for pair in adapter.pairs]
    strip, add = _prefix(names, base)
    notes = []
    if strip or add:
        change = f"'{escaped(strip)}' removed from" if strip else f"'{add}' put before"
        notes.append(f"{adapter.weights.path.name}: prefix {change} every module path")
    problems, items = [], []
    for pair, name in zip(adapter.pairs, names, strict=True):
        module = add + name.removeprefix(strip)
        problem = _module_problem(pair, module, adapter, base)
        if problem:
            problems.append(problem)
        else:
            items.append(Lora(module, Factors(pair.a, pair.b, adapter.config.scale_of(pair.module))))
    if problems:
        named = adapter.config.base_model or "an unnamed base"
        raise InvalidInputError(
            listing([*problems, f"the adapter was trained on {escaped(named)}, the base given is {base.name}"])
        )
    return tuple(items), notes


def _prefix(names: list[str], base: Base) -> tuple[str, str]:
    """The one prefix to remove from, or to put before, every module path so that all of them exist."""
    if not names or all(name in base.linear for name in names):
        return "", ""
    if all(f"model.{name}" in base.linear for name in names):
        return "", "model."
    fits = [known for known in base.linear if names[0].endswith("." + known)]
    for known in fits:
        prefix = names[0].removesuffix(known)
        if all(name.startswith(prefix) and name.removeprefix(prefix) in base.linear for name in names):
            return prefix, ""
    return "", ""


def _module_problem(pair: LoraPair, module: str, adapter: Adapter, base: Base) -> str | None:
    place = pair.a.place
    if module not in base.linear:
        if module == base.layout.head and base.tied:
            raise UnsupportedError(
                f"{place}: LoRA on the LM head of a base with tied embeddings is not supported; {MERGE_IN_PEFT}"
            )
        return f"{place}: the base has no linear layer {escaped(module)}"
    if pair.shape != base.linear[module]:
        return f"{place}: fits a weight of shape {pair.shape}, the base's is {base.linear[module]} (out, in)"
    rank = adapter.config.rank_of(pair.module)
    if rank != pair.rank:
        return f"{place}: rank {pair.rank}, but adapter_config.json says {rank}, so its scale is not known"
    return None


def _saved_copies(adapter: Adapter, base: Base) -> list[TensorFate]:
    """Full tensors in the adapter file: dropped when they are the base's own bits, otherwise refused."""
    fates, unknown, trained = [], [], []
    for name, tensor in adapter.saved.items():
        target = next((n for n in (name, f"model.{name}") if n in base.parameters), None)
        if target is None and name == f"{base.layout.head}.weight" and base.tied:
            target = f"{base.layout.embedding}.weight"
        if target is None or base.quantized:
            unknown.append(
                f"{tensor.place}: not a tensor this converter knows; map it with --key-map or drop it with "
                "--ignore-keys"
            )
        elif is_copy(tensor, base.tensors[target]):
            fates.append(TensorFate(tensor.file.path.name, tensor.raw, f"equal to the base's {target}, dropped"))
        else:
            trained.append(f"{tensor.place}: a trained or resized copy of {target} is not supported; {MERGE_IN_PEFT}")
    if unknown:
        raise InvalidInputError(listing(unknown + trained))
    if trained:
        raise UnsupportedError(listing(trained))
    return fates


def is_copy(tensor: StoredTensor, original: StoredTensor) -> bool:
    """Whether ``tensor`` holds the values of ``original``, as exactly as its own dtype can."""
    if tensor.shape != original.shape or tensor.dtype not in FLOATS:
        return False
    pairs = zip(tensor.blocks(), original.blocks(), strict=True)
    return all(bool(mx.array_equal(value, base.astype(value.dtype)).item()) for (_, value), (_, base) in pairs)
