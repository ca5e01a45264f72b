"""Steps that are recorded by the driver (CUDA graphs) and launched as one.

A graph holds addresses and sizes, and none of what lies there: whoever has the same launches, a
model that comes back to where its weights were, or another one of its form, takes it as it is.
"""

from __future__ import annotations  # a build without CUDA lacks the names

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable

from aegaeon import _native
from aegaeon.errors import DeviceError, DeviceLost

log = logging.getLogger(__name__)

# Some hundred launches each, a megabyte or so of the driver's.
MOST_GRAPHS = 64
# Steps that came once or not again; what is kept of one is its key.
MOST_KEYS = 1024
# In a row, of steps that could not be recorded: the next could not, either.
MOST_FAILURES = 3

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
        # Of those, the ones that could not be recorded are True.
        self._met: OrderedDict[Hashable, bool] = OrderedDict()
        self._failures = 0  # in a row

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, launch: Launch) -> None:
        """Run the step, of which `key` says all that its launches depend on: by its graph, which is
        recorded when it comes for the second time. What fails of that is no failure of the step:
        it is launched then. Raises DeviceError, and what `launch` raises."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            self.launched += 1
            graph.launch(self._device.stream)
        elif self.refusal or not self._is_due(key):
            launch(self._device.stream)
        else:
            self._record(key, launch)

    def refuse(self, why: str) -> None:
        """Record none from now on."""
        self.refusal = why
        log.warning("steps are launched one by one, the driver records none error=%s", why)

    def warm_up(self, launch: Launch) -> None:
        """Launch on each stream that steps will have, and wait: whoever multiplies allocates what
        it needs of a stream at its first use. Raises DeviceError, and what `launch` raises."""
        launch(self._device.stream)
        self._device.synchronize()
        try:
            recorder = self._open_recorder()
        except DeviceLost:
            raise
        except DeviceError as error:
            self.refuse(str(error))
            return
        launch(recorder.stream)
        recorder.synchronize()

    def _is_due(self, key: Hashable) -> bool:
        if key in self._met:
            return not self._met[key]
        self._met[key] = False
        if len(self._met) > MOST_KEYS:
            self._met.popitem(last=False)
        return False

    def _open_recorder(self) -> _native.CudaRecorder:
        if self._recorder is None:
            self._recorder = _native.CudaRecorder(self._device)
        return self._recorder

    def _record(self, key: Hashable, launch: Launch) -> None:
        """Run the step on the stream that records, and then have it recorded there: who multiplies
        may allocate what it needs of a stream at its first use, and not while it is recorded."""
        self._device.synchronize()
        try:
            recorder = self._open_recorder()
            launch(recorder.stream)
            recorder.synchronize()
        except (DeviceError, RuntimeError) as error:
            self._give_up(key, error)
            if self._recorder is not None:
                # What was launched of the step writes to where it is about to be run.
                self._recorder.synchronize()
            launch(self._device.stream)
            return
        try:
            recorder.begin()
            launch(recorder.stream)
            graph = recorder.end()
        except (DeviceError, RuntimeError) as error:
            recorder.abandon()
            self._give_up(key, error)
            return
        self._failures = 0
        del self._met[key]
        self._graphs[key] = graph
        if len(self._graphs) > self._most:
            # Whatever it was given is behind us: tokens have been drawn since.
            self._graphs.popitem(last=False)

    def _give_up(self, key: Hashable, error: Exception) -> None:
        """Record this step no more, nor any where none can be. Raises DeviceLost."""
        if isinstance(error, DeviceLost):
            raise error
        self._device.check()  # torch tells of a lost device in words of its own
        self._met[key] = True
        self._failures += 1
        log.info("a step is not recorded error=%s", error)
        if self._failures == MOST_FAILURES:
            self.refuse(str(error))
