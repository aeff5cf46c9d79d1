"""Chats as the chat templates take them, and the few questions that are asked of them.

A message says where a picture goes ({"type": "image"} or {"type": "video"}) and never holds it; the
row's pictures fill the slots of their kind in order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Message = Mapping[str, Any]
"""{"role": str, "content": [{"type": "image"} | {"type": "video"} | {"type": "text", "text": str}, ...]}"""
Kind = Literal["image", "video"]


def user_message(text: str, images: int = 0, videos: int = 0) -> dict[str, Any]:
    """A user's turn: `images` image slots, then `videos` video slots, then the text."""
    slots = [*([{"type": "image"}] * images), *([{"type": "video"}] * videos)]
    return {"role": "user", "content": [*slots, {"type": "text", "text": text}]}


def text_message(role: str, text: str) -> dict[str, Any]:
    """A turn of text alone, e.g. of role "system" or "assistant"."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def slots(messages: Sequence[Message], kind: Kind) -> int:
    """How many pictures of a kind the messages ask for."""
    return sum(part.get("type") == kind for message in messages for part in parts(message))


def texts(messages: Sequence[Message]) -> list[str]:
    """Every text of the messages, in order."""
    found = [part for message in messages for part in parts(message)]
    return [str(part["text"]) for part in found if part.get("type") == "text"]


def parts(message: Message) -> Sequence[Mapping[str, Any]]:
    """What a message holds; a plain string is one text."""
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
