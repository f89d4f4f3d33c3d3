"""``config.json`` of transformers 4 and 5 brought to the form that mlx-lm reads."""

from pathlib import Path
from typing import Any

import pytest

from specstream_convert.base.config import mlx_config
from specstream_convert.base.model import resolve_base
from specstream_mlx.errors import InvalidInputError, UnsupportedError

WHERE = Path("config.json")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-5,
    "model_type": "llama",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def read(**values: Any) -> dict[str, Any]:
    return mlx_config(SIZES | values, WHERE)[0]


def test_rope_of_transformers_5() -> None:
    config = read(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, None)
    assert "rope_parameters" not in config
    config = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3)
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == LLAMA3 | {"rope_type": "llama3", "type": "llama3"}


def test_rope_of_transformers_4() -> None:
    config = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3"} | LLAMA3)
    assert config["rope_scaling"] == LLAMA3 | {"rope_type": "llama3", "type": "llama3"}
    assert read(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})["rope_scaling"]["rope_type"] == "linear"
    assert read(rope_theta=5e5, rope_scaling=None)["rope_theta"] == 5e5


def test_rope_missing() -> None:
    """transformers' default is written out; for qwen2 mlx-lm's differs by a factor of 100, so nothing is guessed."""
    assert read()["rope_theta"] == 10000.0
    with pytest.raises(InvalidInputError, match="rope_theta is missing"):
        read(model_type="qwen2")


def test_phi3_longrope() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    raw = SIZES | {
        "model_type": "phi3",
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5} | factors,
        "original_max_position_embeddings": 64,
    }
    config, _, warnings = mlx_config(raw, WHERE)
    assert config["rope_scaling"]["type"] == "longrope"
    assert config["partial_rotary_factor"] == 0.5
    assert any("long factors" in warning for warning in warnings)


def test_windows_that_mlx_lm_ignores() -> None:
    assert mlx_config(SIZES | {"model_type": "mistral", "sliding_window": 16}, WHERE)[2]
    assert not mlx_config(SIZES | {"model_type": "mistral", "sliding_window": None}, WHERE)[2]
    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    assert "window of 16 tokens, as layer_types says" in mlx_config(SIZES | layers, WHERE)[2][0]


def test_code_of_the_checkpoint_is_dropped() -> None:
    config, notes, _ = mlx_config(SIZES | {"auto_map": {"AutoModel": "evil.Model"}}, WHERE)
    assert "auto_map" not in config
    assert any("auto_map" in note for note in notes)


@pytest.mark.parametrize("family", ["mamba", "bloom", "Llama", ""])
def test_other_families(family: str) -> None:
    with pytest.raises(UnsupportedError, match="supported: gpt2, llama, mistral, opt, phi3, qwen2, qwen3"):
        read(model_type=family)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "mixtral"])
def test_families_that_run_but_do_not_convert(family: str) -> None:
    """The message says what to do instead."""
    with pytest.raises(UnsupportedError, match=f"'{family}' runs, but fine-tunes of it are not converted; .* train`"):
        read(model_type=family)


def test_local_paths_are_not_downloaded(tmp_path: Path) -> None:
    """Only what looks like a repository id would go to the hub."""
    (tmp_path / "base").mkdir()
    assert resolve_base(str(tmp_path / "base"), None) == (tmp_path / "base", "base", None)
    assert resolve_base("base", None, relative_to=tmp_path)[0] == tmp_path / "base"
    for name in ("./base", "/no/such", "~/no-such", "a/b/c", "C:\\x", "a b", "org/../x", "", "a\0b"):
        with pytest.raises(InvalidInputError):
            resolve_base(name, None)
