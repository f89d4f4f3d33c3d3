"""What a user loads: a target with the adapters that lie in memory, and the drafter of the one in use."""

from pathlib import Path

import mlx.nn as nn

from specstream_mlx.drafters.protocol import Drafter
from specstream_mlx.drafters.streams.drafter import StreamsDrafter
from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.errors import UsageError
from specstream_mlx.formats.config import StreamConfig
from specstream_mlx.formats.places import ADAPTER_WEIGHTS, resolve
from specstream_mlx.models.adapters import OWN, Adapter, check_adapter_configuration, read_adapter
from specstream_mlx.planning.times import PassTimes
from specstream_mlx.target.mounts import BARE
from specstream_mlx.target.target import Target


class SpecStreamModel(Target):
    """A target that can take adapters, and draft when the one in use has streams.

    Attributes:
        drafter: what the adapter in use brings; None: nothing.
        stream_config, streams: of the adapter in use; None without streams.
        adapter: the name of the adapter in use; None: the base alone.
    """

    def __init__(
        self,
        base: nn.Module,
        model_type: str,
        stream_config: StreamConfig | None = None,
        streams: Streams | None = None,
    ) -> None:
        """Wrap ``base`` in place; ``streams`` and ``stream_config`` come together or not at all.

        Raises:
            UnsupportedError: the family or its cache is not supported.
        """
        super().__init__(base, model_type)
        self._resident: dict[str, Adapter] = {}
        if stream_config is not None:
            self.add_adapter(OWN, Adapter(stream_config, streams))
        self.use_adapter(OWN if stream_config is not None else None)

    def load_adapter(self, path_or_repo: str | Path, name: str | None = None) -> str:
        """Read an adapter and keep it in memory, beside any others; ``use_adapter`` puts it to use.

        Args:
            path_or_repo: a stream adapter, a LoRA that mlx-lm wrote, or a repository id.
            name: what to call it here; None: the directory's name, or the repository's.

        Returns:
            The name.

        Raises:
            UsageError: the name is taken.
            InvalidInputError: a damaged adapter, or one of another base. The model is as it was.
            UnsupportedError: a format version or a kind of adapter that we do not run. The model is as it was.
        """
        directory = resolve(path_or_repo, weights=ADAPTER_WEIGHTS, judge=check_adapter_configuration)
        local = Path(path_or_repo).expanduser().is_dir()
        name = name or (directory.resolve().name if local else str(path_or_repo))
        self._check_free(name)
        with self.building(BARE):
            adapter = read_adapter(directory, self.base, self.family, self.context)
        self.add_adapter(name, adapter)
        return name

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Keep an adapter that was made here, beside any others.

        Raises:
            UsageError: the name is taken.
        """
        self._check_free(name)
        self._resident[name] = adapter

    def use_adapter(self, name: str | None) -> None:
        """Put a loaded adapter to use, or with None the base alone, which then decodes plainly.

        Takes no time worth the name: the base's weights stay where they are. The streams that lie in a model's own
        directory are an adapter too, called ``"own"``. A prompt cache goes on with the adapter it was made with, or
        with any that leaves the text to the base.

        Raises:
            UsageError: no adapter of this name is loaded.
        """
        adapter = self._get(name) if name is not None else Adapter()
        with self._lock:  # a generation in another thread begins with all of it, or with none
            self.mount(adapter.mount)
            self.adapter = name
            self._in_use = adapter
            self.stream_config, self.streams = adapter.stream_config, adapter.streams
            self.drafter: Drafter | None = None
            if adapter.stream_config is not None and adapter.streams is not None:
                self.drafter = StreamsDrafter(adapter.stream_config, adapter.streams, len(self.layers))

    def unload_adapter(self, name: str) -> None:
        """Free an adapter's memory; when it is in use, the base alone is in use afterwards.

        Raises:
            UsageError: no adapter of this name is loaded.
        """
        self._get(name)
        if self.adapter == name:
            self.use_adapter(None)
        del self._resident[name]

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Every adapter in memory, by name; ``num_bytes`` is what it takes."""
        return dict(self._resident)

    def pass_times(self, drafter: str) -> PassTimes:
        """What recent passes with a drafter and the adapter in use took."""
        return self._in_use.pass_times[drafter]

    @property
    def gamma(self) -> int:
        """Number of streams; 0 without streams."""
        return self.stream_config.gamma if self.stream_config is not None else 0

    @property
    def num_trunk_layers(self) -> int:
        """``N - N_s``, the layers below the first stream layer."""
        return len(self.layers) - (self.stream_config.num_stream_layers if self.stream_config is not None else 0)

    def _get(self, name: str) -> Adapter:
        if name not in self._resident:
            loaded = ", ".join(map(repr, self._resident)) or "none"
            raise UsageError(f"adapter {name!r} is not loaded; loaded: {loaded}")
        return self._resident[name]

    def _check_free(self, name: str) -> None:
        if name in self._resident:
            raise UsageError(f"adapter {name!r} is loaded already; give another name, or unload it first")
