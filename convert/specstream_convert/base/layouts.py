"""Where a model family keeps its parts: names in Hugging Face files, in PEFT's module paths, and in mlx-lm.

Llama-shaped models have the same names everywhere. A family that differs says here how raw tensor names become
mlx-lm's, which weights are stored transposed (Conv1D), and how PEFT's module paths become mlx-lm's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """Names of one family; every path is mlx-lm's. The runtime's family knows where the blocks are.

    Attributes:
        renames: prefixes of raw tensor names and of PEFT's module paths, and what mlx-lm has in their place; the
            first that fits is used.
        transposed: matches the mlx-lm names of weights that Hugging Face files, where names differ from mlx-lm's,
            store (in, out); they are written (out, in).
        ignored: matches raw names that mlx-lm recomputes, and the reason.
    """

    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    renames: Mapping[str, str] = field(default_factory=dict)
    transposed: str | None = None
    ignored: str = r".*\.rotary_emb\.inv_freq"

    def name(self, raw: str) -> str:
        """mlx-lm's name of a raw tensor name or of a PEFT module path."""
        for old, new in self.renames.items():
            if raw.startswith(old):
                return new + raw.removeprefix(old)
        return raw

    def is_transposed(self, name: str) -> bool:
        """Whether Hugging Face files store the tensor that mlx-lm calls ``name`` as (in, out)."""
        return self.transposed is not None and re.fullmatch(self.transposed, name) is not None

    def is_ignored(self, raw: str) -> bool:
        """Whether a raw tensor is no parameter but recomputed by the model."""
        return re.fullmatch(self.ignored, raw) is not None


LAYOUTS: dict[str, Layout] = {
    "llama": Layout(),
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "phi3": Layout(),
    "opt": Layout(
        embedding="model.decoder.embed_tokens",
        renames={"decoder.": "model.decoder."},  # files of OPTModel
        ignored=r"(model\.)?decoder\.version",  # a mark of fairseq's
    ),
    "gpt2": Layout(
        embedding="model.wte",
        renames={
            "transformer.": "model.",
            **{f"{part}.": f"model.{part}." for part in ("h", "wte", "wpe", "ln_f")},  # files of GPT2Model
        },
        transposed=r"model\.h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight",
        ignored=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",  # the causal mask
    ),
}
