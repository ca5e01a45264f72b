"""An engine whose keys and values find the node's shared memory full."""

from tests.support.checkpoints import make_checkpoint
from tests.support.small_memory import run_in_small_memory

SCRIPT = """
import sys
from pathlib import Path

import aegaeon.engine.cpu
from aegaeon.config import Settings
from aegaeon.engine.open import open_engine
from aegaeon.engine.regions import Regions
from aegaeon.models.references import resolve
from aegaeon.types import Decode, Prefill, Switch
from tests.support.decoder import load_in_thread, make_request

aegaeon.engine.cpu.AHEAD_BYTES = 0
mount, checkpoint = map(Path, sys.argv[1:])
spec = resolve(str(checkpoint), str(checkpoint.parent))
settings = Settings(model_cache_budget_gb=0.002, kv_budget_gb=0.004, threads_per_instance=1)
regions = Regions(str(mount / "aegaeon-full.weights"), str(mount / "aegaeon-full.kv"))
engine = open_engine(settings, (spec,), regions)
load_in_thread(engine, spec.id)
engine.submit(make_request("r", list(range(3, 40)), model=spec.id, max_tokens=8))
filler = mount / "filler"
with filler.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
engine.execute(Switch(spec.id))
for _ in range(3):
    outcome = engine.execute(Prefill(spec.id, ("r",)))
    assert outcome.preempted == ("r",) and not outcome.failed and not outcome.tokens, outcome
    assert "/dev/shm" in outcome.shortage, outcome
filler.unlink()
assert len(engine.execute(Prefill(spec.id, ("r",))).tokens) == 1
assert len(engine.execute(Decode(spec.id, ("r",))).tokens) == 1
engine.close()
"""


def test_keys_and_values_that_have_no_memory_are_waited_for(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "llama", "llama", seed=0)
    run_in_small_memory(tmp_path / "mounted", "16m", SCRIPT, checkpoint)
