"""A training from a model's name to an adapter on disk: what the command line does, without its words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats.adapter_directory import read_adapter
from specstream_mlx.formats.config import LORA_PREFIX, PREFIX, StreamConfig, read_json
from specstream_mlx.formats.upload import upload
from specstream_mlx.models.load import load, model_directory
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training import distill, output, trainer
from specstream_mlx.training.datasets import Dataset, read_dataset
from specstream_mlx.training.evaluation import Validation
from specstream_mlx.training.export_peft import check_peft as check_peft_form
from specstream_mlx.training.export_peft import export_peft
from specstream_mlx.training.log import PLOT
from specstream_mlx.training.restart import RestartPoints
from specstream_mlx.training.settings import TrainSettings
from specstream_mlx.training.start import check_agreement, settings_of, settings_with_its_lora
from specstream_mlx.training.trainable import (
    attach,
    bare,
    check_fits,
    set_trained_tensors,
    train_pruner_only,
    trained_tensors,
)


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
        revision: str | None = None,
        trust_remote_code: bool = False,
        check_peft: bool = False,
    ) -> "TrainRun":
        """Check everything that can be checked, then load the model.

        Args:
            model: directory or repository; None for the bundled model.
            target: the adapter's directory.
            settings: fields of ``TrainSettings``; those of the streams default to ``adapter``'s.
            adapter: a stream adapter to start from.
            revision: branch, tag or commit of the model's repository.
            trust_remote_code: let mlx-lm run model code that comes with the checkpoint.
            check_peft: make sure that the result can be written in PEFT's form.

        Raises:
            UsageError, InvalidInputError, UnsupportedError: something is wrong; nothing was written.
        """
        defaults = settings_of(adapter) if adapter is not None else {}
        chosen = TrainSettings(**(defaults | dict(settings)))
        if adapter is not None:
            check_agreement(adapter, defaults, chosen)
        if chosen.pruner_only and adapter is None:
            raise UsageError("--pruner-only: needs streams that are trained; give --resume-adapter-file")
        trainer.check_optimizer(chosen)
        path = model_directory(model, revision, trust_remote_code=trust_remote_code)
        base, tokenizer = load(path, trust_remote_code=trust_remote_code)
        if check_peft:
            check_peft_form(base.model_type)
        chosen = chosen.for_hidden_size(base.family.size(vars(base.args), "hidden_size"))
        name = model or str(path)
        run = cls(name if revision is None else f"{model}@{revision}", path, base, tokenizer, chosen, target, adapter)
        bare(base)
        check_fits(base, run.config(), chosen.num_layers, chosen.lora_keys)
        if adapter is not None:
            run.settings = settings_with_its_lora(base, adapter, chosen, settings)
        return run

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
            validation=self.settings.val_batches != 0,
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
            validation=self.settings.val_batches != 0,
            progress=progress,
        )

    def check_rows(self, examples: Dataset) -> str | None:
        """Refuse rows that leave streams nothing to predict; a note where they do not fill a batch.

        Raises:
            InvalidInputError: all answers are of one token, which is the main stream's.
        """
        if not any(len(example.answer) > 1 for example in examples.train):
            raise InvalidInputError(
                "no answer to train on has more than one token, so streams have nothing to predict; give longer ones"
            )
        if len(examples.train) >= self.settings.batch_size:
            return None
        return (
            f"{len(examples.train)} rows do not fill a batch of {self.settings.batch_size}; each batch is all of them"
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
            theirs = read_adapter(self.adapter)[1]
            without = [PREFIX + "prune."]
            if not any(name.startswith(LORA_PREFIX) for name in theirs):
                without.append(LORA_PREFIX)
            fresh = {name: v for name, v in trained_tensors(self.model).items() if name.startswith(tuple(without))}
            set_trained_tensors(self.model, fresh | theirs)
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
