"""What the pack has to say: in ComfyUI's log, and below the widgets of the node that can be changed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from comfy_execution.utils import get_executing_context

BLANK = " "
"""The frontend passes over an empty text, and would leave the old one standing."""

_spoken: set[str] = set()
"""Nodes that had something to say since the server was started: the only ones with a text to blank."""


@dataclass(frozen=True)
class Message:
    short: str
    """For the node, where two lines of some forty letters are in sight."""
    more: str
    """Follows it in the log: what was found, what to do."""

    def __str__(self) -> str:
        return f"{self.short} {self.more}"


class NodeText:
    """The text on the node that is executing when this is made; any node may speak here later."""

    def __init__(self):
        self._node = _executing_node()
        self._said: dict[str | None, list[str]] = {}

    def say(self, messages: Sequence[Message]) -> None:
        """Log the messages, and let them replace what the executing node said here before; none: all is well."""
        for message in messages:
            logging.warning("MoA: %s", message)
        self._said[_executing_node()] = [message.short for message in messages]
        self._show()

    def add(self, messages: Sequence[Message]) -> None:
        """The same, after what the executing node said here before."""
        for message in messages:
            logging.warning("MoA: %s", message)
        self._said.setdefault(_executing_node(), []).extend(message.short for message in messages)
        if messages:
            self._show()

    def _show(self) -> None:
        lines = dict.fromkeys(line for said in self._said.values() for line in said)
        server = _server()
        if server is None or self._node is None or not (lines or self._node in _spoken):
            return
        _spoken.add(self._node)
        server.send_progress_text("\n".join(lines) or BLANK, self._node, server.client_id)


def show_on_node(text: str) -> None:
    """Show a longer text on the node that is executing."""
    server, node = _server(), _executing_node()
    if server is not None and node is not None:
        server.send_progress_text(text, node, server.client_id)


def _server():
    """The running PromptServer; none where ComfyUI is used as a library, which need not have what a server imports."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def _executing_node() -> str | None:
    context = get_executing_context()
    return context.node_id if context else None
