"""specstream_config.json: nothing guessed, everything wrong listed at once."""

import json

import pytest

from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.formats.config import StreamConfig, read_json

VALID = {
    "format": "specstream",
    "format_version": 1,
    "gamma": 4,
    "num_stream_layers": 2,
    "mode": "shared",
    "lora_rows": "all",
    "stream_id": {"type": "embedding"},
    "stream_init": {"type": "low_rank", "rank": 8, "residual": False},
    "stream_position": "anchor_plus_j",
    "main_attends_streams": False,
    "prune": {"type": "low_rank", "rank": 8, "layer": 4, "residual": True, "final_norm": True},
    "base_model": {"num_hidden_layers": 6, "hidden_size": 32},
    "training": {"anything": 1},
    "x_own": [1, 2],
}


def test_round_trip():
    config = StreamConfig.from_dict(VALID)
    assert config.to_dict() == VALID
    rotation = VALID | {"stream_id": {"type": "value_rotation", "epsilon": 0.5}, "prune": None}
    assert StreamConfig.from_dict(rotation).to_dict() == rotation
    assert config.tensor_shapes(32) == {
        "stream_embeddings": (4, 32),
        "stream_init.down.weight": (8, 32),
        "stream_init.up.weight": (32, 8),
        "prune.down.weight": (8, 32),
        "prune.up.weight": (32, 8),
    }
    assert StreamConfig.from_dict(rotation | {"stream_init": {"type": "identity"}}).tensor_shapes(32) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 0}, "gamma is 0, expected an integer 1..32"),
        ({"gamma": True}, "gamma is True"),
        ({"gamma": 33}, "gamma is 33"),
        ({"num_stream_layers": 7}, "num_stream_layers is 7, the base has 6 layers"),
        ({"mode": "fast"}, "mode is 'fast', expected 'shared' or 'lossless'"),
        ({"mode": "lossless"}, "lora_rows is 'all', mode 'lossless' goes with 'streams'"),
        ({"stream_id": {"type": "value_rotation"}}, "stream_id.epsilon is None, value_rotation needs a finite number"),
        ({"stream_id": {"type": "embedding", "epsilon": 1}}, "stream_id has unknown 'epsilon'"),
        ({"stream_id": None}, "stream_id is null"),
        ({"stream_init": {"type": "low_rank"}}, "stream_init.rank is None, expected an integer of at least 1"),
        ({"stream_init": {"type": "low_rank", "rank": 4, "residual": 1}}, "stream_init.residual is 1, expected true"),
        ({"stream_position": "here"}, "stream_position is 'here'"),
        ({"prune": {"type": "low_rank", "rank": 8, "layer": 9}}, "prune.layer is 9, the base has 6 layers"),
        ({"prune": {"type": "full", "rank": 8, "layer": 1}}, "prune.type is 'full'"),
        ({"prune": 3}, "prune is 3, expected an object"),
        ({"format": "other"}, "format is 'other'"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"surprise": 1}, "unknown 'surprise' \\(own keys start with 'x_'\\)"),
        ({"main_attends_streams": "no"}, "main_attends_streams is 'no'"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        StreamConfig.from_dict(VALID | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2 is newer than 1; upgrade"),
        ({"main_attends_streams": True}, "not supported, train with main_attends_streams false"),
    ],
)
def test_what_is_recognised_but_unsupported(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        StreamConfig.from_dict(VALID | changes)


@pytest.mark.parametrize("key", ["gamma", "num_stream_layers", "mode", "stream_id", "stream_init", "prune"])
def test_there_are_no_defaults(key):
    with pytest.raises(InvalidInputError, match=f"missing {key}"):
        StreamConfig.from_dict({name: value for name, value in VALID.items() if name != key})


def test_all_problems_are_listed_at_once():
    with pytest.raises(InvalidInputError) as caught:
        StreamConfig.from_dict(VALID | {"gamma": 0, "mode": "x", "odd": 1}, "dir/file.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("dir/file.json: ") for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"a": NaN}', "NaN is not valid JSON"),
        (b'\xff{"a": 1}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=message):
        read_json(file)
    file.write_text(json.dumps(VALID))
    assert read_json(file) == VALID


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(InvalidInputError, match="file not found"):
        read_json(tmp_path / "no.json")
    with pytest.raises(InvalidInputError, match="not a regular file"):
        read_json(tmp_path)
