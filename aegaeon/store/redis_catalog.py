"""The catalogue in Redis; apart, so that only those who use Redis import its client."""

from aegaeon.specs import Catalog
from aegaeon.store.catalog import CatalogStore
from aegaeon.store.codec import decode_catalog, encode
from aegaeon.store.redis_link import RedisLink

# KEYS: catalogue. ARGV: the version that is to be replaced, the record. 0: it is another one.
_SWAP = """
local version = redis.call('HGET', KEYS[1], 'version') or '0'
if version ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'record', ARGV[3])
return 1
"""


class RedisCatalogStore(CatalogStore):
    """A hash at `key`."""

    def __init__(self, link: RedisLink, key: str) -> None:
        """Use `link`, which stays its owner's."""
        self._link = link
        self._key = key
        self._swap = link.script(_SWAP)

    def read(self) -> Catalog:
        record = self._link.call(lambda: self._link.client.hget(self._key, "record"))
        return decode_catalog(record) if isinstance(record, bytes) else Catalog()

    def swap(self, expected_version: int, catalog: Catalog) -> bool:
        arguments = [expected_version, catalog.version, encode(catalog)]
        done = self._link.call(lambda: self._swap([self._key], arguments))
        # Run twice because the first answer was lost, it finds what it has written itself.
        return bool(done) or self.read() == catalog
