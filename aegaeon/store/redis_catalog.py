"""The catalogue in Redis; apart, so that only those who use Redis import its client."""

import secrets

from aegaeon.specs import Catalog
from aegaeon.store.catalog import CatalogStore
from aegaeon.store.codec import decode_catalog, encode
from aegaeon.store.redis_link import RedisLink

STAMP_BYTES = 8

# KEYS: catalogue. ARGV: the version that is to be replaced, that of the record, the record, and
# what tells this writing from any other. 0: it is another one.
_SWAP = """
local version = redis.call('HGET', KEYS[1], 'version') or '0'
if version ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'record', ARGV[3], 'stamp', ARGV[4])
return 1
"""


class RedisCatalogStore(CatalogStore):
    """A hash at `key`."""

    def __init__(self, link: RedisLink, key: str) -> None:
        """Use `link`, which stays its owner's."""
        self._link = link
        self._key = key
        self._swap = link.script(_SWAP)
        self._seen: tuple[bytes, Catalog] | None = None

    def read(self) -> Catalog:
        seen, link = self._seen, self._link
        stamp = link.call(lambda: link.client.hget(self._key, "stamp"))
        if seen is not None and seen[0] == stamp:
            return seen[1]  # many look often, and it may be long
        stamp, record = link.call(lambda: link.client.hmget(self._key, "stamp", "record"))
        if not isinstance(record, bytes):
            return Catalog()
        catalog = decode_catalog(record)
        self._seen = (stamp, catalog) if isinstance(stamp, bytes) else None
        return catalog

    def swap(self, expected_version: int, catalog: Catalog) -> bool:
        stamp = secrets.token_bytes(STAMP_BYTES)
        arguments = [expected_version, catalog.version, encode(catalog), stamp]
        done = self._link.call(lambda: self._swap([self._key], arguments))
        # Run twice because the first answer was lost, it finds what it has written itself.
        return bool(done) or self.read() == catalog
