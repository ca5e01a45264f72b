"""How models and their files are called on the Hugging Face hub, and where they lie when they come
from there."""

import re

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"  # begins with no dot, so it is never "." or ".."
NAME = re.compile(f"{_PART}(/{_PART})?")
HUB_ID = re.compile(f"{_PART}/{_PART}")

# Of a model's directory.
DESCRIBING_FILES = ("*.json", "*.jinja", "tokenizer*")
WEIGHT_FILES = ("*.safetensors",)


def directory_name(model_id: str) -> str:
    """Return the name of the directory of `model_id`: Qwen/Qwen3-0.6B -> `Qwen__Qwen3-0.6B`."""
    return model_id.replace("/", "__")
