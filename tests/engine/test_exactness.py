"""16-bit and quantised weights: equal tokens or ties within rounding, no upcast anywhere, and a check that can fail."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from specstream_mlx import DraftOptions, load
from specstream_mlx.engine.exactness import Difference, check_exact, first_difference, plain_model, rounding
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME
from specstream_mlx.target.tree import DraftTree
from tests.passes import early_exit_logits, stream_logits, trunk_of, verify
from tests.tiny import NumberTokenizer, drafter, make_model, our_tokens, plain_tokens, random_prompt, save_directory

BASES = {
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "affine-4": {"quantize": True, "q_bits": 4, "q_group_size": 32, "dtype": "float16"},
    "affine-6": {"quantize": True, "q_bits": 6, "q_group_size": 32, "dtype": "bfloat16"},
    "affine-8": {"quantize": True, "q_bits": 8, "q_group_size": 32, "dtype": "bfloat16"},
    "affine-4-float32": {"quantize": True, "q_bits": 4, "q_group_size": 32, "dtype": "float32"},
    "mxfp4": {"quantize": True, "q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4", "dtype": "bfloat16"},
    "mxfp8": {"quantize": True, "q_bits": 8, "q_group_size": 32, "q_mode": "mxfp8", "dtype": "bfloat16"},
    "nvfp4": {"quantize": True, "q_bits": 4, "q_group_size": 16, "q_mode": "nvfp4", "dtype": "bfloat16"},
}
RANK = 4
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A float32 model with streams, as a directory."""
    return save_directory(make_model("llama", seed=51), tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="module", params=BASES)
def base(request, original, tmp_path_factory):
    """That model without streams, through mlx-lm's own converter, as bases are published."""
    path = tmp_path_factory.mktemp("base") / request.param
    mlx_lm.convert(str(original), mlx_path=str(path), **BASES[request.param])
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (path / name).unlink(missing_ok=True)
    return path


def sidecar(original, path, lora):
    """The streams alone; with LoRA on stream rows (lossless), or on all rows (live)."""
    path.mkdir()
    shutil.copy(original / WEIGHTS_NAME, path)
    config = json.loads((original / CONFIG_NAME).read_text())
    factors = {}
    for layer in (2, 3) if lora == "lossless" else range(4):
        for module in MODULES:
            rows, columns = {"mlp.down_proj": (64, 32)}.get(module, (32, 32))
            key = mx.random.key(100 * layer + len(module))
            name = f"model.layers.{layer}.{module}"
            factors[f"{name}.lora_a"] = 0.3 * mx.random.normal((rows, RANK), key=key)
            factors[f"{name}.lora_b"] = 0.3 * mx.random.normal((RANK, columns), key=key)
    if lora == "lossless":
        config |= {"mode": "lossless", "lora_rows": "streams", "lora": {"rank": RANK, "scale": 2.0}}
        tensors = mx.load(str(path / WEIGHTS_NAME)) | {f"lora.{name}": value for name, value in factors.items()}
        mx.eval(tensors)
        (path / WEIGHTS_NAME).unlink()
        mx.save_safetensors(str(path / WEIGHTS_NAME), tensors)
    elif lora == "live":
        parameters = {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": list(MODULES)}
        adapter = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters}
        (path / "adapters").mkdir()
        (path / "adapters" / "adapter_config.json").write_text(json.dumps(adapter))
        mx.save_safetensors(str(path / "adapters" / "adapters.safetensors"), factors)
    (path / CONFIG_NAME).write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("lora", ["lossless", "live"])
def test_sidecars_over_published_bases(base, original, tmp_path, lora):
    """Red when: LoRA for streams reaches a main row, live LoRA misses one, or a mask or position is wrong."""
    adapter = sidecar(original, tmp_path / "sidecar", lora)
    model, _ = load(base, adapter=adapter)
    plain = plain_model(model, base, adapter)
    prompt = random_prompt(9, seed=1)
    sampler = make_sampler(0.9, top_p=0.95)
    for turn, (temp_sampler, insertion) in enumerate(((None, "deferred"), (sampler, "parallel"))):
        how = {"seed": turn, "sampler": temp_sampler}
        expected = plain_tokens(plain, prompt, 20, end_of_text=(), **how)
        with drafter(model, expected, len(prompt), 0.8, seed=turn):
            tokens = our_tokens(
                model,
                prompt,
                20,
                tokenizer=NumberTokenizer(end_of_text=()),
                draft="tree",
                draft_options=DraftOptions(tree="cartesian:2x2x1", insertion=insertion),
                **how,
            )
        difference = check_exact(plain, prompt, tokens, **how)
        assert (tokens == expected) == (difference is None)
        assert difference is None or difference.is_tie, str(difference)


def test_nothing_is_upcast(base, original, tmp_path):
    """Red when: a float32 scale, mask, rotation or stream tensor pulls activations up to float32."""
    model, _ = load(base, adapter=sidecar(original, tmp_path / "sidecar", "lossless"))
    dtype = getattr(mx, BASES[base.name]["dtype"])
    caches = model.make_cache()
    model(mx.array([random_prompt(9, seed=2)]), cache=caches)
    tree = DraftTree.cartesian((2, 2))
    verified = verify(
        model, mx.array(random_prompt(tree.size, seed=3)), tree, caches, insertion="parallel", num_streams=4
    )
    model.commit(verified, [0], caches)
    after = verify(model, mx.array(random_prompt(tree.size, seed=4)), tree, caches, insertion="deferred", num_streams=4)
    model.commit(after, [0, 1], caches)
    made = {
        "logits": verified.logits,
        "trunk": trunk_of(model, verified),
        "streams beside the rows": stream_logits(model, verified, 0, caches, 4),
        "streams of their own": stream_logits(model, after, 1, caches, 4),
        "early exit": early_exit_logits(model, trunk_of(model, verified)),
        "keys": caches[-1].keys,
        "values": caches[0].values,
    }
    assert {name: value.dtype for name, value in made.items()} == dict.fromkeys(made, dtype)


def test_the_plain_model_shares_its_weights_and_is_not_wrapped(base, original, tmp_path):
    """Red when: the reference runs through the seam that it is to check, or weights are held twice."""
    for lora in (None, "lossless", "live"):
        adapter = sidecar(original, tmp_path / str(lora), lora)
        model, _ = load(base, adapter=adapter)
        plain = plain_model(model, base, adapter)
        theirs = {name.replace(".linear.", "."): v for name, v in tree_flatten(model.base.parameters())}
        assert all(theirs[name.replace(".linear.", ".")] is value for name, value in tree_flatten(plain.parameters()))
        kinds = {type(module).__name__ for _, module in plain.named_modules()}
        assert not kinds & {"TreeRope", "StreamLoRALinear"}


@pytest.fixture(scope="module")
def half():
    """A float16 model whose logits of tokens 6 and 7 are almost the same, and a text of it.

    Its logits lie between 4 and 16, where float16 numbers are 0.004 to 0.008 apart; tests allow two or three steps.
    """
    model = make_model("llama", seed=52)
    model.base.update(tree_map(lambda x: x.astype(mx.float16), model.base.parameters()))
    prompt = random_prompt(9, seed=5)
    return model.base, prompt, plain_tokens(model.base, prompt, 12, end_of_text=())


def test_equal_tokens_are_no_difference(half):
    plain, prompt, tokens = half
    assert check_exact(plain, prompt, tokens) is None
    for sampler in (make_sampler(0.8), make_sampler(1.0, xtc_probability=0.5)):
        tokens = plain_tokens(plain, prompt, 9, end_of_text=(), seed=3, sampler=sampler)
        assert check_exact(plain, prompt, tokens, sampler=sampler, seed=3) is None


@pytest.mark.parametrize("processors", [None, make_logits_processors({7: 1.5}, 1.2)], ids=["plain", "processors"])
def test_a_greedy_gap_is_the_distance_of_two_logits(half, processors):
    """Red when: the position is off by one, or the logits are another token's."""
    plain, prompt, _ = half
    tokens = plain_tokens(plain, prompt, 12, end_of_text=(), logits_processors=processors)
    wrong = [*tokens[:7], (tokens[7] + 1) % 97, *tokens[8:]]
    found = check_exact(plain, prompt, wrong, logits_processors=processors)
    row = plain(mx.array([[*prompt, *tokens[:7]]]))[0, -1:]
    for processor in processors or ():
        row = processor(mx.array([*prompt, *tokens[:7]]), row)
    row = (row - mx.logsumexp(row, keepdims=True))[0].astype(mx.float32)
    assert (found.position, found.token, found.plain_token) == (7, wrong[7], tokens[7])
    assert found.plain_logit == pytest.approx(row[tokens[7]].item(), abs=0.02)
    assert found.logit == pytest.approx(row[wrong[7]].item(), abs=0.02)
    assert found.gap == pytest.approx(found.plain_logit - found.logit, abs=1e-3)
    assert not found.is_tie
    assert f"token 8 is {wrong[7]}, in plain decoding by mlx-lm {tokens[7]}" in str(found)


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.2}], ids=str)
def test_a_sampled_gap_is_what_it_takes_with_the_same_noise(half, sampling):
    """Red when: the noise is that of another token, or the sampler's filters are left out."""
    plain, prompt, _ = half
    sampler = make_sampler(0.8, **sampling)
    tokens = plain_tokens(plain, prompt, 9, end_of_text=(), seed=11, sampler=sampler)
    wrong = [*tokens[:5], (tokens[5] + 3) % 97]
    found = check_exact(plain, prompt, wrong, sampler=sampler, seed=11)
    raised = []
    for rise in (found.gap * 1.01, found.gap * 0.99):

        def bias(ids, logits, rise=rise):
            return logits.at[:, wrong[5]].add(rise) if len(ids) == len(prompt) + 5 else logits

        more = {"seed": 11, "sampler": lambda row: sampler(row.astype(mx.float32)), "logits_processors": [bias]}
        raised.append(plain_tokens(plain, prompt, 6, end_of_text=(), **more)[5])
    assert raised[0] == wrong[5]
    assert raised[1] != wrong[5]


def test_rounding_is_that_of_the_model_at_hand(half, monkeypatch):
    """Red when: the bound is a constant, or rows are compared with themselves.

    This model rounds differently where a pass has more than four rows: its logits wander by 0.25 there.
    """
    plain, prompt, tokens = half
    stock = type(plain).__call__
    monkeypatch.setattr(
        type(plain), "__call__", lambda self, ids, cache=None: stock(self, ids, cache) + 0.25 * (ids.shape[1] > 4)
    )
    assert rounding(plain, [*prompt, *tokens]) == pytest.approx(0.25, abs=0.02)
    found = check_exact(plain, prompt, [*tokens[:3], tokens[3] - 1])
    assert found.bound == pytest.approx(1.0, abs=0.08)


def test_no_difference_is_allowed_in_float32():
    plain = make_model("llama", seed=52).base
    prompt = random_prompt(9, seed=5)
    tokens = plain_tokens(plain, prompt, 5, end_of_text=())
    found = check_exact(plain, prompt, [*tokens[:2], tokens[2] - 1])
    assert found.bound == 0
    assert not found.is_tie


def test_a_difference_within_the_bound_is_a_tie():
    assert Difference(0, 1, 2, -1.0, -0.99, 0.01, 0.01).is_tie
    assert not Difference(0, 1, 2, -1.0, -0.98, 0.02, 0.01).is_tie


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1], [1, 3]) == 1
