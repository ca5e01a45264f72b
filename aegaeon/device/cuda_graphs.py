"""Steps that are recorded by the driver (CUDA graphs) and launched as one.

A graph holds addresses and sizes, and none of what lies there: whoever has the same launches, a
model that comes back to where its weights were, or another one of its form, takes it as it is.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable

from aegaeon import _native
from aegaeon.errors import DeviceError

log = logging.getLogger(__name__)

# Some hundred launches each, a megabyte or so of the driver's.
MOST_GRAPHS = 64
# Steps that came once or not again; what is kept of one is its key.
MOST_KEYS = 1024

# Launches a step on the stream of this address.
Launch = Callable[[int], None]


class Graphs:
    """Of one device, for one thread at a time."""

    def __init__(self, device: _native.CudaDevice, most: int = MOST_GRAPHS) -> None:
        """Keep the `most` that were used last."""
        self.refusal = ""  # why the driver records nothing, once it has said so
        self.launched = 0  # by graphs
        self._device = device
        self._most = most
        self._recorder: _native.CudaRecorder | None = None
        self._graphs: OrderedDict[Hashable, _native.CudaGraph] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, launch: Launch) -> None:
        """Run the step, of which `key` says all that its launches depend on: by its graph, which is
        recorded when it comes for the second time. Raises DeviceError, and what `launch` raises."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self.launched += 1
            graph.launch(self._device.stream)
        elif self.refusal or not self._has_met(key):
            launch(self._device.stream)
        else:
            self._record(key, launch)

    def refuse(self, why: str) -> None:
        """Record none from now on."""
        self.refusal = why
        log.warning("steps are launched one by one, the driver records none error=%s", why)

    def _has_met(self, key: Hashable) -> bool:
        if key in self._met:
            return True
        self._met[key] = None
        if len(self._met) > MOST_KEYS:
            self._met.popitem(last=False)
        return False

    def _record(self, key: Hashable, launch: Launch) -> None:
        """Run the step on the stream that records, and then have it recorded there: who multiplies
        may allocate what it needs of a stream at its first use, and not while it is recorded."""
        try:
            if self._recorder is None:
                self._recorder = _native.CudaRecorder(self._device)
        except DeviceError as error:
            self.refuse(str(error))
            launch(self._device.stream)
            return
        recorder = self._recorder
        self._device.synchronize()
        try:
            launch(recorder.stream)
        finally:
            recorder.synchronize()
        try:
            recorder.begin()
            launch(recorder.stream)
            graph = recorder.end()
        except (DeviceError, RuntimeError) as error:
            recorder.abandon()
            self.refuse(str(error))
            return
        del self._met[key]
        self._graphs[key] = graph
        if len(self._graphs) > self._most:
            # Whatever it was given is behind us: tokens have been drawn since.
            self._graphs.popitem(last=False)
