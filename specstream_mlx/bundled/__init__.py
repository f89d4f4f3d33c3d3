"""The small text-to-SQL model that ships with the package, so that every command runs offline."""

import json
from pathlib import Path

_DIRECTORY = Path(__file__).parent / "text-to-sql"


def default_model_path() -> Path:
    """The directory of the bundled model; stock ``mlx_lm.load`` opens it too."""
    return _DIRECTORY


def samples() -> list[dict[str, str]]:
    """Held-out examples of the bundled model's task: objects with ``prompt`` and ``answer``."""
    lines = (_DIRECTORY / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def sample_prompt() -> str:
    """The question that ``generate`` answers when none is given."""
    return samples()[0]["prompt"]
