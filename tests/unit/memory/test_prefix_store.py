"""Kept prefixes: what is found again is what was stored, limits hold, every page is somewhere once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.memory.kv.host_pages import HostPages
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PAGE_TOKENS, PageFormat
from autoglm_lab.memory.kv.prefix_store import PrefixStore
from autoglm_lab.policy import KvPolicy


@dataclass
class Holder:
    """A conversation of pages: its keys, and the pages that it holds for them."""

    keys: list[bytes] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


@pytest.fixture
def pool() -> KvPool:
    """A pool with a second place, as beside a GPU."""
    pool = KvPool(PageFormat(layers=2, kv_heads=2, head_dim=16, dtype=torch.float32), open_accelerator("cpu"))
    pool.prefixes = PrefixStore(pool, HostPages(pool.raw(0).numel(), torch.device("cpu")), PAGE_TOKENS)
    return pool


def limits(pool: KvPool, device: int, host: int = 0) -> KvPolicy:
    """A policy that keeps so many pages."""
    return KvPolicy(prefix_bytes=device * pool.page_bytes, prefix_host_bytes=host * pool.page_bytes)


def chain(*path: int) -> list[bytes]:
    """The keys of a dialogue whose pages hold ``path``."""
    return [repr(path[: end + 1]).encode() for end in range(len(path))]


def say(pool: KvPool, keys: list[bytes]) -> Holder:
    """Hold what is known of ``keys``, write the rest, publish all."""
    known = pool.prefixes.match(keys)
    pages = pool.prefixes.hold(keys[:known])
    for key, page in zip(keys, pages, strict=False):
        assert content(pool, page) == mark(key)
    for key in keys[known:]:
        (page,) = pool.take(1)
        pool.raw(page).fill_(mark(key))
        pages.append(page)
    return Holder(keys, pool.prefixes.add(keys, pages))


def mark(key: bytes) -> int:
    return sum(key) % 251


def content(pool: KvPool, page: int) -> int:
    raw = pool.raw(page)
    assert bool((raw == raw[0]).all())
    return int(raw[0])


def rows(pool: KvPool) -> dict[tuple[str, str], int]:
    return {(row.name, row.place): row.nbytes or 0 for row in pool.holdings()}


def test_a_prefix_is_found_after_its_conversation_has_gone(pool: KvPool) -> None:
    pool.prefixes.obey(limits(pool, 10))
    first = say(pool, chain(1, 2, 3))
    pool.put(first.pages)
    assert rows(pool) == {("KV kept prefixes", "device"): 3 * pool.page_bytes}
    second = say(pool, chain(1, 2, 9))
    assert second.pages[:2] == first.pages[:2]
    assert rows(pool)["KV kept prefixes", "device"] == pool.page_bytes


def test_the_least_recently_used_goes_first_and_never_before_what_follows_it(pool: KvPool) -> None:
    pool.prefixes.obey(limits(pool, 10))
    for path in [(1, 2, 3), (1, 2, 4), (5, 6)]:
        pool.put(say(pool, chain(*path)).pages)
    pool.put(say(pool, chain(1, 2, 3)).pages)
    pool.prefixes.obey(limits(pool, 4))
    # (5, 6) was used before the last (1, 2, 3); (1, 2) is needed by it; (1, 2, 4) is the oldest.
    assert [pool.prefixes.match(chain(*path)) for path in [(1, 2, 3), (1, 2, 4), (5, 6)]] == [3, 2, 1]
    pool.prefixes.obey(limits(pool, 2))
    assert [pool.prefixes.match(chain(*path)) for path in [(1, 2, 3), (5, 6)]] == [2, 0]
    pool.prefixes.obey(limits(pool, 0))
    assert pool.used_pages == 0


def test_what_leaves_the_device_comes_back_from_the_host(pool: KvPool) -> None:
    pool.prefixes.obey(limits(pool, 1, host=8))
    pool.put(say(pool, chain(1, 2, 3, 4)).pages)
    assert pool.used_pages == 1
    assert rows(pool)["KV kept prefixes", "host"] >= 3 * pool.page_bytes
    assert pool.prefixes.host.copied_out == 3 * pool.raw(0).numel()
    again = say(pool, chain(1, 2, 3, 4))  # it checks what the pages hold
    assert len(set(again.pages)) == 4
    assert pool.prefixes.host.copied_in == 3 * pool.raw(0).numel()
    assert pool.prefixes.host.used == 0


def test_the_host_keeps_no_more_than_its_limit(pool: KvPool) -> None:
    pool.prefixes.obey(limits(pool, 0, host=3))
    pool.put(say(pool, chain(1, 2, 3, 4)).pages)
    assert pool.prefixes.host.used == 3
    assert pool.prefixes.match(chain(1, 2, 3, 4)) == 3
    pool.put(say(pool, chain(7, 8)).pages)
    assert pool.prefixes.host.used == 3
    assert pool.prefixes.match(chain(7, 8)) == 2
    assert pool.prefixes.match(chain(1, 2, 3, 4)) == 1
    pool.prefixes.obey(limits(pool, 0, host=0))
    assert (pool.prefixes.host.used, pool.prefixes.host_nbytes, pool.used_pages) == (0, 0, 0)


def test_the_same_pages_made_twice_are_stored_once(pool: KvPool) -> None:
    first = say(pool, chain(1, 2))
    pages = pool.take(3)
    held = pool.prefixes.add(chain(1, 2, 3), pages)
    assert held == [*first.pages, pages[2]]
    assert pool.used_pages == 3
    pool.put(first.pages)
    pool.put(held)
    assert pool.used_pages == 0


def test_a_page_that_will_be_written_takes_what_follows_it_out_of_the_store(pool: KvPool) -> None:
    pool.prefixes.obey(limits(pool, 10))
    one = say(pool, chain(1, 2, 3))
    pool.put(one.pages[2:])
    assert pool.used_pages == 3
    pool.prefixes.forget(one.pages[1])
    assert pool.used_pages == 2
    assert pool.prefixes.match(chain(1, 2, 3)) == 1


def test_a_pool_without_room_takes_kept_pages_before_it_says_no(pool: KvPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.prefixes.obey(limits(pool, 10))
    pool.put(say(pool, chain(1, 2, 3)).pages)
    (share,) = pool.shares
    monkeypatch.setattr(share, "room", lambda used: (3 - used) * pool.page_bytes)
    assert len(pool.take(2)) == 2
    assert pool.prefixes.match(chain(1, 2, 3)) == 1


def test_without_reuse_nothing_is_shared_or_kept(pool: KvPool) -> None:
    pool.prefixes.obey(limits(pool, 10, host=10))
    pool.put(say(pool, chain(1, 2)).pages)
    held = say(pool, chain(1, 3))
    pool.prefixes.obey(KvPolicy(reuse=False))
    assert pool.prefixes.match(chain(1, 3)) == 0
    other = say(pool, chain(1, 3))
    assert not set(other.pages) & set(held.pages)
    pool.put([*held.pages, *other.pages])
    assert pool.used_pages == 0


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_pages_hold_what_their_key_says_and_limits_hold(pool: KvPool, seed: int) -> None:
    chance = random.Random(seed)
    store, holders = pool.prefixes, []
    device, host = 6, 5
    store.obey(limits(pool, device, host))
    for _ in range(600):
        action = chance.random()
        if action < 0.45 or not holders:
            path = [chance.randrange(3) for _ in range(chance.randrange(1, 7))]
            holders.append(say(pool, chain(*path)))
        elif action < 0.75:
            pool.put(holders.pop(chance.randrange(len(holders))).pages)
        elif action < 0.85:
            one = chance.choice(holders)
            cut = chance.randrange(len(one.pages) + 1)
            pool.put(one.pages[cut:])
            del one.pages[cut:], one.keys[cut:]
        elif action < 0.9:
            one = chance.choice(holders)
            if one.pages and pool.holders(one.pages[-1]) == 1:
                store.forget(one.pages[-1])
                pool.put([one.pages.pop()])
                one.keys.pop()
        elif action < 0.95:
            store.free(chance.randrange(4) * pool.page_bytes)
        else:
            device, host = chance.randrange(8), chance.randrange(8)
            store.obey(limits(pool, device, host))
        held = {page for one in holders for page in one.pages}
        assert store.nbytes == (pool.used_pages - len(held)) * pool.page_bytes
        assert store.nbytes <= device * pool.page_bytes
        assert store.host.used <= host
        for one in holders:
            assert [content(pool, page) for page in one.pages] == [mark(key) for key in one.keys]
    for one in holders:
        pool.put(one.pages)
    store.clear()
    assert (pool.used_pages, store.host_nbytes, store.nbytes) == (0, 0, 0)
