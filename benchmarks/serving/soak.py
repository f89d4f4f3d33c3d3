"""Many requests by clients that misbehave: nothing may go wrong, grow, or stay behind.

    python -m benchmarks.serving.soak [--model DIR] [--requests 2000] [--clients 8] [--seed 0]

Some requests are hung up on, are no JSON, are huge, ask for nonsense, or are read slowly. Every greedy answer is
compared with plain decoding. At the end no answer is running, the memory is where it was after a tenth of the requests
(within
``--growth``), and the server ends with code 0 and nothing on standard error. Exit code 1 otherwise.
"""

import argparse
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from benchmarks.serving.client import Running, ours
from specstream_mlx import load, stream_generate
from specstream_mlx.bundled import samples

MAX_TOKENS = 24


class Soak:
    """The clients' common state."""

    def __init__(self, server: Running, expected: dict[str, str], seed: int) -> None:
        self.server, self.expected, self.seed = server, expected, seed
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def request(self, number: int) -> None:
        """One request, as its number decides."""
        rng = random.Random(f"{self.seed} {number}")
        kind = rng.choices(("good", "hang up", "no json", "huge", "nonsense", "slow"), (60, 15, 8, 2, 10, 5))[0]
        prompt = rng.choice(sorted(self.expected))
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS}
        url = f"{self.server.url}/v1/completions"
        problem = None
        try:
            with httpx.Client(timeout=120) as client:
                if kind == "good":
                    text = client.post(url, json=body).json()["choices"][0]["text"]
                    problem = None if text == self.expected[prompt] else f"{prompt[:40]!r}: {text!r}"
                elif kind in ("hang up", "slow"):
                    with client.stream("POST", url, json=body | {"stream": True, "max_tokens": 400}) as response:
                        for _, _line in zip(range(rng.randint(1, 12)), response.iter_lines(), strict=False):
                            time.sleep(0.2 * (kind == "slow"))
                else:
                    data = {"no json": b"{" * rng.randint(1, 9), "huge": b'"' + b"x" * (17 << 20)}.get(kind)
                    odd = {"prompt": [prompt, -1, None, {}][rng.randint(1, 3)], "n": rng.choice((0, 99, "x"))}
                    response = client.post(url, content=data) if data else client.post(url, json=odd)
                    if not 400 <= response.status_code < 500 or "error" not in response.json():
                        problem = f"{kind}: status {response.status_code}"
        except httpx.HTTPError as error:
            problem = None if kind == "huge" else f"{kind}: {error!r}"  # refused before it was all sent
        with self._lock:
            self.counts[kind] += 1
            if problem is not None:
                self.wrong.append(problem)


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no process {pid}")


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--growth", type=float, default=0.25, help="share by which memory may grow")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    model, tokenizer = load(flags.model)
    prompts = [sample["prompt"] for sample in samples()[:12]]
    expected = {
        prompt: "".join(r.text for r in stream_generate(model, tokenizer, prompt, MAX_TOKENS, draft="off"))
        for prompt in prompts
    }
    words = ["--model", flags.model] if flags.model else []
    server = ours(*words, "--prompt-cache-bytes", "200MB")
    soak = Soak(server, expected, flags.seed)
    early = 0
    with ThreadPoolExecutor(flags.clients) as pool:
        for number, _ in enumerate(pool.map(soak.request, range(flags.requests)), start=1):
            if number == max(flags.requests // 10, 1):
                early = memory(server.process.pid)
    time.sleep(2)
    late = memory(server.process.pid)
    metrics = httpx.get(f"{server.url}/metrics").text
    running = next(line for line in metrics.splitlines() if line.startswith("specstream_running_requests"))
    if not running.endswith(" 0"):
        soak.wrong.append(f"still running: {running}")
    if late > (1 + flags.growth) * early:
        soak.wrong.append(f"memory grew from {early >> 20} MB to {late >> 20} MB")
    server.process.terminate()
    _, errors = server.process.communicate(timeout=60)
    if server.process.returncode != 0 or errors:
        soak.wrong.append(f"exit code {server.process.returncode}, standard error: {errors.decode()[:500]!r}")
    print(f"{sum(soak.counts.values())} requests {dict(soak.counts)}, memory {early >> 20} MB then {late >> 20} MB")
    for problem in soak.wrong[:20]:
        print(f"wrong: {problem}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
