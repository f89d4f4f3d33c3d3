"""``specstream-mlx inspect``: what a checkpoint or MLX directory holds, without loading the base."""

from pathlib import Path
from typing import Annotated

import typer

from specstream_cli.tables import document
from specstream_cli.terminal import answer, quieten_libraries
from specstream_cli.validation import invalid_input, usage_error


def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(help="PEFT directory, stream adapter or MLX model; default: the model shipped here."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The same as PATH.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Say what a checkpoint or model directory holds; exit code 3 when something in it is wrong."""
    if path is not None and model is not None:
        raise usage_error("--model: PATH is given already; drop one")
    quieten_libraries(offline=True, debug=debug)
    with answer() as out:
        place = path or model
        if place is None:
            from specstream_mlx import default_model_path

            place = Path(default_model_path())
        from specstream_convert import inspect_checkpoint

        found = inspect_checkpoint(place.expanduser()).to_dict()
        if as_json:
            out.write_json(found)
        else:
            out.write(document({key: value for key, value in found.items() if value not in (None, [], {})}))
    if found["problems"]:
        raise invalid_input("\n".join(found["problems"]))
