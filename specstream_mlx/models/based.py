"""Whether an adapter belongs to the base at hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from specstream_mlx.errors import InvalidInputError
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.formats.config import BASE_SIZES
from specstream_mlx.formats.fingerprint import is_marked


def check_base(
    trained_for: Mapping[str, Any],
    what: str,
    family: DecoderFamily,
    base: nn.Module,
    where: Path,
    more: Sequence[str] = (),
) -> None:
    """Compare a ``base_model`` block with the base at hand: sizes, and the fingerprint when both sides have one.

    Args:
        trained_for: the block.
        what: was trained for it; for messages.
        where: the file that holds it.
        more: problems that were found already.

    Raises:
        InvalidInputError: another base.
    """
    config = vars(base.args)
    problems = []
    for key in BASE_SIZES:
        found = family.size(config, key)
        if key in trained_for and found is not None and trained_for[key] != found:
            problems.append(f"{where}: {what} were trained for {key} {trained_for[key]!r}, this base has {found!r}")
    problems += more
    mark: Any = trained_for.get("fingerprint")
    marked = family.fingerprint_tensor(config)
    if not problems and isinstance(mark, dict) and marked is not None and mark.get("tensor") == marked:
        weight: mx.array = dict(tree_flatten(base.parameters()))[marked]
        if not is_marked(mark, weight):
            problems.append(
                f"{where}: fingerprint of {marked} differs; the shapes fit, but this is another base than "
                f"{trained_for.get('name_or_path', f'the one the {what} were trained for')!r}"
            )
    if problems:
        raise InvalidInputError("\n".join(problems))
