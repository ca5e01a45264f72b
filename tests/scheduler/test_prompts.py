"""Prompts that were sent before: found again by what they begin with, in a bounded table."""

from hypothesis import given
from hypothesis import strategies as st

from aegaeon.memory import kv
from aegaeon.scheduler import prompts
from aegaeon.scheduler.prompts import BLOCK_TOKENS, MOST_PLACES, SentPrompts


def keys(*tokens, model="m"):
    return SentPrompts.keys(model, tokens)


def test_blocks_are_those_of_keys_and_values():
    assert kv.BLOCK_TOKENS == prompts.BLOCK_TOKENS


def test_the_last_token_is_always_run():
    assert [len(keys(*range(n))) for n in (0, 1, 16, 17, 32, 33)] == [0, 0, 0, 1, 1, 2]


def test_the_next_turn_of_a_chat_knows_where_the_last_one_went():
    sent = SentPrompts()
    first = range(50)
    sent.note(keys(*first), "i0")
    assert sent.known(keys(*first, *range(70, 100))) == {"i0": 48}
    assert sent.known(keys(*first, *range(70, 100), model="other")) == {}
    assert sent.known(keys(99, *first)) == {}


def test_places_know_as_far_as_their_prompts_agree():
    sent = SentPrompts()
    system = range(32)
    sent.note(keys(*system, *range(100, 140)), "i0")
    sent.note(keys(*system, *range(200, 240)), "i1")
    assert sent.known(keys(*system, *range(200, 240), 1, 2)) == {"i0": 32, "i1": 64}


def test_what_was_not_sent_for_longest_is_forgotten_from_the_end():
    sent = SentPrompts(most_blocks=4)
    sent.note(keys(*range(50)), "i0")  # three blocks
    sent.note(keys(*range(500, 533)), "i1")
    assert len(sent) == 4
    assert sent.known(keys(*range(50))) == {"i0": 32}
    assert sent.known(keys(*range(500, 533))) == {"i1": 32}


def test_a_prompt_that_everybody_knows_is_remembered_of_the_last_ones():
    sent = SentPrompts()
    for number in range(MOST_PLACES + 3):
        sent.note(keys(*range(20)), number)
    assert set(sent.known(keys(*range(20)))) == set(range(3, MOST_PLACES + 3))


chats = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=80), st.sampled_from("abc")), max_size=12
)


@given(chats, st.lists(st.integers(0, 1), max_size=80), st.integers(1, 12))
def test_nothing_is_known_that_was_not_sent(sent_prompts, asked, most_blocks):
    sent, bounded = SentPrompts(), SentPrompts(most_blocks)
    for tokens, place in sent_prompts:
        sent.note(keys(*tokens), place)
        bounded.note(keys(*tokens), place)
        assert len(bounded) <= most_blocks

    def common(tokens):
        most = min((len(tokens) - 1) // BLOCK_TOKENS, (len(asked) - 1) // BLOCK_TOKENS)
        whole = (n for n in range(most + 1) if tokens[: n * 16] == asked[: n * 16])
        return max(whole, default=0) * BLOCK_TOKENS

    expected = {}
    for tokens, place in sent_prompts:
        expected[place] = max(expected.get(place, 0), common(tokens))
    found = sent.known(keys(*asked))
    assert found == {place: tokens for place, tokens in expected.items() if tokens}
    for place, tokens in bounded.known(keys(*asked)).items():
        assert tokens <= found[place]
