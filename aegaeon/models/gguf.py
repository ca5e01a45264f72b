"""Turns a GGUF file into a model directory in the Hugging Face layout, once."""

import importlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from aegaeon.errors import CheckpointError, ConfigError, ModelNotFound, UnsupportedModel
from aegaeon.models.checkpoint import tensor_shapes
from aegaeon.models.config import ModelConfig, parse_config
from aegaeon.models.gguf_metadata import GgufMetadata, config_json, generation_json
from aegaeon.models.gguf_tokenizer import build_tokenizer, tokenizer_config_json

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
ImportDtype = Literal["bf16", "f16", "f32"]

DTYPES = {
    "bf16": (torch.bfloat16, "BF16", "bfloat16"),
    "f16": (torch.float16, "F16", "float16"),
    "f32": (torch.float32, "F32", "float32"),
}
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# A vocabulary of 256,000 tokens with scores, types and merges takes 3 million.
MAX_HEADER_READS = 8_000_000
ROPE_FREQUENCIES = "rope_freqs.weight"


def import_gguf(
    file: str | Path,
    out_dir: str | Path,
    dtype: ImportDtype = "bf16",
    on_progress: OnProgress | None = None,
) -> Path:
    """Write the model in `file` (llama, qwen2 or qwen3, byte-level BPE) to the new `out_dir`.

    Weights are dequantised to `dtype`. Everything is written beside `out_dir` and renamed at the
    end, so an interrupted import leaves no half model. `on_progress(bytes_done, bytes_total)`
    counts bytes of weights written. Needs the package `gguf`; peak memory is a few tensors.
    Raises ModelNotFound, ConfigError (`out_dir` exists, `gguf` is missing), CheckpointError and
    UnsupportedModel. Returns `out_dir`.
    """
    file, target = Path(file).expanduser(), Path(out_dir).expanduser()
    if target.exists():
        raise ConfigError(f"{target} exists already; remove it or choose another name")
    reader = GgufReader(file)
    _sweep_partials(target)
    partial = target.parent / f".{target.name}.import-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        _write_model(reader, partial, dtype, on_progress)
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target} ({error.strerror}); free some space or choose another directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("model imported file=%s path=%s dtype=%s", file, target, dtype)
    return target


def _sweep_partials(target: Path) -> None:
    """Remove what imports to `target` left whose process was killed."""
    prefix = f".{target.name}.import-"
    for left in target.parent.iterdir() if target.parent.is_dir() else ():
        pid = left.name.removeprefix(prefix)
        if left.name.startswith(prefix) and pid.isascii() and pid.isdigit():
            try:
                os.kill(int(pid), 0)
            except (ProcessLookupError, OverflowError):
                log.warning("removing an unfinished import path=%s", left)
                shutil.rmtree(left, ignore_errors=True)
            except PermissionError:
                continue  # alive, another user's


class GgufReader:
    """A GGUF file: metadata as plain values, tensors dequantised one at a time."""

    def __init__(self, file: Path) -> None:
        """Map the file and read its header. Raises as import_gguf does."""
        self.path = file
        try:
            with file.open("rb") as opened:
                magic = opened.read(4)
        except OSError as error:
            raise ModelNotFound(
                f"cannot read {file} ({error.strerror}); name a GGUF file"
            ) from None
        if magic != b"GGUF":
            raise CheckpointError(
                f"{file} is not a GGUF file; name one, or a safetensors directory"
            )
        package = _gguf_package()
        self._dequantize: Callable[[Any, Any], Any] = package.quants.dequantize
        try:
            reader = _bounded_reader(package)(file)
            values = {key: field.contents() for key, field in reader.fields.items()}
        # What the package's parser runs into on damaged bytes.
        except (
            LookupError,
            ValueError,
            TypeError,
            OverflowError,
            RecursionError,
            MemoryError,
        ) as error:
            raise self._unreadable(error) from None
        self.metadata = GgufMetadata(values, str(file))
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of all tensors, in GGUF's own naming."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape, outermost dimension first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the tensor as float32. Raises UnsupportedModel, CheckpointError."""
        tensor = self._tensors[name]
        try:
            with np.errstate(all="ignore"):  # damaged scales; what comes of them is looked at
                values = self._dequantize(tensor.data, tensor.tensor_type)
            whole = np.asarray(values, dtype=np.float32).reshape(self.shape(name))
        except NotImplementedError:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} is of type {tensor.tensor_type.name}, which the "
                "package gguf cannot dequantise; take another quantisation of the model"
            ) from None
        except ValueError as error:
            raise self._unreadable(error) from None
        if not np.isfinite(whole).all():
            raise self._unreadable(ValueError(f"tensor {name!r} holds values that are no numbers"))
        return whole

    def _unreadable(self, error: Exception) -> CheckpointError | UnsupportedModel:
        fact = " ".join(str(error).split())[:200] or type(error).__name__
        if "GGMLQuantizationType" in fact or "appears to be version" in fact:
            return UnsupportedModel(
                f"{self.path} is of a kind that the installed gguf cannot read ({fact}); "
                "upgrade it with `pip install -U gguf` or take another file"
            )
        return CheckpointError(
            f"{self.path} is damaged or cut off ({fact}); download the file again"
        )


def _gguf_package() -> ModuleType:
    try:
        package = importlib.import_module("gguf")  # an extra: absent is an answer, not a crash
        importlib.import_module("gguf.quants")
    except ModuleNotFoundError:
        raise ConfigError(
            "importing GGUF needs the package gguf; run: pip install 'aegaeon[gguf]'"
        ) from None
    return package


def _bounded_reader(package: ModuleType) -> Callable[[Path], Any]:
    """Return the package's reader for one file, kept from reading past its end, and from a header
    without end.

    Its own reads return less there and it goes on: a damaged count would keep it busy for ever.
    And it makes an object of 200 bytes of each value, be it one byte in a file of many gigabytes.
    """

    reads = 0

    def get(reader: Any, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads > MAX_HEADER_READS:
            raise ValueError("its header has more values than any model's")
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(reader.data):
            raise ValueError("it names more than it holds")
        # As a plain array, for slicing a map takes twice the time; a file has 100,000 of slices.
        reader.data = reader.data.view(np.ndarray)
        return package.GGUFReader._get(reader, offset, dtype, count, *order, **named)

    return type("BoundedReader", (package.GGUFReader,), {"_get": get})


def _write_model(
    reader: GgufReader, directory: Path, dtype: ImportDtype, on_progress: OnProgress | None
) -> None:
    names = reader.tensor_names
    factors = reader.read(ROPE_FREQUENCIES).ravel() if ROPE_FREQUENCIES in names else None
    vocab = reader.shape("token_embd.weight")[0] if "token_embd.weight" in names else 0
    raw = config_json(reader.metadata, names, vocab, None if factors is None else factors.tolist())
    config = parse_config(json.dumps(raw).encode(), str(reader.path))
    _check_tensors(reader, config)
    tokenizer = build_tokenizer(reader.metadata)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "config.json", raw | {"torch_dtype": DTYPES[dtype][2]})
    _write_json(directory / "tokenizer_config.json", tokenizer_config_json(reader.metadata))
    _write_json(directory / "generation_config.json", generation_json(reader.metadata))
    _write_weights(reader, config, directory / "model.safetensors", dtype, on_progress)


def gguf_name(name: str) -> str:
    """Return what GGUF calls the Hugging Face tensor `name`."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"


def _check_tensors(reader: GgufReader, config: ModelConfig) -> None:
    left = set(reader.tensor_names) - {ROPE_FREQUENCIES}
    for name, shape in tensor_shapes(config):
        source = gguf_name(name)
        if source not in left:
            raise CheckpointError(
                f"{reader.path} lacks the tensor {source!r}; download the file again"
            )
        if reader.shape(source) != shape:
            raise CheckpointError(
                f"{reader.path}: tensor {source!r} has shape {list(reader.shape(source))}, the "
                f"metadata ask for {list(shape)}; download the file again"
            )
        left.remove(source)
    if left:
        raise UnsupportedModel(
            f"{reader.path}: tensor {min(left)!r} is not part of {config.architecture}, leaving it "
            "out would change the answers; take the model's safetensors"
        )


def _write_weights(
    reader: GgufReader,
    config: ModelConfig,
    path: Path,
    dtype: ImportDtype,
    on_progress: OnProgress | None,
) -> None:
    torch_dtype, stored_dtype, _ = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, shape in tensor_shapes(config):
        end = total + int(np.prod(shape)) * torch_dtype.itemsize
        header[name] = {"dtype": stored_dtype, "shape": shape, "data_offsets": [total, end]}
        total = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begin aligned, as the format advises
    done = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for values in _converted(reader, config):
            data = torch.from_numpy(values).to(torch_dtype).contiguous().view(torch.uint8).numpy()
            file.write(data.data)
            done += data.nbytes
            if on_progress is not None:
                on_progress(done, total)
        file.flush()
        os.fsync(file.fileno())


def _converted(
    reader: GgufReader, config: ModelConfig
) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """Yield the tensors in the order of tensor_shapes, as Hugging Face lays them out."""
    is_permuted = config.architecture == "LlamaForCausalLM"
    for name, _ in tensor_shapes(config):
        values = reader.read(gguf_name(name))
        if is_permuted and ".q_proj." in name:
            values = unpermute(values, config.heads)
        elif is_permuted and ".k_proj." in name:
            values = unpermute(values, config.kv_heads)
        # Owned, writable and in order, whatever the reader's view of the file was.
        yield np.array(values, dtype=np.float32, order="C")


def unpermute(
    values: np.ndarray[Any, np.dtype[np.float32]], heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Undo llama.cpp's reordering of a llama's query or key rows: it rotates neighbouring pairs,
    Hugging Face the two halves of a head. `values` is [heads * head_dim, ...]."""
    pairs = values.shape[0] // heads // 2
    split = values.reshape(heads, pairs, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
