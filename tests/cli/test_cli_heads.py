"""Draft heads on the command line: ``--adapter`` takes one, ``benchmark --head`` compares some, ``convert --heads``."""

import json
import shutil

import pytest

import specstream_mlx
from tests.drafters.tiny_drafters import SETTINGS, save_head
from tests.tiny import make_model, save_directory

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers.*")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = save_directory(make_model("llama", seed=41), tmp_path_factory.mktemp("model") / "tiny")
    lines = [json.dumps({"prompt": " ".join(f"w{word}" for word in range(start, start + 9))}) for start in (7, 20)]
    (path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def base(directory, tmp_path_factory):
    """The same without streams."""
    path = tmp_path_factory.mktemp("bare") / "base"
    shutil.copytree(directory, path)
    for name in ("specstream_config.json", "specstream.safetensors"):
        (path / name).unlink()
    return path


@pytest.mark.parametrize("with_streams", [True, False])
def test_draft_heads_are_arms(run, directory, base, tmp_path, with_streams):
    """Beside the streams, or over a base alone. Red when: a head's adapter takes the streams' place."""
    model, _ = specstream_mlx.load(directory)
    path = directory if with_streams else base
    words = ["--draft", "chain", "--repeats", "1", "--max-tokens", "12", "--json"]
    for kind in ("medusa", "eagle3"):
        words += ["--head", str(save_head(kind, model, tmp_path / kind))]
    words += ["--head", str(save_head("medusa", model, tmp_path / "second", seed=9))]
    result = run("benchmark", "--model", str(path), *words)
    assert result.code == 0, result.stderr
    (load,) = json.loads(result.stdout)["workloads"]
    names = ["mlx-lm", "chain" if with_streams else "off", "medusa", "eagle3", "second"]
    assert [found["arm"] for found in load["arms"]] == names
    assert {found["prompts_with_equal_tokens"] for found in load["arms"]} == {2}
    assert all(sum(found["drafted_by_depth"]) > 0 for found in load["arms"][2:])
    refused = run("benchmark", "--model", str(path), "--head", str(directory), "--quiet")
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "holds no draft head" in refused.stderr


@pytest.mark.parametrize("kind", SETTINGS)
def test_generate_takes_a_head_as_its_adapter(run, base, tmp_path, kind):
    model, _ = specstream_mlx.load(base)
    head = save_head(kind, model, tmp_path / kind)
    words = ["generate", "--model", str(base), "--prompt", "w7 w8 w9", "--max-tokens", "12", "--json"]
    plain = json.loads(run(*words).stdout)
    found = json.loads(run(*words, "--adapter", str(head), "--draft", "chain").stdout)
    assert found["token_ids"] == plain["token_ids"]
    assert found["drafted_by_depth"][0] > 0
    checked = run(*words, "--adapter", str(head), "--draft", "chain", "--check-exact")
    assert checked.code == 0, checked.stderr


def test_convert_and_inspect(run, tmp_path):
    """Red when: a flag is lost on its way."""
    from tests.convert.test_convert_heads import eagle

    published = eagle(tmp_path / "eagle")
    words = ["convert", "--heads", str(published.path), "--mlx-path", str(tmp_path / "out")]
    result = run(*words)
    assert result.code == 0, result.stderr
    assert "(2 files, eagle head)" in result.stderr
    assert run(*words).code == 2
    told = json.loads(run("inspect", str(tmp_path / "out"), "--json").stdout)
    assert (told["kind"], told["head"]["kind"]) == ("draft head", "eagle")
    assert "eagle" in run("inspect", str(published.path)).stdout
