"""How many processors this process may use, and what keeps a child's libraries from more."""

import math
import os
from pathlib import Path

from aegaeon.config import Settings

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")
# What keeps the libraries of a child from threads of their own: those that compute are ours.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
THREAD_ENVIRONMENT = dict.fromkeys(THREAD_VARIABLES, "1") | {"TOKENIZERS_PARALLELISM": "false"}


def compute_threads(settings: Settings) -> int:
    """Return the most threads on which one instance computes: as set, else as many as there are
    processors, which instances that compute at the same time share out."""
    return settings.threads_per_instance or available_processors()


def available_processors() -> int:
    """Processors of the affinity mask, or fewer where a control group allows less; at least 1."""
    allowed = len(os.sched_getaffinity(0))
    quota = quota_processors(CGROUP_QUOTA, CGROUP_V1)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def quota_processors(unified: Path, legacy: Path) -> float | None:
    """The control group's processor quota (may be a fraction), or None without one."""
    try:
        if unified.exists():
            quota, period = unified.read_text(encoding="ascii").split()
        else:
            quota = (legacy / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (legacy / "cpu.cfs_period_us").read_text(encoding="ascii")
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such control group
        return None
