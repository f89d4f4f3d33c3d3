"""The inputs of a conversion opened: adapter, streams and their configuration, base."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_convert.adapter.full_dump import split_dump
from specstream_convert.adapter.peft import (
    Adapter,
    compile_ignored,
    find_adapter,
    open_adapter,
    read_renames,
    stream_file,
)
from specstream_convert.adapter.streams import (
    WHY_NO_STREAMS,
    StreamSource,
    from_stream_file,
    gather,
    join,
    read_stream_config,
)
from specstream_convert.base.dequantize import dequantized
from specstream_convert.base.model import Base, open_base, resolve_base
from specstream_convert.changes.recompute import check_asked_for
from specstream_convert.files.pickles import Pickles
from specstream_convert.files.stored import StoredTensor
from specstream_convert.options import ConvertOptions
from specstream_convert.writing.output import tokenizer_directory
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME, StreamConfig
from specstream_mlx.formats.messages import escaped
from specstream_mlx.formats.safetensors import open_tensors


@dataclass(frozen=True)
class Inputs:
    """What a conversion starts from, each part checked on its own."""

    adapter: Adapter | None
    streams: StreamSource
    config: StreamConfig | None
    config_path: Path | None
    base: Base

    @property
    def mode(self) -> str | None:
        return self.config.mode if self.config else None


def open_inputs(options: ConvertOptions, pickles: Pickles) -> Inputs:
    """Open all inputs; nothing is written but what ``pickles`` keeps for as long as it is open."""
    renames, ignored = read_renames(options.key_map), compile_ignored(options.ignore_keys)
    adapter = dumped = None
    if options.adapter_path is not None:
        directory = find_adapter(options.adapter_path, options.adapter_name)
        adapter = open_adapter(directory, options.adapter_name, renames, ignored, pickles)
        check_asked_for(adapter.config, options.recompute_init)
        if options.hf_path is None and (dump := split_dump(adapter, renames, ignored)) is not None:
            adapter, dumped = dump
    streams, config, config_path = _open_streams(options, adapter, renames, ignored)
    base = _open_base(options, adapter, config, pickles, dumped)
    return Inputs(adapter, streams, config, config_path, dequantized(base) if options.dequantize else base)


def _open_streams(
    options: ConvertOptions, adapter: Adapter | None, renames: dict[str, str], ignored: Any
) -> tuple[StreamSource, StreamConfig | None, Path | None]:
    form_a = gather(adapter.streams) if adapter else None
    if options.lora_only:
        if form_a is not None and form_a.tensors:
            raise UsageError(
                f"{form_a.fates[0].file}: holds stream tensors; leave out --lora-only, or drop them with "
                "--ignore-keys '.*specstream.*'"
            )
        return StreamSource({}, (), ()), None, None
    homes = _homes(options, adapter)
    path = options.streams_path
    if path is None:
        path = next((home for home in homes if (home / WEIGHTS_NAME).exists()), None)
    form_b = from_stream_file(open_tensors(stream_file(path)), renames, ignored) if path is not None else None
    streams = join(form_a, form_b)
    config_path = options.specstream_config
    if config_path is None:
        config_path = next((home / CONFIG_NAME for home in homes if (home / CONFIG_NAME).exists()), None)
    if config_path is None:
        config_path = homes[0] / CONFIG_NAME
    if not streams.tensors and not config_path.exists():
        where = adapter.weights.path if adapter else path
        raise InvalidInputError(f"{where}: {WHY_NO_STREAMS}")
    config = read_stream_config(config_path, streams)
    if not streams.tensors and config.tensor_shapes(1):
        where = adapter.weights.path if adapter else path
        raise InvalidInputError(f"{where}: {WHY_NO_STREAMS}")
    return streams, config, config_path


def _homes(options: ConvertOptions, adapter: Adapter | None) -> list[Path]:
    """Directories where the stream file and configuration are looked for, nearest first."""
    homes = []
    if options.streams_path is not None:
        homes.append(options.streams_path if options.streams_path.is_dir() else options.streams_path.parent)
    if adapter is not None:
        homes.append(adapter.directory)
    if options.adapter_path is not None and options.adapter_path not in homes:
        homes.append(options.adapter_path)
    return homes


def _open_base(
    options: ConvertOptions,
    adapter: Adapter | None,
    config: StreamConfig | None,
    pickles: Pickles,
    dumped: dict[str, StoredTensor] | None,
) -> Base:
    if dumped is not None:
        assert adapter is not None
        return open_base(adapter.directory, adapter.directory.resolve().name, held=dumped)
    named, relative_to, revision = options.hf_path, None, options.revision
    if named is None:
        assert adapter is not None
        named = adapter.config.base_model
        if named is None:
            raise InvalidInputError(
                f"{adapter.config.path}: base_model_name_or_path is missing; give the base model with --hf-path"
            )
        revision = adapter.config.revision
        recorded = config.base_model if config else {}
        if revision is None and recorded.get("name_or_path") == named and isinstance(recorded.get("revision"), str):
            revision = recorded["revision"]
        relative_to = adapter.directory
    try:
        path, name, revision = resolve_base(named, revision, relative_to, pickled=pickles.allowed)
        return open_base(path, name, revision, pickles)
    except UnsupportedError as error:
        named = adapter.config.base_model if adapter else None
        plain = re.sub(r"(-unsloth)?-bnb-4bit$", "", named or "")
        if not plain or plain == named:
            raise
        raise UnsupportedError(f"{error}; try {escaped(plain)}, the name without its quantisation") from error


def other_name(adapter: Adapter, base: Base, config: StreamConfig | None) -> list[str]:
    """A note where only the shapes say that the base is the one that the adapter was trained on."""
    named = adapter.config.base_model
    marked = config is not None and "fingerprint" in config.base_model
    if named is None or marked or Path(named).name.lower() == Path(base.name).name.lower():
        return []
    return [f"the adapter was trained on {escaped(named)}, the base given is {escaped(base.name)}; their shapes agree"]


def find_tokenizer(options: ConvertOptions, inputs: Inputs) -> Path | None:
    """The adapter's tokenizer, beside its weights or one directory up, otherwise the base's."""
    adapter, base = inputs.adapter, inputs.base
    if adapter is None:
        return tokenizer_directory(None, base.path)
    found = tokenizer_directory(adapter.directory, base.path)
    if found in (base.path, None) and options.adapter_path not in (None, adapter.directory):
        return tokenizer_directory(options.adapter_path, base.path)
    return found
