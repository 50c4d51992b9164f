"""Mining of hard negatives: the papers' rule, exact search, and the encoders that say which texts are near."""

from .rule import mine

__all__ = ["mine"]
