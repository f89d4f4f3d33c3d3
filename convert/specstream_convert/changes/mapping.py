"""A PEFT adapter mapped onto a base: which tensor of the base every part of the fine-tune changes, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from specstream_convert.adapter.peft import Adapter
from specstream_convert.base.model import Base
from specstream_convert.changes.kinds import AddScaled, Change, Lora, Replace
from specstream_convert.changes.lora import merged_changes
from specstream_convert.changes.tied import Sides, join_sides
from specstream_convert.changes.trained_tensors import (
    Naming,
    Shape,
    map_saved,
    map_tokens,
    share_frozen,
    vocab_size_after,
    weight_of,
)
from specstream_convert.report import TensorFate
from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.formats.messages import escaped, listing, refuse


@dataclass(frozen=True)
class FineTune:
    """What an adapter does to a base.

    Attributes:
        loras: LoRA modules, which may be merged or stay live.
        others: changes to base tensors that a live adapter cannot hold, by mlx-lm's tensor name.
        untied: the LM head of a tied base gets values of its own, so the output has one.
        vocab_size: rows of the embedding afterwards, when they are not the base's.
    """

    loras: tuple[Lora, ...] = ()
    others: dict[str, tuple[Change, ...]] = field(default_factory=dict)
    untied: bool = False
    vocab_size: int | None = None
    fates: tuple[TensorFate, ...] = ()
    notes: tuple[str, ...] = ()

    def merged(self) -> dict[str, tuple[Change, ...]]:
        """All changes by tensor, in the order in which they apply."""
        return merged_changes(self.loras, self.others)


def map_adapter(adapter: Adapter, base: Base) -> FineTune:
    """Match PEFT's module paths and saved tensors with mlx-lm's; every one must exist and fit.

    Raises:
        InvalidInputError: a module or shape that the base does not have, a tensor nobody knows, or a copy of the
            base's that is another base's; all are listed.
        UnsupportedError: a change with no exact result here.
    """
    name, notes = _naming(adapter, base)
    replaced, fates = map_saved(adapter, base, name)
    if base.tied:
        replaced = share_frozen(adapter, base, name, replaced)
    vocab_size = vocab_size_after(base, replaced)
    shapes = {
        module: replaced[weight_of(module)].shape if weight_of(module) in replaced else shape
        for module, shape in _module_shapes(base).items()
    }
    loras = _map_loras(adapter, base, name, shapes)
    others: dict[str, tuple[Change, ...]] = {target: (Replace(tensor),) for target, tensor in replaced.items()}
    for target, rows in map_tokens(adapter, base, name, shapes).items():
        others[target] = (*others.get(target, ()), rows)
    for item in loras:
        if item.bias is not None:
            target = f"{item.module}.bias"
            others[target] = (*others.get(target, ()), AddScaled(item.bias, item.scale))
    sides = join_sides(loras, others, adapter, base) if base.tied else Sides(loras, others)
    return FineTune(
        loras=sides.loras,
        others=sides.others,
        untied=sides.untied,
        vocab_size=vocab_size,
        fates=(*fates, *sides.fates),
        notes=(*notes, *sides.notes),
    )


def _module_shapes(base: Base) -> dict[str, Shape]:
    """Modules whose weight may get a LoRA; the LM head too when it is the embedding."""
    shapes: dict[str, Shape] = {**base.linear, **base.embeddings}
    if base.tied:
        shapes[base.family.HEAD] = base.embeddings[base.family.EMBEDDING]
    return shapes


def _naming(adapter: Adapter, base: Base) -> tuple[Naming, list[str]]:
    """PEFT's path of a module or tensor -> mlx-lm's, with the one prefix that all of them lack or have too much."""
    modules = [lora.module for lora in adapter.loras] + list(adapter.tokens)
    if not modules:
        modules = [saved.rpartition(".")[0] for saved in adapter.saved]
    strip, add = _prefix([base.hugging_face.name(module) for module in modules], base)
    notes = []
    if strip or add:
        change = f"'{escaped(strip)}' removed from" if strip else f"'{add}' put before"
        notes.append(f"{adapter.weights.path.name}: prefix {change} every module path")
    return lambda path: add + base.hugging_face.name(path).removeprefix(strip), notes


def _prefix(names: list[str], base: Base) -> tuple[str, str]:
    """The one prefix to remove from, or to put before, every module path so that all of them exist."""
    known = {*_module_shapes(base), *(parameter.rpartition(".")[0] for parameter in base.parameters)}
    if not names or all(name in known for name in names):
        return "", ""
    if all(f"model.{name}" in known for name in names):
        return "", "model."
    for fit in sorted(module for module in known if names[0].endswith("." + module)):
        prefix = names[0].removesuffix(fit)
        if all(name.startswith(prefix) and name.removeprefix(prefix) in known for name in names):
            return prefix, ""
    return "", ""


def _map_loras(adapter: Adapter, base: Base, name: Naming, shapes: Mapping[str, Shape]) -> tuple[Lora, ...]:
    problems, items = [], []
    for lora in adapter.loras:
        module = name(lora.module)
        problem = _module_problem(lora, module, adapter, base, shapes)
        if problem:
            problems.append(problem)
        else:
            items.append(replace(lora, module=module))
    if problems:
        named = adapter.config.base_model or "an unnamed base"
        raise InvalidInputError(
            listing([*problems, f"the adapter was trained on {escaped(named)}, the base given is {base.name}"])
        )
    nowhere = [item for item in items if item.bias is not None and f"{item.module}.bias" not in base.parameters]
    refuse(
        [
            f"{item.bias.place}: the base's {item.module} has no bias that this could be added to, and PEFT itself "
            "cannot merge it; retrain with lora_bias=False"
            for item in nowhere
            if item.bias is not None
        ],
        UnsupportedError,
    )
    return tuple(items)


def _module_problem(lora: Lora, module: str, adapter: Adapter, base: Base, shapes: Mapping[str, Shape]) -> str | None:
    place = lora.a.place
    if module not in shapes or lora.embedding != (module in base.embeddings):
        return f"{place}: the base has no {'embedding' if lora.embedding else 'linear layer'} {escaped(module)}"
    if lora.shape != shapes[module]:
        order = "rows, width" if lora.embedding else "out, in"
        return f"{place}: fits a weight of shape {lora.shape}, the base's is {shapes[module]} ({order})"
    rank = adapter.config.rank_of(lora.module)
    if rank != lora.rank:
        return (
            f"{place}: rank {lora.rank}, but adapter_config.json says {rank}, so its scale is not known; save "
            "both together"
        )
    return None
