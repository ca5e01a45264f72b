"""Two writers that send numbered records as fast as they can, and the reader who counts them."""

import itertools
import threading
import time

from aegaeon.store.base import Domain

WRITERS = 2


class NumberedRecords:
    """Records of WRITERS threads to one new mailbox of `domain`, until `end`."""

    def __init__(self, domain: Domain) -> None:
        self._reader = domain.create_mailbox("box", 1 << 20)
        self._stop = threading.Event()
        self._got: list[tuple[int, ...]] = []
        self.sent = [0] * WRITERS

        def send_on(writer: int) -> None:
            sender = domain.open_mailbox("box")
            for number in itertools.count():
                if self._stop.is_set():
                    return
                sender.send(b"%d %d" % (writer, number), timeout_s=20)
                self.sent[writer] = number + 1

        self._writers = [threading.Thread(target=send_on, args=(n,)) for n in range(WRITERS)]
        for writer in self._writers:
            writer.start()

    def read_for(self, seconds: float) -> None:
        """Take what comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            records = self._reader.receive(0.05, max_records=20)
            self._got.extend(tuple(map(int, record.split())) for record in records)

    def end(self) -> None:
        """Have the writers stop, and take what is left."""
        self._stop.set()
        while any(writer.is_alive() for writer in self._writers):
            self.read_for(0.05)
        self.read_for(0.3)

    def got_of(self, writer: int) -> list[int]:
        """The numbers that came of one writer, in their order."""
        return [number for who, number in self._got if who == writer]
