"""Downloads models from the Hugging Face hub into the models directory."""

import logging
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from aegaeon.errors import ModelNotFound
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.config import read_config
from aegaeon.models.hub_ids import DESCRIBING_FILES, HUB_ID, WEIGHT_FILES, directory_name

log = logging.getLogger(__name__)

# What the hub's library raises when it cannot: its own errors, and those of whichever HTTP client
# its release is built on, which is the base of its HTTP error.
_DOWNLOAD_ERRORS: tuple[type[BaseException], ...] = (
    OSError,
    ValueError,
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
)


def pull(hub_id: str, models_dir: str | Path) -> Path:
    """Download the model `hub_id` (Org/Name) into `models_dir` and return its directory.

    Progress bars go to stderr. An interrupted download continues at the next call and is never
    taken for a model. Nothing is fetched if the directory is there already.
    Raises ModelNotFound (wrong id, offline, no access), UnsupportedModel (before any weights are
    fetched), CheckpointError.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise ModelNotFound(f"{hub_id!r} is not a hub id; it must look like Org/Name")
    root = Path(models_dir).expanduser()
    target = root / directory_name(hub_id)
    if target.is_dir():
        return target
    partial = root / f".{target.name}.partial"
    _download(hub_id, partial, DESCRIBING_FILES)
    read_config(partial)
    _download(hub_id, partial, WEIGHT_FILES)
    plan_load(partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the library's own records
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    log.info("model downloaded model=%s path=%s", hub_id, target)
    return target


def _download(hub_id: str, directory: Path, patterns: tuple[str, ...]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Only the top folder: others hold other formats of the same weights.
        snapshot_download(
            hub_id,
            local_dir=directory,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    except _DOWNLOAD_ERRORS as error:
        fact = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFound(
            f"cannot download {hub_id} from the hub ({fact}); check the id and the network, log in "
            "with `hf auth login` if the model is gated, or name a local directory"
        ) from error
