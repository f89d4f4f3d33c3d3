"""OPT: learned positions, ReLU, pre-norm or post-norm (opt-350m)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from specstream_mlx.families.decoder import Positions
from specstream_mlx.families.hugging_face import SIZES, HuggingFace
from specstream_mlx.families.learned_positions import LearnedPositions

if TYPE_CHECKING:
    import mlx.core as mx


def _complete(config: dict[str, Any], where: Path) -> list[str]:
    return ["mlx-lm has no OPT: the output opens with specstream_mlx.load, not with mlx_lm.load"]


class OPTFamily(LearnedPositions):
    """``model.decoder.*``; pre-norm and post-norm, with and without projections around the blocks."""

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ("opt",)
    MODEL: ClassVar[str | None] = "specstream_mlx.families.models.opt"
    EMBEDDING: ClassVar[str] = "model.decoder.embed_tokens"
    POSITIONS: ClassVar[str | None] = "model.decoder.embed_positions"
    LAYERS: ClassVar[str] = "model.decoder.layers"
    NORM: ClassVar[str] = "model.decoder.final_layer_norm"
    HUGGING_FACE: ClassVar[HuggingFace | None] = HuggingFace(
        bare=("decoder",),  # files of OPTModel
        ignored=r"(model\.)?decoder\.version",  # a mark of fairseq's
        project_in="model.decoder.project_in",
        project_out="model.decoder.project_out",
        position_offset=2,  # rows 0 and 1 stand for padding
        sizes=(*SIZES, "ffn_dim", "max_position_embeddings"),
        epsilons=(),
        fixed={"activation_function": ("relu",)},
        complete=_complete,
    )

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self._decoder = base.model.decoder

    @classmethod
    def fingerprint_tensor(cls, config: Mapping[str, Any]) -> str | None:
        """The last layer norm that has weights: the final one, or the last block's."""
        if not config.get("layer_norm_elementwise_affine", True):
            return None
        if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
            return f"{cls.NORM}.weight"
        return f"{cls.LAYERS}.{config['num_hidden_layers'] - 1}.final_layer_norm.weight"

    def embed(self, tokens: mx.array, positions: Positions) -> mx.array:
        """(B, L) ids at (L,) absolute positions -> (B, L, D)."""
        rows = self._within_table(positions, self.args.max_position_embeddings)
        return self._decoder.embed(tokens, rows)

    def norm(self, hidden: mx.array) -> mx.array:
        """The final norm where there is one; post-norm blocks have normed already."""
        return self._decoder.norm(hidden)

    def head(self, normed: mx.array) -> mx.array:
        """``project_out`` where there is one, then the LM head: (B, L, D) -> (B, L, V) logits."""
        return self._base.head(normed)
