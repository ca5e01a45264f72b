"""schemathesis over our own OpenAPI document: no answer is a 5xx, and every one is in shape."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from probe import BASE_URL, KEY, feature, main

SECONDS = os.environ.get("CONFORMANCE_FUZZ_S", "60")
CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance,ignored_auth"


@feature("no 5xx, all errors in shape")
def _fuzz() -> None:
    report = Path(tempfile.mkdtemp()) / "report.json"
    command = ["st", "run", f"{BASE_URL}/openapi.json", "--max-time", SECONDS, "--checks", CHECKS]
    command += ["-H", f"Authorization: Bearer {KEY}", "--continue-on-failure", "--no-color"]
    command += ["--report-json-path", str(report), "--suppress-health-check", "all"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=float(SECONDS) * 4 + 60, check=False
    )
    if done.returncode:
        failures = [line for line in done.stdout.splitlines() if line.startswith("- ")]
        said = done.stdout[-300:] + done.stderr[-300:]
        raise AssertionError("; ".join(sorted(set(failures))) or said)
    assert json.loads(report.read_text())


if __name__ == "__main__":
    main()
