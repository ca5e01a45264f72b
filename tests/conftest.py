"""One compute thread in tests and what they start: small products gain nothing from more, and
OpenMP teams that spin beside other processes lose much. Set before anything imports torch."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
