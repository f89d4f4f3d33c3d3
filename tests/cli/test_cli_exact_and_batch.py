"""``generate --check-exact`` and ``--prompts-file`` on a real, tiny model."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from specstream_mlx.engine import exactness
from tests.tiny import make_model, save_directory

SAMPLED = ("--temp", "0.9", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "3")
PROMPTS = ("w7 w8 w9 w10", "w20 w21", "w30 w31 w32")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    model = make_model("llama", seed=61)
    model.base.update(tree_map(lambda x: x.astype(mx.float16), model.base.parameters()))
    return save_directory(model, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt, "answer": "any"}) for prompt in PROMPTS]
    path.write_text("\n\n".join(lines) + "\n")  # blank lines are skipped, and counted
    return path


def generate(run, directory, *words):
    return run("generate", "--model", str(directory), "--max-tokens", "12", "--draft", "tree", *map(str, words))


@pytest.mark.parametrize("sampling", [(), SAMPLED], ids=["greedy", "sampled"])
def test_equal_tokens_pass_the_check(run, directory, sampling):
    """Red when: the sampler, the processors or the seed of the reference are other than the answer's."""
    result = generate(run, directory, "-p", PROMPTS[0], *sampling, "--check-exact", "--json")
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["exact"] == {"identical": True}
    count = len(document["token_ids"])
    assert result.stderr.splitlines()[-1] == f"exact: {count} tokens compared with plain decoding by mlx-lm"


@pytest.mark.parametrize("rounding", [0.0, 100.0])
def test_a_difference_is_reported_and_fails_beyond_the_bound(run, directory, monkeypatch, rounding):
    """Red when: a difference is not seen, a tie fails, or what is no tie passes."""
    monkeypatch.setattr(exactness, "rounding", lambda plain, text: rounding)
    real = exactness.check_exact

    def other_token(plain, prompt, tokens, **how):
        return real(plain, prompt, [*tokens[:4], (tokens[4] + 1) % 97, *tokens[5:]], **how)

    monkeypatch.setattr(exactness, "check_exact", other_token)
    result = generate(run, directory, "-p", PROMPTS[0], "--check-exact", "--json", "--quiet")
    document = json.loads(result.stdout)
    exact, tokens = document["exact"], document["token_ids"]
    assert (exact["identical"], exact["position"], exact["plain_token"]) == (False, 4, tokens[4])
    assert exact["bound"] == 4 * rounding
    line = f"token 5 is {(tokens[4] + 1) % 97}, in plain decoding by mlx-lm {tokens[4]}; "
    if rounding:
        assert (result.code, exact["tie"]) == (0, True)
        assert result.stderr.startswith(line)
        assert result.stderr.endswith(": a tie\n")
    else:
        assert (result.code, exact["tie"]) == (5, False)
        assert result.stderr.startswith(f"error: {line}")
        assert result.stderr.endswith("please report it\n")
    assert result.stderr.count("\n") == 1


def test_sampled_text_needs_a_seed_to_be_compared(run, directory):
    result = generate(run, directory, "-p", "w7", "--temp", "1", "--check-exact")
    assert result.code == 2
    line = "error: --check-exact: sampled text can be compared for the same seed only; give --seed\n"
    assert result.stderr == line


@pytest.mark.parametrize("sampling", [(), SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_answers_as_single_runs_do(run, directory, prompts_file, sampling):
    """Red when: an answer depends on the one before it."""
    single = [json.loads(generate(run, directory, "-p", prompt, *sampling, "--json").stdout) for prompt in PROMPTS]
    result = generate(run, directory, "--prompts-file", prompts_file, *sampling, "--json", "--check-exact")
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    answers = document["answers"]
    assert [answer["prompt"] for answer in answers] == list(PROMPTS)
    assert [answer["exact"] for answer in answers] == [{"identical": True}] * 3
    for key in ("text", "token_ids", "finish_reason", "target_passes", "prompt_tokens"):
        assert [answer[key] for answer in answers] == [answer[key] for answer in single]
    total = sum(len(answer["token_ids"]) for answer in single)
    assert (document["prompts"], document["generation_tokens"]) == (3, total)
    assert document["target_passes"] == sum(answer["target_passes"] for answer in single)
    text = generate(run, directory, "--prompts-file", prompts_file, *sampling)
    assert text.stdout == "==========\n".join(f"{answer['text']}\n" for answer in single)
    assert text.stderr.startswith(f"3 prompts, {total} tokens in {document['target_passes']} passes (")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"prompt": "w7"}\n{"prompt": 3}\n', ":2: expected a JSON object with a 'prompt' that is not empty"),
        ('{"prompt": "w7"}\n\n{"prompt"\n', ":3: not JSON (Expecting ':' delimiter: line 1 column 10 (char 9))"),
        ("\n", ": no prompts in it"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_generated(run, directory, tmp_path, content, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    result = generate(run, directory, "--prompts-file", path)
    assert (result.code, result.stdout, result.stderr) == (3, "", f"error: {path}{line}\n")


def test_prompts_that_do_not_fit_are_named_together(run, directory, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "w7 " * count}) + "\n" for count in (3, 600, 2, 512)))
    result = generate(run, directory, "--prompts-file", path, "--json")
    assert (result.code, result.stdout) == (3, "")
    shorten = "the model's context holds 512; shorten the prompt"
    assert result.stderr.splitlines() == [
        f"error: {path}:2: prompt has 600 tokens, {shorten}",
        f"error: {path}:4: prompt has 512 tokens, {shorten}",
    ]


def test_a_file_and_a_prompt_contradict(run, directory, prompts_file):
    result = generate(run, directory, "--prompts-file", prompts_file, "-p", "w7")
    assert (result.code, result.stderr) == (2, "error: --prompts-file: contradicts --prompt; drop one\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupted_batch_keeps_what_there_is(run, directory, prompts_file, monkeypatch, as_json):
    """Red when: finished answers are lost with the one under way."""
    from specstream_mlx.engine import batch_generate

    real = batch_generate.stream_batch
    made = {}

    def interrupted(*arguments, **options):
        first_is_done = False
        for index, response in real(*arguments, **options):
            made.setdefault(index, []).extend(response.tokens)
            yield index, response
            if first_is_done and len(made) > 1:
                raise KeyboardInterrupt
            first_is_done |= index == 0 and response.finish_reason is not None

    monkeypatch.setattr(batch_generate, "stream_batch", interrupted)
    result = generate(run, directory, "--prompts-file", prompts_file, *["--json"] * as_json)
    assert (result.code, result.stderr) == (130, "interrupted\n")
    if as_json:
        answers = json.loads(result.stdout)["answers"]
        assert len(answers) == len(made) > 1
        assert [answer["token_ids"] for answer in answers] == [made[index] for index in sorted(made)]
    else:
        texts = result.stdout.split("==========\n")
        assert len(texts) == len(made) > 1
        assert all(text.endswith("\n") for text in texts)
