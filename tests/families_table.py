"""The table of model families: what is verified of each, on tiny random models beside stock mlx-lm.

    scripts/with-openblas python -m tests.families_table --write docs/families.md
    scripts/with-openblas python -m tests.families_table minicpm exaone4 --write docs/families.md

Without ``--write`` it goes to stdout. Every figure is what a run found; all of them take some minutes. With names,
those are measured, and the other rows stay as they are in the file, which must be of the same versions of MLX and
mlx-lm. A name that mlx-lm runs as another model has that model's figures.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.models
from mlx_lm.utils import MODEL_REMAPPING

from benchmarks.exactness import INSERTIONS, TEMPERATURES, TREES, cases, tiny_arm
from specstream_convert.base.config import mlx_config
from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import FAMILIES as SUPPORTED
from specstream_mlx.families import REFUSED
from tests.family_cases import TOLERANCE, insertion_error, training_error, tree_error
from tests.tiny import ALIASES, EVERY_FAMILY, FAMILIES, VOCAB_SIZE, WINDOW, WINDOWED, base_config, make_model

PROMPTS = 4
ROWS = (*EVERY_FAMILY, *ALIASES)
# Settings that a family which is run otherwise refuses.
PARTS = {
    "gemma4, gemma4_text, gemma4_unified of the smallest sizes": ("gemma4_text", {"hidden_size_per_layer_input": 256}),
    "gemma4, gemma4_text, gemma4_unified with shared keys": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 20},
    ),
    "hunyuan of the largest size": ("hunyuan", {"use_cla": True}),
    "mistral3, llava with mistral4": ("mistral3", {"text_config": {"model_type": "mistral4"}}),
}
VERSIONS = "on `mlx {mlx}` and `mlx-lm {mlx_lm}`"
HEADER = """# Model families: what is verified of each

Every `model_type` that mlx-lm runs is here: in the table of those that are run and verified, or in the table of those
that are refused, with the reason. A refused model is named before anything but its configuration is downloaded.

## Run

Tiny random models (four layers, {vocab} tokens, float32) {versions}, beside stock mlx-lm
with the caches that it makes for the family itself. Names with a hyphen are variants of a model, but for `lille-130m`
and `phi-msft`. What mlx-lm runs as another model has that one's figures:
{aliases}. Made by

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
A window is what mlx-lm itself gives the layers of a model:
{windowed}.
Such layers get a full cache here and a mask for the window, so that rejected tokens can be taken back; their memory
grows with the text, as that of the other layers does. A stream sees what lies within the window of the position it is
rotated to. `llama` and `mistral` have windows with `layer_types`; `mistral` without, `phi3`, `qwen2`, `starcoder2` and
`gemma2` with `sliding_window` run without it, because mlx-lm runs them so.

Mixtures of experts: LoRA of stream rows acts on the linear layers of attention and router; on experts it is refused
by name.

Of checkpoints with vision the language model is run, as by mlx-lm.

## Refused

| model | it |
|---|---|
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
        *support(name),
    )


def support(name: str) -> tuple[str, str]:
    """Whether fine-tunes of a family are converted, and whether its logits are compared with the PyTorch reference."""
    return "yes" if converts(name) else "no", "yes" if name in FAMILIES else "-"


def converts(name: str) -> bool:
    """Whether the converter takes this family's configuration."""
    try:
        mlx_config(base_config(name), Path("config.json"))
    except UnsupportedError:
        return False
    return True


def document(rows: dict[str, tuple[str, ...]]) -> str:
    """docs/families.md, from the rows of ``EVERY_FAMILY``."""
    rows = rows | {name: (*rows[model][:4], *support(name)) for name, model in ALIASES.items()}
    head = HEADER.format(
        vocab=VOCAB_SIZE,
        versions=versions(),
        aliases=", ".join(f"`{name}`" for name in sorted(ALIASES)),
        tolerance=TOLERANCE,
        trees=len(TREES),
        insertions=len(INSERTIONS),
        prompts=PROMPTS,
    )
    assert {base_config(name)["model_type"] for name in rows} == SUPPORTED.keys()
    assert len(TEMPERATURES) == 2
    lines = ["| model | tree = path | insertions | training | generations | convert | twin |", "|---" * 7 + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in sorted(rows.items())]
    windowed = textwrap.fill(", ".join(f"`{name}`" for name in sorted(WINDOWED)), 120, break_on_hyphens=False)
    refused = [f"| {name} | {reason} |" for name, reason in sorted(reasons().items())]
    return head + "\n".join(lines) + "\n" + NOTES.format(windowed=windowed) + "\n".join(refused) + "\n"


def versions() -> str:
    """What the figures were measured on, as the document says it."""
    return VERSIONS.format(mlx=mx.__version__, mlx_lm=mlx_lm.__version__)


def model_types() -> set[str]:
    """Every ``model_type`` that the installed mlx-lm runs: its modules with a model, and its other names for them."""
    files = Path(mlx_lm.models.__path__[0]).glob("*.py")  # read, because some need packages on import
    models = {file.stem for file in files if re.search(r"^class Model\(|import Model\b", file.read_text(), re.M)}
    return models | MODEL_REMAPPING.keys()


def reasons() -> dict[str, str]:
    """Why a model is refused: whole families, and settings of families that are run."""
    found = dict(REFUSED)
    for name, (model_type, config) in PARTS.items():
        reason = SUPPORTED[model_type].refusal(config)
        assert reason is not None
        found[name] = reason
    return found


def rows_of(text: str) -> dict[str, tuple[str, ...]]:
    """The cells of the first table of a document, by the model's name."""
    table = [line for line in text.partition("## Refused")[0].splitlines() if line.startswith("| ")]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[1:])
    return {name: tuple(rest) for name, *rest in cells}


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *EVERY_FAMILY], help="measure these alone")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also where the other rows are read")
    arguments = parser.parse_args()
    path, names = arguments.write, arguments.names or EVERY_FAMILY
    rows = {}
    if arguments.names:
        if path is None:
            parser.error("with names, give --write FILE, which has the other rows")
        before = path.read_text(encoding="utf-8")
        if versions() not in before:
            parser.error(f"{path}: measured on other versions of MLX or mlx-lm; measure all rows")
        rows = rows_of(before)
    for name in (name for name in names if name not in ALIASES):
        rows[name] = row(name)
        print(f"{name:16} {'  '.join(rows[name])}", file=sys.stderr, flush=True)
    text = document(rows)
    if path is None:
        print(text, end="")
    else:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
