"""From a model directory to a decoder that computes."""

from pathlib import Path

from aegaeon.device.base import Device
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.layers import Decoder
from aegaeon.models.packing import plan_pack
from aegaeon.models.weights import OnProgress, read_weights
from aegaeon.types import Quantize


def load_model(
    path: str | Path,
    device: Device,
    on_progress: OnProgress | None = None,
    quantize: Quantize = "none",
) -> Decoder:
    """Load the model in the directory `path` for `device`, into memory of its own.

    Peak memory is the packed weights plus one tensor. `on_progress(bytes_done, bytes_total)`
    counts bytes of the files. Raises ModelNotFound, CheckpointError, UnsupportedModel.
    """
    plan = plan_pack(plan_load(path), quantize)
    return Decoder(plan.load_plan.config, device, read_weights(plan, on_progress))
