"""README.md of a directory that train or convert writes: a model card for the Hugging Face hub."""

import shlex
from collections.abc import Sequence

from specstream_mlx.formats.config import StreamConfig
from specstream_mlx.formats.places import is_repository_id

_WHAT_THE_LORA_DOES = {
    "sidecar": "The answers are those of the base model; the LoRA acts on the draft streams only.",
    "live": "The LoRA in `adapters/`, in mlx-lm's format, changes the answers: it is a fine-tune of the base.",
    "merged": "The fine-tune's LoRA is merged into the weights.",
}


def card(
    title: str, base: str, config: StreamConfig | None, placement: str, origin: str, usage: Sequence[str], end: str = ""
) -> str:
    """A card.

    Args:
        title: its heading.
        base: name of the base model, safe to print.
        config: of the streams, where there are any.
        placement: where the LoRA is: merged, live, sidecar or none.
        origin: who made it; ends the sentence on the streams.
        usage: lines after the sentences.
        end: a last sentence.
    """
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"]
    if config is not None:
        lines.append("- speculative-decoding")
    if is_repository_id(base):
        lines.append(f"base_model: {base}")
    lines += ["---", "", f"# {title}", ""]
    if config is not None:
        lines += [
            f"{config.gamma} streams over the top {config.num_stream_layers} layers, mode `{config.mode}`, {origin} "
            "specstream-mlx (Speculative Streaming, arXiv 2402.11131).",
            "",
        ]
    lossless = config is not None and config.mode == "lossless"
    effect = _WHAT_THE_LORA_DOES.get("sidecar" if lossless else placement)
    lines += [effect, ""] if effect else []
    lines += [*usage, "", *([end, ""] if end else [])]
    return "\n".join(lines)


def adapter_card(config: StreamConfig) -> str:
    """The card of a trained adapter."""
    base = str(config.base_model.get("name_or_path", "the base model"))
    title = f"Speculative streams for {base}"
    placement = "live" if config.mode == "shared" else "sidecar"
    return card(title, base, config, placement, "trained by", generate_lines(base))


def generate_lines(base: str | None) -> list[str]:
    """How an adapter over ``base``, or with None a model, is run."""
    where = "." if base is None else f"{shlex.quote(base)} --adapter ."
    return ["```bash", "pip install specstream-mlx", f'specstream-mlx generate --model {where} --prompt "..."', "```"]
