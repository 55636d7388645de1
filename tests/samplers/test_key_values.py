"""A cache with room against the plain one of transformers, which concatenates."""

import torch
from transformers import DynamicCache

from esscher.samplers.key_values import ROOM, roomy


def test_it_holds_what_a_plain_cache_holds() -> None:
    """Through repeating, selecting, cutting, and more tokens than there was room for."""
    torch.manual_seed(0)
    plain, ours = DynamicCache(), DynamicCache()

    def add(rows: int, length: int) -> None:
        for layer in range(2):
            keys, values = torch.randn(2, rows, 3, length, 4)
            expected = plain.update(keys, values, layer)
            found = ours.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    add(2, 5)
    roomy(ours)
    assert roomy(ours) is ours
    for cache in (plain, ours):
        cache.batch_repeat_interleave(3)
    for _ in range(ROOM + 10):
        add(6, 1)
    for cache in (plain, ours):
        cache.batch_select_indices(torch.tensor([0, 2, 5]))
    add(3, 1)
    for cache in (plain, ours):
        cache.crop(-4)
    add(3, 2)
    assert ours.get_seq_length() == plain.get_seq_length() == 5 + ROOM + 10 + 1 - 4 + 2


def test_tokens_are_appended_without_a_copy_of_all_others() -> None:
    cache = DynamicCache()
    cache.update(*torch.randn(2, 1, 1, 4, 2), 0)
    roomy(cache)
    first, _ = cache.update(*torch.randn(2, 1, 1, 1, 2), 0)
    second, _ = cache.update(*torch.randn(2, 1, 1, 1, 2), 0)
    assert first.data_ptr() == second.data_ptr()
