"""CUDA devices (csrc/cuda): memory, copies, the stream that computes."""

from collections.abc import Callable, Sequence
from typing import final

from aegaeon._native.copies import CopyEngine
from aegaeon._native.memory import DeviceBytes
from aegaeon._native.ops import DrawOperand, PagedRows

has_cuda: bool
"""Whether this build has CUDA; without it the functions here raise DeviceError."""

def count_cuda_devices() -> int:
    """Return how many there are. Raises DeviceError, which says why there is none."""

def cuda_total_bytes(number: int) -> int:
    """Return the memory of cuda:`number`, without making anything there. Raises DeviceError."""

def cuda_attend_shared_bytes(head_dim: int, type: int) -> int:
    """Return the shared memory that a block of the attention kernels takes, of keys and values of a
    type code. Raises ValueError for a head_dim that they do not have."""

def cuda_stage_bytes(chunk_bytes: int) -> int:
    """Return the page-locked bytes of a copy engine with such chunks."""

@final
class CudaDevice:
    """A device as this process uses it; what it has made keeps it."""

    def __init__(self, number: int) -> None:
        """Raises DeviceError: no such device, no driver, a build without CUDA."""

    @property
    def number(self) -> int:
        """As in cuda:N."""

    @property
    def stream(self) -> int:
        """The cudaStream_t that computes. Copies start behind all that it had been given when they
        were submitted; so it must not be captured into a graph: capture another one."""

    @property
    def free_bytes(self) -> int:
        """Memory that nobody has. Raises DeviceError."""

    @property
    def total_bytes(self) -> int:
        """All its memory. Raises DeviceError."""

    def synchronize(self) -> None:
        """Wait until the stream has done all that it was given. Raises DeviceError."""

    def allocate(self, size_bytes: int) -> CudaMemory:
        """Return zeroed memory of the device. Raises DeviceError."""

    def open(self, handle: bytes, size_bytes: int) -> CudaPeer:
        """Open the CudaMemory of `size_bytes` that another process made, by its handle. Raises
        DeviceError for none such."""

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability, major and minor. Raises DeviceError."""

    @property
    def block_shared_bytes(self) -> int:
        """Shared memory that a block of threads may ask for. Raises DeviceError."""

    def check(self) -> None:
        """Raise DeviceLost where the device is lost to this process. Waits for nothing."""

    def pin(
        self,
        address: int,
        size_bytes: int,
        is_read_only: bool = False,
        is_wanted: Callable[[], bool] | None = None,
    ) -> str:
        """Page-lock memory of the host, whole pages, so that copies go there at full speed; return
        why not where the system refuses: copies go through a stage then, as of any other memory.

        `is_read_only`: it is mapped so. `is_wanted` is asked before each GiB; False undoes all.
        Raises DeviceLost.
        """

    def unpin(self, address: int) -> None:
        """Undo `pin`, before the memory is unmapped and after all copies there. Nothing happens
        where nothing is locked."""

    def copy_engine(self, chunk_bytes: int) -> CopyEngine:
        """Return an engine between host and device, and within the device. Raises DeviceError,
        CopyError."""

@final
class CudaMemory(DeviceBytes):
    """Memory of a device, given back with the object."""

    @property
    def address(self) -> int:
        """Where it begins, in addresses of the device."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    @property
    def number(self) -> int:
        """The device's, as in cuda:N."""

    def handle(self) -> bytes:
        """Return what another process on the device opens it by. Raises DeviceError."""

@final
class CudaPeer:
    """Another process's memory of the device, for as long as that one keeps it."""

    @property
    def address(self) -> int:
        """Where it begins, in addresses of this process."""

Columns = tuple[int, int, int]  # slot, first column, columns

@final
class CudaStepPlan:
    """A model's step as launches on a device: recorded operator by operator as StepPlan is, of
    weights row by row, then laid out by `finish`. Recording raises ValueError for what does not fit
    together."""

    def __init__(self) -> None:
        """Nothing yet."""

    def input(self, width: int, /) -> int: ...
    def linear(
        self,
        x: Columns,
        parts: Sequence[tuple[int, int, int, int]],
        residual: Columns | None = None,
    ) -> int: ...
    def gated(self, x: Columns, parts: Sequence[tuple[int, int, int, int]], /) -> int: ...
    def rms_norm(self, x: Columns, heads: int, weight: int, eps: float, /) -> int: ...
    def rms_norm_outputs(self, x: Columns, weight: int, eps: float, /) -> int: ...
    def rotate(self, x: Columns, heads: int, cos: Columns, sin: Columns, /) -> int: ...
    def append_kv(self, layer: int, kv_heads: int, keys: Columns, values: Columns, /) -> None: ...
    def attend(self, layer: int, heads: int, queries: Columns, scale: float, /) -> int: ...
    def need_stages(self, stages: int, /) -> None: ...
    def finish(self, result: int) -> None: ...
    @property
    def operators(self) -> int:
        """Launches, and products that are made between them."""

    @property
    def row_bytes(self) -> int:
        """Bytes that a row of all slots takes together."""

    @property
    def identity(self) -> bytes:
        """All that launches depend on beside a pass: two plans with the same launch the same."""

    @property
    def products(
        self,
    ) -> list[list[tuple[tuple[int, int, int], tuple[bool, int, int], tuple[int, int], bool]]]:
        """The factors of each product, x @ weight.T: where x begins, in bytes of a row of all slots
        before it, its type code and columns; whether it goes to the result, else where that begins,
        and its columns; the first column of the factor and how many it has; whether of outputs."""

    def stages_of(self, operator: int, /) -> int:
        """Stages of the weights that it needs."""

    def product_of(self, operator: int, /) -> int | None:
        """Which product is to be made there; None for a launch."""

@final
class CudaPass:
    """A run of a plan: uploads what it begins with, then launches."""

    def __init__(
        self,
        plan: CudaStepPlan,
        rows: PagedRows,
        step: tuple[int, tuple[int, int, int], int, int],
        table: tuple[int, int, int, int],
        bounds: tuple[int, int, int],
        /,
    ) -> None:
        """`step`: rows, addresses of their ids, cosines and sines; outputs, address of their rows.
        `table`: address, vocabulary, type code, and bytes where it lies in the host, else 0.
        `bounds`: rows, as many outputs, and splits of 512 tokens that launches are made for, or
        zeros; the most floats of attention's workspace. What is given stays until `send`.
        Raises ValueError, IndexError."""

    @property
    def upload_bytes(self) -> int:
        """Bytes that `send` sends."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes that attention needs while the pass runs."""

    @property
    def identity(self) -> bytes:
        """All that launches depend on beside the plan, once placed."""

    def place(self, slots: tuple[int, int], result: int, upload: int, workspace: int, /) -> None:
        """Say where all is on the device: of the slots also the rows that each has room for."""

    def send(self, exchange: CudaExchange, /) -> None:
        """Have all that the pass begins with copied to the device. Raises DeviceError."""

    def run(self, stream: int, first: int, stages: int, /) -> int:
        """Launch from operator `first` on; return the first that is a product, or needs more stages
        than `stages`; else how many operators there are. Raises DeviceError."""

@final
class CudaExchange:
    """Page-locked memory by which the small things of each step go and come."""

    def __init__(self, device: CudaDevice, size_bytes: int) -> None:
        """With room for so much of each upload; it grows. Raises DeviceError."""

@final
class CudaGraph:
    """Launches that were recorded."""

    def launch(self, stream: int, /) -> None:
        """Have all done, behind what the stream was given. Raises DeviceError."""

@final
class CudaRecorder:
    """A stream on which launches are recorded instead of done."""

    def __init__(self, device: CudaDevice) -> None:
        """Raises DeviceError."""

    @property
    def stream(self) -> int:
        """The cudaStream_t."""

    def synchronize(self) -> None:
        """Wait until the stream has done all that it was given. Raises DeviceError."""

    def begin(self) -> None:
        """Record from now on; this thread waits for nothing and allocates nothing until `end`.
        Raises DeviceError where the driver refuses."""

    def end(self) -> CudaGraph:
        """Return what was recorded. Raises DeviceError where that was spoilt."""

    def abandon(self) -> None:
        """Give up what is recorded, if anything is."""

@final
class CudaDraws:
    """How the token of each row of logits is drawn."""

    def __init__(self, draws: Sequence[DrawOperand], shape: Sequence[int]) -> None:
        """Draws as of `sample`, a row each of logits of `shape`, (rows, vocab). Raises ValueError
        where rows are not as many."""

    @property
    def room_bytes(self) -> int:
        """Bytes that drawing needs on the device, aligned to 16."""

    def sample(
        self, device: CudaDevice, exchange: CudaExchange, logits: int, room: int, /
    ) -> list[int]:
        """Return the token of each row of float32 logits, in one piece: the CPU's for the same, -1
        where they are not finite. Raises DeviceError."""
