"""A dump of a whole model with LoRA inside: the base's own tensors among the adapter's.

    model.layers.0.self_attn.q_proj.base_layer.weight       the base's q_proj
    model.layers.0.self_attn.q_proj.lora_A.default.weight   the adapter
    model.norm.weight                                       the base's norm
    lm_head.original_module.weight                          the base's head
    lm_head.modules_to_save.default.weight                  what training made of it

With another base given the copies are compared with it; alone, and beside a ``config.json``, they are the base.
"""

import re
from dataclasses import replace

from specstream_convert.adapter.peft import Adapter
from specstream_convert.adapter.peft_keys import Kind, parse
from specstream_convert.files.stored import StoredTensor
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.families import CONVERTED, FAMILIES
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.messages import escaped

_FIRST_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.0\.")


def split_dump(
    adapter: Adapter, renames: dict[str, str], ignored: re.Pattern[str] | None
) -> tuple[Adapter, dict[str, StoredTensor]] | None:
    """The adapter without the base's tensors, and those by their Hugging Face names; None when it is no such dump.

    It is one when the directory has a model's ``config.json``, every LoRA module comes with its ``base_layer``, and
    the embedding and a plain tensor of the first block are there, which PEFT does not save with an adapter.

    Raises:
        InvalidInputError: two tensors that mean the same one of the base.
    """
    where = adapter.directory / "config.json"
    if not where.is_file():
        return None
    config = read_json(where)
    model_type = str(config.get("model_type"))
    if model_type not in CONVERTED:
        return None
    embedding, name_of = f"{FAMILIES[model_type].EMBEDDING}.weight", CONVERTED[model_type].name
    base: dict[str, StoredTensor] = {}
    for raw, tensor in adapter.weights.tensors.items():
        key = parse(renames.get(raw, raw))
        if ignored is not None and ignored.fullmatch(raw):
            continue
        if key.kind in (Kind.BASE_COPY, Kind.UNTRAINED) or (key.kind is Kind.SAVED and key.adapter is None):
            if key.kind is Kind.UNTRAINED and "specstream." in key.module:
                continue
            if key.module in base:
                raise InvalidInputError(
                    f"{tensor.place}: means the same tensor as {escaped(base[key.module].raw)}; keep one"
                )
            base[key.module] = tensor
    complete = all(lora.weight in base for lora in adapter.loras)
    plain = any(_FIRST_BLOCK.search(name) and ".base_layer." not in tensor.raw for name, tensor in base.items())
    if not (complete and plain and embedding in map(name_of, base)):
        return None
    names = {tensor.raw for tensor in base.values()}
    views = {
        file.path: replace(file, tensors={raw: info for raw, info in file.tensors.items() if raw in names})
        for file in adapter.weights.files
    }
    base = {name: replace(tensor, file=views[tensor.file.path]) for name, tensor in base.items()}
    biases = adapter.config.bias != "none"  # trained in place: the base's and the adapter's are one
    rest = {
        name: tensor
        for name, tensor in adapter.saved.items()
        if tensor.raw not in names or (biases and name.endswith(".bias"))
    }
    fates = tuple(fate for fate in adapter.fates if fate.tensor not in names)
    note = f"{adapter.weights.path.name}: holds the base as well, which is used; give --hf-path to compare with another"
    return replace(adapter, saved=rest, fates=fates, notes=(*adapter.notes, note)), base
