"""The table of model families: what is verified of each, on tiny random models beside stock mlx-lm.

    scripts/with-openblas python -m tests.families_table --write docs/families.md

Without ``--write`` it goes to stdout. Every figure is what this run found; it takes some minutes.
"""

import argparse
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import mlx_lm

from benchmarks.exactness import INSERTIONS, TEMPERATURES, TREES, cases, tiny_arm
from specstream_convert.base.config import mlx_config
from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import FAMILIES as SUPPORTED
from specstream_mlx.families import RECURRENT
from tests.family_cases import TOLERANCE, insertion_error, training_error, tree_error
from tests.tiny import EVERY_FAMILY, FAMILIES, VOCAB_SIZE, WINDOW, WINDOWED, base_config, make_model

PROMPTS = 4
HEADER = """# Model families: what is verified of each

Tiny random models (four layers, {vocab} tokens, float32) on `mlx {mlx}` and `mlx-lm {mlx_lm}`, beside stock mlx-lm
with the caches that it makes for the family itself. A name after the first hyphen is a variant. Made by

```bash
scripts/with-openblas python -m tests.families_table --write docs/families.md
```

- **tree = path**: largest difference of a logit between a node of a tree and its path run alone, token by token, and of
  the token after a committed branch; on a prompt shorter than the window and on one longer. Tests allow {tolerance:g}.
- **insertions**: largest difference of a stream's logits when streams are inserted at the leaf, in parallel or
  deferred; with stream embeddings and with value rotation.
- **training**: the same between the training forward of `specstream-mlx train` and inference.
- **generations**: token-identical to `mlx_lm.generate.generate_step`, greedy and sampled with a seed, {trees}
  trees, {insertions} insertions, {prompts} prompts of 1 to 80 tokens, prefilled in chunks.
- **convert**: PyTorch fine-tunes are converted; "no" is refused by name. **twin**: logits equal those of the PyTorch
  reference (tests/torch_twin/test_parity.py).

"""
NOTES = """
A window is what mlx-lm itself gives the layers of a model: `gemma3`, `gemma3_text`, `cohere2`, `olmo3`, `gpt_oss`,
and `llama` or `mistral` with `layer_types`. Such layers get a full cache here and a mask for the window, so that
rejected tokens can be taken back; their memory grows with the text, as that of the other layers does. A stream sees
what lies within the window of the position it is rotated to. `mistral`, `phi3`, `qwen2`, `starcoder2` and `gemma2`
with `sliding_window` run without it, because mlx-lm runs them so.

Mixtures of experts: LoRA of stream rows acts on the linear layers of attention and router; on experts it is refused
by name.

Refused, because their layers fold the past into a state from which rejected tokens cannot be taken back:
{recurrent}.
"""


def row(name: str) -> tuple[str, ...]:
    """The cells of one family."""
    lengths = (WINDOW - 3, 2 * WINDOW) if name in WINDOWED else (WINDOW - 3,)
    rotated = {"stream_id": {"type": "value_rotation", "epsilon": 0.3}, "stream_position": "anchor"}
    tree = max(tree_error(make_model(name, seed=1), length) for length in lengths)
    insertion = max(insertion_error(make_model(name, seed=2, **streams), WINDOW - 3) for streams in ({}, rotated))
    training = max(training_error(make_model(name, seed=4, **streams)) for streams in ({}, rotated))
    equal = [same for same, _ in cases(tiny_arm(name, PROMPTS))]
    return (
        *(f"{error:.0e}" for error in (tree, insertion, training)),
        f"{sum(equal)} of {len(equal)}",
        "yes" if converts(name) else "no",
        "yes" if name in FAMILIES else "-",
    )


def converts(name: str) -> bool:
    """Whether the converter takes this family's configuration."""
    try:
        mlx_config(base_config(name), Path("config.json"))
    except UnsupportedError:
        return False
    return True


def document(rows: dict[str, tuple[str, ...]]) -> str:
    """docs/families.md."""
    head = HEADER.format(
        vocab=VOCAB_SIZE,
        mlx=mx.__version__,
        mlx_lm=mlx_lm.__version__,
        tolerance=TOLERANCE,
        trees=len(TREES),
        insertions=len(INSERTIONS),
        prompts=PROMPTS,
    )
    assert {base_config(name)["model_type"] for name in rows} == SUPPORTED.keys()
    assert len(TEMPERATURES) == 2
    lines = ["| model | tree = path | insertions | training | generations | convert | twin |", "|---" * 7 + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in sorted(rows.items())]
    recurrent = textwrap.fill(", ".join(f"`{name}`" for name in sorted(RECURRENT)), 120, break_on_hyphens=False)
    return head + "\n".join(lines) + "\n" + NOTES.format(recurrent=recurrent)


def main() -> None:
    """Measure everything and write the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    path = parser.parse_args().write
    rows = {}
    for name in EVERY_FAMILY:
        rows[name] = row(name)
        print(f"{name:16} {'  '.join(rows[name])}", file=sys.stderr, flush=True)
    text = document(rows)
    if path is None:
        print(text, end="")
    else:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
