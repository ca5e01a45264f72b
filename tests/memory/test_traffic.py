"""Bytes moved, counted when they have been."""

import ctypes

from aegaeon._native import CopyEngine
from aegaeon.measures import PhaseTotal
from aegaeon.memory import traffic as module
from aegaeon.memory.traffic import Traffic


def test_a_copy_counts_once_it_has_ended_however_it_ended():
    source, target = bytearray(b"x" * 1000), bytearray(1000)
    traffic = Traffic()
    copier = CopyEngine(1)
    done = copier.submit([(address(target), address(source), 1000)])
    traffic.watch("weights", done)
    assert done.wait(timeout_s=10)
    assert traffic.totals()["weights"] == PhaseTotal(1, 1000, done.seconds)
    copier.close()
    copier = CopyEngine(1, 100, link_bytes_per_s=1)
    stopped = copier.submit([(address(target), address(source), 1000)])
    traffic.watch("weights", stopped)
    assert traffic.totals()["weights"].count == 1
    stopped.cancel()
    assert traffic.totals()["weights"].count == 2
    assert traffic.totals()["weights"].moved_bytes == 1000
    copier.close()


def test_what_no_ticket_stands_for_is_added_to_its_phase_alone():
    traffic = Traffic()
    traffic.add("disk", 10, 2.0)
    traffic.add("disk", 5, 1.0)
    totals = traffic.totals()
    assert totals["disk"] == PhaseTotal(2, 15, 3.0)
    assert all(total == PhaseTotal() for phase, total in totals.items() if phase != "disk")


def test_ended_tickets_are_let_go_though_nobody_asks_for_totals():
    traffic = Traffic()
    copier = CopyEngine(1)
    for _ in range(10 * module.LEAST_OPEN):
        ticket = copier.submit([])
        assert ticket.wait(timeout_s=10)
        traffic.watch("kv_in", ticket)
        assert len(traffic._open) <= module.LEAST_OPEN
    assert traffic.totals()["kv_in"].count == 10 * module.LEAST_OPEN
    copier.close()


def address(buffer):
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
