"""What the command lines of several commands share: their parser."""

import argparse
from typing import NoReturn

from aegaeon.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are our one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def escape(text: str) -> str:
    """Return `text` as argparse wants a help text, which it formats."""
    return text.replace("%", "%%")
