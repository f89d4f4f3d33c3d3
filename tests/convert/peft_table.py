"""The table of PEFT features: every one saved by PEFT, converted, and compared with PEFT's logits.

    PYTHONPATH=.:convert scripts/with-openblas python tests/convert/peft_table.py --write docs/peft.md

Without ``--write`` it goes to stdout. Every figure and every reason is what this run found.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft_cases import ATOL, FAMILIES, FEATURES, Bases, Feature, Saved, label, ties

from specstream_convert.adapter.peft_config import INERT, READ, REFUSED, read_peft_config
from specstream_mlx.errors import SpecStreamError, UnsupportedError

NOT_APPLICABLE = "-"
# Values that PEFT writes for settings which leave the adapter's files with no defined result here.
REFUSED_VALUES: dict[str, list[Any]] = {
    **{name: [True] for name in REFUSED},
    "init_lora_weights": ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"],
    "peft_type": ["ADALORA", "LOHA", "LOKR", "VERA", "IA3", "OFT", "PROMPT_TUNING"],
}
HEADER = """# PEFT adapters: what converts, and how exactly

Adapters of `peft {peft}` over tiny random bases (two layers, 32 wide, float32, `transformers {transformers}`,
`torch {torch}`), every trained tensor random. A figure is the largest difference of a logit between PEFT's forward
pass and the converted model in mlx-lm, on {tokens} tokens; logits are around 3, and {atol:g} is what the tests allow.
"Tied" bases share the embedding with the LM head. Made by

```bash
PYTHONPATH=.:convert scripts/with-openblas python tests/convert/peft_table.py --write docs/peft.md
```
"""


def measure(saved: Saved, out: Path, *, fuse: bool) -> float | str:
    """The largest difference, or why the conversion is refused."""
    try:
        return saved.difference(out, fuse=fuse)
    except UnsupportedError as error:
        return reason(error)


def reason(error: SpecStreamError) -> str:
    """The first line of a refusal without the place."""
    return re.sub(r"^/.*?\.json: |^\S*:\s", "", str(error).splitlines()[0])


def rows() -> list[tuple[Feature, bool, str]]:
    """The features in the order of the table, with the label of their row."""
    return [(feature, tie, label(feature, tie)) for feature in FEATURES for tie in feature.ties]


def table(title: str, results: dict[tuple[str, str], float | str]) -> list[str]:
    """A Markdown table of features by families; reasons become notes below it."""
    lines = [f"## {title}", "", f"| feature | {' | '.join(FAMILIES)} |", "|---" * (len(FAMILIES) + 1) + "|"]
    notes: list[str] = []
    for _, _, name in rows():
        cells = []
        for family in FAMILIES:
            found = results.get((name, family), NOT_APPLICABLE)
            if isinstance(found, float):
                cells.append(f"{found:.1e}")
            elif found == NOT_APPLICABLE:
                cells.append(found)
            else:
                if found not in notes:
                    notes.append(found)
                cells.append(f"refused ({notes.index(found) + 1})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", *(f"{i + 1}. {note}" for i, note in enumerate(notes)), *([""] if notes else [])]


def refusals(directory: Path) -> list[tuple[str, str]]:
    """Settings that are refused, each tried on the reader of ``adapter_config.json``, and why."""
    found = []
    for name, values in REFUSED_VALUES.items():
        for value in values:
            path = directory / "adapter_config.json"
            path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | {name: value}))
            try:
                read_peft_config(path)
            except UnsupportedError as error:
                shown = f"`{name}`" if value is True else f"`{name}: {json.dumps(value)}`"
                found.append((shown, re.sub(rf"^{name} is .*?: ", "", reason(error))))
    return found


def document(results: dict[str, dict[tuple[str, str], float | str]], refused: list[tuple[str, str]]) -> str:
    """docs/peft.md."""
    versions = {module.__name__: module.__version__ for module in (peft, transformers, torch)}
    head = HEADER.format(tokens=10, atol=ATOL, **versions)
    worst = max(found for part in results.values() for found in part.values() if isinstance(found, float))
    lines = [head, f"The largest figure below is {worst:.1e}.", ""]
    lines += table("Merged into the base", results["merged"])
    lines += [
        "In a live adapter (`--keep-adapters`, the default on a quantised base) the LoRA or DoRA factors stay apart in",
        "`adapters/`; what that form cannot hold (whole modules, biases, token rows, an LM head of its own) is written",
        "into the model's own tensors.",
        "",
    ]
    lines += table("Live", results["live"])
    lines += ["## Refused", "", "| setting | why, and what to do |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in refused]
    return "\n".join(lines) + "\n"


def known_fields() -> set[str]:
    """Every field of PEFT's LoRA configuration that the converter knows."""
    return set(INERT) | set(READ) | set(REFUSED)


def main() -> None:
    """Measure everything and write the document."""
    parser = argparse.ArgumentParser(prog="peft_table", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    path = parser.parse_args().write
    torch.set_num_threads(1)
    results: dict[str, dict[tuple[str, str], float | str]] = {"merged": {}, "live": {}}
    with tempfile.TemporaryDirectory() as root:
        bases = Bases(Path(root) / "bases")
        for i, (feature, tie, name) in enumerate(rows()):
            for family in feature.families:
                if tie not in ties(feature, family):
                    continue
                place = Path(root) / f"{i}-{family}"
                saved = bases.save(feature, family, tie, place / "adapter")
                for how in results:
                    results[how][name, family] = measure(saved, place / how, fuse=how == "merged")
        text = document(results, refusals(Path(root)))
    if path is None:
        print(text, end="")
        return
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
