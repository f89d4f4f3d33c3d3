"""``specstream-mlx inspect``: what a checkpoint or MLX directory holds, without loading the base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from specstream_cli.options import Revision
from specstream_cli.tables import document
from specstream_cli.terminal import answer, quieten_libraries
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats.places import ADAPTER_WEIGHTS, MODEL_WEIGHTS, Repository, fetch, locate

_WEIGHTS = (*MODEL_WEIGHTS, *ADAPTER_WEIGHTS, "adapter_model.safetensors")


def inspect(
    path: Annotated[
        str | None,
        typer.Argument(
            help="PEFT directory, stream adapter or MLX model, or a repository of one; default: the model shipped here."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same as PATH.")] = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Say what a checkpoint or model directory holds; exit code 3 when something in it is wrong."""
    if path is not None and model is not None:
        raise UsageError("--model: PATH is given already; drop one")
    place = model if path is None else path
    repository = _repository(place, revision)
    quieten_libraries(offline=repository is None, debug=debug)
    with answer() as out:
        from specstream_convert import inspect_checkpoint
        from specstream_mlx import default_model_path

        if repository is not None:
            directory = fetch(repository, weights=_WEIGHTS)
        else:
            directory = Path(place or default_model_path()).expanduser()
        found = inspect_checkpoint(directory).to_dict()
        if as_json:
            out.write_json(found)
        else:
            out.write(document(for_people(found)))
    if found["problems"]:
        raise InvalidInputError("\n".join(found["problems"]))


def _repository(place: str | None, revision: str | None) -> Repository | None:
    """The repository that ``place`` names; None for a path, which may be one of a file.

    Raises:
        UsageError: a revision of something else.
    """
    if place is None:
        if revision is not None:
            raise UsageError("--revision: is of the repository that PATH names; give both or neither")
        return None
    try:
        found = locate(place, revision)
    except InvalidInputError:  # a file, or no path of anything: the inspection says what is wrong
        if revision is not None:
            raise
        return None
    return found if isinstance(found, Repository) else None


def for_people(found: Mapping[str, Any]) -> dict[str, Any]:
    """``found`` without what is empty: large numbers grouped, files with their sizes, streams measured by Medusa."""
    shown: dict[str, Any] = {}
    streams, medusa = found.get("num_stream_parameters"), found.get("num_medusa_parameters")
    for key, value in found.items():
        if value in (None, [], {}):
            continue
        if key == "num_medusa_parameters" and streams:
            shown[key] = f"{value:,} ({medusa / streams:,.0f} times the streams')"
        elif key.endswith("_parameters"):
            shown[key] = f"{value:,}"
        elif key == "adapter_bytes":
            shown[key] = f"{value:,} bytes"
        elif key == "files":
            shown[key] = {name: f"{size:,} bytes" for name, size in value.items()}
        elif key == "streams":
            shown[key] = {name: _described(item) for name, item in value.items()}
        else:
            shown[key] = value
    return shown


def _described(item: Any) -> Any:
    """``{"type": "low_rank", "rank": 8}`` -> ``low_rank, rank 8``."""
    if not isinstance(item, Mapping):
        return item
    facts = [f"{name} {_yes_or_no(value)}" for name, value in item.items() if name != "type"]
    return ", ".join([str(item.get("type")), *facts])


def _yes_or_no(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
