"""The HTTP side: text in, text out. `uvicorn aegaeon.proxy:app` serves it."""

from aegaeon.proxy.application import create_app

# Nothing is read or opened before the server starts it.
app = create_app()
__all__ = ["app", "create_app"]
