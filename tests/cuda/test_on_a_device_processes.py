"""KV that goes from process to process on one CUDA device without the host, whoever dies or comes
late: on the stand-in for a device, and on cuda:0."""

import os
import signal
from contextlib import contextmanager
from functools import partial

import msgspec
import pytest

from aegaeon.config import Settings
from aegaeon.engine.open import open_engine
from aegaeon.errors import KvGone, KvUnreachable
from aegaeon.models.references import resolve
from aegaeon.types import Decode, Load, Prefill, SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.cuda_peer import Peer, started
from tests.support.decoder import all_kv_bytes, make_request
from tests.support.polling import eventually
from tests.support.regions import own_regions

GB = 1e9
PROMPT = [(7 * k) % 300 + 3 for k in range(75)]
# A process takes seconds to start.
THOROUGH = partial(pytest.param, marks=pytest.mark.thorough)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    widths = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    path = make_checkpoint(root / "ada", "qwen3", seed=4, **widths)
    return (resolve(str(path), str(root)),)


class Served:
    """An engine with its model loaded, of this process or as another one has it."""

    def __init__(self, specs, regions, kv_gb):
        weight_gb = specs[0].weight_bytes / GB
        settings = Settings(
            device="cuda:0",
            colocated_count=3,
            threads_per_instance=1,
            model_cache_budget_gb=3 * weight_gb,
            kv_budget_gb=kv_gb,
            device_memory_gb=kv_gb + 1.5 * weight_gb,
        )
        self.model = specs[0].id
        self.engine = open_engine(settings, specs, regions)
        self.lending = self.engine._kv._lending
        self.engine.load(Load(self.model))

    def prefill(self, request):
        """Return the request with its first token."""
        self.engine.submit(request)
        (token,) = self.engine.execute(Prefill(self.model, (request.id,))).tokens
        return msgspec.structs.replace(request, generated_token_ids=(token.token_id,))

    def decode(self, request):
        """Return all its tokens."""
        tokens = list(request.generated_token_ids)
        while True:
            (token,) = self.engine.execute(Decode(self.model, (request.id,))).tokens
            tokens.append(token.token_id)
            if token.finish_reason is not None:
                return tokens

    def hand_over(self, name, by_host=False):
        return self.engine.hand_over(name, by_host)

    def adopt(self, request, kv, room=None):
        self.engine.adopt(request, kv)

    def submit(self, request):
        self.engine.submit(request)

    def release(self, name):
        self.engine.release(name)

    def kv_bytes(self):
        return all_kv_bytes(self.engine)

    def moved(self, phase):
        """Copies and bytes."""
        total = self.engine.usage().moved[phase]
        return total.count, total.moved_bytes

    def at(self, stage, act):
        """Call `act` when what is lent has been opened, has been copied, or is taken."""
        lending, host = self.lending, self.lending._host
        owner, name, is_after = {
            "opened": (lending, "_room_for", False),
            "copied": (lending, "_await_copy", True),
            "taken": (host, "free", False),
        }[stage]
        verb = getattr(owner, name)

        def hooked(*given, **named):
            if not is_after:
                act()
            made = verb(*given, **named)
            if is_after:
                act()
            return made

        setattr(owner, name, hooked)

    def die_at(self, stage):
        self.at(stage, lambda: os.kill(os.getpid(), signal.SIGKILL))

    def close(self):
        self.engine.close()
        self.engine = self.lending = None


@contextmanager
def served(specs, regions, kv_gb=0.004):
    one = Served(specs, regions, kv_gb)
    yield one
    one.close()


class Here:
    """An engine of this process, called as those of others."""

    def __init__(self, one):
        self.one = one

    def call(self, verb, *given):
        return getattr(self.one, verb)(*given)


@pytest.fixture
def regions():
    with own_regions() as made:
        yield made


@pytest.fixture
def here(cuda, specs, regions):
    with served(specs, regions) as one:
        yield one


@contextmanager
def another(cuda, specs, regions, **changes):
    peer = Peer(cuda.kind, served, specs, regions, *changes.values())
    with started(peer):
        yield peer


def request_of(name="r", sampling=SEEDED, prompt=PROMPT):
    return make_request(name, prompt, "ada", sampling=sampling, max_tokens=10)


def tokens_alone(one, **changes):
    """What a request has to come to, in an engine that keeps it."""
    told = one.prefill(request_of("alone", **changes))
    return one.decode(told)


@pytest.mark.parametrize("way", ["to another", THOROUGH("from another")])
def test_a_request_goes_on_in_another_process_with_its_kv(cuda, specs, regions, here, way):
    expected = tokens_alone(here)
    with another(cuda, specs, regions) as peer:
        sender, receiver = (Here(here), peer) if way == "to another" else (peer, Here(here))
        for name in ("r", "s"):  # the second time all is open
            told = sender.call("prefill", request_of(name))
            kv = sender.call("hand_over", name)
            assert kv.device is not None and kv.kv_bytes == sender.call("kv_bytes") - pledge(here)
            receiver.call("adopt", told, kv)
            assert receiver.call("kv_bytes") == kv.kv_bytes
            sender.call("release", name)
            assert sender.call("kv_bytes") == 0
            assert receiver.call("decode", told) == expected
            assert receiver.call("kv_bytes") == 0
        # Nothing went by the host.
        assert sender.call("moved", "kv_out") == sender.call("moved", "kv_in") == (0, 0)
        assert receiver.call("moved", "kv_in") == (2, 2 * kv.kv_bytes)
        # What it has may be on its way out by now, for the next turn of a chat.
        peer.stop()


def pledge(one):
    """Bytes of the one block that stands for all that is lent."""
    return one.engine._shapes["ada"].block_bytes


@pytest.mark.thorough
def test_a_full_device_takes_what_is_lent_to_the_host(cuda, specs, regions, here):
    expected = tokens_alone(here)
    with another(cuda, specs, regions) as peer:
        told = peer.call("prefill", request_of())
        kv = peer.call("hand_over", "r")
        pool, shape = here.engine._kv.pool, here.engine._shapes["ada"]
        blocks = pool.allocate(shape, pool.free_blocks(shape))
        here.adopt(told, kv)
        assert here.moved("kv_out") == (1, kv.kv_bytes)
        pool.free(shape, blocks)
        peer.call("release", "r")
        assert here.decode(told) == expected
        peer.stop()
    assert here.kv_bytes() == 0


@pytest.mark.parametrize("stage", [THOROUGH("offered"), THOROUGH("opened"), "copied"])
def test_a_sender_that_dies_costs_a_prefill(cuda, specs, regions, here, stage):
    expected = tokens_alone(here)
    with another(cuda, specs, regions) as peer:
        told = peer.call("prefill", request_of())
        kv = peer.call("hand_over", "r")
        if stage == "offered":
            peer.stop(is_killed=True)
        else:
            here.at(stage, lambda: peer.stop(is_killed=True))
        with pytest.raises(KvGone, match="died"):
            here.adopt(told, kv)
    assert here.kv_bytes() == 0
    here.submit(told)
    assert here.decode(told) == expected
    # Its memory is let go at once: the next life needs the room.
    eventually(lambda: not here.lending._peers._opened)
    assert_all_free(here)


def assert_all_free(one):
    """What the dead held has come back to the node's pool."""
    pool, shape = one.lending._host, one.engine._shapes["ada"]
    blocks = pool.allocate(shape, pool.capacity_blocks(shape))
    assert one.kv_bytes() == len(blocks) * shape.block_bytes
    pool.free(shape, blocks)
    assert one.kv_bytes() == 0


@pytest.mark.parametrize("stage", [THOROUGH("opened"), THOROUGH("copied"), "taken"])
def test_a_receiver_that_dies_leaves_the_kv_to_the_next_one(cuda, specs, regions, here, stage):
    expected = tokens_alone(here)
    told = here.prefill(request_of())
    with another(cuda, specs, regions) as doomed, another(cuda, specs, regions) as peer:
        doomed.call("die_at", stage)
        with pytest.raises(EOFError):
            doomed.call("adopt", told, here.hand_over("r"))
        kv = here.hand_over("r")
        assert kv.device is not None
        peer.call("adopt", told, kv)
        here.release("r")
        assert peer.call("decode", told) == expected
        assert (here.kv_bytes(), peer.call("kv_bytes")) == (0, 0)
        peer.stop()
    assert_all_free(here)


def test_a_late_receiver_keeps_nothing(cuda, specs, regions, here):
    """The sender let go while it copied, and the blocks hold something else by now."""
    expected = tokens_alone(here)
    with another(cuda, specs, regions) as peer:
        told = peer.call("prefill", request_of())
        kv = peer.call("hand_over", "r")

        def let_go():
            peer.call("release", "r")
            peer.call("prefill", request_of("other", prompt=PROMPT[::-1]))

        here.at("copied", let_go)
        with pytest.raises(KvGone, match="not the sender's any more"):
            here.adopt(told, kv)
        assert here.kv_bytes() == 0
        here.submit(told)
        assert here.decode(told) == expected
        peer.call("release", "other")
        peer.stop()


@pytest.mark.thorough
def test_an_offer_that_was_named_anew_is_not_taken_under_its_old_name(cuda, specs, regions, here):
    expected = tokens_alone(here)
    with another(cuda, specs, regions) as peer:
        told = peer.call("prefill", request_of())
        old, new = peer.call("hand_over", "r"), peer.call("hand_over", "r")
        with pytest.raises(KvGone):
            here.adopt(told, old)
        here.adopt(told, new)
        peer.call("release", "r")
        assert here.decode(told) == expected
        peer.stop()


def test_what_cannot_be_opened_goes_by_the_host_from_then_on(cuda, specs, regions, here):
    expected = tokens_alone(here)
    with another(cuda, specs, regions) as peer:
        told = peer.call("prefill", request_of())
        kv = peer.call("hand_over", "r")
        for change in ({"device": "cuda:77"}, {"handle": b"not one"}, {"pid": os.getpid()}):
            elsewhere = msgspec.structs.replace(kv.device, **change)
            with pytest.raises(KvUnreachable):
                here.adopt(told, msgspec.structs.replace(kv, device=elsewhere))
        for name, by_host in (("r", True), ("s", False)):
            if name == "s":
                told = peer.call("prefill", request_of("s"))
            kv = peer.call("hand_over", name, by_host)
            assert kv.device is None and len(kv.blocks) > 1
            here.adopt(told, kv)
            peer.call("release", name)
            assert here.decode(told) == expected
        peer.stop()
    assert here.kv_bytes() == 0


@pytest.mark.parametrize(
    "change",
    [{"pid": 0x7FFFFFFF}, {"blocks": ()}, {"blocks": (1,) * 4}, {"blocks": (-16,) * 5},
     {"blocks": (1 << 40,) * 5}, {"start_bytes": -1}, {"start_bytes": 1 << 40},
     {"size_bytes": 0}],
)  # fmt: skip
def test_a_handle_that_makes_no_sense_is_kv_that_is_gone(here, change):
    told = here.prefill(request_of())
    kv = here.hand_over("r")
    assert len(kv.device.blocks) == 5
    wrong = msgspec.structs.replace(kv, device=msgspec.structs.replace(kv.device, **change))
    with pytest.raises(KvGone, match="prefill again"):
        here.adopt(msgspec.structs.replace(told, id="s"), wrong)
    here.release("r")
    assert here.kv_bytes() == 0


def test_half_of_the_device_may_be_lent_and_the_rest_goes_by_the_host(here):
    shape = here.engine._shapes["ada"]
    kvs = []
    for number in range(16):
        here.prefill(request_of(f"r{number}"))
        kvs.append(here.hand_over(f"r{number}"))
    lent = [kv.device is not None for kv in kvs]
    most = here.engine._kv.pool.budget_bytes / 2
    assert lent == [True] * (sum(lent)) + [False] * (16 - sum(lent)) and 2 < sum(lent) < 16
    assert sum(lent) * 5 * shape.block_bytes <= most < (sum(lent) + 1) * 5 * shape.block_bytes
    for number in range(16):
        here.release(f"r{number}")
    assert here.kv_bytes() == 0
