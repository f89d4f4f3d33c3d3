"""A training from a model's name to an adapter on disk: what the command line does, without its words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from specstream_mlx.bundled import default_model_path
from specstream_mlx.checkpoint import load
from specstream_mlx.config import CONFIG_NAME, PREFIX, WEIGHTS_NAME, StreamConfig, read_json
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.files import resolve
from specstream_mlx.model import SpecStreamModel
from specstream_mlx.training import distill, output, trainer
from specstream_mlx.training.datasets import Dataset, read_dataset
from specstream_mlx.training.evaluation import Validation
from specstream_mlx.training.export_peft import check_peft as check_peft_form
from specstream_mlx.training.export_peft import export_peft
from specstream_mlx.training.log import PLOT
from specstream_mlx.training.restart import RestartPoints
from specstream_mlx.training.settings import TrainSettings, flag
from specstream_mlx.training.trainable import (
    attach,
    check_fits,
    set_trained_tensors,
    train_pruner_only,
    trained_tensors,
)
from specstream_mlx.upload import upload

_STARTING = "resume_adapter_file"  # what the adapter to start from is called while it is checked


@dataclass
class TrainRun:
    """A loaded model, the settings, and where the adapter goes.

    Attributes:
        SETTINGS: names that ``prepare`` takes.
        name: of the model, as it was given.
        path: its directory.
        model: the base; ``train`` attaches streams and LoRA.
        tokenizer: mlx-lm's wrapper.
        settings: of the training.
        target: the adapter's directory.
        adapter: a stream adapter to start from.
    """

    SETTINGS: ClassVar[frozenset[str]] = frozenset(field.name for field in fields(TrainSettings))

    name: str
    path: Path
    model: SpecStreamModel
    tokenizer: Any
    settings: TrainSettings
    target: Path
    adapter: Path | None = None

    @classmethod
    def prepare(
        cls,
        model: str | None,
        target: Path,
        settings: Mapping[str, Any],
        *,
        adapter: Path | None = None,
        trust_remote_code: bool = False,
        check_peft: bool = False,
    ) -> "TrainRun":
        """Check everything that can be checked, then load the model.

        Args:
            model: directory or repository; None for the bundled model.
            target: the adapter's directory.
            settings: fields of ``TrainSettings``; those of the streams default to ``adapter``'s.
            adapter: a stream adapter to start from.
            trust_remote_code: let mlx-lm run model code that comes with the checkpoint.
            check_peft: make sure that the result can be written in PEFT's form.

        Raises:
            UsageError, InvalidInputError, UnsupportedError: something is wrong; nothing was written.
        """
        defaults = _settings_of(adapter) if adapter is not None else {}
        chosen = TrainSettings(**(defaults | dict(settings)))
        changed = [
            f"{flag(name)} {getattr(chosen, name)} differs from its {value}"
            for name, value in defaults.items()
            if getattr(chosen, name) != value and (name, value) != ("prune_rank", None)
        ]
        if changed:
            raise UsageError(f"--resume-adapter-file: {adapter}: {', '.join(changed)}; drop the options")
        if chosen.pruner_only and adapter is None:
            raise UsageError("--pruner-only: needs streams that are trained; give --resume-adapter-file")
        trainer.make_optimizer(chosen)
        path = resolve(model) if model is not None else default_model_path()
        base, tokenizer = load(path, trust_remote_code=trust_remote_code)
        if check_peft:
            check_peft_form(base.model_type)
        run = cls(model or str(path), path, base, tokenizer, chosen, target, adapter)
        check_fits(base, run.config(), chosen.num_layers, chosen.lora_keys)
        if adapter is not None:
            run._check_start(adapter)
        return run

    def _check_start(self, adapter: Path) -> None:
        """Make sure that the tensors of an adapter mean here what they meant where they were trained.

        Raises:
            InvalidInputError: it is of another base.
            UnsupportedError: its maps are none that a training here makes.
        """
        name = self.model.load_adapter(adapter, _STARTING)
        theirs, ours = self.model.adapters[name].stream_config, self.config()
        self.model.unload_adapter(name)
        assert theirs is not None
        if theirs.stream_init != ours.stream_init or theirs.prune not in (None, ours.prune):
            raise UnsupportedError(
                f"--resume-adapter-file: {adapter}: stream_init or prune is not as train makes it (residual, with the "
                "final norm, the pruner right below the stream layers); train new streams"
            )

    @property
    def max_seq_length(self) -> int:
        """The longest row: as asked for, within the positions of a model that has learned ones."""
        return self.model.tokens_within_context(self.settings.max_seq_length, 0)

    def read(
        self,
        data: str | Sequence[Mapping[str, Any]],
        mask_prompt: bool | None = None,
        features: Mapping[str, str] | None = None,
    ) -> Dataset:
        """Examples of a data set; see ``read_dataset``."""
        return read_dataset(
            data,
            self.tokenizer,
            mask_prompt=mask_prompt,
            max_seq_length=self.max_seq_length,
            seed=self.settings.seed,
            features=features,
        )

    def own_answers(
        self,
        prompts: Path | None,
        file: Path,
        settings: Mapping[str, Any],
        progress: Callable[[int, int], None] | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Dataset:
        """Examples that the model answers itself; ``prompts`` None for a general list.

        ``template`` holds further arguments of the chat template.
        """
        return distill.own_answers(
            self.model,
            self.tokenizer,
            distill.read_prompts(prompts, self.tokenizer, template),
            distill.DistillSettings(**({"seed": self.settings.seed} | dict(settings))),
            file,
            identity=distill.base_identity(self.path, self.config().base_model),
            max_seq_length=self.max_seq_length,
            split_seed=self.settings.seed,
            progress=progress,
        )

    def summary(self) -> str:
        """One line: what is trained how long."""
        chosen = self.config()
        return (
            f"{chosen.mode} mode: {chosen.gamma} streams over the top {chosen.num_stream_layers} of "
            f"{len(self.model.layers)} layers, LoRA of rank {self.settings.rank}, "
            f"{self.settings.iters:,} iterations of {self.settings.batch_size}"
        )

    def discard_restart_points(self) -> None:
        """Forget an interrupted run."""
        RestartPoints(self.target, self.settings, (), None).remove()

    def train(
        self,
        examples: Dataset,
        *,
        resume: bool = False,
        report: trainer.Report | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Validation | None:
        """Attach streams and LoRA, train, write the adapter. See ``trainer.train``."""
        attach(
            self.model,
            self.config(),
            rank=self.settings.rank,
            scale=self.settings.scale,
            num_layers=self.settings.num_layers,
            keys=self.settings.lora_keys,
            seed=self.settings.seed,
        )
        if self.adapter is not None:
            fresh = {name: v for name, v in trained_tensors(self.model).items() if name.startswith(PREFIX + "prune.")}
            set_trained_tensors(self.model, fresh | output.read_adapter(self.adapter)[1])
        if self.settings.pruner_only:
            train_pruner_only(self.model)
        return trainer.train(
            self.model,
            self.settings,
            examples.train,
            examples.valid,
            self.target,
            resume=resume,
            report=report,
            progress=progress,
        )

    def export_peft(self, directory: Path) -> None:
        """Write the trained tensors in PEFT's form."""
        assert self.model.stream_config is not None
        tensors = trained_tensors(self.model)
        export_peft(directory, self.model.stream_config, tensors, len(self.model.layers), self.name)

    def upload(self, repo: str) -> None:
        """Upload the adapter to a Hugging Face repository."""
        upload(self.target, repo)

    def result(self, found: Validation | None) -> dict[str, Any]:
        """What came out, as a JSON object."""
        chosen = self.config()
        return {
            "model": self.name,
            "adapter": str(self.target),
            "mode": chosen.mode,
            "gamma": chosen.gamma,
            "num_stream_layers": chosen.num_stream_layers,
            "iters": self.settings.iters,
            "trained_parameters": sum(value.size for value in trained_tensors(self.model).values()),
            "adapter_bytes": sum(file.stat().st_size for file in self.target.rglob("*.safetensors")),
            "validation": None if found is None else found.to_dict(),
            "plot": str(self.target / PLOT) if (self.target / PLOT).exists() else None,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }

    def config(self) -> StreamConfig:
        """The streams that are trained, and the base they belong to."""
        local = Path(self.name).expanduser()
        base = output.describe_base(
            read_json(self.path / "config.json"),
            local.resolve().name if local.is_dir() else self.name,
            self.model,
        )
        return self.settings.stream_config(len(self.model.layers), base)


def _settings_of(adapter: Path) -> dict[str, Any]:
    """The settings that a stream adapter's tensors depend on.

    Raises:
        InvalidInputError: it is another kind of directory, or damaged.
    """
    where = f"--resume-adapter-file: {adapter}"
    if (adapter / "adapter_model.safetensors").exists() and not (adapter / WEIGHTS_NAME).exists():
        raise InvalidInputError(f"{where}: a checkpoint in PEFT's form; bring it here with `convert --adapter-only`")
    if not (adapter / CONFIG_NAME).exists():
        raise InvalidInputError(f"{where}: no stream adapter, it has no {CONFIG_NAME}; give one that train wrote")
    config, _ = output.read_adapter(adapter)
    lora: Mapping[str, Any] = config.lora or {}
    found = {
        "mode": config.mode,
        "gamma": config.gamma,
        "num_stream_layers": config.num_stream_layers,
        "value_rotation": config.stream_id.epsilon,
        "stream_init_rank": config.stream_init.rank,
        "stream_position": config.stream_position,
        "prune_rank": config.prune.rank if config.prune is not None else None,
        "num_layers": config.training.get("num_layers", -1),
        "lora_keys": config.training.get("lora_keys"),
    }
    return found | {key: lora[key] for key in ("rank", "scale") if key in lora}
