"""The HTTP side: text in, text out. `uvicorn aegaeon.proxy:app` serves it."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Make `app` when it is asked for, which reads and opens nothing before it is served.

    Whoever only starts proxies, as the command line does, then imports no web framework.
    """
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    app = import_module("aegaeon.proxy.application").create_app()
    globals()["app"] = app
    return app
