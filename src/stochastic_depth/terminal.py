"""What a terminal shows of names from files and runs: always text."""


def visible(text: str) -> str:
    """`text` with what could drive a terminal, or cannot be encoded, written as an escape."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
