"""A row of the shared table as bytes: what an instance says once, and its status.

The models of a record are named once; the status has their numbers among them. Several hundred
models fit into a row in this way, and one that nobody asks for costs next to nothing.
"""

from typing import Any, TypeVar

import msgspec

from aegaeon.errors import RegionMismatch
from aegaeon.measures import Speed
from aegaeon.specs import ROW_BYTES as ROW_BYTES  # noqa: PLC0414
from aegaeon.types import Instance, InstanceRecord, InstanceStatus, ModelId

_T = TypeVar("_T")
_Place = int | str  # in the record's models; what is not there keeps its name


class _Head(msgspec.Struct, frozen=True, array_like=True):
    record: msgspec.Raw
    lease_s: float


class _Row(msgspec.Struct, frozen=True, array_like=True):
    """Begins as `_Head`. `status` is without what follows it."""

    record: msgspec.Raw
    lease_s: float
    status: InstanceStatus
    resident: tuple[_Place, ...]
    joins: tuple[_Place, ...]
    waiting: dict[_Place, int]
    running: dict[_Place, int]
    refused: dict[_Place, str]
    speeds: dict[_Place, Speed]


_encoder = msgspec.msgpack.Encoder()
_head = msgspec.msgpack.Decoder(_Head)
_row = msgspec.msgpack.Decoder(_Row)
_record = msgspec.msgpack.Decoder(InstanceRecord)


class RowWriter:
    """Makes rows of one instance after another, whose records seldom change."""

    def __init__(self) -> None:
        self._record = b""
        self._places: dict[ModelId, _Place] = {}

    def entered(self, record: InstanceRecord, lease_s: float) -> bytes:
        """Return the row of one that is starting."""
        return self._encoded(_encoder.encode(record), lease_s, InstanceStatus())

    def renewed(self, row: bytes, status: InstanceStatus) -> tuple[bytes, float]:
        """Return `row` with another status, and its lease. Raises RegionMismatch."""
        head = _decode(_head, row)
        return self._encoded(bytes(head.record), head.lease_s, status), head.lease_s

    def _encoded(self, record: bytes, lease_s: float, status: InstanceStatus) -> bytes:
        if record != self._record:
            models = _decode(_record, record).models
            self._places = {model: place for place, model in enumerate(models)}
            self._record = record
        row = _Row(
            msgspec.Raw(record),
            lease_s,
            without_models(status),
            self._all(status.resident),
            self._all(status.joins),
            self._keyed(status.waiting),
            self._keyed(status.running),
            self._keyed(status.refused),
            self._keyed(status.speeds),
        )
        return _encoder.encode(row)

    def _all(self, models: tuple[ModelId, ...]) -> tuple[_Place, ...]:
        return tuple(self._places.get(model, model) for model in models)

    def _keyed(self, values: dict[ModelId, _T]) -> dict[_Place, _T]:
        return {self._places.get(model, model): value for model, value in values.items()}


class SeenRow:
    """A row that was read, and what it says."""

    __slots__ = ("_record", "instance", "row")
    instance: Instance

    def __init__(self, row: bytes, before: "SeenRow | None" = None) -> None:
        """`before` is what stood in its place. Raises RegionMismatch."""
        read = _decode(_row, row)
        self.row = row
        self._record = bytes(read.record)
        if before is not None and before._record == self._record:
            record = before.instance.record
        else:
            record = _decode(_record, self._record)
        self.instance = Instance(record=record, status=_named(read, record.models))


def without_models(status: InstanceStatus) -> InstanceStatus:
    """Return what `status` says that does not grow with the models."""
    return msgspec.structs.replace(
        status, resident=(), joins=(), waiting={}, running={}, refused={}, speeds={}
    )


def _named(row: _Row, models: tuple[ModelId, ...]) -> InstanceStatus:
    def name(place: _Place) -> ModelId:
        return place if isinstance(place, str) else models[place]

    def keyed(values: dict[_Place, _T]) -> dict[ModelId, _T]:
        return {name(place): value for place, value in values.items()}

    try:
        return msgspec.structs.replace(
            row.status,
            resident=tuple(map(name, row.resident)),
            joins=tuple(map(name, row.joins)),
            waiting=keyed(row.waiting),
            running=keyed(row.running),
            refused=keyed(row.refused),
            speeds=keyed(row.speeds),
        )
    except IndexError:
        raise RegionMismatch(
            "a row of the instance table names models that its record has not; run one version "
            "of aegaeon per domain"
        ) from None


def _decode(decoder: "msgspec.msgpack.Decoder[_T]", row: Any) -> _T:
    try:
        return decoder.decode(row)
    except msgspec.MsgspecError as error:
        raise RegionMismatch(
            f"{len(row)} bytes are not a row of the instance table ({error}); run one version of "
            "aegaeon per domain"
        ) from None
