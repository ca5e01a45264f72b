"""Models in a device's arena: never overlapping, never beyond, whole after they moved."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon._native import CopyEngine
from aegaeon.errors import BudgetTooSmall
from aegaeon.memory.arena import ALIGNMENT, Arena, Layout, Place

PAGE = ALIGNMENT


def pages(layout: Layout) -> dict[str, tuple[int, int]]:
    """Each model's first page and the one behind its last."""
    return {place.model: (place.offset // PAGE, place.end // PAGE) for place in layout.places()}


def check(layout: Layout) -> None:
    end = 0
    for place in layout.places():
        assert place.offset >= end and place.offset % PAGE == 0
        end = place.offset + place.size_bytes
    assert end <= layout.capacity_bytes


def test_the_next_model_lies_at_the_other_end_so_that_turns_leave_one_gap():
    layout = Layout(10 * PAGE)
    layout.allocate("a", 4 * PAGE)
    layout.allocate("b", 3 * PAGE)
    assert pages(layout) == {"a": (0, 4), "b": (7, 10)}
    layout.free("a")
    assert layout.largest_gap_bytes == 7 * PAGE
    layout.allocate("c", 7 * PAGE)
    assert pages(layout) == {"c": (0, 7), "b": (7, 10)}
    layout.free("b")
    layout.allocate("d", 3 * PAGE - 5)
    assert pages(layout) == {"c": (0, 7), "d": (7, 10)}
    assert layout.used_bytes == 10 * PAGE and layout.largest_gap_bytes == 0


def test_a_third_model_takes_the_smallest_gap_that_holds_it():
    layout = Layout(10 * PAGE)
    for model, size in (("a", 2), ("b", 2), ("c", 3)):
        layout.allocate(model, size * PAGE)
    assert pages(layout) == {"a": (0, 2), "c": (2, 5), "b": (8, 10)}
    layout.free("a")
    layout.allocate("d", PAGE + 1)
    assert pages(layout)["d"] == (0, 2)


def test_what_never_fits_is_an_error_and_what_does_not_fit_now_is_none():
    layout = Layout(4 * PAGE + 100)
    with pytest.raises(BudgetTooSmall, match=r"a has 16385 bytes of weights, .* arena 16384"):
        layout.allocate("a", 4 * PAGE + 1)
    layout.allocate("a", 3 * PAGE)
    assert layout.allocate("b", PAGE + 1) is None
    assert layout.get("b") is None and layout.get("a") == Place("a", 0, 3 * PAGE)


def test_freeing_all_gives_all_back():
    layout = Layout(4 * PAGE)
    layout.allocate("a", PAGE)
    layout.allocate("b", PAGE)
    layout.free("a")
    layout.free("b")
    assert layout.places() == () and layout.used_bytes == 0
    assert layout.allocate("c", 4 * PAGE) == Place("c", 0, 4 * PAGE)


def with_holes() -> Layout:
    """Pages: a, hole of 2, b of 3, hole of 1, c, hole of 2, d."""
    layout = Layout(11 * PAGE)
    for model, size in (("a", 1), ("d", 1), ("x", 2), ("b", 3), ("y", 1), ("c", 1)):
        layout.allocate(model, size * PAGE)
    layout.free("x")
    layout.free("y")
    assert pages(layout) == {"a": (0, 1), "b": (3, 6), "c": (7, 8), "d": (10, 11)}
    return layout


def test_compaction_moves_as_little_as_it_can():
    layout = with_holes()
    compaction = layout.plan_compaction(3 * PAGE)
    assert [move.model for move in compaction.moves] == ["c"]
    assert compaction.size_bytes == PAGE
    layout.commit(compaction)
    assert pages(layout)["c"] == (6, 7) and layout.largest_gap_bytes == 3 * PAGE
    assert layout.plan_compaction(3 * PAGE).moves == ()


def test_compaction_leaves_alone_what_computes():
    layout = with_holes()
    compaction = layout.plan_compaction(3 * PAGE, fixed={"c"})
    assert [move.model for move in compaction.moves] == ["b"]
    assert layout.plan_compaction(4 * PAGE, fixed={"c"}) is None
    assert layout.plan_compaction(6 * PAGE) is None


def test_a_compaction_of_an_older_state_is_not_entered():
    layout = with_holes()
    compaction = layout.plan_compaction(5 * PAGE)
    layout.free("a")
    with pytest.raises(AssertionError, match="has changed under"):
        layout.commit(compaction)


def test_an_arena_that_the_system_cannot_give_is_refused():
    for size in (1 << 60, 1 << 70):
        with pytest.raises(BudgetTooSmall, match="the system has no"):
            Arena(size)
    for size in (0, 100, -PAGE):
        with pytest.raises(BudgetTooSmall, match="give it 4096"):
            Arena(size)


def test_the_view_and_the_address_are_the_same_memory():
    arena = Arena(4 * PAGE)
    place = arena.allocate("a", 100)
    arena.bytes_of(place)[:] = b"x" * 100
    target = Arena(PAGE)
    engine = CopyEngine()
    assert engine.submit([(target.address, arena.address, 100)]).wait(timeout_s=20.0)
    engine.close()
    assert bytes(target.view[:101]) == b"x" * 100 + b"\0"
    assert arena.view.nbytes == arena.capacity_bytes


class Contents:
    """An arena whose models are known byte by byte."""

    def __init__(self, capacity_pages: int, engine: CopyEngine) -> None:
        self.arena = Arena(capacity_pages * PAGE)
        self.engine = engine
        self.expected: dict[str, bytes] = {}

    def allocate(self, model: str, size_bytes: int) -> None:
        place = self.arena.allocate(model, size_bytes)
        fits = size_bytes <= self.arena.largest_gap_bytes
        if place is None:
            assert not fits
            return
        self.expected[model] = random.Random(model).randbytes(size_bytes)
        self.arena.bytes_of(place)[:] = self.expected[model]

    def free(self, model: str) -> None:
        self.arena.free(model)
        del self.expected[model]

    def compact(self, size_bytes: int, fixed: set[str]) -> None:
        before = {model: self.arena.get(model) for model in fixed}
        compaction = self.arena.plan_compaction(size_bytes, fixed)
        free_bytes = self.arena.capacity_bytes - self.arena.used_bytes
        if compaction is None:
            assert fixed or size_bytes > free_bytes
            return
        ticket = self.engine.submit(self.arena.segments(compaction.moves))
        assert ticket.wait(timeout_s=20.0)
        self.arena.commit(compaction)
        assert self.arena.largest_gap_bytes >= size_bytes
        assert {model: self.arena.get(model) for model in fixed} == before

    def check(self) -> None:
        check(self.arena)
        assert {place.model for place in self.arena.places()} == set(self.expected)
        for place in self.arena.places():
            assert bytes(self.arena.bytes_of(place)) == self.expected[place.model]


@pytest.fixture(scope="module")
def engine():
    engine = CopyEngine(threads=2, chunk_bytes=1500)
    yield engine
    engine.close()


@settings(max_examples=60)
@given(data=st.data(), capacity_pages=st.integers(1, 24))
def test_random_lives_keep_every_model_whole(engine, data, capacity_pages):
    contents = Contents(capacity_pages, engine)
    sizes = st.integers(1, capacity_pages * PAGE)
    for number in range(data.draw(st.integers(0, 25), "steps")):
        here = sorted(contents.expected)
        verb = data.draw(st.sampled_from(["allocate", "free", "compact"]), "verb")
        if verb == "allocate":
            contents.allocate(f"model-{number}", data.draw(sizes, "size") // 3 + 1)
        elif verb == "free" and here:
            contents.free(data.draw(st.sampled_from(here), "model"))
        elif verb == "compact":
            fixed = data.draw(st.sets(st.sampled_from(here)) if here else st.just(set()), "fixed")
            contents.compact(data.draw(sizes, "size"), fixed)
        contents.check()


def test_a_model_that_comes_back_goes_to_where_it_lay():
    layout = Layout(100 * ALIGNMENT)
    sizes = {"a": 30 * ALIGNMENT, "b": 40 * ALIGNMENT, "c": 20 * ALIGNMENT}
    first = {name: layout.allocate(name, size) for name, size in sizes.items()}
    for name in ("a", "b", "a", "c", "b"):
        layout.free(name)
        assert layout.allocate(name, sizes[name]) == first[name]
    # All are away: the empty arena would hold each at its beginning.
    for name in sizes:
        layout.free(name)
    assert layout.allocate("b", sizes["b"]) == first["b"]


def test_a_model_whose_place_is_taken_goes_to_the_smallest_gap():
    layout = Layout(100 * ALIGNMENT)
    first = layout.allocate("a", 30 * ALIGNMENT)
    layout.free("a")
    assert layout.allocate("b", 60 * ALIGNMENT).offset == first.offset == 0
    again = layout.allocate("a", 30 * ALIGNMENT)
    assert again.offset == 70 * ALIGNMENT
    layout.free("b")
    layout.free("a")
    # Where it lay last.
    assert layout.allocate("a", 30 * ALIGNMENT) == again
