"""Small breaks of the code, each with the test that must notice it; one module for each area.

The command is ``scripts/with-openblas python -m tests.breaks [NAME ...]``.
"""

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "specstream_mlx"


@dataclass(frozen=True)
class Break:
    """In one function, replace ``old`` by ``new``; ``test`` must fail.

    Attributes:
        where: the function below ``specstream_mlx``, as in "engine.sampling.TargetSampler.draw", or a module.
        old: what stands there once; any whitespace in it stands for any other, so lines may be moved and wrapped.
        new: what breaks.
        test: the name of a test function, or how it begins, and what else ``pytest -k`` is given, as in
            "test_batches and opt".
    """

    name: str
    where: str
    old: str
    new: str
    test: str

    @cached_property
    def _file_and_names(self) -> tuple[Path, list[str]]:
        """The module's file in the repository, and the names that lead to the function in it."""
        parts = self.where.split(".")
        for length in range(len(parts), 0, -1):
            file = Path(PACKAGE, *parts[:length]).with_suffix(".py")
            if (ROOT / file).exists():
                return file, parts[length:]
        raise ValueError(f"{self.name}: no module {self.where}")

    @property
    def file(self) -> Path:
        """Below the root of the repository."""
        return self._file_and_names[0]

    def applied(self, text: str) -> str:
        """The module's text with the break in it.

        Raises:
            ValueError: the function is not there, or what breaks stands in it never or more than once.
        """
        begin, end = self._span(text)
        pattern = r"\s+".join(map(re.escape, self.old.split()))
        found = list(re.finditer(pattern, text[begin:end]))
        if len(found) != 1:
            raise ValueError(f"{self.name}: {self.where} holds the text to break {len(found)} times")
        return text[: begin + found[0].start()] + self.new + text[begin + found[0].end() :]

    def _span(self, text: str) -> tuple[int, int]:
        """Where the function begins and ends."""
        node: ast.AST = ast.parse(text)
        lines = [0]
        for line in text.splitlines(keepends=True):
            lines.append(lines[-1] + len(line))
        begin, end = 0, len(text)
        for name in self._file_and_names[1]:
            parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.FunctionDef | ast.ClassDef)]
            inner = [child for child in parts if child.name == name]
            if len(inner) != 1:
                raise ValueError(f"{self.name}: {len(inner)} times {name} in {self.where}")
            node = inner[0]
            begin, end = lines[inner[0].lineno - 1], lines[inner[0].end_lineno or 0]
        return begin, end

    @property
    def test_file(self) -> Path:
        """The file of the test, below the root of the repository.

        Raises:
            ValueError: no file, or more than one, has such a test.
        """
        head = re.compile(rf"^def {self.test.split()[0]}\w*\(", re.MULTILINE)
        files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if head.search(file.read_text("utf-8"))]
        if len(files) != 1:
            raise ValueError(f"{self.name}: {len(files)} files have the test {self.test}")
        return files[0].relative_to(ROOT)
