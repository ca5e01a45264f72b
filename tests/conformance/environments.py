"""Where the clients live: a virtual environment and node_modules under build/, made when needed."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HOME = ROOT / "build" / "conformance"
CLIENTS = HERE / "clients"


class Missing(Exception):
    """What a client needs is not there; the message says what."""


def python() -> Path:
    """Return the Python that has the clients of requirements.txt. Raises Missing."""
    wanted = HERE / "requirements.txt"
    home = HOME / f"python-{_digest(wanted)}"
    found = home / "bin" / "python"
    if not (home / "made").exists():
        _run([sys.executable, "-m", "venv", str(home)])
        _run([str(found), "-m", "pip", "install", "-q", "-r", str(wanted)])
        (home / "made").touch()
    return found


def node() -> Path:
    """Return a directory with the clients of package.json and the scripts. Raises Missing."""
    if shutil.which("npm") is None:
        raise Missing("npm is not installed")
    wanted = HERE / "package.json"
    home = HOME / f"node-{_digest(wanted)}"
    if not (home / "made").exists():
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(wanted, home)
        _run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home)])
        (home / "made").touch()
    for script in CLIENTS.glob("*.mjs"):
        shutil.copy(script, home)
    return home


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Missing(f"{' '.join(command[:4])} ... failed: {said[-1] if said else ''}")
