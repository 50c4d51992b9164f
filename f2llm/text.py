"""What a text is to the kit: when two count as equal, and what stands before a query."""

import re
import unicodedata

QUERY_PROMPT = "Instruct: {instruction}\nQuery: "  # [v1] section 2; before queries only, documents are raw


def prompted(text: str, instruction: str | None) -> str:
    """A text as the model sees it."""
    return QUERY_PROMPT.format(instruction=instruction) + text if instruction else text


def normalise(text: str) -> str:
    """Case, punctuation and width folded away: two texts that differ only there count as equal."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
