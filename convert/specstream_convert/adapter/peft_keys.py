"""PEFT's tensor names, parsed. Pure text: no file and no tensor is touched here."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a tensor of an adapter file is."""

    LORA_A = "LoRA A"
    LORA_B = "LoRA B"
    STREAM = "stream tensor"
    STREAM_WRAPPED = "LoRA around a stream module"
    UNTRAINED = "untrained copy of a module in modules_to_save"
    LORA_BIAS = "LoRA bias"
    EMBEDDING_A = "LoRA A of an embedding"
    EMBEDDING_B = "LoRA B of an embedding"
    DORA = "DoRA magnitude"
    VELORA = "VeLoRA projection"
    TOKENS = "trained token rows"
    EXPERT_LORA = "LoRA on fused experts"
    BASE_COPY = "frozen copy of a base tensor"
    SAVED = "module in modules_to_save"
    OTHER = "unknown"


@dataclass(frozen=True)
class Key:
    """One parsed name: ``module`` is the module's path, or the tensor's for copies; ``adapter`` None when unnamed."""

    raw: str
    kind: Kind
    module: str
    adapter: str | None = None
    prefixed: bool = False  # a trainer's wrapper prefix was removed


_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.base_layer)?$")
_LORA = re.compile(r"^(.+)\.lora_([AB])(?:\.([^.]+))?\.(weight|bias)$")
_EMBEDDING = re.compile(r"^(.+)\.lora_embedding_([AB])(?:\.([^.]+))?$")
_DORA = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.([^.]+))?(?:\.weight)?$")
_VELORA = re.compile(r"^(.+)\.lora_velora_embed(?:\.([^.]+))?$")
_TOKENS = re.compile(r"^(.+)\.token_adapter\.trainable_tokens_delta(?:\.([^.]+))?$")
_SAVED = re.compile(r"^(.+)\.modules_to_save\.([^.]+)\.(.+)$")
_SAVED_UNNAMED = re.compile(r"^(.+)\.modules_to_save\.(weight|bias)$")  # PEFT, after resizing the vocabulary
_ORIGINAL = re.compile(r"^(.+)\.original_module\.(.+)$")
_BASE_LAYER = re.compile(r"^(.+?)(?:\.token_adapter)?\.base_layer\.(weight|bias)$")
_STREAM = re.compile(r"^(?:model\.)*specstream\.(.+)$")


def without_wrappers(raw: str) -> tuple[str, bool]:
    """Drop trainers' wrappers and one ``base_model.model.``; also say whether a trainer's wrapper was there.

    >>> without_wrappers("module.base_model.model.model._orig_mod.norm.weight")
    ('model.norm.weight', True)
    """
    parts = raw.split(".")
    kept = parts[:]
    while kept and kept[0] == "module":
        kept = kept[1:]
    kept = [part for part in kept if part not in _WRAPPERS]
    wrapped = len(kept) != len(parts)
    return ".".join(kept).removeprefix("base_model.model."), wrapped


def parse(raw: str) -> Key:
    """Classify one tensor name of an adapter file.

    >>> parse("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight").module
    'model.layers.0.self_attn.q_proj'
    >>> parse("base_model.model.specstream.modules_to_save.default.stream_embeddings").module
    'stream_embeddings'
    """
    name, prefixed = without_wrappers(raw)

    def key(kind: Kind, module: str, adapter: str | None = None) -> Key:
        return Key(raw, kind, module, adapter, prefixed)

    stream = _STREAM.match(name)
    if stream:
        return _stream(key, stream.group(1))
    if match := _ORIGINAL.match(name):
        return key(Kind.UNTRAINED, f"{match.group(1)}.{match.group(2)}")
    if match := _SAVED.match(name):
        inner = _STREAM.match(f"{match.group(1)}.{match.group(3)}")
        if inner:
            return key(Kind.STREAM, inner.group(1), match.group(2))
        return key(Kind.SAVED, f"{match.group(1)}.{match.group(3)}", match.group(2))
    if match := _SAVED_UNNAMED.match(name):
        return key(Kind.SAVED, f"{match.group(1)}.{match.group(2)}")
    if match := _LORA.match(name):
        module, side, adapter, part = match.groups()
        if _EXPERTS.search(module):
            return key(Kind.EXPERT_LORA, module, adapter)
        if part == "bias":
            return key(Kind.LORA_BIAS if side == "B" else Kind.OTHER, module if side == "B" else name, adapter)
        return key(Kind.LORA_A if side == "A" else Kind.LORA_B, module, adapter)
    if match := _EMBEDDING.match(name):
        module, side, adapter = match.groups()
        return key(Kind.EMBEDDING_A if side == "A" else Kind.EMBEDDING_B, module, adapter)
    if match := _DORA.match(name):
        return key(Kind.DORA, match.group(1), match.group(2))
    if match := _VELORA.match(name):
        return key(Kind.VELORA, match.group(1), match.group(2))
    if match := _TOKENS.match(name):
        return key(Kind.TOKENS, match.group(1), match.group(2))
    if match := _BASE_LAYER.match(name):
        return key(Kind.BASE_COPY, f"{match.group(1)}.{match.group(2)}")
    if "lora_" in name:
        return key(Kind.OTHER, name)
    return key(Kind.SAVED, name)


def _stream(key: Callable[..., Key], inner: str) -> Key:
    """A name below ``specstream.``: a plain tensor, PEFT's raw copies of it, or a LoRA around one of its parts."""
    if inner.startswith("original_module."):
        return key(Kind.UNTRAINED, "specstream." + inner.removeprefix("original_module."))
    match = re.match(r"^modules_to_save\.([^.]+)\.(.+)$", inner)
    if match:
        adapter: str | None = match.group(1)
        inner = match.group(2)
    else:
        adapter = None
    if re.search(r"(?:^|\.)(?:lora_|base_layer\.)", inner):
        return key(Kind.STREAM_WRAPPED, inner, adapter)
    return key(Kind.STREAM, inner, adapter)
