"""Published tensors -> the tensors and settings of our heads, every one used, dropped for a reason, or refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_convert.base.model import Base
from specstream_convert.files.stored import StoredTensor
from specstream_convert.heads.source import MEDUSA_TENSOR, HeadSource
from specstream_mlx.drafters.head import BaseSizes
from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.formats.messages import escaped, listing

DROPPED_SUFFIX = "rotary_emb.inv_freq"
WRONG_BASE = "give the base that the head was trained for"


@dataclass
class HeadPlan:
    """What a conversion writes.

    Attributes:
        kind, settings: of ``drafter_config.json``.
        sizes: of the base that the head reads; without a base at hand its number of layers is not known, and any.
        named: the base that the head's configuration names.
        tensors: by our name.
        fates: published name -> ours, or why it is dropped.
    """

    kind: str
    settings: dict[str, Any]
    sizes: BaseSizes
    named: str | None
    tensors: dict[str, StoredTensor | mx.array]
    fates: dict[str, tuple[str, str | None]]
    notes: list[str] = field(default_factory=list)


def plan_heads(source: HeadSource, base: Base | None) -> HeadPlan:
    """Map a head of any published kind.

    Raises:
        InvalidInputError: missing or superfluous tensors, sizes that contradict each other, or another base.
        UnsupportedError: a version or variant that we do not run.
    """
    plan = _PLANS[source.kind](source, base)
    if base is not None:
        for name, own, theirs in (
            ("hidden_size", plan.sizes.hidden_size, base.hidden_size),
            ("vocab_size", plan.sizes.vocab_size, int(base.config["vocab_size"])),
        ):
            if own != theirs:
                named = f" ({escaped(plan.named)})" if plan.named else ""
                raise InvalidInputError(
                    f"{source.directory}: a {plan.kind} head for a base of {name} {own}, {base.path} has {theirs}; "
                    f"{WRONG_BASE}{named}"
                )
    return plan


def _medusa(source: HeadSource, base: Base | None) -> HeadPlan:
    config, reader = source.config, _Config(source)
    found = {name: match for name in source.tensors if (match := MEDUSA_TENSOR.fullmatch(name))}
    _refuse_unknown(source, [name for name in source.tensors if name not in found])
    num_heads = 1 + max(int(match[1]) for match in found.values())
    layers = {int(match[2]) for match in found.values() if match[3] == "weight"}
    if len(layers) != 1:
        raise InvalidInputError(
            f"{source.directory}: LM heads at depths {sorted(layers)}, not at one; download it again"
        )
    num_layers = layers.pop()
    said_heads, said_layers = config.get("medusa_num_heads"), config.get("medusa_num_layers", 1)
    if said_layers != num_layers:
        raise InvalidInputError(
            f"{source.config_path}: medusa_num_layers is {said_layers!r}, the file has {num_layers}; keep the pair "
            "that belongs together"
        )
    notes = []
    if type(said_heads) is int and said_heads > num_heads:
        raise InvalidInputError(
            f"{source.directory}: {num_heads} heads, and config.json says medusa_num_heads {said_heads}; the file is "
            "incomplete, download it again"
        )
    if said_heads != num_heads:
        notes.append(f"config.json says medusa_num_heads {said_heads!r}, the file has {num_heads}, and all are taken")
    names = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            for part in ("weight", "bias"):
                names[f"{head}.{layer}.linear.{part}"] = f"heads.{head}.blocks.{layer}.linear.{part}"
        names[f"{head}.{num_layers}.weight"] = f"heads.{head}.lm_head.weight"
    _refuse_missing(source, names)
    vocab_size, hidden_size = _matrix(source.tensors[f"0.{num_layers}.weight"])
    return HeadPlan(
        "medusa",
        {"num_heads": num_heads, "num_layers": num_layers},
        _sizes(base, hidden_size, vocab_size),
        reader.named,
        {ours: source.tensors[name] for name, ours in names.items()},
        {name: ("used", ours) for name, ours in names.items()},
        notes,
    )


def _eagle(source: HeadSource, base: Base | None) -> HeadPlan:
    reader = _Config(source)
    reader.refuse_variants()
    hidden_size, width = _matrix(source.tensors["fc.weight"])
    if width != 2 * hidden_size:
        raise UnsupportedError(
            f"{source.tensors['fc.weight'].place}: shape {(hidden_size, width)}, an EAGLE head has (D, 2 D); this is "
            "another version"
        )
    num_layers = reader.layer.get("num_hidden_layers", 1)
    settings = reader.layer_settings(hidden_size, "layers.0") | {
        "num_layers": num_layers,
        "fc_bias": "fc.bias" in source.tensors,
        "own_embedding": "embed_tokens.weight" in source.tensors,
    }
    names = ["fc.weight", *_present(source, "fc.bias", "embed_tokens.weight")]
    for layer in range(num_layers):
        names += _layer_names(source, f"layers.{layer}", ("post_attention_layernorm",))
        if layer:
            names.append(f"layers.{layer}.input_layernorm.weight")
    vocab_size = _vocab_size(source, reader)
    plan = _direct(source, base, "eagle", settings, {name: name for name in names}, hidden_size, vocab_size, reader)
    _leave_out_embedding(plan, base)
    return plan


def _eagle3(source: HeadSource, base: Base | None) -> HeadPlan:
    reader = _Config(source)
    reader.refuse_variants()
    hidden_size, width = _matrix(source.tensors["fc.weight"])
    if width % 3:
        raise UnsupportedError(
            f"{source.tensors['fc.weight'].place}: shape {(hidden_size, width)}, an EAGLE-3 head reads three hidden "
            "states; this is another version"
        )
    stored = "midlayer" if any(name.startswith("midlayer.") for name in source.tensors) else "layers.0"
    vocab_size = _vocab_size(source, reader)
    draft_vocab_size = _matrix(source.tensors["lm_head.weight"])[0] if "lm_head.weight" in source.tensors else 1
    settings = reader.layer_settings(hidden_size, stored) | {
        "hidden_size": hidden_size,
        "draft_vocab_size": draft_vocab_size,
        "own_embedding": "embed_tokens.weight" in source.tensors,
        "norm_before_residual": bool(source.config.get("norm_before_residual", False)),
    }
    taps = reader.taps()
    if taps is not None:
        settings["taps"] = taps
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    names = {name: name.replace(stored, "midlayer", 1) for name in _layer_names(source, stored, norms)}
    plain = ["fc.weight", "norm.weight", "lm_head.weight", *_present(source, "embed_tokens.weight")]
    names |= {name: name for name in plain}
    maps = ("d2t", "t2d")
    mapped = draft_vocab_size < vocab_size
    plan = _direct(source, base, "eagle3", settings, names, width // 3, vocab_size, reader, maps)
    if mapped:
        plan.tensors["d2t"] = _draft_to_target(source, draft_vocab_size, vocab_size)
        plan.fates["d2t"] = ("used", "d2t")
    for name in _present(source, *maps):
        if name not in plan.fates:
            plan.fates[name] = ("dropped: it follows from d2t" if mapped else "dropped: the vocabulary is whole", None)
    if hidden_size == width // 3:
        _leave_out_embedding(plan, base)
    return plan


_PLANS: Mapping[str, Callable[[HeadSource, Base | None], HeadPlan]] = {
    "medusa": _medusa,
    "eagle": _eagle,
    "eagle3": _eagle3,
}


class _Config:
    """Reads ``config.json``, whose decoder layer may stand in a block of its own."""

    def __init__(self, source: HeadSource) -> None:
        self.source, self.config = source, source.config
        nested = self.config.get("transformer_layer_config")
        self.layer: dict[str, Any] = nested if isinstance(nested, dict) else self.config

    @property
    def named(self) -> str | None:
        """The base that the head was trained for, where the file says so."""
        verifier = (self.config.get("speculators_config") or {}).get("verifier") or {}
        name = self.config.get("base_model_name_or_path") or verifier.get("name_or_path")
        return name if isinstance(name, str) else None

    def refuse_variants(self) -> None:
        """Refuse what changes the computation and is not run here."""
        where = self.source.config_path
        act = self.layer.get("hidden_act", "silu")
        problems = [f"hidden_act is {act!r}, expected 'silu'"] if act != "silu" else []
        for name in ("norm_before_fc", "fc_norm", "layernorms", "norm_output"):
            if self.config.get(name):
                problems.append(f"{name} is {self.config[name]!r}, which changes the layer")
        if problems:
            raise UnsupportedError(listing(f"{where}: {problem}; this version is not run here" for problem in problems))

    def layer_settings(self, hidden_size: int, stored: str) -> dict[str, Any]:
        """The settings of the decoder layer; sizes are checked against the tensors."""
        layer = self.layer
        heads = self._integer("num_attention_heads")
        head_dim = layer.get("head_dim") or hidden_size // heads
        if layer.get("hidden_size", hidden_size) != hidden_size:
            raise InvalidInputError(
                f"{self.source.config_path}: hidden_size is {layer['hidden_size']!r}, fc.weight says {hidden_size}; "
                "keep the pair that belongs together"
            )
        rope: dict[str, Any] = layer.get("rope_parameters") or {}
        scaling = layer.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        return {
            "intermediate_size": self._integer("intermediate_size"),
            "num_heads": heads,
            "num_kv_heads": layer.get("num_key_value_heads") or heads,
            "head_dim": head_dim,
            "rms_norm_eps": layer.get("rms_norm_eps", 1e-6),
            "rope_theta": layer.get("rope_theta") or rope.get("rope_theta", 10000.0),
            "rope_scaling": scaling,
            "max_position_embeddings": layer.get("max_position_embeddings", 2048),
            "qkv_bias": f"{stored}.self_attn.q_proj.bias" in self.source.tensors,
        }

    def taps(self) -> list[int] | None:
        """The layers below which the hidden states are read; None: EAGLE-3's own choice.

        At the top level (vLLM) they count so already; in ``eagle_config`` (SGLang) they name the layer that made
        the state, one less.
        """
        own = self.config.get("eagle_aux_hidden_state_layer_ids")
        nested = (self.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        if own is None and nested is not None:
            own = [number + 1 for number in nested if isinstance(number, int)]
        if own is not None and len(own) != 3:
            raise UnsupportedError(
                f"{self.source.config_path}: eagle_aux_hidden_state_layer_ids is {own!r}, three are run here"
            )
        return own

    def _integer(self, name: str) -> int:
        value = self.layer.get(name)
        if type(value) is not int or value < 1:
            raise InvalidInputError(
                f"{self.source.config_path}: {name} is {value!r}, expected a whole number; restore it"
            )
        return value


def _direct(
    source: HeadSource,
    base: Base | None,
    kind: str,
    settings: dict[str, Any],
    names: Mapping[str, str],
    hidden_size: int,
    vocab_size: int,
    reader: _Config,
    apart: tuple[str, ...] = (),
) -> HeadPlan:
    """A plan that takes tensors as they are, under new names; ``apart``: tensors that are seen to by the caller."""
    _refuse_missing(source, names)
    dropped = [name for name in source.tensors if name.endswith(DROPPED_SUFFIX)]
    _refuse_unknown(source, [name for name in source.tensors if name not in {*names, *dropped, *apart}])
    fates: dict[str, tuple[str, str | None]] = {name: ("used", ours) for name, ours in names.items()}
    fates |= dict.fromkeys(dropped, ("dropped: a constant", None))
    tensors: dict[str, StoredTensor | mx.array] = {ours: source.tensors[name] for name, ours in names.items()}
    return HeadPlan(kind, settings, _sizes(base, hidden_size, vocab_size), reader.named, tensors, fates)


def _draft_to_target(source: HeadSource, draft_vocab_size: int, vocab_size: int) -> mx.array:
    """``d2t``, which must name different ids of the vocabulary, the ones that ``t2d`` marks."""
    if "d2t" not in source.tensors:
        raise InvalidInputError(
            f"{source.directory}: d2t: missing, and the head's {draft_vocab_size} guesses are not the whole vocabulary "
            f"of {vocab_size}; download it again"
        )
    stored = source.tensors["d2t"]
    if stored.shape != (draft_vocab_size,) or not stored.dtype.startswith("I"):
        raise InvalidInputError(f"{stored.place}: {stored.dtype} {stored.shape}, expected {draft_vocab_size} integers")
    d2t = np.array(stored.read()).astype(np.int64)
    ids = d2t + np.arange(draft_vocab_size)
    if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) != draft_vocab_size:
        raise InvalidInputError(
            f"{stored.place}: its ids are not {draft_vocab_size} different ones below {vocab_size}; it is damaged, or "
            "of another base"
        )
    if "t2d" in source.tensors:
        marked = np.array(source.tensors["t2d"].read()).astype(bool)
        if marked.shape != (vocab_size,) or not np.array_equal(np.flatnonzero(marked), np.sort(ids)):
            raise InvalidInputError(f"{source.tensors['t2d'].place}: marks other ids than d2t names; download it again")
    return mx.array(d2t.astype(np.int32))


def _leave_out_embedding(plan: HeadPlan, base: Base | None) -> None:
    """An embedding that is the base's own need not be stored again; without a base nobody can tell."""
    own = plan.tensors.get("embed_tokens.weight")
    if base is None or not isinstance(own, StoredTensor):
        return
    theirs = base.tensors.get(f"{base.family.EMBEDDING}.weight")
    if theirs is None or f"{base.family.EMBEDDING}.scales" in base.tensors or theirs.shape != own.shape:
        return
    pairs = zip(own.blocks(), theirs.blocks(), strict=True)
    if all(mx.array_equal(a.astype(mx.float32), b.astype(mx.float32)).item() for (_, a), (_, b) in pairs):
        del plan.tensors["embed_tokens.weight"]
        plan.settings["own_embedding"] = False
        name = next(name for name, (_, ours) in plan.fates.items() if ours == "embed_tokens.weight")
        plan.fates[name] = ("dropped: it is the base's own", None)


def _layer_names(source: HeadSource, layer: str, norms: tuple[str, ...]) -> list[str]:
    """Of a decoder layer, with the biases that are there."""
    attention = [f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v")]
    names = [f"{name}.weight" for name in (*attention, f"{layer}.self_attn.o_proj")]
    if f"{attention[0]}.bias" in source.tensors:
        names += [f"{name}.bias" for name in attention]
    names += [f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    return names + [f"{layer}.{norm}.weight" for norm in norms]


def _present(source: HeadSource, *names: str) -> list[str]:
    return [name for name in names if name in source.tensors]


def _vocab_size(source: HeadSource, reader: _Config) -> int:
    """Of the target."""
    for name in ("t2d", "embed_tokens.weight"):
        if name in source.tensors and source.tensors[name].shape:
            return source.tensors[name].shape[0]
    value = reader.layer.get("vocab_size")
    if type(value) is not int or value < 1:
        raise InvalidInputError(f"{source.config_path}: vocab_size is {value!r}, expected a whole number; restore it")
    return value


def _sizes(base: Base | None, hidden_size: int, vocab_size: int) -> BaseSizes:
    return BaseSizes(base.num_layers if base is not None else 1_000, hidden_size, vocab_size)


def _matrix(tensor: StoredTensor) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise InvalidInputError(f"{tensor.place}: shape {tensor.shape}, expected a matrix; download it again")
    return tensor.shape[0], tensor.shape[1]


def _refuse_missing(source: HeadSource, names: Mapping[str, str]) -> None:
    missing = [name for name in names if name not in source.tensors]
    if missing:
        raise InvalidInputError(
            listing(
                f"{source.directory}: {name}: missing; the file is incomplete, download it again" for name in missing
            )
        )


def _refuse_unknown(source: HeadSource, names: list[str]) -> None:
    if names:
        raise UnsupportedError(
            listing(
                f"{source.tensors[name].place}: not a tensor of the {source.kind} heads that are run here; this is "
                "another version"
                for name in sorted(names)
            )
        )
