"""How messages look as bytes (msgpack); rows of the shared table have a module of their own."""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from aegaeon.deaths import Confirm
from aegaeon.errors import RegionMismatch
from aegaeon.explanations import Explain, Explained
from aegaeon.measures import Waited
from aegaeon.specs import Catalog
from aegaeon.types import InstanceMessage, InstanceRecord, InstanceStatus, Reply

_T = TypeVar("_T")


_encoder = msgspec.msgpack.Encoder()
# The checker takes a union given as a value for Any.
_Message = InstanceMessage | Explain | Confirm
_instance_message: "msgspec.msgpack.Decoder[_Message]" = msgspec.msgpack.Decoder(_Message)
_replies: "msgspec.msgpack.Decoder[list[Reply | Explained] | Reply | Explained]" = (
    msgspec.msgpack.Decoder(list[Reply | Explained] | Reply | Explained)
)
_waited = msgspec.msgpack.Decoder(Waited)
_record = msgspec.msgpack.Decoder(InstanceRecord)
_status = msgspec.msgpack.Decoder(InstanceStatus)
_catalog = msgspec.msgpack.Decoder(Catalog)


def encode(
    message: InstanceMessage
    | Reply
    | Confirm
    | Explain
    | Explained
    | InstanceRecord
    | InstanceStatus
    | Catalog,
) -> bytes:
    """Return `message` as bytes for a mailbox or the table."""
    return _encoder.encode(message)


def decode_instance_message(record: bytes) -> InstanceMessage | Explain | Confirm:
    """Read what the proxy sent to an instance. Raises RegionMismatch on other bytes."""
    return _decode(_instance_message, record, "a message to an instance")


def joined(records: Sequence[bytes]) -> bytes:
    """Return one record of several encoded replies, up to 65,535: what is read once is cheaper for
    both ends."""
    # An array in msgpack: its length, then its elements as they are.
    return b"\xdc" + len(records).to_bytes(2, "big") + b"".join(records)


def decode_replies(record: bytes) -> list[Reply | Explained]:
    """Read what an instance sent to the proxy, one or several `joined`. Raises RegionMismatch on
    other bytes."""
    found = _decode(_replies, record, "a reply")
    return found if isinstance(found, list) else [found]


def decode_waited(record: bytes) -> Waited:
    """Read what a request has waited for. Raises RegionMismatch on other bytes."""
    return _decode(_waited, record, "what was waited for")


def decode_record(record: bytes) -> InstanceRecord:
    """Read an instance's record. Raises RegionMismatch on other bytes."""
    return _decode(_record, record, "an instance's record")


def decode_status(record: bytes) -> InstanceStatus:
    """Read an instance's status. Raises RegionMismatch on other bytes."""
    return _decode(_status, record, "an instance's status")


def decode_catalog(record: bytes) -> Catalog:
    """Read a domain's catalogue. Raises RegionMismatch on other bytes."""
    return _decode(_catalog, record, "a catalogue of models")


def _decode(decoder: "msgspec.msgpack.Decoder[_T]", record: bytes, what: str) -> _T:
    try:
        return decoder.decode(record)
    except msgspec.MsgspecError as error:
        raise RegionMismatch(
            f"{len(record)} bytes are not {what} ({error}); run one version of aegaeon per domain"
        ) from None
