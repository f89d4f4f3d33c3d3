"""``train --config`` takes the files of ``mlx_lm lora``: each key with its meaning, refused, or ignored with a note."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, build_parser
from typer.main import get_command

from specstream_cli.app import app
from specstream_cli.train import _types_in_file
from specstream_cli.train_config import read_config, refuse_flags
from specstream_mlx.errors import InvalidInputError, UsageError

TAKEN = "taken"
# Every key of mlx-lm's files: a value, and what becomes of it.
KEYS: dict[str, tuple[Any, str]] = {
    "model": ("org/name", TAKEN),
    "train": (False, "train: got False, only true is supported: this command only trains"),
    "fine_tune_type": ("dora", "fine_tune_type: got 'dora', only lora is supported: streams are trained with LoRA"),
    "optimizer": ("muon", TAKEN),
    "optimizer_config": ({"adamw": {"weight_decay": 0.1}}, TAKEN),
    "data": ("org/rows", TAKEN),
    "seed": (3, TAKEN),
    "num_layers": (2, TAKEN),
    "batch_size": (2, TAKEN),
    "iters": (5, TAKEN),
    "val_batches": (-1, TAKEN),
    "learning_rate": (2e-4, TAKEN),
    "steps_per_report": (3, TAKEN),
    "steps_per_eval": (3, TAKEN),
    "resume_adapter_file": ("before", TAKEN),
    "adapter_path": ("out", TAKEN),
    "save_every": (3, TAKEN),
    "test": (True, "test: got True, only false is supported: nothing is tested after a training"),
    "test_batches": (9, "test_batches has no effect here: nothing is tested after a training"),
    "max_seq_length": (99, TAKEN),
    "config": ("other.yaml", "config: got 'other.yaml', only none is supported: a file names no other file"),
    "grad_checkpoint": (True, TAKEN),
    "grad_accumulation_steps": (2, TAKEN),
    "clear_cache_threshold": (9, "clear_cache_threshold has no effect here: the cache of freed buffers is bounded"),
    "lr_schedule": ({"name": "cosine_decay", "arguments": [1e-4, 5]}, TAKEN),
    "lora_parameters": ({"rank": 3, "scale": 2.5, "keys": ["self_attn.q_proj"], "dropout": 0.0}, TAKEN),
    "mask_prompt": (False, TAKEN),
    "report_to": ("wandb", "report_to has no effect here: every figure is in the adapter's training_log.jsonl"),
    "project_name": ("mine", "project_name has no effect here: no service is reported to"),
    "trust_remote_code": (True, TAKEN),
    "hf_dataset": ([{"path": "org/rows", "config": {"name": "small"}, "train_split": "train[:9]"}], TAKEN),
    "prompt_feature": ("question", TAKEN),
    "completion_feature": ("answer", TAKEN),
    "text_feature": ("body", TAKEN),
    "chat_feature": ("turns", TAKEN),
}


def read(tmp_path: Path, text: str) -> tuple[dict[str, Any], list[str]]:
    file = tmp_path / "lora.yaml"
    file.write_text(text, encoding="utf-8")
    return read_config(file, _types_in_file())


def test_no_key_of_mlx_lm_is_forgotten() -> None:
    """Red when: mlx-lm learns a key that nobody has decided about."""
    options = {action.dest for action in build_parser()._actions} - {"help"}
    assert KEYS.keys() >= CONFIG_DEFAULTS.keys() | options


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_mlx_lm_is_taken_or_said_not_to_be(key: str, tmp_path: Path) -> None:
    """Red when: a key is refused as unknown, swallowed, or taken with another value."""
    value, outcome = KEYS[key]
    text = yaml.safe_dump({key: value})
    if outcome == TAKEN:
        expected = {key: value}
        if key == "lora_parameters":
            expected = {"rank": 3, "scale": 2.5, "lora_keys": ["self_attn.q_proj"]}
        assert read(tmp_path, text) == (expected, [])
    elif "has no effect" in outcome:
        values, (note,) = read(tmp_path, text)
        assert values == {}
        assert outcome in note
    else:
        with pytest.raises(InvalidInputError) as caught:
            read(tmp_path, text)
        assert outcome in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", CONFIG_DEFAULTS)
def test_what_mlx_lm_takes_for_granted_may_be_written_down(key: str, tmp_path: Path) -> None:
    """Red when: mlx-lm's own default of a key is refused; ``train: false`` is, and ``test_batches`` gets its note."""
    text = yaml.safe_dump({key: CONFIG_DEFAULTS[key]})
    if key == "train":
        with pytest.raises(InvalidInputError, match="only true"):
            read(tmp_path, text)
    else:
        assert len(read(tmp_path, text)[1]) == (key == "test_batches")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf_dataset: {path: a/b, name: x}", "hf_dataset.name: unknown; known: chat_feature, completion_feature, conf"),
        ("hf_dataset: {train_split: train}", "hf_dataset: got {'train_split': 'train'}, expected 'path: org/name'"),
        ("hf_dataset: a/b", "hf_dataset: got 'a/b', expected 'path: org/name'"),
        ("hf_dataset: [{path: a/b}, {path: 3}]", "hf_dataset.path: got 3, expected str"),
        ("lora_parameters: [3]", "lora_parameters: got [3], expected dict"),
        ("lora_parameters: {keys: q_proj}", "lora_parameters.keys: got 'q_proj', expected list"),
        ("prompt_feature: [a]", "prompt_feature: got ['a'], expected str"),
        ("seed: 2024-13-45", "not valid YAML (month must be in 1..12)"),
        ("a: " + "[" * 400, "not valid YAML ("),
        ("iters: '10'", "iters: got '10', expected int"),
        ("iters: 10.5", "iters: got 10.5, expected int"),
        ("batch_size: true", "batch_size: got True, expected int"),
        ("scale: 1" + "0" * 400, "scale: got 1000"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(text: str, reason: str, tmp_path: Path) -> None:
    """Red when: a wrong value reaches the training, or comes out as a traceback."""
    with pytest.raises(InvalidInputError) as caught:
        read(tmp_path, text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_flag_of_mlx_lm_is_just_unknown() -> None:
    """Red when: a flag of ``mlx_lm lora`` is neither one of ours nor refused with the reason."""
    ours = {option for parameter in get_command(app).commands["train"].params for option in parameter.opts}
    theirs = {option for action in build_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert {"--train", "--test", "--report-to"} <= theirs - ours
    for option in theirs - ours:
        with pytest.raises(UsageError, match=f"{option}: an option of mlx_lm lora alone: "):
            refuse_flags(["--iters", "5", option])
