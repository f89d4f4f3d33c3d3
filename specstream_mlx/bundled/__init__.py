"""The small text-to-SQL model that ships with the package, so that every command runs offline."""

from pathlib import Path

from specstream_mlx.formats.jsonl import read_jsonl

_DIRECTORY = Path(__file__).parent / "text-to-sql"


def default_model_path() -> Path:
    """The directory of the bundled model; stock ``mlx_lm.load`` opens it too."""
    return _DIRECTORY


def samples() -> list[dict[str, str]]:
    """Held-out examples of the bundled model's task: objects with ``prompt`` and ``answer``."""
    return [row for _, row in read_jsonl(_DIRECTORY / "samples.jsonl")]


def sample_prompt() -> str:
    """The question that ``generate`` answers when none is given."""
    return samples()[0]["prompt"]
