"""``convert`` and ``inspect``: flags reach the converter, reports come back as text or JSON."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from specstream_mlx.errors import VerificationError

REPORT = {
    "dry_run": False,
    "mode": "shared",
    "placement": "merged",
    "warnings": ["vocabulary grew"],
    "notes": ["alias f_eta used"],
    "verification": {"tensors": {"checked": 39, "max_abs_error": 3.6242e-08}, "streams": "not checked"},
    "output_files": {"model.safetensors": {"bytes": 10}, "config.json": {"bytes": 2}},
    "tensors": [
        {"file": "a.safetensors", "tensor": "x.lora_A.weight", "fate": "merged into q_proj", "target": "m.st:x"},
        {"file": "a.safetensors", "tensor": "y", "fate": "ignored", "target": None},
    ],
}
INSPECTION = {
    "path": "m",
    "kind": "specstream model",
    "base": {"model_type": "llama", "vocab_size": 97},
    "gamma": 4,
    "lora": None,
    "quantization": None,
    "problems": [],
    "notes": ["alias f_eta used"],
}


class Document:
    def __init__(self, document):
        self.document = document

    def to_dict(self):
        return self.document


@pytest.fixture
def converter(monkeypatch):
    """A converter that records its options and returns ``report``."""
    fake = ModuleType("specstream_convert")
    fake.report, fake.inspection, fake.calls = dict(REPORT), dict(INSPECTION), []

    def convert(options, progress):
        print("mlx noise")
        fake.calls.append(options)
        if isinstance(fake.report, Exception):
            raise fake.report
        return Document(fake.report)

    def inspect_checkpoint(path):
        fake.calls.append(path)
        return Document(fake.inspection)

    fake.convert, fake.inspect_checkpoint, fake.ConvertOptions = convert, inspect_checkpoint, lambda **options: options
    monkeypatch.setitem(sys.modules, "specstream_convert", fake)
    return fake


def test_every_flag_reaches_the_converter(run, library, converter, tmp_path):
    words = "--adapter-path a --adapter-name n --streams-path s --heads h --specstream-config c"
    words += " --mlx-path out --overwrite --keep-adapters --adapter-only -q --q-bits 8 --q-group-size 32 --q-mode mxfp8"
    words += (
        " --dtype bfloat16 --key-map k --ignore-keys .*bias --recompute-init --dequantize --lora-only --allow-pickle"
    )
    words += " --trust-remote-code --dry-run --no-verify --reference-logits r.npz"
    assert run("convert", "--model", str(tmp_path), *words.split()).code == 0
    assert converter.calls == [
        {
            "hf_path": str(tmp_path),
            "adapter_path": Path("a"),
            "adapter_name": "n",
            "streams_path": Path("s"),
            "heads_path": Path("h"),
            "specstream_config": Path("c"),
            "mlx_path": Path("out"),
            "overwrite": True,
            "fuse": False,
            "adapter_only": True,
            "quantize": True,
            "q_bits": 8,
            "q_group_size": 32,
            "q_mode": "mxfp8",
            "dtype": "bfloat16",
            "key_map": Path("k"),
            "ignore_keys": ".*bias",
            "recompute_init": True,
            "dequantize": True,
            "lora_only": True,
            "allow_pickle": True,
            "trust_remote_code": True,
            "dry_run": True,
            "verify": False,
            "reference_logits": Path("r.npz"),
            "upload_repo": None,
        }
    ]


def test_the_defaults_are_the_contract_s(run, library, converter):
    assert run("convert", "--adapter-path", "a").code == 0
    (options,) = converter.calls
    assert options["mlx_path"] == Path("mlx_model")
    assert (options["q_bits"], options["q_group_size"], options["q_mode"]) == (4, 64, "affine")
    assert (options["fuse"], options["verify"], options["quantize"]) == (None, True, False)


def test_the_summary_goes_to_stderr(run, library, converter):
    result = run("convert", "--adapter-path", "a", "--mlx-path", "out")
    assert (result.code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        "mlx noise",
        "wrote out (2 files, shared, LoRA merged)",
        "2 tensors: 1 ignored, 1 merged",
        "verified tensors: checked 39, max abs error 3.6e-08",
        "verified streams: not checked",
        "note: alias f_eta used",
        "warning: vocabulary grew",
    ]


def test_quiet_convert_says_nothing(run, library, converter):
    result = run("convert", "--adapter-path", "a", "--quiet")
    assert (result.stdout, result.stderr) == ("", "mlx noise\n")


def test_dry_run_prints_the_plan_on_stdout(run, library, converter):
    converter.report["dry_run"] = True
    result = run("convert", "--adapter-path", "a", "--dry-run")
    assert result.stdout.splitlines() == [
        "input tensor                   fate                output tensor",
        "-----------------------------  ------------------  -------------",
        "a.safetensors:x.lora_A.weight  merged into q_proj  m.st:x",
        "a.safetensors:y                ignored             -",
    ]
    assert "would write mlx_model" in result.stderr


def test_convert_json_is_the_report(run, library, converter):
    result = run("convert", "--adapter-path", "a", "--json")
    assert json.loads(result.stdout) == REPORT
    assert result.stdout.count("\n") == 1


def test_a_failed_verification_is_five(run, library, converter):
    converter.report = VerificationError("model.safetensors: logits differ by 0.1")
    result = run("convert", "--adapter-path", "a")
    assert (result.code, result.stdout) == (5, "")
    assert result.stderr == "mlx noise\nerror: model.safetensors: logits differ by 0.1\n"


def test_inspect_prints_what_is_there(run, library, converter):
    result = run("inspect", "m")
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "path   m",
        "kind   specstream model",
        "base",
        "  model_type  llama",
        "  vocab_size  97",
        "gamma  4",
        "notes",
        "  alias f_eta used",
    ]


def test_inspect_json_is_one_object(run, library, converter):
    result = run("inspect", "--model", "m", "--json")
    assert json.loads(result.stdout) == INSPECTION


def test_inspect_without_a_path_looks_at_the_bundled_model(run, library, converter):
    assert run("inspect").code == 0
    assert converter.calls == [Path("bundled-model")]


def test_inspect_reports_problems_and_exits_with_three(run, library, converter):
    converter.inspection["problems"] = ["m/x: missing", "m/y: missing"]
    result = run("inspect", "m")
    assert result.code == 3
    assert "  m/x: missing" in result.stdout
    assert result.stderr == "error: m/x: missing\nerror: m/y: missing\n"


def test_code_of_a_checkpoint_is_refused_by_name(run, tmp_path):
    """The flag of the other commands; here it is no licence, and the help says so."""
    result = run("convert", "--adapter-path", str(tmp_path), "--hf-path", str(tmp_path), "--trust-remote-code")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == ("error: --trust-remote-code: a conversion never runs code of a checkpoint; leave it out\n")
    assert "never runs code of a checkpoint" in " ".join(run("convert", "--help").stdout.split())


@pytest.mark.parametrize("name", ["streams", "a/b/c", "../x", ""])
def test_a_bad_repository_name_is_a_usage_error(run, name):
    result = run("convert", "--adapter-path", "a", "--upload-repo", name)
    assert (result.code, result.stdout) == (2, "")
    assert "--upload-repo" in result.stderr
