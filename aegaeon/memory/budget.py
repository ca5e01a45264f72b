"""The byte layout of a node: who may hold how much, from the settings and the machine. No torch.

Whether the machine has the room is room.py's business.
"""

from collections.abc import Callable, Sequence

import msgspec

from aegaeon.config import Settings
from aegaeon.device.processors import compute_threads
from aegaeon.errors import BudgetTooSmall
from aegaeon.memory.cuda_room import cuda_workspace_bytes
from aegaeon.memory.front import tokenizer_bytes
from aegaeon.memory.machine import Machine, read_machine, with_device
from aegaeon.memory.workspace import sampling_bytes
from aegaeon.models.config import config_of
from aegaeon.types import ModelSpec

# Of memory, where the settings leave it open; less where that is more than there is.
WEIGHT_SHARE = 0.6
KV_SHARE = 0.1
DEVICE_SHARE = 0.25
# Of the memory of a device itself; the rest is for its driver, kernels and what else uses it.
CUDA_SHARE = 0.9
# The least a sequence is good for: a prompt and an answer of a few sentences.
LEAST_SEQUENCE_TOKENS = 256
# Times that a chosen quota holds: slabs of one size for all models leave some of it unused.
LEAST_SEQUENCES = 2
# A load: so many that the disk's queue stays full while some of them pack. A chunk is read into one
# buffer and packed by slices.
READER_THREADS = 8
READER_CHUNK_BYTES = 4 << 20
READER_SLICE_BYTES = 128 << 10
READER_SLICES = 2
# Copies between host and device; a chunk of each thread is on its way.
COPY_THREADS = 1
COPY_CHUNK_BYTES = 1 << 20
# By a CUDA device itself. Of 10 us that a copy may take before its first byte, chunks of 4 MiB lose
# 12 % of PCIe 5 (55 GB/s), these 3 %; and what is urgent waits for three of them, 2 ms at the
# 25 GB/s of PCIe 4, which is less than a step.
CUDA_CHUNK_BYTES = 16 << 20
CUDA_STAGE_CHUNKS = 6  # csrc/cuda/copies.h, of the host
CUDA_SCRATCH_CHUNKS = 2  # likewise, of the device
# Interpreter and libraries of a process (measured: 150 MB with torch).
PROCESS_BYTES = 200_000_000
# What follows schemas, a process that an instance starts for the first one: interpreter and
# library, and for each token of a vocabulary that it keeps (measured: 27 MB; 86 MB with one of
# 49,152 tokens and 20 grammars). Its bound, in addresses, is on what the grammars of strangers may
# make of it; most of that is never asked for.
GRAMMAR_HOST_BYTES = 40_000_000
GRAMMAR_TOKEN_BYTES = 1200
GRAMMAR_VOCABULARIES = 4
GRAMMAR_HOST_MOST_BYTES = 3 << 29
# The table, the mailboxes, and the directories of cache and pool.
SHARED_RESERVE_BYTES = 64 << 20
PAGE_BYTES = 4096
# Of memory, left to the system when shares are chosen.
HEADROOM_SHARE = 0.05
SCALE_STEPS = 50  # halvings of the interval in which a scale is looked for
GB = 1e9


class Budgets(msgspec.Struct, frozen=True):
    """What one instance may use.

    `weight_bytes` are those of the node's cache, which all instances share; `kv_bytes` its quota of
    the node's pool. The device areas are in the device's own memory, `staged` has them in this
    host's (`is_device_in_host`). `workspace_bytes` are the host's, `device_workspace_bytes` those
    that a device takes beside its one allocation. `grammar_host_bytes` are of the process that
    follows schemas, at rest.
    """

    weight_bytes: int
    kv_bytes: int
    threads: int
    device_weight_bytes: int = 0
    device_kv_bytes: int = 0
    stage_bytes: int = 0
    workspace_bytes: int = 0
    device_workspace_bytes: int = 0
    grammar_host_bytes: int = 0
    is_device_in_host: bool = True

    @property
    def device_bytes(self) -> int:
        """Bytes of the device's one allocation."""
        return self.device_weight_bytes + self.device_kv_bytes

    @property
    def private_bytes(self) -> int:
        """Bytes that are in no shared memory, its process included."""
        device = self.device_bytes if self.is_device_in_host else 0
        own = device + self.stage_bytes + self.workspace_bytes
        return own + PROCESS_BYTES + self.grammar_host_bytes


class NodeBudget(msgspec.Struct, frozen=True):
    """The layout of a node whose `instances` are all alike."""

    instances: int
    instance: Budgets
    tokenizer_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight cache."""
        return self.instance.weight_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pool, all quotas together."""
        return self.instances * self.instance.kv_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes in /dev/shm."""
        return self.weight_bytes + self.kv_bytes + SHARED_RESERVE_BYTES

    @property
    def front_bytes(self) -> int:
        """Bytes of the supervisor, the proxy and its tokenizers."""
        return PROCESS_BYTES + self.tokenizer_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of everything."""
        return self.shared_bytes + self.front_bytes + self.instances * self.instance.private_bytes


def choose_budgets(
    settings: Settings, specs: Sequence[ModelSpec], machine: Machine | None = None
) -> Budgets:
    """Return the budgets of one instance. Raises BudgetTooSmall as `lay_out`.

    Whether the machine has room is not asked: what other instances hold already would count twice.
    """
    if machine is None:
        machine = read_machine()
        if not settings.device_memory_gb:
            machine = with_device(machine, settings)
    return lay_out(settings, specs, machine).instance


def lay_out(settings: Settings, specs: Sequence[ModelSpec], machine: Machine) -> NodeBudget:
    """Lay out the node's bytes: what is set, and shares of `machine` for what is left open.

    A share holds at least the largest model or one sequence, even where there is no room for it:
    room.py says so then. Raises BudgetTooSmall with the numbers when what is set holds less.
    """
    beside = device_workspace_bytes(settings, specs)
    settings = _with_device_share(settings, machine, beside)
    has_own, is_in_host = settings.has_own_memory, settings.cuda_number is None
    stage = _stage_bytes(settings)
    workspace = workspace_bytes(settings, specs) if is_in_host else 0
    grammars = grammar_host_bytes(specs)
    private_bytes = stage + workspace + PROCESS_BYTES + grammars
    tokenizers = tokenizer_bytes(specs)
    beside_parts = SHARED_RESERVE_BYTES + PROCESS_BYTES + tokenizers
    memory_room = int((1 - HEADROOM_SHARE) * machine.memory_bytes) - (
        beside_parts + settings.instance_count * private_bytes
    )
    parts = _parts(settings, specs, machine)
    shared_room = machine.shared_free_bytes - SHARED_RESERVE_BYTES
    # What the host has no part in must not count against its room.
    elsewhere = 0 if is_in_host else settings.instance_count * round(settings.device_memory_gb * GB)
    rooms = shared_room, memory_room + elsewhere
    cache_bytes, kv_bytes, device_bytes = _fit(parts, largest_bytes(specs), *rooms)
    if has_own:
        check_device(device_bytes, kv_bytes, specs)
    budgets = Budgets(
        weight_bytes=cache_bytes,
        kv_bytes=kv_bytes,
        threads=compute_threads(settings),
        device_weight_bytes=device_bytes - kv_bytes if has_own else 0,
        device_kv_bytes=kv_bytes if has_own else 0,
        stage_bytes=stage,
        workspace_bytes=workspace,
        device_workspace_bytes=beside,
        grammar_host_bytes=grammars,
        is_device_in_host=is_in_host,
    )
    check_budgets(budgets, specs)
    return NodeBudget(settings.instance_count, budgets, tokenizers)


class _Part(msgspec.Struct, frozen=True):
    """Bytes of which a node has `count` times as many: as set, else a share with a least size."""

    set_gb: float
    share_bytes: float
    least_bytes: int
    count: int = 1

    def scaled(self, scale: float, least_bytes: int = 0) -> int:
        """Return the bytes. Only a share is scaled, to whole pages."""
        if self.set_gb:
            return round(self.set_gb * GB)
        wanted = int(self.share_bytes * scale) // PAGE_BYTES * PAGE_BYTES
        return _pages(max(wanted, self.least_bytes, least_bytes))


def _parts(
    settings: Settings, specs: Sequence[ModelSpec], machine: Machine
) -> tuple[_Part, _Part, _Part]:
    """Return what the settings leave to choose: weight cache, KV quota, device."""
    count = settings.instance_count
    kv_share = KV_SHARE * machine.memory_bytes / count
    least_kv = LEAST_SEQUENCES * least_kv_bytes(specs)
    if settings.has_own_memory and settings.device_memory_gb:
        # A device that is set small is not to be filled with KV alone, nor over the largest model.
        device_bytes = settings.device_memory_gb * GB
        beside = int(device_bytes - largest_bytes(specs)) // PAGE_BYTES * PAGE_BYTES
        least_kv = min(least_kv, max(least_kv_bytes(specs), beside))
        kv_share = min(kv_share, KV_SHARE / DEVICE_SHARE * device_bytes, max(0, beside))
    cache_share, weights_least = WEIGHT_SHARE * machine.memory_bytes, largest_bytes(specs)
    device_share = DEVICE_SHARE * machine.memory_bytes / count if settings.has_own_memory else 0
    return (
        _Part(settings.model_cache_budget_gb, cache_share, weights_least),
        _Part(settings.kv_budget_gb, kv_share, least_kv, count),
        _Part(settings.device_memory_gb, device_share, 0, count),
    )


def _fit(
    parts: tuple[_Part, _Part, _Part], largest: int, shared_room: int, memory_room: int
) -> tuple[int, int, int]:
    """Return the bytes of cache, quota and device: shares scaled to fit in both rooms beside what
    is set and what the least sizes take. A device holds its quota and the `largest` model."""
    cache, kv, device = parts

    def shared(scale: float) -> int:
        return cache.scaled(scale) + kv.count * kv.scaled(scale)

    shared_scale = _largest_scale(lambda scale: shared(scale) <= shared_room)

    def sizes(scale: float) -> tuple[int, int, int]:
        kv_bytes = kv.scaled(min(scale, shared_scale))
        on_device = 0
        if device.share_bytes:
            on_device = device.scaled(scale, kv_bytes + largest)
        return cache.scaled(min(scale, shared_scale)), kv_bytes, on_device

    def fits(scale: float) -> bool:
        cache_bytes, kv_bytes, on_device = sizes(scale)
        return cache_bytes + kv.count * (kv_bytes + on_device) <= memory_room

    return sizes(_largest_scale(fits))


def _largest_scale(fits: Callable[[float], bool]) -> float:
    """Return the largest scale of 0 to 1 that fits; 0 where none does."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(SCALE_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _pages(count: int) -> int:
    return -(-count // PAGE_BYTES) * PAGE_BYTES


def largest_bytes(specs: Sequence[ModelSpec]) -> int:
    return max((_pages(spec.weight_bytes) for spec in specs), default=0)


def least_kv_bytes(specs: Sequence[ModelSpec]) -> int:
    return max((_pages(_sequence_bytes(spec)) for spec in specs), default=0)


def least_tokens(spec: ModelSpec) -> int:
    """Return the tokens of a sequence of `spec` that every instance must have room for."""
    return min(spec.context_tokens, LEAST_SEQUENCE_TOKENS)


def _sequence_bytes(spec: ModelSpec) -> int:
    return least_tokens(spec) * spec.kv_token_bytes


def _stage_bytes(settings: Settings) -> int:
    reading = READER_THREADS * (READER_CHUNK_BYTES + READER_SLICES * READER_SLICE_BYTES)
    if settings.cuda_number is not None:
        return reading + CUDA_STAGE_CHUNKS * CUDA_CHUNK_BYTES
    return reading + (COPY_THREADS * COPY_CHUNK_BYTES if settings.has_own_memory else 0)


def _with_device_share(settings: Settings, machine: Machine, workspace: int) -> Settings:
    """Return the settings with the memory of a CUDA device chosen where it was left open: what is
    there beside the workspace."""
    if settings.cuda_number is None or settings.device_memory_gb:
        return settings
    share = int(CUDA_SHARE * machine.device_bytes / settings.instance_count) - workspace
    if share < PAGE_BYTES:
        raise BudgetTooSmall(
            f"{settings.device} has {gb(machine.device_bytes)}, of which steps of each of "
            f"{settings.instance_count} instances take {gb(workspace)}: nothing is left for "
            "weights; lower --max-batch or the count of instances"
        )
    chosen = share // PAGE_BYTES * PAGE_BYTES / GB
    return msgspec.structs.replace(settings, device_memory_gb=chosen)


def device_workspace_bytes(settings: Settings, specs: Sequence[ModelSpec]) -> int:
    """Return what steps, by the models' config.json, and moves take of a CUDA device beside its one
    allocation. Raises what reading those raises."""
    if settings.cuda_number is None:
        return 0
    steps = cuda_workspace_bytes((config_of(spec) for spec in specs), settings.max_batch)
    return steps + CUDA_SCRATCH_CHUNKS * CUDA_CHUNK_BYTES


def workspace_bytes(settings: Settings, specs: Sequence[ModelSpec]) -> int:
    """Return what a pass of the widest of `specs` takes, an estimate from its configuration, and
    the threads that draw its tokens."""
    threads = compute_threads(settings)
    return max(
        (
            spec.pass_bytes
            + settings.max_batch * spec.sequence_bytes
            + threads * sampling_bytes(spec.vocab_tokens)
            for spec in specs
        ),
        default=0,
    )


def grammar_host_bytes(specs: Sequence[ModelSpec]) -> int:
    """Return what an instance's process that follows schemas takes at rest, with the largest
    vocabularies that it keeps; models of the same one may be counted as of several."""
    sizes = sorted((spec.vocab_tokens for spec in specs), reverse=True)[:GRAMMAR_VOCABULARIES]
    return GRAMMAR_HOST_BYTES + GRAMMAR_TOKEN_BYTES * sum(sizes)


def check_budgets(budgets: Budgets, specs: Sequence[ModelSpec]) -> None:
    """Raise BudgetTooSmall when some model's weights, or one sequence of it, can never fit."""
    for spec in specs:
        if _pages(spec.weight_bytes) > budgets.weight_bytes:
            raise BudgetTooSmall(
                f"{spec.id} needs {gb(spec.weight_bytes)} of weights, the node's cache may hold "
                f"{gb(budgets.weight_bytes)}; raise --model-cache-budget-gb"
            )
        need = _sequence_bytes(spec)
        if need > budgets.kv_bytes:
            raise BudgetTooSmall(
                f"{least_tokens(spec)} tokens of {spec.id} need {gb(need)} of keys and values, an "
                f"instance may hold {gb(budgets.kv_bytes)}; raise --kv-budget-gb"
            )


def check_device(device_bytes: int, kv_bytes: int, specs: Sequence[ModelSpec]) -> None:
    """Raise BudgetTooSmall when some model's weights do not fit on a device beside KV."""
    room = max(0, device_bytes - kv_bytes)
    for spec in specs:
        if _pages(spec.weight_bytes) > room:
            least = _pages(spec.weight_bytes) + least_kv_bytes(specs)
            remedy = " or lower --kv-budget-gb" if least <= device_bytes else ""
            raise BudgetTooSmall(
                f"{spec.id} needs {gb(spec.weight_bytes)} of weights, a device of "
                f"{gb(device_bytes)} has {gb(room)} beside {gb(kv_bytes)} of keys and values; "
                f"raise --device-memory-gb{remedy}"
            )


def gb(count: int) -> str:
    """Return bytes as people read them."""
    return f"{count / GB:.3f} GB"
