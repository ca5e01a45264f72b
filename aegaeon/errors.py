"""Every error that a user or another module may meet; each message states the fact and the remedy.

`code` is what clients read in an error body and what crosses processes in `RequestFailed`.
HTTP statuses are the proxy's business, not ours.
"""

from typing import ClassVar


class AegaeonError(Exception):
    """The root of all errors raised on purpose."""

    code: ClassVar[str] = "internal_error"


class ConfigError(AegaeonError):
    """A setting, flag or file is wrong."""

    code = "config_error"


class ModelNotFound(AegaeonError):
    """A model reference or name that leads nowhere."""

    code = "model_not_found"


class UnsupportedModel(AegaeonError):
    """An architecture, tensor type or file format that this version cannot run."""

    code = "unsupported_model"


class CheckpointError(AegaeonError):
    """Model files are missing, truncated or inconsistent."""

    code = "checkpoint_error"


class BudgetTooSmall(AegaeonError):
    """A byte budget cannot hold what it must hold."""

    code = "budget_too_small"


class MemoryFull(AegaeonError):
    """Shared memory has no room for weights that the budget has room for: others fill it."""

    code = "memory_full"


class WeightsEvicted(AegaeonError):
    """A model's weights are not in the cache any more; acquire them again."""

    code = "weights_evicted"


class LoadCancelled(AegaeonError):
    """The load of a model was stopped because whoever asked for it is closing."""

    code = "load_cancelled"


class LoadStalled(AegaeonError):
    """A model's first layers are long in coming; its load goes on, so ask for it again later."""

    code = "load_stalled"


class LoadLate(CheckpointError):
    """Weights have not come for so long that nobody waits for them any more; perhaps later."""

    code = "model_loading"


class OutOfBlocks(AegaeonError):
    """The KV pool has no room for a sequence, even alone."""

    code = "out_of_blocks"


class KvGone(AegaeonError):
    """The KV that a handle names is not there to be adopted; the sequence is prefilled again."""

    code = "kv_gone"


class KvUnreachable(AegaeonError):
    """The KV that a handle names is where we cannot read it; offer it by the host's memory."""

    code = "kv_unreachable"


class InvalidRequest(AegaeonError):
    """A request that cannot be served as asked."""

    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested tokens are more than the model's context."""

    code = "context_length_exceeded"


class Overloaded(AegaeonError):
    """A bounded queue is full."""

    code = "overloaded"


class QueueFull(Overloaded):
    """As many requests are open as the server takes. `retry_after_s`: when there is room again, by
    prediction; 0: nobody knows."""

    code = "queue_full"
    retry_after_s: float = 0.0


class KeyQueueFull(QueueFull):
    """As many requests of one key are open as may be: what room is left is for others."""

    code = "rate_limit_exceeded"


class TooManyOpen(QueueFull):
    """As many requests are open, those that have begun included, as the server takes."""

    code = "overloaded"


class ModelLoading(QueueFull):
    """The model's weights are on no device yet, and as many requests wait for such as may."""

    code = "model_loading"


class Draining(AegaeonError):
    """The server or instance takes nothing new because it is about to stop."""

    code = "draining"


class InstanceLost(AegaeonError):
    """No instance is left that could serve the request."""

    code = "instance_lost"


class GivenUp(InstanceLost):
    """Instances ended because of the request or its model, too often: sent again, it would end
    more of them."""


class HandoffLost(InstanceLost):
    """Nobody can tell whether a hand-off was taken; the proxy places the request again."""

    code = "handoff_lost"


class Forgotten(InstanceLost):
    """The instance does not have the request (any more); the proxy places it again."""

    code = "forgotten"


class DeadlineExceeded(AegaeonError):
    """The request's deadline passed."""

    code = "timeout"


class RegionError(AegaeonError):
    """A shared-memory region that cannot be created or attached."""

    code = "region_error"


class RegionMismatch(RegionError):
    """A region written by another version, with other sizes, or damaged."""

    code = "region_mismatch"


class RingFull(AegaeonError):
    """A mailbox has no room for the record within the given time."""

    code = "mailbox_full"


class RingClosed(AegaeonError):
    """The mailbox's reader has closed it for good."""

    code = "mailbox_closed"


class RecordTooLarge(AegaeonError):
    """A record larger than the ring or slot accepts."""

    code = "record_too_large"


class TableFull(AegaeonError):
    """No slot of a table is free or expired."""

    code = "table_full"


class StoreUnavailable(AegaeonError):
    """The store behind the table and mailboxes does not answer."""

    code = "store_unavailable"


class StaleIncarnation(AegaeonError):
    """A late write of an instance that has been replaced, or whose lease has ended."""

    code = "stale_incarnation"


class DeviceError(AegaeonError):
    """A device that is not there, or that has failed."""

    code = "device_error"


class DeviceLost(DeviceError):
    """A device that answers this process with failures alone from here on: another process has to
    be started in its place."""

    code = "device_lost"


class CopyError(AegaeonError):
    """A copy engine that cannot start its threads, has been closed, or was lost in a fork."""

    code = "copy_error"


class CopyQueueFull(CopyError):
    """As many copies are open as an engine takes."""

    code = "copy_queue_full"


class TransferError(AegaeonError):
    """A model that cannot be brought to this node, or a node that gives none."""

    code = "transfer_failed"


class CannotStore(TransferError):
    """This node cannot write what it fetches: its disk is full, or fails."""

    code = "cannot_store"


def error_of(code: str, message: str) -> AegaeonError:
    """Return the error that an instance reported, as the class that has this code."""
    kinds: list[type[AegaeonError]] = [AegaeonError]
    for kind in kinds:
        if kind.code == code:
            return kind(message)
        kinds.extend(kind.__subclasses__())
    return AegaeonError(f"{code}: {message}")
