"""What a model family needs beyond stock mlx-lm blocks.

The runtime drives the layers itself and needs four parts of a model: embedding, layers, final norm, LM head. Here is
where each family's parts are found. A family whose embedding is scaled or whose logits are capped gets its own class.
Windows and rotary embeddings need no word here: the caches that mlx-lm makes tell the former, and the seam wraps the
latter whatever they are. docs/families.md says how each family is verified.
"""

from collections.abc import Mapping
from typing import Any

from mlx_lm.utils import _get_classes

from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import opt
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.learned_positions import GPT2Family, OPTFamily
from specstream_mlx.families.variants import (
    CohereFamily,
    Gemma2Family,
    Gemma3Family,
    Gemma3VisionFamily,
    GemmaFamily,
    GPTNeoXFamily,
    GraniteFamily,
    PhiFamily,
)

_LLAMA_SHAPED = (
    "glm",
    "glm4",
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
FAMILIES: dict[str, type[DecoderFamily]] = {
    **dict.fromkeys(_LLAMA_SHAPED, DecoderFamily),
    "cohere": CohereFamily,
    "cohere2": CohereFamily,
    "gemma": GemmaFamily,
    "gemma2": Gemma2Family,
    "gemma3": Gemma3VisionFamily,
    "gemma3_text": Gemma3Family,
    "gpt2": GPT2Family,
    "gpt_neox": GPTNeoXFamily,
    "granite": GraniteFamily,
    "opt": OPTFamily,
    "phi": PhiFamily,
}
# Known to mlx-lm, and impossible here: what these keep of the past cannot be taken back token by token.
RECURRENT = frozenset(
    (
        "baichuan_m1", "bailing_hybrid", "bailing_moe_linear", "bailing_moe_v3", "falcon_h1", "falcon_mamba", "gear",
        "granitemoehybrid", "jamba", "kimi_k3", "kimi_linear", "lfm2", "lfm2-vl", "lfm2_moe", "longcat_flash_ngram",
        "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "plamo2", "prism_hadamard_qwen35", "qwen3_5", "qwen3_5_moe",
        "qwen3_next", "recurrent_gemma", "rwkv7",
    )
)  # fmt: skip
# The models that are written here because mlx-lm has none.
OURS: dict[str, tuple[type[Any], type[Any]]] = {"opt": (opt.Model, opt.ModelArgs)}


def check_supported(model_type: object, where: str = "model_type") -> None:
    """Refuse families that are not verified here, before any weight is read.

    Raises:
        UnsupportedError: the family is not among ``FAMILIES``.
    """
    if model_type in RECURRENT:
        raise UnsupportedError(
            f"{where}: {model_type!r} has layers that fold the past into one state, from which rejected tokens cannot "
            "be taken back; run it with mlx-lm, or choose a model of attention alone"
        )
    if model_type not in FAMILIES:
        raise UnsupportedError(f"{where}: {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def family_of(base: Any, model_type: str) -> DecoderFamily:
    """The family of a loaded mlx-lm model.

    Raises:
        UnsupportedError: the family is not one we have verified.
    """
    check_supported(model_type)
    return FAMILIES[model_type](base)


def model_classes(config: Mapping[str, Any]) -> tuple[type[Any], type[Any]]:
    """The model class and its arguments' class: ours where mlx-lm has none, mlx-lm's for every other family.

    It is what ``mlx_lm.utils.load_model`` takes as ``get_model_classes``.

    Raises:
        ValueError: mlx-lm has no such model.
    """
    classes: tuple[type[Any], type[Any]] = OURS.get(config["model_type"]) or _get_classes(dict(config))
    return classes
