from __future__ import annotations

import pytest
import torch

from vkd_framework.shelf import Shelf


def photos(count: int, dtype: torch.dtype = torch.float32) -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        (f"photo {i}", "another"): {
            "near": torch.randn(3 + i, 8, generator=generator).to(dtype),
            "far": torch.randn(2, 4, generator=generator).to(dtype),
        }
        for i in range(count)
    }


@pytest.mark.parametrize("limit", [0, 500, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_on_the_shelf_comes_back_bit_for_bit_in_memory_and_from_disk(
    limit: int, dtype: torch.dtype
) -> None:
    shelf, expected = Shelf(limit), photos(6, dtype)
    shelf.update(expected)
    assert set(shelf) == set(expected) and len(shelf) == 6
    for keys, features in reversed(expected.items()):
        for layer, rows in features.items():
            found = shelf[keys][layer]
            assert found.dtype == dtype and torch.equal(found, rows)


def test_memory_stays_below_the_limit_however_many_photos_there_are() -> None:
    shelf = Shelf(1000)
    shelf.update(photos(3))
    few = shelf.bytes
    shelf.update(photos(60))
    assert 0 < few <= shelf.bytes <= 1000


def test_features_that_were_read_can_be_written_to_without_changing_what_is_kept() -> None:
    shelf = Shelf(0)
    shelf.update(photos(1))
    (keys,) = shelf
    shelf[keys]["far"].zero_()
    assert bool(shelf[keys]["far"].any())


def test_a_photo_that_was_never_seen_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Shelf()["nobody",]
