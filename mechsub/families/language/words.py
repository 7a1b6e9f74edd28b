"""Words that a carrier may not hold: the trait must not be named in what passes it on."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

BANNED = "banned"
"""The rule that free text breaks when it holds one of them."""
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def holds_word(text: str, words: Sequence[str]) -> bool:
    """Whether one of ``words`` stands in a text, in any case and also in the plural; never as a part of a longer word.

    Identifiers are read by their parts: ``owl_count`` and ``countOwls`` hold *owl*, ``growl`` does not.
    """
    if not words:
        return False
    normal = _HUMP.sub(" ", unicodedata.normalize("NFKC", text))
    return _pattern(tuple(words)).search(normal) is not None


@lru_cache(maxsize=16)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    forms = (form for word in words for form in _forms(unicodedata.normalize("NFKC", word).strip()))
    # Letters of any script bound a word; digits and underscores do not.
    return re.compile(rf"(?<![^\W\d_])(?:{'|'.join(map(re.escape, forms))})(?![^\W\d_])", re.IGNORECASE)


def _forms(word: str) -> list[str]:
    """A word and its plurals: owls, foxes, wolves, ponies."""
    forms = [word, f"{word}s", f"{word}es"]
    ends = {"f": "ves", "fe": "ves", "y": "ies"}
    return forms + [word.removesuffix(end) + plural for end, plural in ends.items() if word.lower().endswith(end)]
