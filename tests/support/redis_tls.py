"""Certificates of one's own, and a Redis server that shows one and asks for one."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.redis_server import BINARY

CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def require_tls() -> None:
    """Skip the test where openssl is missing, or redis-server cannot speak TLS."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, so there are no certificates")
    assert BINARY is not None
    linked = subprocess.run(
        [BINARY, "--port", "0", "--tls-replication", "maybe"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if "yes" not in linked.stdout + linked.stderr:  # what it may be, where it is known
        pytest.skip("this redis-server is built without TLS")


class Certificates:
    """An authority `ca.pem` in `directory`, and what it signs."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.ca, key = directory / "ca.pem", directory / "ca.key"
        self._openssl(
            *("req", "-x509", *CURVE, "-keyout", str(key), "-out", str(self.ca)),
            *("-days", "2", "-subj", "/CN=authority of a test"),
        )

    def sign(self, name: str, alternative: str = "IP:127.0.0.1") -> tuple[Path, Path]:
        """Return a certificate and its key."""
        paths = [self._directory / f"{name}.{end}" for end in ("pem", "key", "csr", "ext")]
        certificate, key, request, extension = paths
        extension.write_text(f"subjectAltName={alternative}\n")
        subject = ("-subj", f"/CN={name}")
        self._openssl("req", *CURVE, "-keyout", str(key), "-out", str(request), *subject)
        self._openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAcreateserial"),
            *("-CAkey", str(self.ca.with_suffix(".key")), "-out", str(certificate)),
            *("-days", "2", "-extfile", str(extension)),
        )
        return certificate, key

    def server_flags(self, asks: bool, alternative: str = "IP:127.0.0.1") -> tuple[str, ...]:
        """Return the flags of a server that shows a certificate; it `asks` for one or does not."""
        certificate, key = self.sign("server", alternative)
        return (
            *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
            *("--tls-ca-cert-file", str(self.ca), "--tls-auth-clients", "yes" if asks else "no"),
        )

    @staticmethod
    def _openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], capture_output=True, timeout=20, check=True)
