"""``specstream-mlx doctor``: verdicts, exit code, and a document that is the one docs/doctor.md describes."""

import json
import re
from pathlib import Path

import pytest

import specstream_cli.doctor as command
from benchmarks import merge_doctors
from specstream_mlx.calibration import probes, surroundings
from specstream_mlx.calibration.surroundings import surrounding_findings, survey, version_finding
from specstream_mlx.engine.exactness import Difference

ROOT = Path(__file__).parents[2]
KEYS = re.findall(r"^\| `([\w.\[\]]+)` \| ([\w ]+) \|", (ROOT / "docs/doctor.md").read_text("utf-8"), re.M)
TYPES = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "list": list,
    "object": dict,
    "null": type(None),
}
OPEN = ("versions", "speedup.decode", "speedup.total", "speedup.decode_tokens_per_second", "speedup.first_token_ms")
"""Objects whose keys the table does not list one by one."""


def is_of(value, kinds):
    return any(
        isinstance(value, TYPES[kind]) and (isinstance(value, bool) == (kind == "boolean"))
        for kind in kinds.split(" or ")
    )


def keys_of(value, path=""):
    """Every key of a document as the table writes it, with the value."""
    if isinstance(value, dict) and path not in OPEN:
        for key, item in value.items():
            inner = f"{path}.{key}" if path else key
            yield inner, item
            yield from keys_of(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item, f"{path}[]")


def check_document(document, lacking=()):
    described = dict(KEYS)
    found = list(keys_of(document))
    for key, value in found:
        assert key in described, f"{key} is not in docs/doctor.md"
        assert is_of(value, described[key]), f"{key}: {value!r} is not {described[key]}"
    missing = set(described) - {key for key, _ in found}
    assert not {key for key in missing if not key.startswith(tuple(lacking))} if lacking else not missing
    assert document["format_version"] == command.FORMAT_VERSION


EXACT = {
    "weights": "float32", "answers": 4, "tokens": 200, "identical": 4, "ties": 0, "beyond_rounding": 0,
    "largest_gap": None, "differences": [], "rounding": 1e-5, "bound": 0.0,
}  # fmt: skip
CURVE = {
    "model": "bundled", "weights": "float32", "weights_gb": 0.01, "context": 128, "plain": 0.002,
    "chain": [[1, 0.002], [5, 0.003]], "tree": [[5, 0.003]], "leaf": [[5, 0.0035]], "deferred": [[5, 0.004]],
    "parallel": [[5, 0.006]], "break_even": 1.75,
}  # fmt: skip
SPEEDUP = {
    "model": "bundled", "weights": "float32", "prompts": 6, "tokens": 300, "repeats": 3, "tokens_per_pass": 4.3,
    "decode": {"of_medians": 2.5, "min": 2.4, "max": 2.6}, "total": {"of_medians": 1.9, "min": 1.8, "max": 2.0},
    "decode_tokens_per_second": {"mlx-lm": 300.0, "ours": 750.0}, "first_token_ms": {"mlx-lm": 9.0, "ours": 10.0},
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """No measurement is made: the document holds these."""
    kept = {"shapes": []}
    monkeypatch.setattr(probes, "measure_exactness", lambda weights, **_: EXACT | {"weights": weights, "tokens": 100})

    def curve(shape, **_):
        kept["shapes"].append(shape)
        return CURVE | ({"model": shape, "weights": "4-bit"} if shape else {})

    monkeypatch.setattr(probes, "measure_curve", curve)
    monkeypatch.setattr(probes, "seconds_per_byte", lambda: 1e-11)
    monkeypatch.setattr(probes, "memory_gb", lambda: 64.0)
    monkeypatch.setattr(command, "measure_speedup", lambda *_: dict(SPEEDUP))
    monkeypatch.setattr(surroundings.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return kept


def test_the_document_is_the_documented_one(run, measured):
    """Red when: a key appears, goes or changes its type without docs/doctor.md."""
    result = run("doctor", "--json", "--quiet")
    assert (result.code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    check_document(document)
    assert measured["shapes"] == [None, "llama-1b"]
    assert [entry["weights"] for entry in document["exactness"]] == list(probes.WEIGHTS)
    assert str(Path.home()) not in result.stdout


def test_a_line_for_each_check_with_what_to_do(run, measured, monkeypatch):
    slow = SPEEDUP | {"decode": {"of_medians": 1.05, "min": 1.0, "max": 1.1}}
    monkeypatch.setattr(command, "measure_speedup", lambda *_: slow)
    result = run("doctor", "--quick", "--quiet")
    assert (result.code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    names = [line[9:].split(":")[0] for line in lines if not line.startswith("  ")]
    assert names[0] == "chip"
    assert names[-5:] == ["exact float32", "exact bfloat16", "exact 4-bit", "costs bundled float32", "speed-up"]
    assert lines[-2].startswith("note     speed-up: decoding 1.05x stock mlx-lm (1.00..1.10)")
    assert lines[-1].startswith("         to do: run 'specstream-mlx calibrate'")


def test_a_probe_that_fails_is_a_problem_and_the_others_run(run, measured, monkeypatch):
    """Red when: one failure hides the rest, the document is lost, or the exit code is not 5."""

    def fail(*_, **__):
        raise RuntimeError(f"no kernel\nin {Path.home()}/x")

    monkeypatch.setattr(probes, "measure_curve", fail)
    result = run("doctor", "--json", "--quiet", "--shape", "none")
    assert result.code == 5
    assert result.stderr == "error: costs bundled float32: RuntimeError: no kernel in ~/x\n"
    document = json.loads(result.stdout)
    assert document["verdict"] == "problem"
    assert document["costs"] == []
    assert document["speedup"] is not None
    check_document(document, lacking=["costs["])


def test_wrong_tokens_are_a_problem(run, measured, monkeypatch):
    wrong = EXACT | {"identical": 3, "beyond_rounding": 1, "largest_gap": 2.0, "differences": ["token 3 is 7"]}
    monkeypatch.setattr(probes, "measure_exactness", lambda weights, **_: wrong)
    result = run("doctor", "--quick", "--quiet", "--shape", "none")
    assert result.code == 5
    assert "problem  exact float32: 1 of 4 answers are not mlx-lm's: token 3 is 7\n" in result.stdout


def test_an_interrupt_is_no_problem_of_the_machine(run, measured, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(probes, "measure_curve", interrupt)
    assert run("doctor", "--quick", "--json").code == 130


def test_an_unknown_shape_is_a_usage_error(run):
    result = run("doctor", "--shape", "llama-9b")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --shape: got 'llama-9b', expected one of llama-40m, ")


def test_a_shape_where_none_is_quick_enough(run, measured, monkeypatch):
    monkeypatch.setattr(probes, "seconds_per_byte", lambda: 1e-7)
    result = run("doctor", "--quiet")
    assert result.code == 0
    assert measured["shapes"] == [None]
    assert "note     costs shape: 4-bit models of well-known shapes are too slow" in result.stdout
    assert run("doctor", "--quick", "--quiet", "--shape", "llama-40m").code == 0
    assert measured["shapes"] == [None, None, "llama-40m"]


@pytest.mark.parametrize(
    ("per_byte", "memory", "shape"),
    [(1e-11, 64.0, "llama-1b"), (1e-11, 4.0, "llama-100m"), (1e-10, 64.0, "llama-100m"), (1e-8, 64.0, None)],
)
def test_the_largest_shape_that_is_quick_and_fits(per_byte, memory, shape):
    assert probes.choose_shape(per_byte, memory) == shape


def test_a_quick_run_on_this_machine(run):
    """The one that measures. Red when: a probe fails here, or what it gives is not the documented form."""
    result = run("doctor", "--quick", "--json", "--quiet")
    document = json.loads(result.stdout)
    problems = [line for line in document["lines"] if line["verdict"] == "problem"]
    assert problems == []
    assert (result.code, result.stderr) == (0, "")
    check_document(document)
    float32 = document["exactness"][0]
    assert float32["identical"] == float32["answers"] > 0
    assert 0 < float32["rounding"] < 1e-2


# What a Mac answers, and what is said about it; the machines are made up.
ANSWERS = {
    "hw.perflevel0.physicalcpu": "12",
    "hw.perflevel1.physicalcpu": "4",
    "iogpu.wired_limit_mb": "0",
    "batt": "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t100%; charged; 0:00 remaining present: true",
    "-g": "System-wide power settings:\nCurrently in use:\n standby 1\n lowpowermode         0\n",
    "-d1": '+-o AGXAcceleratorG16X\n    {\n      "gpu-core-count" = 40\n      "model" = "Apple M4 Max"\n    }',
}
MAC = {
    "system": "Darwin 25.3.0",
    "os": "macOS 26.3",
    "architecture": "arm64",
    "processor": "Apple M4 Max",
    "device": "gpu",
    "device_name": "Apple M4 Max",
    "device_architecture": "applegpu_g16s",
    "memory_gb": 68.7,
    "cpus": 16,
    "blas": "accelerate",
    "blas_threads": None,
    "metal": True,
    "wired_limit_gb": 55.7,
    "load": 1.5,
}


def mac(**changes):
    answers = survey(lambda command: ANSWERS[command[-1]], platform="darwin")
    return answers | MAC | changes


def findings(**changes):
    return {finding.name: finding for finding in surrounding_findings(mac(**changes))}


def test_what_a_mac_answers_is_understood():
    found = findings()
    assert {finding.verdict for finding in found.values()} == {"ok"}
    chip = "Apple M4 Max, 12 performance and 4 efficiency cores, GPU of 40 cores, applegpu_g16s"
    assert found["chip"].text == chip
    assert found["system"].text == "macOS 26.3 (Darwin 25.3.0, arm64)"
    assert found["wired limit"].text == "55.7 GB (macOS's own choice): weights up to 50.1 GB run at full speed"
    assert found["power"].text == "mains"
    assert found["blas"].text == "Accelerate"


def test_a_mac_that_answers_nothing_is_described_all_the_same():
    found = survey(lambda command: "", platform="darwin") | MAC
    assert found["gpu_cores"] is None
    assert {finding.verdict for finding in surrounding_findings(found)} == {"ok"}


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("system", {"processor": "Apple M5", "os": "macOS 26.1"}),
        ("device", {"device": "cpu"}),
        ("power", {"on_battery": True}),
        ("power", {"low_power_mode": True}),
        ("load", {"load": 12.0}),
        ("memory", {"memory_gb": 4.0}),
    ],
)
def test_what_makes_figures_worse_is_a_note_with_advice(line, changes):
    found = findings(**changes)
    assert [name for name, finding in found.items() if finding.verdict == "note"] == [line]
    assert found[line].advice


def test_a_program_that_is_missing_says_nothing():
    assert surroundings.ask_system(["/nowhere/sysctl"]) == ""


def test_releases_that_the_package_does_not_ask_for():
    asked = ["mlx<0.33,>=0.32", "mlx-lm>=0.32 ; extra == 'test'", "rich>=13"]
    assert version_finding({"mlx": "0.32.4", "mlx-lm": "0.1"}, asked).verdict == "ok"
    found = version_finding({"mlx": "0.33.0"}, asked)
    assert (found.verdict, found.text) == ("note", "mlx 0.33.0: mlx 0.33.0 is not <0.33,>=0.32")


def test_ties_are_a_note_and_a_tie_is_judged_by_its_gap(monkeypatch):
    """Red when: a difference beyond rounding counts as a tie."""
    gaps = iter([0.1, 5.0, float("inf")])

    def differs(*_, **__):
        return Difference(0, 1, 2, -1.0, -1.0, next(gaps), 0.5)

    monkeypatch.setattr(probes, "check_exact", differs)
    monkeypatch.setattr(probes, "rounding", lambda plain, text: 0.125)
    found = probes.measure_exactness("bfloat16", answers=3, max_tokens=1, seconds=1e6)
    assert (found["identical"], found["ties"], found["beyond_rounding"]) == (0, 1, 2)
    assert (found["largest_gap"], found["bound"]) == (1e4, 0.5)
    assert probes.exactness_finding(found).verdict == "problem"
    tie = EXACT | {"weights": "4-bit", "identical": 3, "ties": 1, "largest_gap": 0.1, "bound": 0.5}
    assert probes.exactness_finding(tie).verdict == "note"


def test_dear_rows_are_a_note():
    assert probes.curve_finding(CURVE).verdict == "ok"
    assert probes.curve_finding(CURVE | {"break_even": 3.0}).verdict == "note"


def test_a_clock_that_contradicts_itself_is_a_note():
    found = probes.curve_finding(CURVE | {"plain": 0.01, "break_even": 0.35})
    assert (found.verdict, found.advice.split(":")[0]) == ("note", "quit other programs, and run again")


def test_many_files_make_one_table(run, measured, tmp_path, capsys):
    document = json.loads(run("doctor", "--json", "--quiet").stdout)
    files = []
    for number, chip in enumerate(["Apple M4 Max", "Apple M1"]):
        changed = document | {"machine": mac(processor=chip)}
        if number:
            changed |= {"speedup": None, "costs": [CURVE]}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(changed))
    assert merge_doctors.main([*map(str, files), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["machines"]
    assert (first["chip"], first["decode"], first["shape"]) == ("Apple M1", None, None)
    assert (second["decode"], second["shape"], second["4-bit"]) == (2.5, "llama-1b", "exact")
    assert second["bundled 5 rows"] == pytest.approx(1.5)
    assert merge_doctors.main(list(map(str, files))) == 0
    assert capsys.readouterr().out.count("\n") == 4
    assert merge_doctors.main([*map(str, files), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| chip | GPU cores | memory |")


def test_files_that_are_no_reports_are_named_and_the_others_merged(run, measured, tmp_path, capsys):
    good = tmp_path / "good.json"
    good.write_text(run("doctor", "--json", "--quiet").stdout)
    broken = json.loads(good.read_text())
    del broken["machine"]
    texts = {"text": "no", "other": '{"format": "x"}', "list": "[]", "broken": json.dumps(broken)}
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    files = [str(tmp_path / f"{name}.json") for name in ("missing", *texts, "good")]
    assert merge_doctors.main(files) == 3
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 3
    assert len(captured.err.splitlines()) == 5
    assert all(line.startswith(f"error: {tmp_path}") for line in captured.err.splitlines())
