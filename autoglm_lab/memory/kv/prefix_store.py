"""What conversations begin with: pages that several hold together, and pages kept after the last has let them go.

Pages form a tree: a page follows the one whose key its own key was made from. While a conversation holds a page, it
holds every page before it. A page that nobody holds any more is kept, on the device and then on the host, as long as
the policy allows; the least recently used goes first, and never before those that follow it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from autoglm_lab.errors import OutOfMemoryError
from autoglm_lab.memory.kv.host_pages import HostPages
from autoglm_lab.memory.ledger import Place, Row
from autoglm_lab.policy import KvPolicy


class Pages(Protocol):
    """What the store asks of the pool that its pages belong to."""

    @property
    def page_bytes(self) -> int: ...

    def parted(self, pages: int) -> tuple[tuple[int, int], ...]: ...
    def take(self, count: int) -> list[int]: ...
    def share(self, pages: Iterable[int]) -> None: ...
    def put(self, pages: Iterable[int]) -> None: ...
    def holders(self, page: int) -> int: ...
    def raw(self, page: int) -> Tensor: ...
    def free(self, pages: Iterable[int]) -> None: ...


class PrefixStore:
    """Pages by the key of everything that they depend on (`page_keys`). Only the engine's thread calls it.

    Until it is told to `obey` a policy it lets conversations share pages and keeps none.

    Args:
        pool: whose pages they are.
        host: a second place for pages that leave the device; None where the device is the host.
        page_tokens: tokens of a page, for the ledger.
    """

    def __init__(self, pool: Pages, host: HostPages | None, page_tokens: int) -> None:
        self._pool, self._host, self._page_tokens = pool, host, page_tokens
        self._nodes: dict[bytes, _Node] = {}
        self._by_page: dict[int, _Node] = {}
        self._kept, self._kept_limit, self._host_limit = 0, 0, 0
        self._on, self._clock = True, 0
        self._ages, self._host_ages = _ByAge(), _ByAge()

    # finding and holding

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, are known."""
        return next((number for number, key in enumerate(keys) if key not in self._nodes), len(keys))

    def hold(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of ``keys``, which are known, held for one more conversation; those on the host are brought back.

        Raises:
            OutOfMemoryError: there is no room on the device for those from the host; nothing is held then.
        """
        nodes = [self._nodes[key] for key in keys]
        here = [node.page for node in nodes if node.page is not None]
        away = [node for node in nodes if node.page is None]
        self._pool.share(here)
        for node in away:
            node.wanted = True
        try:
            fresh = self._pool.take(len(away))
        except OutOfMemoryError:
            self._pool.put(here)
            raise
        finally:
            for node in away:
                node.wanted = False
        if away:
            self._bring_back(away, fresh)
        return here + fresh

    def add(self, keys: Sequence[bytes], pages: Sequence[int]) -> list[int]:
        """Let a conversation's full pages be found by ``keys``.

        Returns:
            The pages to hold from now on: where a key was known, the page that it was known by, so that what is the
            same is stored once.
        """
        if not self._on:
            return list(pages)
        held, doubles, before = list(pages), [], None
        for number, (key, page) in enumerate(zip(keys, pages, strict=True)):
            node = self._nodes.get(key)
            if node is None:
                if page in self._by_page:
                    break
                node = self._nodes[key] = _Node(key, before)
                if before is not None:
                    before.after[key] = node
            if node.page is None:
                self._settle_on(node, page)
            elif node.page != page:
                self._pool.share([node.page])
                doubles.append(page)
                held[number] = node.page
            before = node
        self._pool.put(doubles)
        return held

    def forget(self, page: int) -> None:
        """A page is about to be written, or to lose its place: neither it nor what follows is found any more."""
        node = self._by_page.get(page)
        if node is not None:
            self._drop(node)

    def keeps(self, page: int) -> bool:
        """Whether a page would be kept when nobody holds it."""
        return page in self._by_page and bool(self._kept_limit or self._host_limit)

    # what the pool tells

    def held(self, page: int) -> None:
        """A conversation takes up a page that nobody held."""
        del page
        self._kept -= 1

    def released(self, page: int) -> bool:
        """Nobody holds a page any more. Returns whether it is kept; its pool frees it otherwise."""
        node = self._by_page.get(page)
        if node is None:
            return False
        if not self.keeps(page):
            del self._by_page[page]
            node.page = None
            self._count_on_device(node.before, -1)
            self._drop(node)
            return False
        self._kept += 1
        node.stamp = self._clock
        self._age(node)
        return True

    def settle(self) -> None:
        """Come back within the limits, after pages were released."""
        self._clock += 1
        self._shrink(self._kept_limit)

    def before_writing(self) -> None:
        """Pages of the pool are about to be written for the first time: copies of what they held must have ended."""
        if self._host is not None:
            self._host.settle()

    # limits

    @property
    def nbytes(self) -> int:
        """Bytes on the device of pages that nobody holds."""
        return self._kept * self._pool.page_bytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory, free places in it included."""
        return 0 if self._host is None else self._host.nbytes

    @property
    def host(self) -> HostPages | None:
        """Where pages go that leave the device; it counts the bytes copied."""
        return self._host

    def obey(self, policy: KvPolicy) -> None:
        """Keep what ``policy`` allows, from now on and at once: ``reuse``, ``prefix_bytes``, ``prefix_host_bytes``."""
        self._on = policy.reuse
        room = self._pool.page_bytes
        self._kept_limit = policy.prefix_bytes // room if policy.reuse else 0
        self._host_limit = policy.prefix_host_bytes // room if policy.reuse and self._host is not None else 0
        if not policy.reuse:
            for node in [node for node in self._nodes.values() if node.before is None]:
                self._drop(node)
        self._shrink(self._kept_limit)
        self._shrink_host(self._host_limit)
        if self._host is not None:
            self._host.trim()

    def free(self, nbytes: int | None = None) -> int:
        """Free at least ``nbytes`` on the device, or all there is: pages move to the host, or are dropped.

        Returns:
            Bytes freed, for the pool to use or give back.
        """
        before = self._kept
        going = before if nbytes is None else min(before, -(-nbytes // self._pool.page_bytes))
        self._shrink(before - going)
        return (before - self._kept) * self._pool.page_bytes

    def clear(self) -> int:
        """Drop every page that nobody holds, here and on the host. Returns bytes freed on the device."""
        before, limit = self._kept, self._host_limit
        self._host_limit = 0
        self._shrink(0)
        self._shrink_host(0)
        self._host_limit = limit
        if self._host is not None:
            self._host.trim()
        return (before - self._kept) * self._pool.page_bytes

    def close(self) -> None:
        """Give the host's memory back. The pool frees its own."""
        self._nodes.clear()
        self._by_page.clear()
        self._kept = 0
        if self._host is not None:
            self._host.close()

    def holdings(self, place: Place = "device") -> Iterator[Row]:
        """Rows of what nobody holds; ``place``: where the pool's pages are."""
        kept, host = self._kept, self.host_nbytes
        if kept:
            counts = f"{kept * self._page_tokens:,} tokens that no conversation holds, kept for one that begins alike"
            for card, nbytes in self._pool.parted(kept):
                yield Row("KV kept prefixes", "kv", place, nbytes, counts, card=card)
        if host and self._host is not None:
            pages, pinned = self._host.used, "pinned" if self._host.pinned else "pageable"
            counts = f"{pages * self._page_tokens:,} tokens that left the device, {pinned}; room for more included"
            yield Row("KV kept prefixes", "kv", "host", host, counts)

    # moving

    def _shrink(self, most: int) -> None:
        """Let pages leave the device until ``most`` of those that nobody holds are there."""
        leaving: list[tuple[_Node, int]] = []
        while self._kept > most and (node := self._ages.pop(self._may_leave)) is not None:
            assert node.page is not None
            leaving.append((node, node.page))
            del self._by_page[node.page]
            node.page = None
            self._kept -= 1
            self._count_on_device(node.before, -1)
        if not leaving:
            return
        # Those that go last are needed by the others: they choose their place on the host first.
        for node, _ in reversed(leaving):
            self._place_on_host(node)
        saved = {node.slot: self._pool.raw(page) for node, page in leaving if node.slot is not None}
        if self._host is not None:
            self._host.save(list(saved.values()), list(saved))
        self._pool.free([page for _, page in leaving])

    def _place_on_host(self, node: _Node) -> None:
        """Find a place for a page, if need be that of one that was used less recently. It is dropped otherwise."""
        if node.key not in self._nodes:
            return  # dropped with a page before it
        host = self._host
        if host is None or not self._host_limit:
            self._drop(node)
            return
        if host.used >= self._host_limit:
            oldest = self._host_ages.pop(self._may_go)
            if oldest is not None and oldest.stamp > node.stamp:
                self._host_ages.push(oldest)
            elif oldest is not None:
                self._drop(oldest)
        node.slot = host.take() if host.used < self._host_limit else None
        if node.slot is None:
            self._drop(node)
        else:
            self._age(node)

    def _shrink_host(self, most: int) -> None:
        while (
            self._host is not None
            and self._host.used > most
            and (node := self._host_ages.pop(self._may_go)) is not None
        ):
            self._drop(node)

    def _bring_back(self, nodes: Sequence[_Node], pages: Sequence[int]) -> None:
        assert self._host is not None
        slots = [node.slot for node in nodes if node.slot is not None]
        self._host.load(slots, [self._pool.raw(page) for page in pages])
        for node, page in zip(nodes, pages, strict=True):
            self._settle_on(node, page)

    def _settle_on(self, node: _Node, page: int) -> None:
        """A page that is held is a node's from now on."""
        node.page, self._by_page[page] = page, node
        self._count_on_device(node.before, 1)
        if node.slot is not None and self._host is not None:
            self._host.put([node.slot])
            node.slot = None

    def _drop(self, node: _Node) -> None:
        """Take a page and all that follow it out of the tree, and free those that nobody holds."""
        if node.before is not None:
            del node.before.after[node.key]
            self._count_on_device(node.before, -(node.page is not None))
            self._age(node.before)
        free, slots, waiting = [], [], [node]
        while waiting:
            one = waiting.pop()
            waiting += one.after.values()
            del self._nodes[one.key]
            if one.slot is not None:
                slots.append(one.slot)
            if one.page is not None:
                del self._by_page[one.page]
                if not self._pool.holders(one.page):
                    free.append(one.page)
            one.page = one.slot = None
        self._kept -= len(free)
        if slots and self._host is not None:
            self._host.put(slots)
        if free:
            self._pool.free(free)

    # age

    def _count_on_device(self, node: _Node | None, change: int) -> None:
        if node is not None:
            node.after_on_device += change
            if change < 0:
                self._age(node)

    def _age(self, node: _Node) -> None:
        """Put a page in the queue of those that may go, where it is one."""
        if self._may_leave(node):
            self._ages.push(node)
            self._ages.tidy(2 * len(self._nodes), self._may_leave)
        elif self._may_go(node):
            self._host_ages.push(node)
            self._host_ages.tidy(2 * len(self._nodes), self._may_go)

    def _may_leave(self, node: _Node) -> bool:
        return node.page is not None and not node.after_on_device and not self._pool.holders(node.page)

    def _may_go(self, node: _Node) -> bool:
        return node.slot is not None and not node.after and not node.wanted


@dataclass(eq=False, slots=True)
class _Node:
    """One page: on the device, or in a slot of the host.

    Attributes:
        before: the page that it follows.
        after: those that follow it, by key; ``after_on_device`` of them are on the device.
        stamp: when it was last released.
        wanted: it is about to be brought back.
    """

    key: bytes
    before: _Node | None
    page: int | None = None
    slot: int | None = None
    after: dict[bytes, _Node] = field(default_factory=dict)
    after_on_device: int = 0
    stamp: int = 0
    wanted: bool = False


class _ByAge:
    """Nodes by their stamp. One that has been used since, or may not go now, is skipped when its turn comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, _Node]] = []
        self._count = 0

    def push(self, node: _Node) -> None:
        self._count += 1
        heapq.heappush(self._heap, (node.stamp, self._count, node))

    def pop(self, may: Callable[[_Node], bool]) -> _Node | None:
        while self._heap:
            stamp, _, node = heapq.heappop(self._heap)
            if stamp == node.stamp and may(node):
                return node
        return None

    def tidy(self, most: int, may: Callable[[_Node], bool]) -> None:
        """Forget skipped entries where there are more than ``most`` in all."""
        if len(self._heap) > most + 64:
            fresh = {id(node): (stamp, count, node) for stamp, count, node in self._heap if stamp == node.stamp}
            self._heap = [entry for entry in fresh.values() if may(entry[2])]
            heapq.heapify(self._heap)
