"""Measuring, storing and finding calibrations."""

import itertools
import json
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest

from specstream_mlx import stream_generate
from specstream_mlx.calibration import costs
from specstream_mlx.calibration.acceptance import AcceptanceCounts, measure_acceptance
from specstream_mlx.calibration.costs import PLAIN_STEPS, measure_costs, sample_tree, usable_contexts
from specstream_mlx.calibration.measure import measure
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats.prompts import encode_prompt, read_prompts
from specstream_mlx.models.identity import calibration_key, model_digest, stored_calibration
from specstream_mlx.planning.calibration import Calibration
from specstream_mlx.planning.store import cache_directory, path_for, save
from specstream_mlx.target import machine
from tests.tiny import NumberTokenizer, drafter, make_model, plain_tokens, random_prompt


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECSTREAM_MLX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def _clock():
    """Every look at the clock is a second later, however busy the machine is: no kind of pass is ever too dear."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
        yield


@pytest.fixture(scope="module")
def model():
    return make_model("llama", seed=31)


@pytest.fixture(scope="module")
def calibration(model, _clock):
    prompts = [random_prompt(6, seed) for seed in range(2)]
    return measure(model, NumberTokenizer(), prompts, text="two prompts", contexts=[8, 32], repeats=1, max_tokens=12)


def test_a_calibration_survives_the_file(model, calibration):
    path = save(calibration)
    assert path.parent == cache_directory() / "calibrations"
    assert stored_calibration(model) == calibration
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file is left"
    assert calibration.costs[0][1].plain > 0
    assert [context for context, _ in calibration.costs] == [8, 32]
    assert len(calibration.rates) == model.gamma


def test_costs_cover_rows_kinds_and_contexts(model):
    stages = []
    found = dict(
        measure_costs(
            model, [4, 20], model.drafter, rows=(1, 3, 5), repeats=1, progress=lambda *report: stages.append(report)
        )
    )
    assert set(found) == {4, 20}
    for at in found.values():
        assert [rows for rows, _ in at.chain.points] == [1, 3, 5]
        assert [rows for rows, _ in at.tree.points] == [3, 5]
        assert [rows for rows, _ in at.parallel.points] == [3, 5]
        assert min(at.plain, *(seconds for _, seconds in at.chain.points)) > 0
        assert [rows for rows, _ in at.deferred.points] == [rows for rows, _ in at.leaf.points] == [3, 5]
        assert at.stream_pass(4) >= 0
        assert (at.plain, *(seconds for _, seconds in at.chain.points)) == (1 / PLAIN_STEPS, 1, 1, 1)
    assert stages == [("passes", 1, 2), ("passes", 2, 2)]


def test_sample_trees_have_the_rows_and_are_no_chains():
    for rows in (3, 4, 5, 9, 40):
        for gamma in (1, 4):
            tree = sample_tree(rows, gamma)
            assert (tree.size, tree.is_chain) == (rows, False)
            assert tree.max_depth <= gamma


def test_contexts_that_do_not_fit_the_model_are_left_out(model):
    assert model.args.max_position_embeddings == 512
    assert usable_contexts(model, [64, 512, 2048], model.gamma) == [64]
    assert usable_contexts(model, [4096], model.gamma) == [238]


def test_acceptance_is_counted_while_the_guesses_before_were_right():
    counts = AcceptanceCounts(3, ranks=2)
    counts.add([[5, 6], [7, 8], [9, 1]], [6, 7, 2, 4])
    counts.add([[5, 6], [7, 8], [9, 1]], [3, 7, 9])
    counts.add([[5, 6], [7, 8], [9, 1]], [5])
    assert counts.trials.tolist() == [3, 1, 1]
    assert counts.hits.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert counts.rates()[0] == (1 / 3.5, 1 / 3.5)


def test_a_drafter_that_is_always_right_is_measured_so(model):
    """Red when: guesses are compared with tokens one place off."""
    prompt = random_prompt(9, seed=3)
    expected = plain_tokens(model.base, prompt, 41, end_of_text=())
    with drafter(model, expected, len(prompt), 1.0):
        counts = measure_acceptance(model, [prompt], model.drafter, max_tokens=41)
    assert counts.trials.tolist() == [8, 8, 8, 8]
    assert counts.hits[:, 0].tolist() == [8, 8, 8, 8]


def test_without_prompts_the_model_samples_its_own_text(model, monkeypatch):
    monkeypatch.setattr(f"{measure.__module__}.OWN_SAMPLES", 3)
    monkeypatch.setattr(f"{measure.__module__}.OWN_SAMPLE_TOKENS", 30)
    tokenizer = NumberTokenizer()
    tokenizer.__dict__["bos_token_id"] = None
    found = measure(model, tokenizer, contexts=[8], repeats=1)
    assert found.text == "text sampled from the model"
    assert min(found.anchors[:1]) > 50


def test_a_model_without_streams_is_refused():
    plain = make_model("llama", seed=1)
    plain.use_adapter(None)
    with pytest.raises(UsageError, match="no streams"):
        measure(plain, NumberTokenizer())
    assert stored_calibration(plain) is None


def test_the_key_tells_models_and_machines_apart(model, monkeypatch):
    key = calibration_key(model)
    assert key == calibration_key(make_model("llama", seed=31)), "the same model again"
    other = make_model("llama", seed=31)
    other.streams.stream_embeddings = other.streams.stream_embeddings + 1
    assert model_digest(other) != key["model"]
    assert model_digest(make_model("llama", seed=31, gamma=3)) != key["model"]
    assert model_digest(make_model("llama", seed=32)) != key["model"]
    monkeypatch.setattr(machine, "processor", lambda: "another")
    assert calibration_key(model) != key
    assert path_for(calibration_key(model)) != path_for(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged calibration (not JSON"),
        (lambda text: "[]", "damaged calibration"),
        (lambda text: text.replace('"plain":', '"plane":', 1), "damaged calibration ('plain' missing)"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 1'), "damaged calibration (format"),
        (lambda text: _change(text, lambda d: d["acceptance"]["rates"][0].__setitem__(0, 1.5)), "1.5 is out of range"),
        (lambda text: _change(text, lambda d: d["acceptance"]["rates"].pop()), "anchors and rates differ in depth"),
        (lambda text: _change(text, lambda d: d["costs"][0].update(plain=-1.0)), "-1.0 is out of range"),
        (lambda text: _change(text, lambda d: d["costs"][0]["chain"].reverse()), "rows do not rise"),
        (lambda text: _change(text, lambda d: d["costs"].reverse()), "contexts do not rise"),
        (lambda text: _change(text, lambda d: d["key"].update(mlx="0.1", dtype="x")), "made for another dtype, mlx"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_left_aside(model, calibration, damage, message):
    """Red when: a wrong file decides how to draft, or stops a generation that does not need it."""
    path = save(calibration)
    path.write_text(damage(path.read_text()))
    with pytest.raises(InvalidInputError) as caught:
        stored_calibration(model)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    response = list(stream_generate(model, NumberTokenizer(), [7, 8, 9], 6))[-1]
    assert response.draft.plan == "default"
    assert message in response.draft.note
    assert response.draft.note.endswith("going on without it")


def _change(text, change):
    document = json.loads(text)
    change(document)
    return json.dumps(document)


def test_a_stored_calibration_is_used(model, calibration):
    assert list(stream_generate(model, NumberTokenizer(), [7, 8, 9], 6))[-1].draft.plan == "default"
    save(calibration)
    for draft in ("auto", "tree"):
        report = list(stream_generate(model, NumberTokenizer(), [7, 8, 9], 6, draft=draft))[-1].draft
        assert (report.plan, report.note) == ("calibrated", None)
    assert list(stream_generate(model, NumberTokenizer(), [7, 8, 9], 6, draft="chain"))[-1].draft.plan == "default"


def test_a_cache_directory_that_cannot_be_written_is_one_line(calibration, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SPECSTREAM_MLX_CACHE", str(blocked))
    with pytest.raises(UsageError, match="cannot be written"):
        save(calibration)


def test_where_calibrations_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECSTREAM_MLX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "specstream-mlx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == tmp_path / "Library" / "Caches" / "specstream-mlx"
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == tmp_path / ".cache" / "specstream-mlx"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "no prompts in it"),
        ("[1]\n", ":1: a list, expected a JSON object with a 'prompt'"),
        ('{"prompt": "a"}\n{"prompt"\n', ":2: not JSON"),
        ('{"prompt": ""}\n', "not empty"),
    ],
)
def test_bad_prompt_files_are_named_with_their_line(tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(file)
    assert message in str(caught.value)


def test_prompts_keep_what_else_their_lines_say(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1 2", "answer": "3"}\n\n{"prompt": "4"}\n')
    rows = read_prompts(file)
    assert [row.row for row in rows] == [{"prompt": "1 2", "answer": "3"}, {"prompt": "4"}]
    assert [row.text for row in rows] == ["1 2", "4"]
    assert [row.place for row in rows] == [f"{file}:1", f"{file}:3"]
    tokenizer = NumberTokenizer()
    tokenizer.__dict__["has_chat_template"] = False
    assert encode_prompt(tokenizer, rows[0]) == [1, 2]


def test_calibrations_are_plain_data(calibration):
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())), "memory")
    assert again == calibration
    assert again.plan(0) == calibration.plan(0)
    assert mx.array(again.rates).shape[0] == len(again.anchors)
