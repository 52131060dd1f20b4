"""Print the Python that a make target runs with, after installing what that Python lacks.

A Python whose torch, triton and cupy work on a GPU is taken as it is. Where it lacks a package that the target needs,
an environment on top of it gets that package and nothing else. Any other machine gets an environment of its own with
everything in constraints.txt. Either way a second run installs nothing and needs no network.

Standard library only; progress goes to stderr.

    python3 scripts/bootstrap.py compare|gpu|test|check
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
ENVIRONMENT = ROOT / ".venv"
ENVIRONMENT_PYTHON = ENVIRONMENT / "bin" / "python"
STAMP = ENVIRONMENT / "bootstrap.stamp"

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "compare": ("gpu",),
    "gpu": ("gpu", "test"),
    "test": ("gpu", "test"),
    "check": ("gpu", "check"),
}
"""Which optional dependencies of pyproject.toml a target needs. The notebook tools are no target's: the test that
executes notebooks is skipped without them."""

GPU_LIBRARIES = ("torch", "triton", "cupy")
GPU_PROBE = "import torch, triton, cupy; torch.zeros(1, device='cuda'); cupy.cuda.Device(0).compute_capability"


def distribution(requirement: str) -> str:
    """The name in a requirement: `torch` in `torch>=2.11`."""
    return re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0]


def requirements(extras: Iterable[str]) -> dict[str, str]:
    """Distribution name -> requirement, for the project and its `extras`, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [entry for extra in extras for entry in project["optional-dependencies"][extra]]
    return {distribution(entry): entry for entry in wanted}


def pins() -> dict[str, str]:
    """Distribution name -> the line of constraints.txt that pins it."""
    lines = (line.strip() for line in CONSTRAINTS.read_text().splitlines())
    return {distribution(line): line for line in lines if line and not line.startswith("#")}


def missing(wanted: Iterable[str], path: list[str]) -> list[str]:
    """The `wanted` distributions that are not on `path`, GPU libraries aside: GPU_PROBE looks for those."""
    installed = {found.name.lower().replace("_", "-") for found in metadata.distributions(path=path)}
    return [name for name in wanted if name not in installed and not name.startswith(GPU_LIBRARIES)]


def run(*command: str | Path) -> None:
    """Run `command` with its output on stderr; end with its exit status when it fails."""
    print("+", *command, file=sys.stderr, flush=True)
    status = subprocess.run([str(word) for word in command], stdout=sys.stderr, cwd=ROOT).returncode
    if status:
        sys.exit(status)


def install(*arguments: str | Path) -> None:
    """pip install into the environment."""
    run(ENVIRONMENT_PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def stamp(kind: str) -> str:
    """A digest of everything that decides what the environment holds; it is written when the environment is whole."""
    files = (Path(__file__), ROOT / "pyproject.toml", CONSTRAINTS)
    content = b"\0".join(file.read_bytes() for file in files)
    return hashlib.sha256(f"{kind}\0{sys.executable}\0{sys.version}\0".encode() + content).hexdigest()


def stamped(kind: str) -> bool:
    """Whether the environment is there, whole, of this kind and of this checkout."""
    return STAMP.is_file() and STAMP.read_text() == stamp(kind)


def on_top_of_this_python(wanted: Iterable[str]) -> Path:
    """An environment that sees all packages of this Python and adds those of `wanted` that are missing."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = ENVIRONMENT / "lib" / version / "site-packages"
    kept = ENVIRONMENT / "kept.txt"
    if not stamped("on top"):
        run(sys.executable, "-m", "venv", "--clear", ENVIRONMENT)
        # --system-site-packages would miss the packages of a Python that is itself a virtual environment's.
        below = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
        (packages / "below.pth").write_text("".join(f"import site; site.addsitedir({entry!r})\n" for entry in below))
        # What this Python has stays as it is, whatever a missing package would rather have.
        kept.write_text("".join(f"{found.name}=={found.version}\n" for found in metadata.distributions(path=below)))
        STAMP.write_text(stamp("on top"))
    names = missing(wanted, [*sys.path, str(packages)])
    if names:
        install("--constraint", kept, *(pins()[name] for name in names))
    return ENVIRONMENT_PYTHON


def of_its_own() -> Path:
    """An environment with all that constraints.txt names, in those versions, and the `workbench` command."""
    if not stamped("own"):
        run(sys.executable, "-m", "venv", "--clear", ENVIRONMENT)
        install(pins()["torch"])  # first and alone: takes the build for this machine, which nothing later replaces
        install("--no-deps", "--requirement", CONSTRAINTS)
        install("--no-deps", "--no-build-isolation", "--editable", ROOT)
        STAMP.write_text(stamp("own"))
    return ENVIRONMENT_PYTHON


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        sys.exit(f"target: expected one of {', '.join(EXTRAS)}, got {' '.join(sys.argv[1:])!r}")
    wanted = list(requirements(EXTRAS[sys.argv[1]]))
    if subprocess.run([sys.executable, "-c", GPU_PROBE], capture_output=True).returncode:
        print(of_its_own())
    elif missing(wanted, sys.path):
        print(on_top_of_this_python(wanted))
    else:
        print(sys.executable)


if __name__ == "__main__":
    main()
