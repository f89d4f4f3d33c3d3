"""``specstream-mlx benchmark``: no figure before equal tokens, arms in turn, what a model cannot show is said."""

import importlib.util
import json

import mlx.core as mx
import pytest

import specstream_mlx
from specstream_cli import arms as engine
from specstream_cli.arms import BASELINE, Arm, Run, Step, Workload, differences, measure, row, warm_up
from specstream_cli.benchmark import measure_all
from specstream_cli.quality import quality
from specstream_mlx.calibration.shapes import SHAPES
from specstream_mlx.errors import VerificationError
from tests.adapter_cases import save_base, save_every_kind
from tests.tiny import make_model, save_directory


def scripted(groups_by_arm):
    """Arms that speak given groups of tokens, and the order in which they were asked."""
    calls = []

    def arm(name, groups):
        def start(prompt):
            calls.append(name)
            for passes, group in enumerate(groups, start=1):
                yield Step(group, str(group), passes, [passes] * 2, [passes, 0])

        return Arm(name, start, weight_bytes=1)

    return [arm(name, groups) for name, groups in groups_by_arm.items()], calls


@pytest.mark.parametrize("is_tie", [True, False])
def test_different_tokens_give_no_figure_unless_rounding_explains_them(monkeypatch, is_tie):
    """Red when: a difference above the bound is let through because ties are."""
    monkeypatch.setattr("specstream_cli.benchmark.judge", lambda stock, prompt, run: (f"{run.tokens}", is_tie))
    arms, _ = scripted({BASELINE: [[1], [2], [3]], "auto": [[1], [2, 4]]})
    load = Workload("task", [[1], [2]], ["a", "b"])
    with pytest.raises(VerificationError, match=r"task: auto: prompt 1: \[1, 2, 4\]\nso no figure is given"):
        measure_all(arms, [load], 1, False, None)
    if is_tie:
        (result,) = measure_all(arms, [load], 1, True, None)
        assert result["arms"][1]["prompts_with_equal_tokens"] == 0
    else:
        with pytest.raises(VerificationError, match="rounding does not explain it"):
            measure_all(arms, [load], 1, True, None)


def test_arms_take_turns_after_a_warm_up():
    arms, calls = scripted({BASELINE: [[1]], "auto": [[1]]})
    prompts = [[1], [2]]
    warm_up(arms, prompts)
    assert calls == [BASELINE, BASELINE, "auto", "auto"]
    assert differences(arms) == {"auto": []}
    calls.clear()
    for repeat in range(2):
        measure(arms, prompts, repeat)
    assert calls == [BASELINE, "auto", "auto", BASELINE, "auto", BASELINE, BASELINE, "auto"]


def test_figures_by_hand():
    """Red when: passes and tokens are swapped, decoding holds the prefill, or the ratio is the wrong way round."""

    def run(first, decode):
        return Run([1, 2, 3, 4], "", 2, [2, 2], [2, 1], first, decode, 7)

    base, ours = Arm(BASELINE, iter, 100), Arm("auto", iter, 200)
    base.runs = [[run(1.0, 4.0), run(1.0, 2.0)], [run(1.0, 6.0), run(1.0, 6.0)], [run(1.0, 4.0), run(1.0, 4.0)]]
    ours.runs = [[run(1.0, 1.0), run(1.0, 1.0)], [run(1.0, 2.0), run(3.0, 2.0)], [run(1.0, 2.0), run(1.0, 2.0)]]
    found = row(ours, base, 1)
    assert (found["tokens"], found["passes"], found["tokens_per_pass"]) == (8, 4, 2.0)
    assert found["decode_seconds"]["all"] == [2.0, 4.0, 4.0]
    assert found["decode_speedup"] == {"of_medians": 2.0, "min": 2.0, "max": 3.0}
    assert found["total_speedup"]["of_medians"] == 10 / 6
    assert found["efficiency"] == 1.0
    assert found["time_to_first_token_ms"] == {"median": 1000.0, "min": 1000.0, "max": 3000.0}
    assert found["decode_tokens_per_second"] == 6 / 4
    assert (found["drafted_by_depth"], found["accepted_by_depth"]) == ([4, 4], [4, 2])
    assert found["peak_memory_gb"] == 207e-9
    assert found["prompts_with_equal_tokens"] == 1


def test_quality_by_hand(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quality([" a b\n", "c"], ["a b", "d"]) == {"exact_match": 50.0, "rouge1": None, "rougeLsum": None}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = save_directory(make_model("llama", seed=41), tmp_path_factory.mktemp("model") / "tiny")
    lines = [
        json.dumps({"prompt": " ".join(f"w{word}" for word in range(start, start + 9)), "answer": "w1"})
        for start in (7, 20)
    ]
    (path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return path


def benchmark(run, directory, *more):
    arguments = ("--repeats", "1", "--max-tokens", "12", "--json", *more)
    return run("benchmark", "--model", str(directory), *arguments)


def test_every_arm_on_one_model(run, directory):
    """The draft model is the model itself: mlx-lm then accepts every draft."""
    drafts = [word for mode in ("auto", "tree", "chain", "off") for word in ("--draft", mode)]
    more = ["--prompt-lookup", "--draft-model", str(directory), "--context", "40", "--context", "9999", "--costs"]
    result = benchmark(run, directory, *drafts, *more)
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    assert "--context 9999: does not fit the model's 512 positions" in result.stderr
    plain, filled = document["workloads"]
    assert (plain["context"], filled["context"], filled["prompt_tokens"]) == (None, 40, 40)
    names = ["mlx-lm", "auto", "tree", "chain", "off"]
    names += [f"{drafter} {mode}" for drafter in ("prompt-lookup", "two-model") for mode in ("auto", "tree", "chain")]
    names.append("mlx-lm two-model")
    for load in (plain, filled):
        assert [found["arm"] for found in load["arms"]] == names
        for found in load["arms"]:
            assert found["prompts_with_equal_tokens"] == 2
            assert found["decode_seconds"]["median"] > 0
            assert found["peak_memory_gb"] > 0
    by_name = {found["arm"]: found for found in plain["arms"]}
    assert by_name["mlx-lm"]["passes"] == by_name["off"]["passes"] == by_name["off"]["tokens"]
    assert by_name["mlx-lm two-model"]["passes"] < by_name["mlx-lm"]["passes"]
    assert by_name["two-model chain"]["passes"] < by_name["mlx-lm"]["passes"]
    who = {found["arm"]: (found["drafter"], found["draft"]) for found in plain["arms"]}
    assert who["mlx-lm"] == who["mlx-lm two-model"] == (None, None)
    assert (who["tree"], who["off"]) == (("streams", "tree"), ("none", "off"))
    assert who["prompt-lookup chain"] == ("prompt-lookup", "chain")
    assert document["num_draft_tokens"] == {"prompt-lookup": 10, "two-model": 4}
    (costs,) = document["costs"]
    assert costs["leaf"] != costs["chain"]
    assert by_name["mlx-lm"]["quality"]["exact_match"] == 0.0
    assert [costs["context"] for costs in document["costs"]] == [40]
    assert {"machine", "versions", "dtype", "model"} <= set(document)


def test_every_drafter_is_an_arm_of_its_own(run, directory):
    """Red when: plain decoding is measured once per drafter, or a drafter is measured that nobody named."""
    words = ["--drafter", "prompt-lookup", "--drafter", "streams", "--drafter", "none", "--num-draft-tokens", "3"]
    result = benchmark(run, directory, *words, "--draft", "chain", "--draft", "off")
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    (load,) = document["workloads"]
    assert [found["arm"] for found in load["arms"]] == ["mlx-lm", "prompt-lookup chain", "off", "streams chain"]
    assert len(load["arms"][1]["drafted_by_depth"]) == 3
    assert document["num_draft_tokens"]["prompt-lookup"] == 3
    assert document["draft_model"] is None
    result = benchmark(run, directory, "--drafter", "none")
    assert [found["arm"] for found in json.loads(result.stdout)["workloads"][0]["arms"]] == ["mlx-lm", "off"]


def test_tables(run, directory):
    result = run("benchmark", "--model", str(directory), "--repeats", "1", "--max-tokens", "6", "--prompts", "1")
    assert result.code == 0
    assert "decode speed-up" in result.stdout
    assert "auto: exact match 0.0%" in result.stdout


def test_a_model_without_streams_is_measured_as_far_as_it_goes(run, tmp_path):
    model = make_model("llama", seed=42)
    path = save_directory(model, tmp_path / "plain")
    for name in ("specstream_config.json", "specstream.safetensors"):
        (path / name).unlink()
    (path / "samples.jsonl").write_text('{"prompt": "w7 w8 w9"}\n')
    result = benchmark(run, path, "--draft", "tree", "--draft", "auto", "--prompt-lookup")
    assert result.code == 0, result.stderr
    assert "no arm for --draft tree" in result.stderr
    assert "ours decodes plainly" in result.stderr
    (load,) = json.loads(result.stdout)["workloads"]
    names = ["mlx-lm", "off", "prompt-lookup tree", "prompt-lookup auto"]
    assert [found["arm"] for found in load["arms"]] == names
    assert run("benchmark", "--model", str(path), "--noise-streams").code == 2


@pytest.mark.parametrize("kind", ["lossless", "shared", "plain"])
def test_an_adapter_is_measured_against_what_mlx_lm_makes_of_it(run, tmp_path, kind):
    """Red when: the baseline of a lossless adapter is not the bare base, or that of a fine-tune is."""
    base = save_base(tmp_path / "base")
    (base / "samples.jsonl").write_text('{"prompt": "w7 w8 w9"}\n{"prompt": "w17 w18 w19 w20"}\n')
    adapter = save_every_kind(tmp_path, specstream_mlx.load(base)[0].base)[kind]
    result = benchmark(run, base, "--adapter", str(adapter))
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["adapter"] == kind
    assert document["adapter_bytes"] == specstream_mlx.load(base, adapter=adapter)[0].adapters[kind].num_bytes > 0
    (workload,) = document["workloads"]
    assert [found["arm"] for found in workload["arms"]] == ["mlx-lm", "auto", "off"][:: 1 if kind != "plain" else 2]
    assert {found["prompts_with_equal_tokens"] for found in workload["arms"]} == {2}
    if kind == "lossless":
        wrong = benchmark(run, make_another(base), "--adapter", str(adapter))
        assert (wrong.code, wrong.stderr.count("\n")) == (3, 1)
        assert "this is another base or revision than 'org/base'" in wrong.stderr


def make_another(base):
    """The base with another final norm."""
    file = base / "model.safetensors"
    tensors = mx.load(str(file))
    mx.eval(tensors)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    file.unlink()
    mx.save_safetensors(str(file), tensors)
    return base


def test_noise_streams_change_no_token(run, directory):
    result = benchmark(run, directory, "--noise-streams", "--ignore-eos", "--draft", "auto", "--draft", "chain")
    assert result.code == 0, result.stderr
    (load,) = json.loads(result.stdout)["workloads"]
    assert {found["prompts_with_equal_tokens"] for found in load["arms"]} == {2}
    assert {found["tokens"] for found in load["arms"]} == {24}


def test_random_weights_give_costs_and_say_so(run, monkeypatch):
    tiny = SHAPES["llama-100m"] | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    monkeypatch.setitem(SHAPES, "tiny", tiny | {"num_attention_heads": 4, "num_key_value_heads": 2})
    words = ("--random-weights", "tiny", "--dtype", "float32", "--context", "16", "--repeats", "1")
    result = run("benchmark", *words)
    assert result.code == 0, result.stderr
    assert result.stdout.startswith("RANDOM WEIGHTS")
    document = json.loads(run("benchmark", *words, "--q-bits", "4", "--json").stdout)
    assert "workloads" not in document
    assert (document["quantization"], document["model"]) == ("4 bits", "tiny, random weights")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--draft", "fast"], 2, "got 'fast', expected one of auto, tree, chain, off"),
        (["--drafter", "magic"], 2, "got 'magic', expected one of streams, "),
        (["--drafter", "two-model"], 2, "--draft-model is missing; drafter 'two-model' needs a second, smaller model"),
        (["--num-draft-tokens", "3"], 2, "--num-draft-tokens goes with the drafters 'two-model' and 'prompt-lookup'"),
        (["--drafter", "prompt-lookup", "--num-draft-tokens", "0"], 2, "--num-draft-tokens: got 0, expected"),
        (["--random-weights", "llama-1b", "--drafter", "streams"], 2, "--random-weights: contradicts --drafter"),
        (["--dtype", "float16"], 2, "--dtype: goes with --random-weights"),
        (["--random-weights", "llama-1b", "--adapter", "x"], 2, "--random-weights: contradicts --adapter"),
        (["--adapter", "./nowhere"], 3, "no such directory"),
        (["--random-weights", "llama-9000b"], 2, "shape is 'llama-9000b', expected one of"),
        (["--random-weights", "llama-1b", "--dtype", "int8"], 2, "dtype is 'int8'"),
        (["--prompts-file", "nowhere.jsonl", "--prompts", "1"], 3, "nowhere.jsonl: cannot be read"),
        (["--plot", "speed.svg"], 2, "plots are PNG files"),
        (["--draft-model", "./nowhere"], 3, "no such directory"),
    ],
)
def test_refusals_are_one_line(run, arguments, code, message):
    result = run("benchmark", *arguments)
    assert (result.code, result.stdout) == (code, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_draft_model_of_another_vocabulary_is_refused(run, directory):
    from specstream_mlx import default_model_path

    result = benchmark(run, directory, "--draft-model", str(default_model_path()))
    assert result.code == 3
    assert "--draft-model: vocabulary of 2048 tokens, the model has 97" in result.stderr


def test_a_plot_is_a_png(run, directory, tmp_path):
    pytest.importorskip("matplotlib")
    result = benchmark(run, directory, "--costs", "--context", "16", "--plot", str(tmp_path / "speed.png"))
    assert result.code == 0, result.stderr
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_passes_of_mlx_lms_speculative_decoding_are_counted(monkeypatch):
    """Red when: drafted tokens count as passes, or a last pass that ends within its drafts is forgotten."""
    flags = [False, True, True, False, True]
    responses = [type("R", (), {"token": 1, "text": "", "from_draft": flag}) for flag in flags]
    monkeypatch.setattr("mlx_lm.stream_generate", lambda *_, **__: iter(responses))
    steps = list(engine.stock_arm("draft-model", None, None, 0, 5).start([1]))
    assert steps[-1].passes == 3


def test_quality_of_answers():
    """Exact match counts trimmed equality; ROUGE is a mean of F scores, 100 for equal texts and 0 for disjoint ones."""
    from specstream_cli.quality import quality

    found = quality(["SELECT a\n", "x y"], ["SELECT a", "p q"])
    assert found == {"exact_match": 50.0, "rouge1": 50.0, "rougeLsum": 50.0}
