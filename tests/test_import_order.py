"""The rooms of the runtime: a module imports only from rooms above its own, and nothing imports in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

import specstream_mlx

SOURCE = Path(specstream_mlx.__file__).parent
ROOMS = (
    ("errors", "options"),
    ("formats",),
    ("bundled",),
    ("families",),
    ("target",),
    ("drafters",),
    ("planning",),
    ("models",),
    ("engine",),
    ("calibration",),
    ("training",),
    ("serving",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
OUTSIDE = ("__init__", "__main__")  # public names, which are imported when asked for; the program
SPEAK_OF_INSERTION = ("drafters/streams/", "options.py", "planning/")  # a word of streams alone


def module_name(file):
    """``target.masks``; a package goes by its own name."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)


MODULES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}


def imported_by(name):
    """The modules of the runtime that one imports anywhere: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert "specstream_mlx" not in names, f"{name}, line {node.lineno}: say what is imported"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: write the import in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        ours = (n.removeprefix("specstream_mlx.") for n in names if n.startswith("specstream_mlx."))
        homes = (specstream_mlx._HOMES.get(n, n) for n in ours if n != "__version__")
        found |= {home if home in MODULES else home.rpartition(".")[0] for home in homes}
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name not in OUTSIDE])
def test_a_module_imports_only_from_rooms_above_its_own(name):
    """Red when: a room imports one below it, or a new room has no place in the table."""
    level = LEVEL[name.partition(".")[0]]
    assert [other for other in sorted(imported_by(name)) if LEVEL[other.partition(".")[0]] > level] == []


def test_nothing_imports_in_a_circle():
    """Red when: two modules need each other, be it by an import in a function."""
    graph = {name: imported_by(name) for name in MODULES if name not in OUTSIDE}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


def test_no_room_but_the_streams_own_speaks_of_insertion():
    """Red when: another module asks how streams are run; what differs between drafters is data, such as a way."""
    speaking = [
        file.relative_to(SOURCE).as_posix()
        for file in MODULES.values()
        if "insertion" in file.read_text("utf-8").lower()
    ]
    assert [file for file in speaking if not file.startswith(SPEAK_OF_INSERTION)] == []
