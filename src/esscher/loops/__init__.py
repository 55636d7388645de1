"""Generators that drive methods and know none of them. They have no side effects on disk."""
