"""How many tokens of context a chat gets: here, and as num_ctx in the Modelfile."""

from __future__ import annotations

USUAL = 4096
TALK = 2048  # kept beside a long page for questions and answers


def chat_window(page: int, positions: int) -> int:
    """Tokens of context for a chat about a page of `page` tokens.

    Args:
        positions: what the model was trained for; the window is never larger.
    """
    return min(positions, max(USUAL, page + TALK))
