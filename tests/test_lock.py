"""The locked packages: all that pyproject.toml asks for, in its ranges, with hashes and from no named index."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
APART = {"torch"}
"""Not locked with a hash; lock/torch.txt has the reason."""
PLATFORMS = [
    {
        "sys_platform": system,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": python + ".1",
    }
    for system, machine in (("darwin", "arm64"), ("linux", "x86_64"), ("linux", "aarch64"))
    for python, full in (("3.11", "3.11.7"), ("3.12", "3.12.1"), ("3.13", "3.13.0"), ("3.14", "3.14.0"))
]


def locked(name: str) -> list[Requirement]:
    """The requirements of a lock; each must have a pin and a hash."""
    blocks = re.split(r"\n(?=\S)", (ROOT / "lock" / name).read_text(encoding="utf-8"))
    blocks = [block for block in blocks if not block.startswith("#")]
    for block in blocks:
        assert re.match(r"[a-z0-9-]+==\S+ ", block), block
        assert "--hash=sha256:" in block, block
    return [Requirement(block.split("\\")[0]) for block in blocks]


def asked(extra: str | None) -> list[Requirement]:
    """What pyproject.toml asks for, extras that name other extras followed."""
    project = PROJECT["project"]
    found = [] if extra else [Requirement(line) for line in project["dependencies"]]
    for line in project["optional-dependencies"][extra] if extra else ():
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            found += [one for inner in requirement.extras for one in asked(inner)]
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("environment", PLATFORMS, ids=lambda e: "-".join(list(e.values())[:3]))
@pytest.mark.parametrize(("name", "extras"), [("runtime.txt", [None]), ("dev.txt", [None, "dev"])])
def test_the_lock_has_what_the_project_asks_for(name: str, extras: list[str | None], environment: dict) -> None:
    """Red when: pyproject.toml was changed and ``make lock`` not run, or a platform is left out."""
    versions: dict[str, str] = {}
    for requirement in locked(name):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in versions, f"{requirement.name} is locked twice"
            versions[requirement.name] = next(iter(requirement.specifier)).version
    wanted = [one for extra in extras for one in asked(extra)]
    wanted += [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        package = canonicalize_name(requirement.name)
        if package not in APART:
            assert package in versions, f"{package} is missing; run 'make lock'"
            assert versions[package] in requirement.specifier, f"{requirement}: {versions[package]}; run 'make lock'"


def test_the_locks_agree_and_name_no_index() -> None:
    """Red when: ``make test`` would change what ``make demo`` installed, or a CUDA build or an address is locked."""
    runtime, dev = ({str(one) for one in locked(name)} for name in ("runtime.txt", "dev.txt"))
    assert runtime <= dev
    names = {Requirement(line).name for line in dev}
    assert not {name for name in names if name in APART | {"triton"} or name.startswith(("nvidia-", "cuda-"))}
    for file in (ROOT / "lock").iterdir():
        assert not re.search(r"://|--(extra-)?index|--find-links|-f ", file.read_text(encoding="utf-8")), file


def test_the_release_of_pytorch_is_in_the_range() -> None:
    """Red when: the tests' PyTorch is one that the torch extra does not allow."""
    lines = (ROOT / "lock" / "torch.txt").read_text(encoding="utf-8").splitlines()
    (torch,) = (Requirement(line) for line in lines if not line.startswith("#"))
    (allowed,) = (one for one in asked("torch") if one.name == "torch")
    assert next(iter(torch.specifier)).version in allowed.specifier
