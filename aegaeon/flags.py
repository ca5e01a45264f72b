"""What the command lines of several commands share: their parser, and flags of settings."""

import argparse
from typing import Any, Literal, NoReturn, get_args, get_origin

from aegaeon.config import describe
from aegaeon.errors import ConfigError
from aegaeon.setting_text import default_text, parse_text
from aegaeon.store.redis_flag import hide_login


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are our one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def escape(text: str) -> str:
    """Return `text` as argparse wants a help text, which it formats."""
    return text.replace("%", "%%")


def add_setting(group: "argparse._ArgumentGroup", name: str) -> None:
    """Add the flag of the setting `name` to `group`."""
    kind, text, default = describe(name)
    flag = "--" + name.replace("_", "-")
    shown = default_text(default)
    text = f"{text} (default: {shown})" if shown else text
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=escape(text))
        return
    options: dict[str, Any] = {"metavar": _metavar(kind)}
    if get_origin(kind) is Literal:
        options = {"choices": get_args(kind)}

    def read(value: str) -> Any:
        return parse_text(kind, hide_login(value) if name == "redis_url" else value, flag)

    group.add_argument(flag, type=read, help=escape(text), **options)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "A,B,C"
    return {int: "N", float: "X"}.get(kind, "TEXT")
