"""A model directory's safetensors -> a load plan, checked against the configuration. No torch."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from aegaeon.errors import CheckpointError, UnsupportedModel
from aegaeon.models.config import ModelConfig, read_config
from aegaeon.models.safetensors import FileVersion, StoredTensor, read_header, version_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LOADABLE = ("F32", "F16", "BF16")
MAX_INDEX_BYTES = 64 << 20

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


class LoadPlan(msgspec.Struct, frozen=True):
    """The checked configuration and tensors of a model; nothing in it needs checking again.

    `files` are the versions, by path, that this is true of: the tensors are read from no other.
    """

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    files: dict[str, FileVersion]

    @property
    def parameters(self) -> int:
        """Elements of all tensors that the model uses."""
        return sum(count(shape) for _, shape in tensor_shapes(self.config))

    @property
    def file_bytes(self) -> int:
        """Bytes that loading reads."""
        return sum(self.tensors[name].data_bytes for name, _ in tensor_shapes(self.config))


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def plan_load(directory: str | Path) -> LoadPlan:
    """Read configuration and headers of the model in `directory` and check that they agree.

    Reads no weights. Raises ModelNotFound, CheckpointError, UnsupportedModel.
    """
    directory = Path(directory)
    config = read_config(directory)
    stored, versions = _stored_tensors(directory)
    needed = {}
    for name, shape in tensor_shapes(config):
        if name not in stored:
            raise CheckpointError(
                f"{directory} lacks the tensor {name!r}; download or import the model again"
            )
        _check_tensor(stored[name], shape)
        needed[name] = stored[name]
    used = {tensor.path for tensor in needed.values()}
    return LoadPlan(config, needed, {path: versions[path] for path in sorted(used)})


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor the model needs, in the order of computing."""
    yield EMBEDDING, (config.vocab_tokens, config.hidden_size)
    for layer in range(config.layers):
        for name, shape in _layer_shapes(config):
            yield f"{layer_prefix(layer)}{name}", shape
    yield FINAL_NORM, (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield HEAD, (config.vocab_tokens, config.hidden_size)


def layer_prefix(layer: int) -> str:
    """Return what the names of the tensors of `layer` begin with."""
    return f"model.layers.{layer}."


def count(shape: tuple[int, ...]) -> int:
    """Return the elements of a tensor of `shape`."""
    elements = 1
    for size in shape:
        elements *= size
    return elements


def _layer_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield "input_layernorm.weight", (hidden,)
    for name, rows, columns, has_bias in (
        ("self_attn.q_proj", queries, hidden, config.qkv_bias),
        ("self_attn.k_proj", keys, hidden, config.qkv_bias),
        ("self_attn.v_proj", keys, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, queries, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ):
        yield f"{name}.weight", (rows, columns)
        if has_bias:
            yield f"{name}.bias", (rows,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    yield "post_attention_layernorm.weight", (hidden,)


def _check_tensor(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, config.json "
            f"asks for {list(shape)}; restore the files of one and the same model"
        )
    if tensor.dtype not in LOADABLE:
        raise UnsupportedModel(
            f"{tensor.path}: tensor {tensor.name!r} is of type {tensor.dtype}; "
            f"use a checkpoint in one of {', '.join(LOADABLE)}"
        )


def _stored_tensors(
    directory: Path,
) -> tuple[dict[str, StoredTensor], dict[str, FileVersion]]:
    if (directory / SINGLE).is_file():
        # Looked at before it is read: what is read then is this version, or will be refused.
        versions = {str(directory / SINGLE): version_of(directory / SINGLE)}
        return read_header(directory / SINGLE), versions
    if not (directory / INDEX).is_file():
        raise _no_weights(directory)
    weight_map = _read_index(directory / INDEX)
    headers, versions = {}, {}
    for file in sorted(set(weight_map.values())):
        if not _is_shard_name(file):
            raise CheckpointError(
                f"{directory / INDEX} names {file!r}, which is not a safetensors file beside it; "
                "download the model again"
            )
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory / file} is missing; download the model again")
        versions[str(directory / file)] = version_of(directory / file)
        headers[file] = read_header(directory / file)
    stored = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{directory / file} lacks the tensor {name!r} that the index promises; "
                "download the model again"
            )
        stored[name] = headers[file][name]
    return stored, versions


def _read_index(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_INDEX_BYTES)
        return msgspec.json.decode(text, type=_Index).weight_map
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a usable index ({error}); download the model again"
        ) from None


def _is_shard_name(file: str) -> bool:
    # Only a plain name: an index must not reach out of its directory.
    return file.endswith(".safetensors") and Path(file).name == file and "\0" not in file


def _no_weights(directory: Path) -> CheckpointError:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        return CheckpointError(
            f"{directory} holds only pickled weights, which may run code and are never loaded; "
            "get the safetensors, or convert with save_pretrained of transformers"
        )
    gguf = next(directory.glob("*.gguf"), None)
    if gguf is not None:
        return CheckpointError(
            f"{directory} holds GGUF, not safetensors; run `aegaeon models import {gguf}`"
        )
    return CheckpointError(f"{directory} has no {SINGLE}; download or import the model again")
