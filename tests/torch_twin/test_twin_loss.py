"""Batches written out, and the loss against a loop over single tokens."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from twin_models import load, naive_streams  # noqa: E402

from specstream_torch.loss import IGNORE, Example, make_batch, streaming_loss  # noqa: E402
from specstream_torch.modeling import NO_ANCHOR, causal_lm  # noqa: E402
from tests.tolerances import LOSSES  # noqa: E402

EXAMPLES = [Example((5, 6, 7), (8, 9, 10, 11, 2)), Example((5, 12), (13, 2)), Example((40,), (2,))]


def test_batch_written_out() -> None:
    """Catches: an anchor or target off by one, a prompt token as target, a target past the end."""
    batch = make_batch(EXAMPLES[:2], gamma=3, pad_id=96)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 2], [5, 12, 13, 2, 96, 96, 96, 96]]
    x = IGNORE
    assert batch.main_targets.tolist() == [[x, x, 8, 9, 10, 11, 2, x], [x, 13, 2, x, x, x, x, x]]
    assert batch.anchors.tolist() == [[2, 3, 4, 5], [1, NO_ANCHOR, NO_ANCHOR, NO_ANCHOR]]
    assert batch.stream_targets.tolist() == [
        [[9, 10, 11], [10, 11, 2], [11, 2, x], [2, x, x]],
        [[2, x, x], [x, x, x], [x, x, x], [x, x, x]],
    ]


def test_anchor_sub_sample() -> None:
    """Catches: main targets lost with the anchors, an order that is not a subset, a sample that ignores the seed."""
    example = Example((1, 2), tuple(range(3, 40)))
    full = make_batch([example], gamma=2)
    some = [
        make_batch([example], gamma=2, max_anchors=5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(some[0].main_targets, full.main_targets)
    chosen = some[0].anchors[0].tolist()
    assert len(chosen) == 5
    assert chosen == sorted(set(chosen) & set(full.anchors[0].tolist()))
    assert chosen == some[1].anchors[0].tolist() != some[2].anchors[0].tolist()


@pytest.mark.parametrize("mode", ["shared", "lossless"])
@torch.no_grad()
def test_loss_equals_a_loop(mode: str) -> None:
    """Catches: wrong weights or counts, logits scattered to the wrong stream, targets of padding counted."""
    model = load("llama", mode=mode, prune=True, gamma=3)
    weights = [0.3, 0.2, 0.1]
    batch = make_batch(EXAMPLES, gamma=3)
    report = streaming_loss(model, batch, stream_weight=weights, prune_weight=0.5)

    main, pruner, streams, leading = [], [], [[], [], []], []
    base = causal_lm(model)
    for example in EXAMPLES:
        tokens = [*example.prompt, *example.answer]
        with model.disable_adapter() if mode == "lossless" else torch.no_grad():
            output = model(torch.tensor([tokens]), output_hidden_states=True)
        spec = base.specstream.modules_to_save["default"]
        early = base.lm_head(base.model.norm(spec.prune(output.hidden_states[2])))
        for t in range(len(example.prompt) - 1, len(tokens) - 1):
            main.append(_loss_and_hit(output.logits[0, t], tokens[t + 1]))
            pruner.append(_loss_and_hit(early[0, t], tokens[t + 1]))
            hits = []
            for j, logits in enumerate(naive_streams(model, tokens, t), start=1):
                if t + 1 + j < len(tokens):
                    streams[j - 1].append(_loss_and_hit(logits, tokens[t + 1 + j]))
                    hits.append(streams[j - 1][-1][1])
            if hits:
                leading.append([*hits, False].index(False))

    means = [_mean(column, 0) for column in streams]
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) + 0.5 * _mean(pruner, 0)
    if mode == "shared":
        expected += _mean(main, 0)
        assert report.main_loss == pytest.approx(_mean(main, 0), abs=LOSSES)
        assert report.accuracies[0] == pytest.approx(_mean(main, 1))
    else:
        assert math.isnan(report.accuracies[0])
    assert report.stream_losses == pytest.approx(means, abs=LOSSES)
    assert report.prune_loss == pytest.approx(_mean(pruner, 0), abs=LOSSES)
    assert float(report.loss) == pytest.approx(expected, abs=LOSSES)
    assert report.accuracies[1:] == pytest.approx([_mean(column, 1) for column in streams])
    assert report.chain_tokens == pytest.approx(1 + sum(leading) / len(leading))


def test_chain_tokens_of_a_perfect_model() -> None:
    """Catches: an estimate that stops at the first stream or counts ignored targets as right."""
    model = load("llama", gamma=2)
    example = Example((1, 2), (9, 9, 9, 9))
    with torch.no_grad():
        causal_lm(model).lm_head.weight.zero_()
        causal_lm(model).model.norm.weight.zero_()
    head = causal_lm(model).lm_head
    hook = head.register_forward_hook(lambda m, x, y: y + torch.nn.functional.one_hot(torch.tensor(9), 97))
    report = streaming_loss(model, make_batch([example], gamma=2))
    hook.remove()
    assert report.accuracies == [1.0, 1.0, 1.0]
    assert report.chain_tokens == pytest.approx(1 + (2 + 2 + 1) / 3)  # anchors 1, 2 and 3; the last has one target


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_gradients_reach_what_is_trained_and_nothing_else(mode: str) -> None:
    """Catches: a detached stream, a pruner that moves the trunk, a lossless main pass that trains."""
    model = load("llama", mode=mode, prune=True, stream_init="low_rank_residual")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    batch = make_batch(EXAMPLES[:1], gamma=4)
    streaming_loss(model, batch).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # No stream loss depends on the last layers' values alone, so every trained tensor has a gradient.
    assert missing == []
    model.zero_grad()
    streaming_loss(model, batch, main_weight=0.0, stream_weight=0.0).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in model.named_parameters() if "modules_to_save" in name and ".prune." in name}
    if mode == "lossless":
        with pytest.raises(ValueError, match="does not train the main stream"):
            streaming_loss(model, batch, main_weight=1.0)


def test_bad_input_is_refused() -> None:
    """Catches: an empty prompt whose anchor would be -1, weights that do not match the streams."""
    with pytest.raises(ValueError, match="empty prompt"):
        make_batch([Example((), (1,))], gamma=2)
    with pytest.raises(ValueError, match="stream_weight has 2 values"):
        streaming_loss(load("llama"), make_batch(EXAMPLES, gamma=4), stream_weight=[0.1, 0.1])


def _loss_and_hit(logits, target: int) -> tuple[float, bool]:
    return -float(torch.log_softmax(logits, dim=-1)[target]), int(logits.argmax()) == target


def _mean(column: list, field: int) -> float:
    return sum(entry[field] for entry in column) / len(column)
