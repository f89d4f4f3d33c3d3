"""Stream tensors under every name that trainers give them, and over every copy of their base."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from convert_cases import ADAPTER, GAMMA, PREFIX, STREAM_CONFIG, STREAMS, Case, D, make_case, random_tensor

from specstream_convert import convert
from specstream_mlx.errors import InvalidInputError

ETA, RHO = 2, 4
CONTRACT = {
    "stream_init.down.weight": (ETA, D),
    "stream_init.up.weight": (D, ETA),
    "prune.down.weight": (RHO, D),
    "prune.up.weight": (D, RHO),
}
S = PREFIX + "specstream."
EMBEDDINGS = "stream_embeddings"


def low_rank(case: Case) -> dict[str, mx.array]:
    """Give the case ``f_eta`` and a pruner; return all stream tensors by the contract's names."""
    rng = np.random.default_rng(5)
    values = {name: random_tensor(rng, shape) for name, shape in CONTRACT.items()}
    case.tensors(f"adapter/{ADAPTER}", lambda t: t.update({S + name: value for name, value in values.items()}))
    case.json(
        f"adapter/{STREAM_CONFIG}",
        lambda raw: raw.update(
            stream_init={"type": "low_rank", "rank": ETA, "residual": True},
            prune={"type": "low_rank", "rank": RHO, "layer": 1},
        ),
    )
    return values | {EMBEDDINGS: mx.load(str(case.adapter / ADAPTER))[STREAMS]}


def read_back(case: Case) -> dict[str, mx.array]:
    held = mx.load(str(case.out / "specstream.safetensors"))
    return {name.removeprefix("specstream."): value for name, value in held.items()}


RENAMES = {
    "f_eta": lambda name: name.replace("stream_init.", "f_eta."),
    "f_rho": lambda name: name.replace("prune.", "f_rho."),
    "o_theta": lambda name: name.replace("prune.", "o_theta."),
    "sequential stream_init": lambda name: name.replace("stream_init.down", "stream_init.0").replace(
        "stream_init.up", "stream_init.1"
    ),
    "sequential f_eta": lambda name: name.replace("stream_init.down", "f_eta.0").replace("stream_init.up", "f_eta.1"),
    "sequential prune": lambda name: name.replace("prune.down", "prune.0").replace("prune.up", "prune.1"),
    "nn.Embedding": lambda name: name.replace(EMBEDDINGS, EMBEDDINGS + ".weight"),
}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_aliases(case: Case, rename: Callable[[str], str]) -> None:
    """The values arrive under the contract's names; the report names every alias that was used."""
    values = low_rank(case)
    changed = {name: rename(name) for name in values if rename(name) != name}
    assert changed
    case.tensors(
        f"adapter/{ADAPTER}",
        lambda t: [t.update({S + new: t.pop(S + old)}) for old, new in changed.items()],
    )
    report = convert(case.options()).to_dict()
    written = read_back(case)
    assert written.keys() == values.keys()
    assert all(mx.array_equal(written[name], value) for name, value in values.items())
    for old, new in changed.items():
        assert f"{ADAPTER}: {S}{new} read as specstream.{old}" in report["notes"]
        fate = next(row for row in report["tensors"] if row["tensor"] == S + new)
        assert fate["target"] == f"specstream.safetensors:specstream.{old}"


ROWS = {"vectors": (D,), "matrices": (1, D)}


@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_parameter_list(case: Case, shape: tuple[int, ...]) -> None:
    value = mx.load(str(case.adapter / ADAPTER))[STREAMS]
    case.tensors(
        f"adapter/{ADAPTER}",
        lambda t: [t.pop(STREAMS), t.update({f"{STREAMS}.{i}": value[i].reshape(shape) for i in range(GAMMA)})],
    )
    report = convert(case.options()).to_dict()
    assert mx.array_equal(read_back(case)[EMBEDDINGS], value)
    assert f"{ADAPTER}: {GAMMA} rows of specstream.stream_embeddings joined" in report["notes"]


@pytest.mark.parametrize("shape", [(GAMMA, 1, D), (1, GAMMA, D)])
def test_singleton_dimension(case: Case, shape: tuple[int, ...]) -> None:
    value = mx.load(str(case.adapter / ADAPTER))[STREAMS]
    case.tensors(f"adapter/{ADAPTER}", lambda t: t.update({STREAMS: value.reshape(shape)}))
    report = convert(case.options()).to_dict()
    assert mx.array_equal(read_back(case)[EMBEDDINGS], value)
    assert f"{ADAPTER}: a dimension of size 1 removed from specstream.stream_embeddings" in report["notes"]


def transposed(case: Case, targets: dict[str, str]) -> Path:
    """Store tensors the wrong way round; return a key map that turns them."""
    case.tensors(f"adapter/{ADAPTER}", lambda t: t.update({S + name: mx.contiguous(t[S + name].T) for name in targets}))
    key_map = case.root / "map.json"
    key_map.write_text(json.dumps({S + name: target for name, target in targets.items()}))
    return key_map


def test_key_map_transposes(case: Case) -> None:
    """Only when asked: ``NAME.T`` in the key map."""
    values = low_rank(case)
    names = [EMBEDDINGS, "prune.down.weight"]
    key_map = transposed(case, {name: f"specstream.{name}.T" for name in names})
    with pytest.raises(InvalidInputError, match=r"it is transposed; turn it with --key-map"):
        convert(case.options())
    report = convert(case.options(key_map=key_map)).to_dict()
    written = read_back(case)
    assert all(mx.array_equal(written[name], value) for name, value in values.items())
    assert f"{ADAPTER}: {S}prune.down.weight read as specstream.prune.down.weight, transposed" in report["notes"]


def test_a_square_tensor_is_never_turned(case: Case) -> None:
    """Which way round it is cannot be seen from its shape, so the map is not trusted either."""
    square = mx.load(str(case.adapter / ADAPTER))[STREAMS]
    case.tensors(f"adapter/{ADAPTER}", lambda t: t.update({STREAMS: mx.concatenate([square] * 11)[:D]}))
    (case.root / "map.json").write_text(json.dumps({STREAMS: "specstream.stream_embeddings.T"}))
    case.json(f"adapter/{STREAM_CONFIG}", lambda raw: raw.update(gamma=D))
    with pytest.raises(InvalidInputError, match="as many rows as columns"):
        convert(case.options(key_map=case.root / "map.json"))


def test_a_file_s_own_name_does_not_transpose(case: Case) -> None:
    case.tensors(f"adapter/{ADAPTER}", lambda t: t.update({STREAMS + ".T": mx.contiguous(t.pop(STREAMS).T)}))
    with pytest.raises(InvalidInputError, match=r"stream_embeddings\.T: "):
        convert(case.options())


@pytest.mark.parametrize("trained_on", [mx.float32, mx.bfloat16], ids=str)
def test_a_copy_of_the_base_in_another_dtype(tmp_path: Path, trained_on: mx.Dtype) -> None:
    """The fingerprint of one copy is known again on the other; another base of the same shapes is not."""
    whole = make_case(tmp_path / "case")
    other = mx.bfloat16 if trained_on == mx.float32 else mx.float32
    half = make_case(tmp_path / "half", dtype=mx.bfloat16)
    first, second = (whole, half) if trained_on == mx.float32 else (half, whole)
    assert mx.load(str(second.base / "model.safetensors"))["model.norm.weight"].dtype == other
    convert(first.options(adapter_only=True))
    recorded = json.loads((first.out / STREAM_CONFIG).read_text())["base_model"]["fingerprint"]
    for case in (first, second):
        case.json(f"adapter/{STREAM_CONFIG}", lambda raw: raw["base_model"].update(fingerprint=recorded))
        convert(case.options(overwrite=True))
        case.tensors("base/model.safetensors", lambda t: t.update({"model.norm.weight": t["model.norm.weight"] + 0.02}))
        with pytest.raises(InvalidInputError, match="another base or revision"):
            convert(case.options(overwrite=True))
