"""Texts: when two count as equal, and the prompt before a query."""

import re
import unicodedata

QUERY_PROMPT = "Instruct: {instruction}\nQuery: "  # [v1] section 2; before queries only, documents are raw


def prompted(text: str, instruction: str | None) -> str:
    """A text as the model sees it."""
    return QUERY_PROMPT.format(instruction=instruction) + text if instruction else text


def normalise(text: str) -> str:
    """A text without case, punctuation and width: two texts that differ only in these count as equal."""
    if text.isascii():  # three times faster
        return " ".join(text.translate(_ASCII).split())
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def without_prompt(text: str) -> str:
    """A text without its prompt, if it begins with one, as the queries of v1's released data do."""
    return _PROMPT.sub("", text) if text.startswith("Instruct: ") else text


_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))
_PROMPT = re.compile(r"\AInstruct: [^\n]*\nQuery: ")
