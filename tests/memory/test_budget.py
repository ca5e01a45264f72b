"""The layout of a node's bytes from settings and machine, and what is refused at start-up."""

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.config import Settings
from aegaeon.device.processors import available_processors, compute_threads
from aegaeon.errors import BudgetTooSmall
from aegaeon.memory.budget import (
    CUDA_CHUNK_BYTES,
    GRAMMAR_HOST_BYTES,
    GRAMMAR_TOKEN_BYTES,
    PROCESS_BYTES,
    SHARED_RESERVE_BYTES,
    choose_budgets,
    grammar_host_bytes,
    lay_out,
)
from aegaeon.memory.cuda_room import cuda_workspace_bytes
from aegaeon.memory.front import TOKENIZERS_BYTES, VOCABULARIES_BYTES
from aegaeon.memory.machine import Machine
from aegaeon.memory.room import check_room, settle
from aegaeon.memory.workspace import sampling_bytes
from aegaeon.models.config import read_config
from aegaeon.models.references import resolve
from aegaeon.plan import layout_lines
from aegaeon.types import ModelSpec
from tests.support.checkpoints import make_checkpoint
from tests.support.decoder import make_spec

SPECS = (make_spec("a", weight_bytes=600_000_000), make_spec("b", weight_bytes=100))
MACHINE = Machine(10_000_000_000, 10_000_000_000)


def make_wide_spec(**changes) -> ModelSpec:
    return msgspec.structs.replace(make_spec("a"), **changes)


def test_defaults_are_shares_of_memory_with_one_cache_for_all():
    budgets = choose_budgets(Settings(colocated_count=2), SPECS, MACHINE)
    assert budgets.weight_bytes == pytest.approx(6_000_000_000, abs=4096)
    assert budgets.kv_bytes == pytest.approx(500_000_000, abs=4096)
    assert budgets.device_bytes == 0


def test_a_staged_device_has_weights_beside_as_much_kv_as_the_quota():
    settings = Settings(device="staged", device_memory_gb=2.0, kv_budget_gb=0.5)
    budgets = choose_budgets(settings, SPECS, MACHINE)
    assert (budgets.device_weight_bytes, budgets.device_kv_bytes) == (1_500_000_000, 500_000_000)
    default = choose_budgets(Settings(device="staged"), SPECS, MACHINE)
    assert default.device_bytes == pytest.approx(2_500_000_000, rel=0.1)
    assert default.device_kv_bytes == default.kv_bytes


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A model with a config.json, which tells what its steps take of a device."""
    root = tmp_path_factory.mktemp("models")
    spec = resolve(str(make_checkpoint(root / "real")), str(root))
    return msgspec.structs.replace(spec, weight_bytes=600_000_000)


def test_a_cuda_devices_memory_is_no_part_of_the_hosts(real):
    machine = msgspec.structs.replace(MACHINE, device_bytes=80_000_000_000)
    settings = Settings(device="cuda:1", colocated_count=2, kv_budget_gb=0.5)
    node = lay_out(settings, (real,), machine)
    each = node.instance
    steps = cuda_workspace_bytes([read_config(real.path)], settings.max_batch)
    workspace = each.device_workspace_bytes
    assert workspace == steps + 2 * CUDA_CHUNK_BYTES and steps > 32 << 20
    assert each.device_bytes + workspace == pytest.approx(36_000_000_000, abs=4096)
    assert each.device_kv_bytes == each.kv_bytes == 500_000_000
    # What the device's steps and draws take is none of the host's.
    assert each.workspace_bytes == 0 and each.private_bytes < 500_000_000
    check_room(node, (real,), machine)
    settled = settle(settings, (real,), machine)
    assert choose_budgets(settled, (real,), MACHINE) == each
    assert any(line.startswith("device: workspace: 2 x 0.1") for line in layout_lines(node))


def test_a_wider_batch_leaves_a_cuda_device_less_for_weights(real):
    machine = msgspec.structs.replace(MACHINE, device_bytes=80_000_000_000)
    each = [
        lay_out(Settings(device="cuda:0", max_batch=batch, kv_budget_gb=0.5), (real,), machine)
        for batch in (4, 256)
    ]
    narrow, wide = (node.instance for node in each)
    more = wide.device_workspace_bytes - narrow.device_workspace_bytes
    less = narrow.device_weight_bytes - wide.device_weight_bytes
    assert less == pytest.approx(more, abs=4096) and more > 4096


def test_a_cuda_device_too_small_for_a_model_is_refused(real):
    machine = msgspec.structs.replace(MACHINE, device_bytes=500_000_000)
    with pytest.raises(BudgetTooSmall, match="--device-memory-gb"):
        lay_out(Settings(device="cuda:0", kv_budget_gb=0.01), (real,), machine)
    machine = msgspec.structs.replace(MACHINE, device_bytes=30_000_000)
    with pytest.raises(BudgetTooSmall, match="lower --max-batch or the count of instances"):
        lay_out(Settings(device="cuda:0", kv_budget_gb=0.01), (real,), machine)


def test_more_than_a_cuda_device_has_is_refused_with_its_workspace(real):
    machine = msgspec.structs.replace(MACHINE, device_bytes=2_000_000_000)
    settings = Settings(device="cuda:0", colocated_count=2, device_memory_gb=0.98, kv_budget_gb=0.1)
    node = lay_out(settings, (real,), machine)
    with pytest.raises(BudgetTooSmall, match=r"2 x \(weights 0\.880 GB.*workspace 0\.1.*lower"):
        check_room(node, (real,), machine)


def test_a_small_device_is_not_filled_with_keys_and_values():
    settings = Settings(device="staged", device_memory_gb=1.2)
    budgets = choose_budgets(settings, SPECS, MACHINE)
    assert budgets.device_kv_bytes == pytest.approx(480_000_000, abs=4096)


def test_settings_win():
    settings = Settings(model_cache_budget_gb=1.5, kv_budget_gb=0.25, threads_per_instance=3)
    budgets = choose_budgets(settings, SPECS, Machine(1, 1))
    assert budgets.weight_bytes == 1_500_000_000
    assert budgets.kv_bytes == 250_000_000
    assert budgets.threads == 3


def test_the_workspace_is_that_of_the_widest_model_a_full_batch_and_all_threads():
    specs = (make_wide_spec(pass_bytes=1000, sequence_bytes=1), make_wide_spec(sequence_bytes=100))
    for threads in (1, 3):
        sampling = threads * sampling_bytes(specs[0].vocab_tokens)
        for max_batch, expected in ((4, 1004), (64, 6400)):
            settings = Settings(max_batch=max_batch, threads_per_instance=threads)
            budgets = choose_budgets(settings, specs, MACHINE)
            assert budgets.workspace_bytes == expected + sampling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_cache_budget_gb": 0.5}, r"a needs 0\.600 GB.*0\.500 GB.*--model-cache-budget-gb"),
        ({"kv_budget_gb": 0.0001}, r"256 tokens of a need .*--kv-budget-gb"),
        (
            {"device": "staged", "device_memory_gb": 0.7, "kv_budget_gb": 0.2},
            r"a needs 0\.600 GB.*device of 0\.700 GB has 0\.500 GB beside 0\.200.*--device-memory",
        ),
        (
            {"device": "staged", "device_memory_gb": 0.1, "kv_budget_gb": 0.2},
            r"has 0\.000 GB beside 0\.200",
        ),
    ],
)
def test_a_budget_that_cannot_hold_a_model_is_refused_with_the_numbers(changes, message):
    with pytest.raises(BudgetTooSmall, match=message):
        choose_budgets(Settings(**changes), SPECS, MACHINE)


@pytest.mark.parametrize(
    ("changes", "machine", "message"),
    [
        (
            {"model_cache_budget_gb": 9.0, "kv_budget_gb": 1.5},
            MACHINE,
            r"10\.567 GB of /dev/shm, which has 10\.000 GB free: weights 9\.000 GB, keys and values"
            r" 1 x 1\.500 GB.*--kv-budget-gb",
        ),
        (
            {"device": "staged", "device_memory_gb": 4.0, "model_cache_budget_gb": 5.0},
            Machine(7_000_000_000, 7_000_000_000),
            r"of memory, there are 7\.000 GB: weights 5\.000 GB.*device 4\.000 GB.*--device-memory",
        ),
        ({}, Machine(10_000_000_000, 64 << 20), r"of /dev/shm, which has 0\.067 GB free"),
        ({}, Machine(500_000_000, 500_000_000), r"of /dev/shm, which has 0\.500 GB free"),
        ({"colocated_count": 50}, MACHINE, r"of memory, there are 10\.000 GB.*--colocated-count"),
    ],
)
def test_a_layout_that_is_more_than_there_is_is_refused_with_the_numbers(changes, machine, message):
    node = lay_out(Settings(**{"colocated_count": 1, **changes}), SPECS, machine)
    with pytest.raises(BudgetTooSmall, match=message) as raised:
        check_room(node, SPECS, machine)
    assert "\n" not in str(raised.value)


GB = 1_000_000_000
LARGE = (make_spec("a", weight_bytes=6 * GB), make_spec("b", weight_bytes=6 * GB))


def test_what_a_least_size_takes_above_its_share_is_taken_from_the_other_shares():
    machine = Machine(24 * GB, 24 * GB)
    settings = Settings(device="staged", colocated_count=2)
    node = lay_out(settings, LARGE, machine)
    check_room(node, LARGE, machine)
    assert node.instance.device_weight_bytes >= 6 * GB <= node.weight_bytes
    # The room is used: the shares are not scaled down further than they must be.
    assert 0.94 * machine.memory_bytes < node.total_bytes < 0.96 * machine.memory_bytes
    assert node.instance.kv_bytes > 0.1 * GB


def test_the_default_of_kv_leaves_a_small_device_room_for_the_largest_model():
    specs = (make_spec("a", weight_bytes=2_400_000_000),)
    settings = Settings(device="staged", device_memory_gb=2.5)
    budgets = choose_budgets(settings, specs, MACHINE)
    assert budgets.device_weight_bytes >= 2_400_000_000
    assert budgets.device_kv_bytes == pytest.approx(100_000_000, abs=2 * 4096)


def test_a_device_with_room_for_little_more_than_a_sequence_is_served():
    spec = make_wide_spec(weight_bytes=2_350_000_000, kv_token_bytes=400_000)
    settings = Settings(device="staged", device_memory_gb=2.5)
    budgets = choose_budgets(settings, (spec,), MACHINE)
    assert budgets.device_kv_bytes >= 256 * spec.kv_token_bytes
    assert budgets.device_weight_bytes >= spec.weight_bytes


@pytest.mark.parametrize(
    ("changes", "gigabytes", "named", "not_named"),
    [
        ({}, (7, 6), "serve smaller models, or give /dev/shm", "--"),
        ({"model_cache_budget_gb": 7.0}, (9, 6), "lower --model-cache-budget-gb, or", "--kv"),
        ({"kv_budget_gb": 1.0}, (9, 6), "lower --kv-budget-gb, or", "--model-cache"),
        ({"colocated_count": 4}, (6, 60), "lower the count of instances", "--model-cache"),
        ({"device": "staged"}, (7, 60), "serve smaller models, or add memory", "--"),
        ({"device": "staged", "device_memory_gb": 8.0}, (9, 60), "lower --device-m", "--model-c"),
    ],
)
def test_a_refusal_names_only_what_can_help(changes, gigabytes, named, not_named):
    machine = Machine(*(count * GB for count in gigabytes))
    node = lay_out(Settings(**{"colocated_count": 1, **changes}), LARGE, machine)
    with pytest.raises(BudgetTooSmall, match=named) as raised:
        check_room(node, LARGE, machine)
    assert not_named not in str(raised.value).replace("--shm-size", "")


def test_memory_that_others_use_is_warned_of(caplog):
    settle(Settings(), SPECS, msgspec.structs.replace(MACHINE, unused_bytes=9 * GB))
    assert caplog.messages == []
    settle(Settings(), SPECS, msgspec.structs.replace(MACHINE, unused_bytes=2 * GB))
    assert "only 2.000 GB are unused now" in caplog.text


def test_shares_shrink_to_what_shared_memory_has_free():
    machine = Machine(10_000_000_000, 5_000_000_000)
    node = lay_out(Settings(), SPECS, machine)
    assert node.shared_bytes == pytest.approx(5_000_000_000, abs=3 * 4096)
    check_room(node, SPECS, machine)


set_gb = st.one_of(st.just(0.0), st.floats(0.1, 4.0))
# Mostly layouts that fit, and some that do not.
rooms = st.integers(1 << 32, 1 << 38)
model_sizes = st.tuples(st.integers(1, 1 << 29), st.integers(1, 1 << 18))


@given(
    st.sampled_from(["cpu", "staged"]),
    st.integers(1, 8),
    st.tuples(set_gb, set_gb, set_gb),
    st.tuples(rooms, rooms),
    st.lists(model_sizes, min_size=1, max_size=4),
)
def test_a_layout_holds_its_models_adds_up_and_is_the_same_once_settled(
    device, count, sizes, room, models
):
    names = ("model_cache_budget_gb", "kv_budget_gb", "device_memory_gb")
    settings = Settings(
        device=device, colocated_count=count, **dict(zip(names, sizes, strict=True))
    )
    machine = Machine(*room)
    specs = [make_wide_spec(weight_bytes=w, kv_token_bytes=t) for w, t in models]
    try:
        settled = settle(settings, specs, machine)
    except BudgetTooSmall:
        return
    node = lay_out(settled, specs, Machine(1, 1))
    assert node == lay_out(settings, specs, machine)
    each = node.instance
    shared = each.weight_bytes + count * each.kv_bytes + SHARED_RESERVE_BYTES
    processes = PROCESS_BYTES + each.grammar_host_bytes
    own = each.device_weight_bytes + each.device_kv_bytes + each.stage_bytes + each.workspace_bytes
    assert node.shared_bytes == shared <= machine.shared_free_bytes
    assert node.total_bytes == shared + count * (own + processes) + node.front_bytes
    assert node.total_bytes <= machine.memory_bytes
    weights = min(each.weight_bytes, each.device_weight_bytes or each.weight_bytes)
    assert all(spec.weight_bytes <= weights for spec in specs)
    assert all(256 * spec.kv_token_bytes <= each.kv_bytes for spec in specs)


@given(st.integers(1, 4), st.sampled_from(["cpu", "staged"]), st.integers(1, 64))
def test_defaults_fit_any_machine_that_holds_the_least(count, device, gigabytes_of_memory):
    machine = Machine(gigabytes_of_memory << 30, gigabytes_of_memory << 29)
    specs = (make_spec("a", weight_bytes=1 << 20),)
    if machine.memory_bytes > 2 * (count + 1) * PROCESS_BYTES:
        settle(Settings(device=device, colocated_count=count), specs, machine)


def test_the_process_that_follows_schemas_is_in_the_layout_with_the_largest_vocabularies():
    sizes = (1000, 5000, 2000, 4000, 3000)
    specs = [msgspec.structs.replace(SPECS[0], id=f"m{n}", vocab_tokens=n) for n in sizes]
    node = lay_out(Settings(colocated_count=3), specs, MACHINE)
    aside_bytes = GRAMMAR_HOST_BYTES + GRAMMAR_TOKEN_BYTES * 14000
    assert node.instance.grammar_host_bytes == aside_bytes == grammar_host_bytes(specs)
    without = msgspec.structs.replace(node.instance, grammar_host_bytes=0)
    rest = msgspec.structs.replace(node, instance=without)
    assert node.total_bytes - rest.total_bytes == 3 * aside_bytes
    lines = [line for line in layout_lines(node) if line.startswith("grammar host: 3 x 0.057 GB")]
    assert lines and "1.611 GB" in lines[0]


def test_the_null_device_has_no_layout():
    settings = Settings(device="null")
    assert settle(settings, SPECS, Machine(1, 1)) == settings


def test_an_instance_computes_on_all_processors_where_nothing_is_set():
    assert compute_threads(Settings(colocated_count=1000)) == available_processors()
    assert compute_threads(Settings(threads_per_instance=3)) == 3


def test_null_engines_and_budgets_need_no_torch():
    code = "import sys, aegaeon.engine.open, aegaeon.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_tokenizers_are_in_the_layout_once_for_each_file_and_bounded(tmp_path):
    def spec(name, file_bytes):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "tokenizer.json").open("wb") as file:
            file.truncate(file_bytes)
        return msgspec.structs.replace(SPECS[0], id=name, path=str(tmp_path / name))

    small, large = spec("a", 4_000_000), spec("b", 12_000_000)
    again = [msgspec.structs.replace(small, id=f"a{number}") for number in range(500)]
    one, both = lay_out(Settings(), [small], MACHINE), lay_out(Settings(), [small, large], MACHINE)
    assert one.front_bytes - PROCESS_BYTES == 35_000_000 + 10 * 4_000_000 + 4_000_000
    assert lay_out(Settings(), [small, *again], MACHINE).front_bytes == one.front_bytes
    assert both.front_bytes - one.front_bytes == 35_000_000 + 10 * 12_000_000 + 12_000_000
    many = [spec(f"c{number}", 12_000_000) for number in range(40)]
    most = TOKENIZERS_BYTES + VOCABULARIES_BYTES
    assert lay_out(Settings(), many, MACHINE).front_bytes - PROCESS_BYTES == most


def test_there_is_one_instance_where_two_have_no_room(caplog):
    settings, least = Settings(), None
    for megabytes in range(900, 2000, 20):
        machine = Machine(megabytes * 10**6, megabytes * 10**6)
        try:
            settled = settle(settings, SPECS, machine)
        except BudgetTooSmall:
            with pytest.raises(BudgetTooSmall):  # nor has one that is asked for
                settle(Settings(colocated_count=1), SPECS, machine)
            continue
        if least is None:
            least = settled
            assert "one instance is started, for 2 there is no room" in caplog.text
            with pytest.raises(BudgetTooSmall):
                settle(Settings(colocated_count=2), SPECS, machine)
    assert least is not None and least.colocated == least.instance_count == 1
    assert settled.colocated == 2


def test_there_is_one_instance_where_two_would_not_hold_a_context_that_one_holds(caplog):
    # 1 GB for keys and values, of which each of two has half.
    for context_bytes, count in ((400e6, 2), (700e6, 1), (1500e6, 2)):
        caplog.clear()
        spec = make_wide_spec(kv_token_bytes=100_000, context_tokens=int(context_bytes / 100_000))
        machine = Machine(10_000_000_000, 10_000_000_000)
        settled = settle(Settings(), (spec, SPECS[1]), machine)
        assert settled.colocated == count, context_bytes
        assert ("less than the whole context of a; --colocated-count 2" in caplog.text) == (
            count == 1
        )
        assert settled.kv_budget_gb == pytest.approx(1 / count, abs=0.01)
        # Who says how many gets as many.
        assert settle(Settings(colocated_count=2), (spec,), machine).colocated == 2
        asked = Settings(prefill_count=1, decode_count=1)
        assert settle(asked, (spec,), machine).instance_count == 2
