"""What instances were doing when they died: noted where a death leaves it, and told to proxies; and
how these ask whether an instance still has their requests. Only the records and their bytes.
"""

import msgspec

from aegaeon.errors import RegionMismatch
from aegaeon.types import InstanceId, ModelId, RequestId

# Tokens after which a request is not suspected any more of what went before.
PROGRESS_TOKENS = 8
# Names on the board end so that have a record of an instance's deaths.
DEATHS = ".deaths"
MAX_DEATHS = 16  # of an instance that are remembered: a proxy may look a while later
# A supervisor looks so often for instances whose lease has ended, and ends those that do not end by
# themselves in so long; what they did is told after that.
LOOK_S, GRACE_S = 0.5, 2.0
# By then it is: seen missing at a look, ended at one, and a while for the kernel and the board.
WORDS_S = 2 * LOOK_S + GRACE_S + 1.0


class Confirm(msgspec.Struct, frozen=True, tag=True):
    """Proxy to instance: are these attempts still with you? Of each that is not, it says so to
    `reply_to` with a RequestFailed of the code of Forgotten; of the others nothing."""

    attempts: tuple[tuple[RequestId, int], ...]
    reply_to: str


class Work(msgspec.Struct, frozen=True, array_like=True):
    """What an instance is doing: its compute lane, an action of `model` with `requests`; its copy
    lane, bringing in `loading`; its loop, taking in the request `taking`."""

    model: ModelId | None = None
    requests: tuple[RequestId, ...] = ()
    loading: ModelId | None = None
    taking: RequestId | None = None

    def is_on(self, request: RequestId) -> bool:
        """Whether `request` is worked on, not merely here."""
        return request == self.taking or request in self.requests

    def is_on_alone(self, request: RequestId) -> bool:
        """Whether `request` is, and no other one."""
        others = {*self.requests, self.taking} - {None, request}
        return self.is_on(request) and not others


NO_WORK = Work()


class Death(msgspec.Struct, frozen=True, array_like=True):
    """The end of one life of an instance; `work` is None where nobody knows."""

    incarnation: int
    work: Work | None


_encoder = msgspec.msgpack.Encoder()
_work = msgspec.msgpack.Decoder(Work)
_deaths: "msgspec.msgpack.Decoder[tuple[Death, ...]]" = msgspec.msgpack.Decoder(tuple[Death, ...])


def encode_work(work: Work) -> bytes:
    """Return `work` as bytes."""
    return _encoder.encode(work)


def decode_work(record: bytes) -> Work:
    """Read what `encode_work` made. Raises RegionMismatch on other bytes."""
    try:
        return _work.decode(record)
    except msgspec.MsgspecError as error:
        raise RegionMismatch(f"{len(record)} bytes are no work ({error})") from None


def encode_deaths(deaths: tuple[Death, ...]) -> bytes:
    """Return the bytes to publish, of the last ones."""
    return _encoder.encode(deaths[-MAX_DEATHS:])


def decode_deaths(record: bytes) -> tuple[Death, ...]:
    """Read what was published. Raises RegionMismatch on other bytes."""
    try:
        return _deaths.decode(record)
    except msgspec.MsgspecError as error:
        raise RegionMismatch(
            f"{len(record)} bytes are no deaths ({error}); run one version of aegaeon per domain"
        ) from None


def name_of(instance: InstanceId) -> str:
    """Return the name on the board under which the deaths of `instance` stand."""
    return f"{instance}{DEATHS}"
