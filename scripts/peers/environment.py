"""The Python of a peer: an environment of its own, with the versions that stand in the file of requirements beside this."""
import json
import pathlib
import re
import shutil
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHONS = {"trl": ("3.11", "3.12", "3.13"), "tunix": ("3.12",)}  # the first that is found
_ASK = "import importlib.metadata as m, json, sys; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"


def requirements(peer: str) -> pathlib.Path:
    """The file that pins what a peer is measured with."""
    return HERE / f"{peer}.txt"


def pins(peer: str) -> dict[str, str]:
    """Package -> version."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", requirements(peer).read_text(), re.MULTILINE))


def version(peer: str) -> str:
    """Of the peer itself, which its file names first."""
    return next(iter(pins(peer).values()))


def python_of(peer: str, environments: str = "") -> pathlib.Path:
    """The Python that a peer runs in, with all pinned versions.

    Args:
      peer: "trl" or "tunix".
      environments: a folder with an environment of that name, used as it is; "" makes `.venv-peer-<name>` here, once.

    Raises:
      ValueError: for another version of a pinned package, or none.
      RuntimeError: if the environment cannot be made.
    """
    folder = pathlib.Path(environments) / peer if environments else ROOT / f".venv-peer-{peer}"
    python = folder / "bin" / "python"
    if not environments and not _is_made(peer, folder):
        _make(peer, folder)
    if not python.is_file():
        raise ValueError(f"--environments={environments}: there is no {python}. Leave it out, and an environment is made.")
    check(peer, python)
    return python


def check(peer: str, python: pathlib.Path) -> None:
    """Refuses a Python whose packages are not the pinned ones.

    Raises:
      ValueError: naming each of them.
    """
    found = json.loads(subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True).stdout)
    wrong = [f"{name} {found.get(name, 'is missing')} instead of {version}" for name, version in pins(peer).items()
             if found.get(name, "").split("+")[0] != version]  # behind the plus stands who built it
    if wrong:
        raise ValueError(f"{python} has {', '.join(wrong)}: {requirements(peer).name} says what {peer} is measured with. "
                         "Remove that environment and leave out --environments: a right one is made.")


def _is_made(peer: str, folder: pathlib.Path) -> bool:
    stamp = folder / ".installed"
    return stamp.is_file() and stamp.read_text() == requirements(peer).read_text()


def _make(peer: str, folder: pathlib.Path) -> None:
    find = ["bash", "-c", 'source scripts/environment.sh && find_python "$@"', "bash", *PYTHONS[peer]]
    found = subprocess.run(find, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    if not found:
        raise RuntimeError(f"{peer} needs Python {' or '.join(PYTHONS[peer])}, and none was found on the path or among "
                           f"pyenv's versions: install one (pyenv install {PYTHONS[peer][0]}).")
    python, file = folder / "bin" / "python", requirements(peer)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", file]
    for command in ([found, "-m", "venv", "--clear", folder], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise RuntimeError(f"{peer}: {' '.join(map(str, command))} failed:\n{done.stderr}")
    (folder / ".installed").write_text(file.read_text())
