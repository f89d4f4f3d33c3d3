"""Families whose checkpoints hold a vision tower beside the language model; mlx-lm leaves the tower out."""

from collections.abc import Mapping
from typing import Any, ClassVar

from specstream_mlx.families.decoder import DecoderFamily


class WithVision(DecoderFamily):
    """The language model is ``language_model``, and its configuration ``text_config``."""

    EMBEDDING: ClassVar[str] = "language_model.model.embed_tokens"
    LAYERS: ClassVar[str] = "language_model.model.layers"
    NORM: ClassVar[str] = "language_model.model.norm"
    HEAD: ClassVar[str] = "language_model.lm_head"

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.args = base.language_model.args

    @classmethod
    def size(cls, config: Mapping[str, Any], name: str) -> Any:
        """The size that llama calls ``name``, from the language model's part of the configuration."""
        return config[name] if name in config else config.get("text_config", {}).get(name)

    def prompt_caches(self) -> list[Any]:
        """The caches of the language model: mlx-lm gives some models with vision none that tell the windows."""
        from mlx_lm.models.cache import make_prompt_cache

        caches: list[Any] = make_prompt_cache(self._base.language_model)
        return caches
