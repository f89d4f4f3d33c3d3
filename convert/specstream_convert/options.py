"""What a conversion is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from specstream_mlx.errors import UsageError
from specstream_mlx.formats.messages import escaped
from specstream_mlx.formats.places import is_repository_id

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FIXED_QUANTIZATION = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # mode -> bits, group size


@dataclass(frozen=True)
class ConvertOptions:
    """The arguments of one conversion; the names are those of the command line."""

    adapter_path: Path | None  # PEFT directory
    mlx_path: Path  # output
    hf_path: str | None = None  # base directory or repo id; default: the adapter's base_model_name_or_path
    revision: str | None = None  # of hf_path's repository
    adapter_name: str | None = None
    streams_path: Path | None = None  # form B file or directory
    specstream_config: Path | None = None
    fuse: bool | None = None  # None: by mode and base; True --fuse; False --keep-adapters
    adapter_only: bool = False
    quantize: bool = False
    q_bits: int = 4
    q_group_size: int = 64
    q_mode: str = "affine"
    dtype: str | None = None
    key_map: Path | None = None
    ignore_keys: str | None = None
    lora_only: bool = False
    overwrite: bool = False
    dry_run: bool = False
    verify: bool = True
    reference_logits: Path | None = None
    allow_pickle: bool = False
    recompute_init: bool = False
    dequantize: bool = False
    upload_repo: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse arguments that contradict each other, and those that are not supported yet."""
        if self.adapter_path is None and self.streams_path is None:
            raise UsageError("nothing to convert: give --adapter-path (a PEFT directory) or --streams-path")
        if self.adapter_path is None and self.hf_path is None:
            raise UsageError("--hf-path is needed: without --adapter-path nothing names the base model")
        if self.revision is not None and self.hf_path is None:
            raise UsageError("--revision is of the repository that --hf-path names; give both or neither")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.lora_only and self.adapter_path is None:
            raise UsageError("--lora-only converts a PEFT adapter; give --adapter-path")
        if self.lora_only and (self.streams_path or self.specstream_config or self.adapter_only):
            raise UsageError(
                "--lora-only contradicts --streams-path, --specstream-config and --adapter-only; leave one out"
            )
        if self.adapter_only and (self.quantize or self.dtype or self.fuse):
            raise UsageError("--adapter-only writes no base weights; leave out --quantize, --dtype and --fuse")
        if self.dequantize and (self.adapter_only or self.recompute_init):
            raise UsageError(
                "--dequantize contradicts --adapter-only, which writes no base weights, and --recompute-init, which "
                "needs the original ones; leave one out"
            )
        if self.adapter_name is not None and self.adapter_path is None:
            raise UsageError("--adapter-name chooses within --adapter-path; give both or neither")
        self._check_quantization()
        if self.reference_logits is not None and not self.verify:
            raise UsageError("--reference-logits needs verification; leave out --no-verify")
        if self.reference_logits is not None and self.adapter_only:
            raise UsageError("--reference-logits needs a whole model; leave out --adapter-only")
        if self.upload_repo is not None and not is_repository_id(self.upload_repo):
            raise UsageError(f"--upload-repo is {escaped(repr(self.upload_repo))}, expected a repository id: org/name")
        if self.upload_repo is not None and self.dry_run:
            raise UsageError("--upload-repo: nothing is uploaded with --dry-run; leave one out")
        if self.trust_remote_code:
            raise UsageError("--trust-remote-code: a conversion never runs code of a checkpoint; leave it out")
        if self.recompute_init and self.adapter_path is None:
            raise UsageError("--recompute-init concerns a PEFT adapter; give --adapter-path")

    def _check_quantization(self) -> None:
        if not self.quantize:
            return
        if self.q_mode == "affine":
            good = self.q_bits in (2, 3, 4, 5, 6, 8) and self.q_group_size in (32, 64, 128)
            legal = "--q-bits 2, 3, 4, 5, 6 or 8 and --q-group-size 32, 64 or 128"
        elif self.q_mode in FIXED_QUANTIZATION:
            bits, group_size = FIXED_QUANTIZATION[self.q_mode]
            good = (self.q_bits, self.q_group_size) == (bits, group_size)
            legal = f"--q-bits {bits} and --q-group-size {group_size}"
        else:
            raise UsageError(f"--q-mode is {self.q_mode!r}, expected affine or one of {', '.join(FIXED_QUANTIZATION)}")
        if not good:
            raise UsageError(
                f"--q-mode {self.q_mode} takes {legal}, not {self.q_bits} bits in groups of {self.q_group_size}"
            )
