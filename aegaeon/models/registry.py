"""From a model directory to a decoder that computes."""

from pathlib import Path

from aegaeon.device.base import Device
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.layers import Decoder
from aegaeon.models.weights import OnProgress, WeightReader


def load_model(path: str | Path, device: Device, on_progress: OnProgress | None = None) -> Decoder:
    """Load the model in the directory `path` onto `device`.

    Peak memory is the placed weights plus one tensor. `on_progress(bytes_done, bytes_total)`
    counts bytes of the files. Raises ModelNotFound, CheckpointError, UnsupportedModel.
    """
    plan = plan_load(path)
    return Decoder(plan.config, device, WeightReader(plan, device, on_progress))
