"""Encoder outputs by content: found again, within the limit, least recently used dropped first."""

from __future__ import annotations

import torch

from autoglm_lab.memory.kv.feature_store import FeatureStore


def features(value: float) -> torch.Tensor:
    return torch.full((16, 64), value, dtype=torch.float32)  # 4 KiB


def test_what_was_put_is_found_and_counted() -> None:
    store = FeatureStore(limit=8192)
    assert store.get("a") is None
    store.put("a", features(1))
    assert store.has("a")
    found = store.get("a")
    assert found is not None
    torch.testing.assert_close(found, features(1))
    assert (store.hits, store.misses, store.nbytes) == (1, 1, 4096)
    (row,) = store.holdings()
    assert (row.name, row.place, row.nbytes) == ("encoder outputs", "device", 4096)


def test_the_least_recently_used_is_dropped_at_the_limit() -> None:
    store = FeatureStore(limit=8192)
    store.put("a", features(1))
    store.put("b", features(2))
    store.get("a")
    store.put("c", features(3))
    assert [key for key in "abc" if store.has(key)] == ["a", "c"]
    assert store.nbytes == 8192
    store.put("c", features(4))
    assert (len(store), store.nbytes) == (2, 8192)


def test_a_lower_limit_holds_at_once_and_too_large_a_tensor_is_not_kept() -> None:
    store = FeatureStore(limit=8192)
    store.put("a", features(1))
    store.put("b", features(2))
    store.obey(5000)
    assert [key for key in "ab" if store.has(key)] == ["b"]
    store.put("large", torch.zeros(64, 64))
    assert not store.has("large")
    assert store.has("b")
    assert store.clear() == 4096
    assert list(store.holdings()) == []


def test_a_part_of_a_larger_tensor_keeps_only_its_own_bytes() -> None:
    store, whole = FeatureStore(limit=1 << 20), torch.arange(1024.0)
    store.put("part", whole[:128])
    kept = store.get("part")
    assert kept is not None
    assert kept.untyped_storage().nbytes() == 512
    torch.testing.assert_close(kept, whole[:128])


def test_content_is_known_in_whatever_size_it_was_kept() -> None:
    store = FeatureStore(1 << 20)
    store.put("image:abc:4:sizes", torch.zeros(4, 8))
    assert store.has_any("image:abc:")
    assert not store.has_any("image:ab:")
    store.clear()
    assert not store.has_any("image:abc:")
