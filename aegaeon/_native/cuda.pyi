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

# The operators of aegaeon.device.base on a device. Each is launched on its stream and returns at
# once; addresses are the device's, float32 rows lie `stride` floats apart.

Strided = tuple[int, int]  # address, stride

def cuda_embed(
    device: CudaDevice,
    token_ids: int,
    shape: Sequence[int],
    table: tuple[int, int, int],
    out: int,
    /,
) -> None:
    """Gather rows of a table (address, vocab, type code), row by row, into `out` of `shape`, (rows,
    features). A row of an id outside the table becomes NaN."""

def cuda_rms_norm(
    device: CudaDevice, x: Strided, shape: Sequence[int], weight: int, eps: float, out: int, /
) -> None:
    """Norm x of `shape`, (rows, heads, features)."""

def cuda_rotate(
    device: CudaDevice, x: Strided, shape: Sequence[int], angles: tuple[int, int], out: int, /
) -> None:
    """Rotate x of `shape`, (rows, heads, head_dim), by `angles`, (cos, sin)."""

def cuda_silu_mul(
    device: CudaDevice, gate: Strided, up: Strided, shape: Sequence[int], out: int, /
) -> None:
    """Make silu(gate) * up of `shape`, (rows, features)."""

@final
class CudaDraws:
    """How the token of each row of logits is drawn: a buffer of bytes, to be put on the device."""

    def __init__(self, draws: Sequence[DrawOperand], shape: Sequence[int]) -> None:
        """Draws as of `sample`, a row each of logits of `shape`, (rows, vocab). Raises ValueError
        where rows are not as many."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """The bytes."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes that drawing needs on the device while it runs, aligned to 16."""

    def sample(
        self, device: CudaDevice, logits: int, places: tuple[int, int], tokens: int, /
    ) -> None:
        """Draw from float32 logits, in one piece, into int64 `tokens` [rows]: the CPU's for the
        same logits, -1 where they are not finite. `places`: where the draws and the workspace are
        on the device."""

@final
class CudaTables:
    """What a pass must know of its keys and values: a buffer of int32 words, to be put on the
    device."""

    def __init__(self, rows: PagedRows, heads: int) -> None:
        """Of so many query heads. Raises ValueError where they share KV heads unevenly."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """The words."""

    @property
    def workspace_floats(self) -> int:
        """Floats that attention needs on the device while it runs."""

    def place(self, words: int, workspace: int) -> None:
        """Say where words and workspace are on the device. They stay there for the pass."""

    def append_kv(
        self, device: CudaDevice, layer: int, count: int, keys: Strided, values: Strided, /
    ) -> None:
        """Store the keys and values of `count` rows."""

    def attend(
        self, device: CudaDevice, layer: int, queries: tuple[int, int], scale: float, out: int, /
    ) -> None:
        """Attend with `queries`, (address, rows). Raises ValueError for a head_dim that the kernels
        do not have: they have 64, 96, 128 and 256."""
