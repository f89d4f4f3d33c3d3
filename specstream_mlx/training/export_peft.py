"""The PyTorch form of a trained adapter: what PEFT puts on the base of transformers, and what ``convert`` reads.

PEFT's ``A`` and ``B`` are (out, in), ours (in, out); for GPT-2's Conv1D layers too, whose ``fan_in_fan_out`` turns
the merged product, not the factors.
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import CONVERTED, FAMILIES
from specstream_mlx.formats.config import CONFIG_NAME, LORA_PREFIX, PREFIX, StreamConfig
from specstream_mlx.formats.output import replaced_directory, write_json
from specstream_mlx.formats.tensor_writer import save_tensors


def check_peft(model_type: str) -> None:
    """Make sure that a fine-tune of this family can be written in PEFT's form.

    Raises:
        UnsupportedError: no converter brings it back, so nothing would prove the names.
    """
    if model_type not in CONVERTED:
        raise UnsupportedError(
            f"--export-peft: fine-tunes of {model_type!r} have no PyTorch form that `convert` reads; supported: "
            f"{', '.join(CONVERTED)}"
        )


def export_peft(
    directory: Path, config: StreamConfig, tensors: Mapping[str, mx.array], num_layers: int, base_name: str
) -> None:
    """Write a PyTorch checkpoint of form A: what PEFT loads and ``convert`` reads, tensors bit for bit the same.

    Args:
        directory: to write.
        config: of the streams.
        tensors: as ``trained_tensors`` names them.
        num_layers: blocks of the base.
        base_name: where PEFT finds the base.

    Raises:
        UnsupportedError: see ``check_peft``.
        UsageError: the directory cannot be written.
    """
    model_type = str(config.base_model.get("model_type"))
    check_peft(model_type)
    assert config.lora is not None
    theirs, blocks = CONVERTED[model_type], FAMILIES[model_type].LAYERS
    renamed, modules, targets, layers = {}, set(), set(), set()
    for name, value in tensors.items():
        if name.startswith(PREFIX):
            renamed["base_model.model." + name] = value
            continue
        path, _, leaf = name.removeprefix(LORA_PREFIX).rpartition(".")
        index, _, within = path.removeprefix(blocks + ".").partition(".")
        targets.add(within)
        layers.add(int(index))
        place = theirs.path(path)
        modules.add(place)
        renamed[f"base_model.model.{place}.lora_{leaf[-1].upper()}.weight"] = value.T
    everywhere = len(modules) == len(targets) * len(layers)  # else every module is named by its whole path
    all_layers = len(layers) == num_layers or not everywhere
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.lora["rank"],
        "lora_alpha": config.lora["scale"] * config.lora["rank"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": theirs.conv1d is not None,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(targets if everywhere else modules),
        "layers_to_transform": None if all_layers else sorted(layers),
        "layers_pattern": None if all_layers else blocks.rpartition(".")[2],
        "modules_to_save": ["specstream"],
        "use_rslora": False,
        "use_dora": False,
    }
    with replaced_directory(directory) as temporary:
        save_tensors(temporary / "adapter_model.safetensors", renamed, {"format": "pt"})
        write_json(temporary / "adapter_config.json", adapter_config)
        fields = config.to_dict()
        fields.pop("lora", None)
        write_json(temporary / CONFIG_NAME, fields)
