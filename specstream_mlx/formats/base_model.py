"""Is this the base? The ``base_model`` block of ``specstream_config.json`` beside a base at hand."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from specstream_mlx.formats.config import BASE_FIELDS, StreamConfig
from specstream_mlx.formats.fingerprint import is_marked
from specstream_mlx.formats.messages import escaped


def base_problems(
    config: StreamConfig,
    where: Path,
    found: Mapping[str, Any],
    num_layers: int,
    tensor: Callable[[str], mx.array | None],
    *,
    base: str = "this base",
    hint: str = "give the base that the streams were trained on",
    strict: bool = False,
) -> list[str]:
    """Why streams do not belong to a base: its sizes differ, or the marked tensor does.

    Args:
        config: of the streams.
        where: its file.
        found: the base's values of ``BASE_FIELDS``; None or absent where it says nothing.
        num_layers: of the base.
        tensor: gives a tensor of the base by the name that the mark has, None when there is none.
        base: what messages call the base.
        hint: what to do.
        strict: a mark that names no tensor of the base is a problem too.
    """
    recorded = config.base_model
    problems = [
        f"base_model.{name} is {escaped(repr(recorded[name]))}, {base} has {found[name]!r}; {hint}"
        for name in BASE_FIELDS
        if name in recorded and found.get(name) is not None and recorded[name] != found[name]
    ]
    if config.num_stream_layers > num_layers:
        problems.append(f"num_stream_layers is {config.num_stream_layers}, the base has {num_layers} layers; {hint}")
    if config.prune is not None and config.prune.layer > num_layers:
        problems.append(f"prune.layer is {config.prune.layer}, the base has {num_layers} layers; {hint}")
    mark = recorded.get("fingerprint")
    if mark is not None and not problems:
        name, digest = (mark.get("tensor"), mark.get("sha256")) if isinstance(mark, dict) else (None, None)
        held = tensor(name) if isinstance(name, str) and isinstance(digest, str) else None
        if held is not None and not is_marked(mark, held):
            other = escaped(repr(recorded.get("name_or_path", "the one the streams were trained for")))
            problems.append(
                f"base_model.fingerprint of {escaped(str(name))} differs: same shapes, but this is another base or "
                f"revision than {other}; {hint}"
            )
        elif held is None and strict:
            problems.append(
                "base_model.fingerprint names no tensor of the base with its sha256; correct it or remove it"
            )
    return [f"{where}: {problem}" for problem in problems]
