"""On the path of a server, Python begins each of its processes with this: they find the stand-in
where they look for a CUDA device, until they end."""

from contextlib import ExitStack

from tests.support.cuda_device import STAND_IN, use_cuda

KEPT = ExitStack()
KEPT.enter_context(use_cuda(STAND_IN))
