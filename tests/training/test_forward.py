"""The training forward against inference: the same stream logits at every anchor, whatever the batch around it."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from specstream_mlx.target.tree import DraftTree
from specstream_mlx.training.forward import forward_main, forward_streams, stream_mask
from specstream_mlx.training.trainable import attach, trained_tensors
from tests import tiny
from tests.family_cases import inference_logits
from tests.passes import early_exit_logits, verify
from tests.tiny import FAMILIES, make_model, random_prompt, stream_config
from tests.training.training_cases import with_lora

ATOL = 2e-5
"""Float32 logits around 10 of one program whose rows come in other passes: other orders of summation."""
CASES = {
    "low-rank": {},
    "lossless": {"mode": "lossless", "stream_init": {"type": "identity"}},
    "anchor": {"stream_position": "anchor", "num_stream_layers": 3},
    "rotation": {"stream_id": {"type": "value_rotation", "epsilon": 0.3}},
    "all-layers": {"num_stream_layers": 4, "prune": None},
}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *((family, case) for family in FAMILIES for case in CASES),
        *((family, "lossless") for family in (*tiny.WINDOWED, "gemma2", "gpt_neox", "llama-dynamic", "qwen3_moe")),
        ("gemma3_text", "anchor"),
    ],
)
def test_stream_logits_are_those_of_inference(family: str, case: str) -> None:
    """Red when: a position, the mask, a window, the value rotation, the initialisation or the LoRA gate differs."""
    window = {"sliding_window": 6} if family in tiny.WINDOWED else {}
    model = with_lora(make_model(family, seed=4, base_changes=window, **CASES[case]))
    rows = [random_prompt(length, seed=length) for length in (11, 7)]
    tokens = mx.array([rows[0], rows[1] + [0] * 4])  # padded on the right
    anchors = np.array([[1, 4, 10], [0, 6, 3]], dtype=np.int32)
    for checkpoint in (False, True):
        main = forward_main(model, tokens, checkpoint=checkpoint)
        hidden = forward_streams(model, main.trunk, main.keys_values, anchors)
        logits = np.array(model.family.head(model.family.norm(hidden))).reshape(2, 3, model.gamma, -1)
        main_logits = np.array(model.family.head(model.family.norm(main.hidden)))
        for row in range(2):
            for place, anchor in enumerate(anchors[row].tolist()):
                expected_main, expected = inference_logits(model, rows[row], anchor)
                assert np.abs(logits[row, place] - expected).max() <= ATOL * max(1, np.abs(expected).max())
                assert np.abs(main_logits[row, anchor] - expected_main).max() <= ATOL * np.abs(expected_main).max()


def test_the_mask_is_the_drawn_one() -> None:
    """Red when: a stream sees past its anchor, another anchor's streams, or a later stream of its own."""
    expected = [
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]
    found = stream_mask(np.array([[1, 2]], dtype=np.int32), num_main=4, gamma=2)
    assert found.astype(int).tolist() == [expected]


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_only_streams_and_lora_train_and_the_start_is_the_base(mode: str) -> None:
    """Red when: a base weight is trained, LoRA lies in the wrong layers, or the fresh LoRA changes the answers."""
    model = make_model("llama", seed=1)
    tokens = mx.array([random_prompt(9, seed=1)])
    before = np.array(model(tokens))
    attach(model, stream_config(mode=mode), rank=2, scale=2.0)
    assert np.array_equal(np.array(model(tokens)), before)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert all(name.startswith("streams.") or name.endswith(("lora_a", "lora_b")) for name in names)
    layers = {name.split(".")[3] for name in names if name.startswith("base.")}
    assert layers == ({"2", "3"} if mode == "lossless" else {"0", "1", "2", "3"})
    assert sum(name.endswith("lora_a") for name in names) == 7 * len(layers)


@pytest.mark.parametrize("mode", ["lossless", "shared"])
def test_nothing_of_a_16_bit_base_is_raised_to_float32(mode: str) -> None:
    """Red when: the float32 tensors that train turn hidden states, and then the LM head, into float32."""
    model = make_model("llama", seed=1)
    model.base.set_dtype(mx.bfloat16)
    attach(model, stream_config(mode=mode), rank=2, scale=2.0)
    assert {value.dtype for value in trained_tensors(model).values()} == {mx.float32}
    main = forward_main(model, mx.array([random_prompt(6, 1)]))
    streams = forward_streams(model, main.trunk, main.keys_values, np.array([[2]], dtype=np.int32))
    exits = early_exit_logits(model, main.trunk)
    verified = verify(model, mx.array([3]), DraftTree.chain(0), model.make_cache(), insertion="leaf")
    assert verified.rider_logits is not None
    found = [*main.arrays, streams, exits, verified.logits, verified.rider_logits]
    assert {array.dtype for array in found} == {mx.bfloat16}


def test_a_quantised_base_trains_in_float() -> None:
    """Red when: LoRA on 4-bit layers has the wrong shape, or gradients do not pass a quantised product."""
    from specstream_mlx.training.batches import Example, make_batch
    from specstream_mlx.training.loss import LossWeights, loss_and_gradients

    for mode in ("lossless", "shared"):
        model = make_model("llama", seed=1, base_changes={"hidden_size": 64, "head_dim": 16, "intermediate_size": 128})
        model.base.set_dtype(mx.bfloat16)
        nn.quantize(model.base, group_size=64, bits=4)
        attach(model, stream_config(mode=mode), rank=2, scale=2.0)
        batch = make_batch([Example(tuple(random_prompt(5, 1)), tuple(random_prompt(8, 2)))], 4)
        report, gradients = loss_and_gradients(model, batch, LossWeights(main=float(mode == "shared")))
        flat = dict(tree_flatten(gradients))
        assert np.isfinite(report.loss)
        assert all(value.dtype == mx.float32 for value in flat.values())
        lora_b = [np.abs(np.array(v)).max() for name, v in flat.items() if name.endswith("lora_b") and ".3." in name]
        assert min(lora_b) > 0
