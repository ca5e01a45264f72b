"""What a forward pass is estimated to hold."""

import json

from aegaeon.memory.workspace import FLOAT_BYTES, MAX_PASS_ROWS, pass_bytes
from aegaeon.models.config import parse_config
from tests.support.checkpoints import make_config


def test_a_pass_holds_its_widest_operand_once_more():
    """The copy of it that products are made from lies beside all that is alive together."""
    narrow, wide = (
        parse_config(json.dumps(make_config("llama", intermediate_size=size)).encode())
        for size in (10_000, 20_000)
    )
    each = FLOAT_BYTES * MAX_PASS_ROWS * (wide.intermediate_size - narrow.intermediate_size)
    inner = 3
    assert pass_bytes(wide) - pass_bytes(narrow) == (inner + 1) * each
