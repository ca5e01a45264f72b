"""What is taken out of the store when a process has died and nobody beside it is left to say so."""

import logging

from aegaeon.errors import AegaeonError
from aegaeon.instance.launch import mailbox_address
from aegaeon.store.base import Domain
from aegaeon.types import InstanceRecord

log = logging.getLogger(__name__)

MAILBOX_BYTES = 1 << 16  # the least; nothing is sent there


def end_life(domain: Domain, record: InstanceRecord) -> None:
    """Take an instance's row and mailbox out: proxies send its requests elsewhere at once, and one
    that still lives, cut off, finds itself replaced and ends."""
    try:
        domain.metadata().remove_instance(record.id, record.incarnation)
    except AegaeonError as error:
        log.warning("row not removed, its lease will end name=%s error=%s", record.id, error)
    end_mailbox(domain, mailbox_address(record.id, record.incarnation))


def end_mailbox(domain: Domain, address: str) -> None:
    """Take the mailbox of a dead process out: whoever sends there learns that nobody reads."""
    try:
        # Only a mailbox's reader removes it, for every backend: so take its place first.
        mailbox = domain.create_mailbox(address, MAILBOX_BYTES)
        mailbox.close()
        mailbox.unlink()
    except AegaeonError as error:
        log.warning("mailbox not removed address=%s error=%s", address, error)
