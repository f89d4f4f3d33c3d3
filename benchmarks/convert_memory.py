"""The memory and the time of a conversion, on a synthetic base of a chosen shape.

    python benchmarks/convert_memory.py --shape llama-1b --shard-gb 0.5           every mode
    python benchmarks/convert_memory.py --shape llama-7b --layers 8 --run merge    one mode, fewer layers

A base of random float16 weights is written shard by shard, with a random PEFT adapter that has streams. Every mode is
converted in a process of its own. Its peak is the largest resident set that the kernel saw, less that of a process
which imports the converter and does nothing: ``VmHWM`` on Linux, where ``ru_maxrss`` of a child begins at its parent's
size, and ``ru_maxrss`` on macOS. Files that are mapped would count; none are.
The budget is 1.5 times the largest shard of the base plus the adapter. The last line is one JSON document.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

LLAMA = {"intermediate_size": 11008, "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 1000,
    },
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-7b": LLAMA | {"num_key_value_heads": 32, "vocab_size": 32000},
    "llama-8b": LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
RANK, GAMMA = 16, 4
RNG = np.random.default_rng(0)
POOL = RNG.standard_normal(1 << 20)
MODES: dict[str, dict[str, Any]] = {
    "merge": {},
    "merge-bfloat16": {"dtype": "bfloat16"},
    "quantize": {"quantize": True},
    "keep-adapters": {"fuse": False},
    "adapter-only": {"adapter_only": True},
    "lossless": {},
}
CHILD = """
import json, resource, sys, time
from pathlib import Path
import specstream_convert.pipeline
def peak_rss():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
options = json.loads(sys.argv[1])
stages, start = {}, time.perf_counter()
if options:
    paths = {name: Path(options.pop(name)) for name in ("adapter_path", "mlx_path")}
    def progress(stage, done, total):
        stages.setdefault(stage, time.perf_counter())
    specstream_convert.convert(specstream_convert.ConvertOptions(**paths, **options), progress)
end = time.perf_counter()
print(json.dumps({
    "peak_rss": peak_rss(),
    "seconds": end - start,
    "stages": [(stage, at - start) for stage, at in stages.items()],
}))
"""


@dataclass(frozen=True)
class Files:
    """What was made for a run."""

    base: Path
    adapters: dict[str, Path]  # by mode of the streams
    shards: list[int]  # bytes

    def adapter_bytes(self, mode: str) -> int:
        return sum(path.stat().st_size for path in self.adapters[mode].iterdir())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0, or 5 when a mode went over the budget."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the files are deleted then too
    shape = dict(SHAPES[options.shape])
    if options.layers is not None:
        shape["num_hidden_layers"] = options.layers
    root = Path(tempfile.mkdtemp(prefix="convert_memory-", dir=options.dir))
    try:
        files = make_files(root, shape, int(options.shard_gb * (1 << 30)))
        idle = child({})["peak_rss"]
        rows = [measure(root, files, mode, idle, options) for mode in options.run or MODES]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    label = options.shape if options.layers is None else f"{options.shape} cut to {options.layers} layers"
    print(f"\n{label}, float16, {gb(sum(files.shards))} in {len(files.shards)} shards, largest {gb(max(files.shards))}")
    print(f"idle process {gb(idle)}; budget: 1.5 x largest shard + adapter\n")
    print(table(rows))
    document = {
        "shape": options.shape, "config": shape, "layers_cut": options.layers is not None,
        "base_bytes": sum(files.shards), "shards": len(files.shards), "largest_shard_bytes": max(files.shards),
        "idle_rss_bytes": idle, "runs": rows, "machine": platform.machine(), "system": platform.platform(),
        "cpus": os.cpu_count(), "device": str(mx.default_device()), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "numpy", "safetensors")},
    }  # fmt: skip
    print(json.dumps(document))
    return 0 if all(row["peak_bytes"] <= row["budget_bytes"] for row in rows) else 5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b", help="shape of the base (default llama-1b)")
    parser.add_argument("--layers", type=int, metavar="N", help="cut the shape to N layers")
    parser.add_argument("--shard-gb", type=float, default=2.0, metavar="G", help="GiB of a shard at most (default 2)")
    parser.add_argument("--run", action="append", choices=MODES, help="a mode; may be repeated (default: all)")
    parser.add_argument("--no-verify", action="store_true", help="do not verify the output")
    parser.add_argument("--dir", type=Path, help="where the files are written and deleted again (default: temporary)")
    return parser.parse_args(arguments)


def make_files(root: Path, shape: dict[str, int], shard_bytes: int) -> Files:
    """Write the base and two adapters."""
    base = root / "base"
    base.mkdir()
    config = shape | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    vocabulary = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (base / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": vocabulary}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, size in tensor_shapes(shape):
        num_bytes = 2 * size[0] * (size[1] if len(size) > 1 else 1)
        if shards[-1] and held + num_bytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = size
        held += num_bytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save(base / file, {name: random_tensor(size, mx.float16) for name, size in shard.items()})
        weight_map |= dict.fromkeys(shard, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    adapters = {mode: make_adapter(root / mode, shape, mode) for mode in ("shared", "lossless")}
    return Files(base, adapters, [path.stat().st_size for path in sorted(base.glob("*.safetensors"))])


def tensor_shapes(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a llama model in the order of its layers."""
    yield "model.embed_tokens.weight", (shape["vocab_size"], shape["hidden_size"])
    for i in range(shape["num_hidden_layers"]):
        for name, size in linear_shapes(shape).items():
            yield f"model.layers.{i}.{name}.weight", size
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (shape["hidden_size"],)
    yield "model.norm.weight", (shape["hidden_size"],)
    yield "lm_head.weight", (shape["vocab_size"], shape["hidden_size"])


def linear_shapes(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of one block."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (heads, width), "self_attn.v_proj": (heads, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip


def make_adapter(directory: Path, shape: dict[str, int], mode: str) -> Path:
    """LoRA on every linear layer (lossless: of the last) and on the head (shared), and stream embeddings."""
    directory.mkdir()
    layers = shape["num_hidden_layers"]
    shared = mode == "shared"
    modules = {
        f"model.layers.{i}.{name}": size
        for i in range(0 if shared else layers - 1, layers)
        for name, size in linear_shapes(shape).items()
    }
    if shared:
        modules["lm_head"] = (shape["vocab_size"], shape["hidden_size"])
    tensors = {"specstream.stream_embeddings": random_tensor((GAMMA, shape["hidden_size"]), mx.float32)}
    for name, (rows, columns) in modules.items():
        tensors[f"{name}.lora_A.weight"] = random_tensor((RANK, columns), mx.float32)
        tensors[f"{name}.lora_B.weight"] = random_tensor((rows, RANK), mx.float32)
    save(directory / "adapter_model.safetensors", {f"base_model.model.{name}": t for name, t in tensors.items()})
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "synthetic", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}), "modules_to_save": ["specstream"],
        "layers_to_transform": None if shared else [layers - 1], "init_lora_weights": True,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    streams = {
        "format": "specstream", "format_version": 1, "gamma": GAMMA, "num_stream_layers": 1, "mode": mode,
        "lora_rows": "all" if shared else "streams", "stream_id": {"type": "embedding"}, "prune": None,
        "stream_init": {"type": "identity"}, "stream_position": "anchor_plus_j", "base_model": {},
    }  # fmt: skip
    (directory / "specstream_config.json").write_text(json.dumps(streams))
    return directory


def random_tensor(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Normal values with variance 1 / columns; a pool of a million, begun at another place each time."""
    pool = np.roll(POOL, RNG.integers(POOL.size)) / shape[-1] ** 0.5
    return mx.array(np.resize(pool.astype(np.float16 if dtype == mx.float16 else np.float32), shape))


def save(path: Path, tensors: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(path), tensors, {"format": "pt"})
    tensors.clear()
    mx.clear_cache()


def measure(root: Path, files: Files, name: str, idle: int, options: argparse.Namespace) -> dict[str, Any]:
    """Convert in a process of its own."""
    mode = "lossless" if name == "lossless" else "shared"
    out = root / "out"
    settings = MODES[name] | {
        "adapter_path": str(files.adapters[mode]), "mlx_path": str(out), "hf_path": str(files.base),
        "verify": not options.no_verify,
    }  # fmt: skip
    result = child(settings)
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    begun = [*result["stages"], ("end", result["seconds"])]
    stages = {stage: round(after - at, 1) for (stage, at), (_, after) in itertools.pairwise(begun)}
    budget = 1.5 * max(files.shards) + files.adapter_bytes(mode)
    peak = result["peak_rss"] - idle
    print(f"{name}: {gb(peak)} in {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    return {
        "mode": name, "peak_bytes": peak, "budget_bytes": int(budget), "adapter_bytes": files.adapter_bytes(mode),
        "peak_per_largest_shard": round(peak / max(files.shards), 3), "written_bytes": written,
        "seconds": round(result["seconds"], 1), "stage_seconds": stages,
    }  # fmt: skip


def child(settings: dict[str, Any]) -> dict[str, Any]:
    """Run :data:`CHILD`; ``peak_rss`` is in bytes."""
    command = [sys.executable, "-c", CHILD, json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'mode':16}{'peak':>10}{'/ shard':>9}{'budget':>10}{'written':>10}{'seconds':>9}  stages"]
    for row in rows:
        stages = ", ".join(f"{stage} {seconds}" for stage, seconds in row["stage_seconds"].items())
        lines.append(
            f"{row['mode']:16}{gb(row['peak_bytes']):>10}{row['peak_per_largest_shard']:>9.2f}"
            f"{gb(row['budget_bytes']):>10}{gb(row['written_bytes']):>10}{row['seconds']:>9.1f}  {stages}"
        )
    return "\n".join(lines)


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
