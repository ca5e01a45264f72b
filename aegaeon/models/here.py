"""Where a served model's files are on this node of a cluster, and whether they are there: each node
has its own models directory, into which those that it lacks are brought (aegaeon/transfer)."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from aegaeon.config import KvDtype
from aegaeon.errors import AegaeonError
from aegaeon.models.references import describe_model
from aegaeon.types import ModelSpec

LOOK_S = 0.5  # between two looks for a model that was not there
TEXTS = ".texts"  # in the models directory: what describes models whose weights are not there
# In which a model that is there must be the one that is served.
FACTS = (
    *("architecture", "weight_bytes", "kv_token_bytes", "context_tokens", "vocab_tokens"),
    *("config", "tokenizer_bytes"),
)


def stored_name(spec: ModelSpec) -> str:
    """Return the name of the directory of a model, the same on all nodes."""
    return Path(spec.path).name


def for_all_nodes(spec: ModelSpec, models_dir: str | Path) -> ModelSpec:
    """Return `spec` as all nodes are told of it: a model of the models directory by its name, for
    each has its own; one that was named by another path by that path."""
    path = Path(spec.path)
    if path.parent == _absolute(models_dir):
        return msgspec.structs.replace(spec, path=path.name)
    return spec


class Here:
    """The models of a node, whose models directory is `models_dir`. One thread's alone."""

    def __init__(
        self,
        models_dir: str | Path,
        kv_dtype: KvDtype = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is looked at yet."""
        self._models_dir = _absolute(models_dir)
        self._kv_dtype = kv_dtype
        self._clock = clock
        self._known: dict[str, tuple[ModelSpec, ModelSpec]] = {}  # as told, and as it is here
        self._missing: dict[str, tuple[ModelSpec, float, str]] = {}  # looked at when, and why not

    def place_of(self, spec: ModelSpec) -> Path:
        """Return where the files of `spec` are, or will be once they have been brought: where its
        path says, if it does and that is here, else in the models directory."""
        path = Path(spec.path)
        if path.is_absolute() and (path / "config.json").is_file():
            return path
        return self._models_dir / path.name

    def local(self, spec: ModelSpec) -> ModelSpec:
        """Return `spec` with the path that it has on this node."""
        return msgspec.structs.replace(spec, path=str(self.place_of(spec)))

    def present(self, specs: Iterable[ModelSpec]) -> tuple[ModelSpec, ...]:
        """Return those of `specs` that are here, with their paths on this node. One that was here
        is taken to be so until its spec changes."""
        return tuple(found for spec in specs if (found := self._find(spec)) is not None)

    def why_not(self, spec: ModelSpec) -> str:
        """Return why what is here under the name of `spec` is not it; empty, where nothing is, or
        where it is."""
        self._find(spec)
        missing = self._missing.get(spec.id)
        return "" if missing is None else missing[2]

    def for_text(self, spec: ModelSpec) -> ModelSpec | None:
        """Return `spec` with the path of a directory that has what a proxy needs of it; None while
        that has not come."""
        for path in (self.place_of(spec), self._models_dir / TEXTS / stored_name(spec)):
            if (path / "tokenizer.json").is_file():
                return msgspec.structs.replace(spec, path=str(path))
        return None

    def _find(self, spec: ModelSpec) -> ModelSpec | None:
        known = self._known.get(spec.id)
        if known is not None and known[0] == spec:
            return known[1]
        now, missing = self._clock(), self._missing.get(spec.id)
        if missing is not None and missing[0] == spec and now - missing[1] < LOOK_S:
            return None
        local = self.local(spec)
        if os.path.isdir(local.path):  # noqa: PTH112  quicker, and asked often
            why = self._differs(local)
            if not why:
                self._missing.pop(spec.id, None)
                self._known[spec.id] = spec, local
                return local
        else:
            why = ""
        self._missing[spec.id] = spec, now, why
        return None

    def _differs(self, local: ModelSpec) -> str:
        if not local.config:  # told by who knew no more of it
            return ""
        try:
            found = describe_model(Path(local.path), local.id, self._kv_dtype, local.quantize)
        except AegaeonError as error:
            return str(error)
        names = [name for name in FACTS if getattr(found, name) != getattr(local, name)]
        if not names:
            return ""
        return (
            f"{local.path} is not the model that the cluster serves as {local.id} (it differs in "
            f"{', '.join(names)}); move it away, and the right one is brought"
        )


def _absolute(directory: str | Path) -> Path:
    return Path(os.path.abspath(Path(directory).expanduser()))  # noqa: PTH100  links stay
