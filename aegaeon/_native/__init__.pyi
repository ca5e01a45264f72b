"""Shared memory, weights, copies, operators and process control, written in C++ (csrc/).

Paths are absolute file paths, in practice under /dev/shm. Times are seconds; leases and deadlines
run on CLOCK_MONOTONIC, the clock of time.monotonic. Errors are the classes of aegaeon.errors.
Waits release the GIL and run Python's signal handlers at least every 50 ms.

One module at run time; described here by area.
"""

from aegaeon._native.copies import *
from aegaeon._native.cuda import *
from aegaeon._native.limits import *
from aegaeon._native.memory import *
from aegaeon._native.ops import *
from aegaeon._native.process import *
from aegaeon._native.relay import *
from aegaeon._native.shm import *
