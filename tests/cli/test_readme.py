"""What the documents tell a reader to type exists, and the files they name are there."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from specstream_cli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = get_command(app)
LINES = [line.strip() for block in re.findall(r"```\w*\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = {
    "generate": "--model --adapter "
    "--adapter-path --revision --trust-remote-code --use-generation-config "
    "--prompt --prompts-file --check-exact --system-prompt --chat-template-config "
    "--ignore-chat-template --prefill-response --max-tokens --stop --extra-eos-token --temp --top-p --top-k --min-p "
    "--min-tokens-to-keep --xtc-probability --xtc-threshold --repetition-penalty --repetition-context-size "
    "--presence-penalty --presence-context-size --frequency-penalty --frequency-context-size --logit-bias --seed "
    "--drafter --draft-model --num-draft-tokens --draft --tree --insertion --prune-threshold --prefill-step-size "
    "--kv-bits --kv-group-size --quantized-kv-start --max-kv-size --prompt-cache-file --show-passes --json --quiet "
    "--debug",
    "chat": "--model --adapter "
    "--adapter-path --revision --trust-remote-code --use-generation-config "
    "--system-prompt --chat-template-config --ignore-chat-template --max-tokens --stop "
    "--extra-eos-token --temp --top-p --top-k --min-p --min-tokens-to-keep --xtc-probability --xtc-threshold "
    "--repetition-penalty --repetition-context-size --presence-penalty --presence-context-size --frequency-penalty "
    "--frequency-context-size --logit-bias --seed --drafter --draft-model --num-draft-tokens --draft --tree "
    "--insertion --prune-threshold --prefill-step-size --kv-bits --kv-group-size --quantized-kv-start --max-kv-size "
    "--json --quiet --debug",
    "cache_prompt": "--prompt-cache-file --prompt --model --adapter "
    "--adapter-path --revision --trust-remote-code "
    "--ignore-chat-template --kv-bits --kv-group-size "
    "--quantized-kv-start --prefill-step-size --quiet --debug",
    "convert": "--hf-path --model --revision "
    "--adapter-path --adapter-name --streams-path --heads --specstream-config --mlx-path "
    "--overwrite --fuse --keep-adapters --adapter-only --quantize --q-bits --q-group-size --q-mode --dtype --key-map "
    "--ignore-keys --recompute-init --dequantize --lora-only --allow-pickle --trust-remote-code --dry-run --verify "
    "--no-verify --reference-logits --upload-repo --json --quiet --debug",
    "inspect": "--model --revision --json --debug",
    "calibrate": "--model --adapter "
    "--adapter-path --revision --trust-remote-code "
    "--drafter --draft-model --num-draft-tokens "
    "--prompts-file --prompts --max-tokens --context --repeats --store --no-store "
    "--plot --json --quiet --debug",
    "benchmark": "--model --adapter --head "
    "--adapter-path --revision --trust-remote-code "
    "--prompts-file --prompts --repeats --max-tokens --context --drafter --draft "
    "--tree --insertion --draft-model --num-draft-tokens --prompt-lookup --ignore-eos --noise-streams "
    "--allow-differences --costs --random-weights --dtype --q-bits --plot --json --quiet --debug",
    "serve": "--model --adapter --adapter-path --host --port --api-key-env --allowed-origins --draft --drafter "
    "--draft-model --num-draft-tokens --max-concurrency --max-tokens --temp --top-p --top-k --min-p --chat-template "
    "--prefill-step-size --prompt-cache-size --prompt-cache-bytes --prompt-cache-dir --request-timeout "
    "--trust-remote-code --log-level --debug",
    "doctor": "--quick --shape --json --quiet --debug",
    "train": "--model --revision "
    "--data --self-distill --adapter-path --overwrite --config --mode --gamma --num-stream-layers "
    "--stream-init-rank --value-rotation --stream-position --prune-rank --pruner-only --rank --scale --num-layers "
    "--iters --batch-size --grad-accumulation-steps --optimizer --learning-rate --stream-lr-scale --warmup "
    "--max-grad-norm --stream-weight --prune-weight --latent-weight --mask-prompt --no-mask-prompt --max-seq-length "
    "--max-anchors --rows-per-chunk --grad-checkpoint --val-batches --steps-per-report --steps-per-eval --save-every "
    "--seed --resume --resume-adapter-file --prompts --answers --chat-template-config --samples --temp --max-tokens "
    "--export-peft --upload-repo --trust-remote-code --json --quiet --debug",
}


def long_options(name):
    options = [
        option for parameter in PROGRAM.commands[name].params for option in [*parameter.opts, *parameter.secondary_opts]
    ]
    return {option for option in options if option.startswith("--")}


def test_the_program_has_these_commands_and_no_stubs():
    assert set(PROGRAM.commands) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_exactly_its_documented_options(name):
    assert long_options(name) == set(COMMANDS[name].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_explains_itself(name, run):
    result = run(name, "--help")
    assert (result.code, result.stderr) == (0, "")
    for parameter in PROGRAM.commands[name].params:
        assert parameter.help, parameter.name
        assert parameter.opts[0] in result.stdout or parameter.param_type_name == "argument"


def test_make_demo_and_make_test_are_the_first_commands():
    assert LINES[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lint", "help"):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_commands_of_the_readme_exist():
    bare = [line.removeprefix("scripts/with-openblas ") for line in LINES]
    lines = [line for line in bare if line.startswith("specstream-mlx ")]
    assert len(lines) >= 12
    for line in lines:
        words = shlex.split(line.split("   ")[0])
        options = {word for word in words if word.startswith("--")}
        assert options <= long_options(words[1]), line


def test_the_files_of_the_readme_are_there():
    tree = README.split("## Files")[1].split("```")[1].strip("\n").splitlines()
    folders = [ROOT]
    for line in tree:
        depth = (len(line) - len(line.lstrip())) // 2
        *names, _ = re.split(r" {2,}", line.strip())
        for name in names:
            path = folders[depth] / name
            assert path.exists(), path
            folders[depth + 1 :] = [path]
        assert names, line


def test_every_link_of_the_readme_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / target).exists(), target
