"""What an adapter trained in full: whole tensors (modules_to_save, biases, a resized vocabulary) and token rows.

PEFT also writes copies of tensors that it left alone, unasked. Those must be the base's own values; they are dropped.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import mlx.core as mx

from specstream_convert.adapter.peft import Adapter
from specstream_convert.base.dequantize import DequantizedTensor
from specstream_convert.base.model import Base
from specstream_convert.changes.kinds import SetRows
from specstream_convert.files.stored import StoredTensor
from specstream_convert.report import TensorFate
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.messages import escaped, refuse
from specstream_mlx.formats.safetensors import FLOATS

Shape = tuple[int, ...]
Naming = Callable[[str], str]  # PEFT's path of a module or tensor -> mlx-lm's


def weight_of(module: str) -> str:
    """The name of a module's weight."""
    return f"{module}.weight"


def is_copy(tensor: StoredTensor, original: StoredTensor) -> bool:
    """Whether ``tensor`` holds the values of ``original``, as exactly as its own dtype can."""
    if tensor.shape != original.shape or tensor.dtype not in FLOATS:
        return False
    value, base = tensor.read(), original.read()
    return bool(mx.array_equal(value.astype(mx.float32), base.astype(value.dtype).astype(mx.float32)).item())


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors hold the same values."""
    if first.shape != second.shape:
        return False
    return bool(mx.array_equal(first.read_float32(), second.read_float32()).item())


def map_saved(adapter: Adapter, base: Base, name: Naming) -> tuple[dict[str, StoredTensor], list[TensorFate]]:
    """Whole tensors of the adapter: trained ones by the name of the tensor they replace; copies are dropped."""
    replaced: dict[str, StoredTensor] = {}
    fates, problems = [], []
    for path, tensor in adapter.saved.items():
        target = _saved_target(path, base, name)
        original = target
        if target is not None and base.tied and target == weight_of(base.family.HEAD):
            original = weight_of(base.family.EMBEDDING)
        if target is None or original is None:
            problems.append(
                f"{tensor.place}: not a tensor this converter knows; map it with --key-map or drop it with "
                "--ignore-keys"
            )
            continue
        transposed = path != base.hugging_face.name(path) and base.hugging_face.is_transposed(target)
        tensor = replace(tensor, transposed=transposed)
        quantized = f"{original.removesuffix('.weight')}.scales" in base.tensors or isinstance(
            base.tensors[original], DequantizedTensor
        )
        wanted = base.parameters[original]
        why = _reason(path, tensor, target, wanted, adapter, base)
        if why is None and quantized:
            problems.append(
                f"{tensor.place}: cannot be compared with {target}, which is quantised in the base; give the "
                "full-precision base with --hf-path, or drop it with --ignore-keys if it was not trained"
            )
        elif not quantized and _equal(tensor, base.tensors[original], exactly=why is not None):
            fates.append(tensor.fate(f"equal to the base's {original}, dropped"))
        elif why is None:
            problems.append(
                f"{tensor.place}: differs from the base's {original}: it was saved from another base, or trained "
                "without being named in modules_to_save; give its own base with --hf-path"
            )
        elif tensor.shape != wanted and (why != "resized" or tensor.shape[1:] != wanted[1:]):
            problems.append(f"{tensor.place}: shape {tensor.shape}, the base's {original} has {wanted}")
        elif target in replaced:
            problems.append(f"{tensor.place}: means the same tensor as {escaped(replaced[target].raw)}; keep one")
        else:
            tensor.require_float()
            replaced[target] = tensor
    if not problems:
        problems = _not_saved(adapter, base, name)
    refuse(problems)
    return replaced, fates


def _not_saved(adapter: Adapter, base: Base, name: Naming) -> list[str]:
    """Tensors that the configuration says were trained whole and the file does not hold."""
    config = adapter.config
    held = {_saved_target(path, base, name) for path in adapter.saved}
    with_lora = {name(lora.module) for lora in adapter.loras}
    heads = [weight_of(base.family.HEAD)] if base.tied else []
    problems = []
    for parameter in [*base.parameters, *heads]:
        module, _, part = parameter.rpartition(".")
        bias = part == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in with_lora))
        if (bias or config.saves(module)) and parameter not in held:
            problems.append(
                f"{adapter.weights.path}: does not hold {parameter}, which {'bias' if bias else 'modules_to_save'} of "
                "adapter_config.json covers; the save is incomplete"
            )
    return problems


def _saved_target(path: str, base: Base, name: Naming) -> str | None:
    for candidate in (name(path), f"model.{path}"):
        if candidate in base.parameters or (base.tied and candidate == weight_of(base.family.HEAD)):
            return candidate
    return None


def _equal(tensor: StoredTensor, original: StoredTensor, exactly: bool) -> bool:
    if tensor.dtype not in FLOATS or tensor.shape != original.shape:
        return False
    return same_values(tensor, original) if exactly else is_copy(tensor, original)


def _reason(path: str, tensor: StoredTensor, target: str, wanted: Shape, adapter: Adapter, base: Base) -> str | None:
    """Why a whole tensor may differ from the base's: trained, or its vocabulary resized; None: it may not."""
    config = adapter.config
    module, _, part = path.rpartition(".")
    embedding, head = base.family.EMBEDDING, base.family.HEAD
    side = target in (weight_of(embedding), weight_of(head))
    if side and len(tensor.shape) == 2 and tensor.shape[0] != wanted[0]:
        return "resized"
    tied = side and base.tied and config.ensure_weight_tying and (config.saves(embedding) or config.saves(head))
    if tied or (path not in adapter.frozen and config.saves(module)):
        return "trained"
    with_lora = module in {lora.module for lora in adapter.loras}
    if part == "bias" and (config.bias == "all" or (config.bias == "lora_only" and with_lora)):
        return "trained"
    return None


def share_frozen(
    adapter: Adapter, base: Base, name: Naming, replaced: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """A resized weight saved from under one side's LoRA is the frozen weight of the other side too."""
    sides = {weight_of(base.family.EMBEDDING), weight_of(base.family.HEAD)}
    frozen = {name(path) for path in adapter.frozen}
    held = sides & set(replaced)
    if len(held) == 1 and held <= frozen:
        return replaced | dict.fromkeys(sides - held, replaced[held.pop()])
    return replaced


def vocab_size_after(base: Base, replaced: Mapping[str, StoredTensor]) -> int | None:
    """The rows of embedding and LM head when the adapter changes them; both must agree."""
    rows = base.embeddings[base.family.EMBEDDING][0]
    sides = [weight_of(base.family.EMBEDDING), weight_of(base.family.HEAD)]
    found = {side: replaced[side].shape[0] if side in replaced else rows for side in sides}
    if len(set(found.values())) > 1:
        place = next(tensor.place for side, tensor in replaced.items() if side in found and tensor.shape[0] != rows)
        raise InvalidInputError(
            f"{place}: the vocabulary was resized and only one side was saved ({sides[0]} has {found[sides[0]]} rows, "
            f"{sides[1]} {found[sides[1]]}); save it again with modules_to_save naming both"
        )
    size = found[sides[0]]
    return size if size != rows else None


def map_tokens(adapter: Adapter, base: Base, name: Naming, shapes: Mapping[str, Shape]) -> dict[str, SetRows]:
    """Trained token rows by the tensor they go into; with tied embeddings those of the embedding go into both."""
    family = base.family
    found: dict[str, SetRows] = {}
    problems = []
    for path, tensor in adapter.tokens.items():
        module = name(path)
        rows = _rows(path, module, adapter, base, name)
        if module not in (family.EMBEDDING, family.HEAD) or module not in shapes:
            problems.append(f"{tensor.place}: the base has no embedding {escaped(module)}")
        elif rows is None:
            problems.append(
                f"{tensor.place}: trainable_token_indices of adapter_config.json does not name the rows of "
                f"{escaped(module)}"
            )
        elif tensor.shape != (len(rows), shapes[module][1]):
            problems.append(f"{tensor.place}: shape {tensor.shape}, expected {(len(rows), shapes[module][1])}")
        elif rows and max(rows) >= shapes[module][0]:
            problems.append(
                f"{tensor.place}: trainable_token_indices names token {max(rows)}, but {module} has "
                f"{shapes[module][0]} rows"
            )
        else:
            tensor.require_float()
            found[weight_of(module)] = SetRows(tensor, rows)
    if not problems:
        problems = _missing_rows(adapter, base, found)
    refuse(problems)
    embedding, head = weight_of(family.EMBEDDING), weight_of(family.HEAD)
    if base.tied and embedding in found:
        found.setdefault(head, found[embedding])
    return found


def _rows(path: str, module: str, adapter: Adapter, base: Base, name: Naming) -> tuple[int, ...] | None:
    """The rows that the configuration gives a module; those of a tied head may be named as the embedding's only."""
    config, family = adapter.config, base.family
    rows = config.token_rows(path)
    if module == family.HEAD and not isinstance(config.trainable_token_indices, dict):
        rows = None
    if rows is None and module == family.HEAD and base.tied:
        return next((config.token_rows(other) for other in adapter.tokens if name(other) == family.EMBEDDING), None)
    return rows


def _missing_rows(adapter: Adapter, base: Base, found: Mapping[str, SetRows]) -> list[str]:
    """Modules that trainable_token_indices names and the file has no rows for; a tied head shares the embedding's."""
    indices = adapter.config.trainable_token_indices
    if indices is None:
        return []
    if not isinstance(indices, dict):
        missing = [] if found else [base.family.EMBEDDING]
    else:
        missing = [key for key in indices if not any(path.endswith(key) for path in adapter.tokens)]
        shared = found.get(weight_of(base.family.EMBEDDING))
        if base.tied and shared is not None:
            missing = [key for key in missing if not base.family.HEAD.endswith(key) or indices[key] != shared.rows]
    return [
        f"{adapter.weights.path}: no trained rows of {escaped(key)}, which trainable_token_indices of "
        "adapter_config.json names; the save is incomplete"
        for key in missing
    ]
