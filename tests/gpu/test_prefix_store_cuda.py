"""Kept prefixes on a GPU: pages go to pinned host memory and come back as they were, in time for what reads them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.kv.kv_pool import KvPool
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.policy import KvPolicy

SYSTEM = "You look at screens and answer briefly, as a careful person would do it. " * 12


@pytest.fixture
def pool(accelerator: Accelerator) -> Iterator[KvPool]:
    pool = KvPool(PageFormat(layers=40, kv_heads=2, head_dim=128, dtype=torch.bfloat16), accelerator)
    yield pool
    pool.close()


def keys(chain: int, count: int) -> list[bytes]:
    return [f"{chain}.{number}".encode() for number in range(count)]


def test_pages_come_back_from_the_host_as_they_were(pool: KvPool) -> None:
    count, chains = 60, 6
    pool.prefixes.obey(KvPolicy(prefix_bytes=0, prefix_host_bytes=count * (chains - 1) * pool.page_bytes))
    sums: dict[int, list[int]] = {}
    for chain in range(chains):
        pages = pool.take(count)  # these were just saved to the host, some are still being read
        for page in pages:
            pool.raw(page).random_(0, 255)
        sums[chain] = [int(pool.raw(page).long().sum()) for page in pages]
        pool.put(pool.prefixes.add(keys(chain, count), pages))
    host = pool.prefixes.host
    assert host is not None
    assert host.pinned
    assert host.used == count * (chains - 1)
    assert pool.used_pages == 0
    assert pool.prefixes.match(keys(0, count)) == 0
    for chain in range(1, chains):
        held = pool.prefixes.hold(keys(chain, count))
        assert [int(pool.raw(page).long().sum()) for page in held] == sums[chain]
        pool.put(held)
    pool.prefixes.clear()
    assert host.nbytes == 0


def test_answers_are_the_same_from_the_device_the_host_and_anew() -> None:
    with lab.load("autoglm-tiny", device="cuda", dtype="float32") as wb:

        def answer(name: str) -> tuple[str, int]:
            result = wb.chat("Who are you?", system=SYSTEM, conversation=name, max_new_tokens=32).result(120)
            wb.drop(name)
            return result.text, result.usage.cached_tokens

        text, cached = answer("anew")
        assert cached == 0
        again, cached = answer("from the device")
        assert (again, cached > 128) == (text, True)
        wb.policy = wb.policy.replace(kv={"prefix_bytes": 0})
        assert wb.memory.nbytes("KV kept prefixes") == 0
        assert wb.memory.nbytes("KV kept prefixes", "host") > 0
        again, cached = answer("from the host")
        assert (again, cached > 128) == (text, True)
        assert wb.engine.state.pool.prefixes.host.copied_in > 0
        wb.policy = wb.policy.replace(kv={"reuse": False})
        assert wb.memory.nbytes("KV kept prefixes", "host") == 0
        assert answer("without reuse") == (text, 0)
