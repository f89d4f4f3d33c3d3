"""Tokens per second of ``specstream-mlx serve`` beside ``mlx_lm.server``, by number of clients.

    python -m benchmarks.serving.throughput [--model DIR] [--clients 1,2,4,8,16] [--json FILE] [--plot FILE]

Both servers answer the same prompts of the same model in turns, one number of clients after another, without kept
prompts. Every client asks for one answer after another. A row tells tokens per second of all clients together, the
median time to the first token, and the ratio.
"""

import argparse
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.serving.client import Running, Timed, ours, stock, timed
from specstream_mlx.bundled import default_model_path, samples


def measure(server: Running, prompts: list[str], clients: int, answers: int, max_tokens: int) -> dict[str, float]:
    """All clients at once, ``answers`` in all."""
    with httpx.Client(timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        def ask(prompt: str) -> Timed:
            return timed(client, server.url, {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0})

        asked = list(itertools.islice(itertools.cycle(prompts), answers))
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(ask, asked))
        seconds = time.perf_counter() - begin
    return {
        "tokens_per_second": sum(answer.tokens for answer in found) / seconds,
        "first_token": median(answer.first for answer in found),
    }


def main() -> None:
    """Measure, print a table, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(default_model_path()))
    parser.add_argument("--prompts-file", type=Path, help="JSON lines with a 'prompt' each")
    parser.add_argument("--clients", default="1,2,4,8,16")
    parser.add_argument("--answers", type=int, default=4, help="answers per client")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    flags = parser.parse_args()
    if flags.prompts_file is None:
        prompts = [sample["prompt"] for sample in samples()]
    else:
        lines = flags.prompts_file.read_text("utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    servers = {
        "ours": ours("--model", flags.model, "--prompt-cache-size", "0"),
        "mlx-lm": stock(flags.model, 18980, "--prompt-cache-size", "0"),
    }
    rows: list[dict[str, Any]] = []
    try:
        for server in servers.values():
            measure(server, prompts, 2, 4, flags.max_tokens)  # warm
        for clients in map(int, flags.clients.split(",")):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
            for _ in range(flags.repeat):
                for name, server in servers.items():
                    answers = clients * flags.answers
                    found[name].append(measure(server, prompts, clients, answers, flags.max_tokens))
            row: dict[str, Any] = {"clients": clients}
            for name, runs in found.items():
                row[name] = {key: median(run[key] for run in runs) for key in runs[0]}
            row["ratio"] = row["ours"]["tokens_per_second"] / row["mlx-lm"]["tokens_per_second"]
            rows.append(row)
            print(
                f"{clients:3} clients  ours {row['ours']['tokens_per_second']:8.1f} tok/s, first token "
                f"{row['ours']['first_token']:.3f} s   mlx-lm {row['mlx-lm']['tokens_per_second']:8.1f} tok/s, "
                f"{row['mlx-lm']['first_token']:.3f} s   ratio {row['ratio']:.2f}",
                flush=True,
            )
    finally:
        for server in servers.values():
            server.end()
    if flags.json is not None:
        flags.json.write_text(json.dumps({"model": flags.model, "rows": rows}, indent=1) + "\n")
    if flags.plot is not None:
        _plot(rows, flags.plot)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in ("ours", "mlx-lm"):
        axes.plot([row["clients"] for row in rows], [row[name]["tokens_per_second"] for row in rows], "o-", label=name)
    axes.set(xlabel="clients", ylabel="tokens per second", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
