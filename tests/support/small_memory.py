"""Programs that find little shared memory."""

import shutil
import subprocess
import sys

import pytest


def run_in_small_memory(directory, size, code, *arguments):
    """Run Python's `code` with `directory` and `arguments`; a tmpfs of `size` is mounted there, for
    it alone. Skips the test where that cannot be done, fails when the code does."""
    unshare = shutil.which("unshare")
    directory.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {directory}"
    if (
        unshare is None
        or subprocess.run([unshare, "-Urm", "sh", "-c", mount], check=False).returncode
    ):
        pytest.skip("no file system may be mounted here")
    run = [unshare, "-Urm", "sh", "-c", f'{mount} && exec "$0" "$@"', sys.executable, "-c", code]
    done = subprocess.run(
        [*run, str(directory), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
