"""Parking and waking on a GPU: about 1.2 GiB of made-up weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import transformers as tf

from autoglm_lab.errors import ModuleError, OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.models.loading import adopt, resolve
from autoglm_lab.models.skeleton import model_class
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB, MiB
from tests.gpu.conftest import free

IDS = torch.arange(20, 52)[None]


def config(layers: int = 12) -> tf.PreTrainedConfig:
    """0.9 GiB of text in bfloat16 with 12 layers, a small vision tower, a projector and a head."""
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            image_size=56,
            patch_size=14,
            projection_dim=64,
        ),
        text_config=tf.LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=8,
            vocab_size=8192,
        ),
        image_token_index=8191,
    )


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def loaded(accelerator: Accelerator, events: list[Event]) -> Iterator[Residency]:
    resolved = resolve(config(), weights="dummy", device=accelerator.device)
    residency = Residency(resolved, accelerator, on_event=events.append)
    residency.materialise()
    yield residency
    residency.close()


def logits(residency: Residency) -> torch.Tensor:
    with torch.no_grad():
        return residency.model(input_ids=IDS.cuda()).logits.clone()


def checksums(residency: Residency) -> dict[str, int]:
    return {
        name: int(parameter.detach().contiguous().view(-1).view(torch.int16).sum(dtype=torch.int64))
        for name, parameter in residency.model.named_parameters()
    }


def names(residency: Residency, module: str) -> tuple[str, ...]:
    return next(spec.tensors for spec in residency.specs if spec.name == module)


def checksums_of(residency: Residency, module: str) -> dict[str, int]:
    wanted, sums = set(names(residency, module)), checksums(residency)
    return {name: value for name, value in sums.items() if name in wanted}


@pytest.mark.parametrize("place", ["host", "disk"])
def test_parking_gives_the_bytes_back_and_waking_gives_the_answers_back(loaded: Residency, place: str) -> None:
    expected, sums = logits(loaded), checksums(loaded)
    addresses = {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()}
    parameters = dict(loaded.model.named_parameters())
    text = loaded["text"]
    assert text.nbytes > GiB // 2
    before = free()
    text.park(place).result(60)  # type: ignore[arg-type]
    # The driver takes a little for itself when host memory is pinned for the first time.
    assert free() - before >= text.nbytes - 4 * MiB
    assert text.place == place
    text.wake().result(60)
    assert abs(before - free()) < 4 * MiB
    assert {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()} == addresses
    assert all(parameters[name] is parameter for name, parameter in loaded.model.named_parameters())
    assert checksums(loaded) == sums
    assert torch.equal(logits(loaded), expected)


def test_a_thousand_cycles_lose_no_byte(loaded: Residency, accelerator: Accelerator) -> None:
    for module in loaded.values():
        module.park()
        module.wake()
    loaded.settle()
    sums, before, slabs, pinned = checksums(loaded), free(), accelerator.reading().slabs, loaded.pinned.used
    whole = checksums_of(loaded, "vision")
    process = psutil.Process()
    host = process.memory_info().rss
    small = [loaded[name] for name in ("vision", "projector", "head")]
    for cycle in range(1000):
        for module in small:
            module.park("host")
        for module in small:
            module.wake()
        if cycle % 100 == 0:
            loaded["text"].park("host")
            assert checksums_of(loaded, "vision") == whole
            loaded["text"].wake()
    loaded.settle()
    assert checksums(loaded) == sums
    assert accelerator.reading().slabs == slabs
    assert loaded.pinned.used == pinned
    assert abs(before - free()) < 4 * MiB
    assert process.memory_info().rss - host < 32 * MiB


def test_a_park_returns_while_the_device_is_busy(loaded: Residency, accelerator: Accelerator) -> None:
    loaded["text"].park()
    loaded["text"].wake()
    loaded.settle()
    slabs = accelerator.reading().slabs
    torch.cuda._sleep(2_000_000_000)  # some 1 s of a kernel on the default stream
    start = time.perf_counter()
    move = loaded["text"].park()
    waited = time.perf_counter() - start
    assert not move.done
    assert loaded["text"].place == "moving"
    assert waited < 0.1
    assert accelerator.reading().slabs == slabs
    assert (move.result(60).seconds or 0) > 0.2
    assert accelerator.reading().slabs < slabs


def test_a_park_that_nothing_later_concerns_does_not_wait_for_it(loaded: Residency) -> None:
    loaded["vision"].park()
    loaded["vision"].wake()
    loaded.settle()
    before = torch.cuda.current_stream().record_event()
    torch.cuda._sleep(2_000_000_000)
    running = torch.cuda.current_stream().record_event()
    assert loaded["vision"].park(after=before).result(60).kind == "parked"
    assert not running.query()
    torch.cuda.synchronize()


def test_kernels_given_before_a_park_still_read_the_weights(loaded: Residency) -> None:
    loaded["head"].park()
    loaded["head"].wake()
    side = torch.cuda.Stream()
    inputs = torch.ones(4096, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = loaded.model.lm_head(inputs)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(100_000_000)
            result = loaded.model.lm_head(inputs)
        loaded["head"].park()
        loaded["head"].wake()
        torch.cuda.synchronize()
        assert torch.equal(result, expected)


def test_a_stream_that_runs_a_module_waits_for_its_weights(loaded: Residency) -> None:
    expected = logits(loaded)
    for _ in range(20):
        loaded["text"].park()
        loaded["text"].wake()
        assert torch.equal(logits(loaded), expected)
        loaded["text"].park()
        loaded["text"].wake()
        with torch.cuda.stream(torch.cuda.Stream()):
            inputs = IDS.cuda()
            assert torch.equal(logits(loaded), expected), inputs


def test_a_wake_while_a_wake_runs_and_a_park_after_it(loaded: Residency, events: list[Event]) -> None:
    sums = checksums(loaded)
    loaded["text"].park().result(60)
    events.clear()
    first, second = loaded["text"].wake(), loaded["text"].wake()
    third = loaded["text"].park()
    assert third.result(60).kind == "parked"
    assert first is second or second.nbytes == 0
    assert [event.kind for event in events] == ["woke", "parked"]
    loaded["text"].wake()
    assert checksums(loaded) == sums


def test_a_wake_that_does_not_fit_leaves_everything_as_it_was(loaded: Residency, accelerator: Accelerator) -> None:
    expected = logits(loaded)
    loaded["text"].park().result(60)
    slabs = accelerator.reading().slabs
    held = accelerator.reading().process
    assert held is not None
    accelerator.set_budget(held + 16 * MiB)
    with pytest.raises(OutOfMemoryError, match="raise budget="):
        loaded["text"].wake()
    assert (loaded["text"].place, accelerator.reading().slabs) == ("host", slabs)
    accelerator.set_budget(None)
    assert torch.equal(logits(loaded), expected)


def test_a_module_on_demand_is_staged_on_the_host(accelerator: Accelerator, events: list[Event]) -> None:
    policy = MemoryPolicy(modules={"vision": "on-demand"})
    resolved = resolve(config(layers=2), weights="dummy", device=accelerator.device)
    residency = Residency(resolved, accelerator, policy=policy, on_event=events.append)
    residency.materialise()
    residency.settle()
    assert residency["vision"].place == "host"
    residency["text"].stage()
    residency.settle()
    assert residency["text"].park().why == "to host"
    residency.close()
    assert residency.pinned.used == 0


def test_a_second_park_copies_nothing(loaded: Residency, events: list[Event]) -> None:
    assert "first host copy made" in loaded["vision"].park().why
    assert loaded["vision"].wake().why == "from host"
    assert events[-1].kind == "woke"
    assert loaded["vision"].park().why == "to host"
    rows = {row.place: row for row in loaded["vision"].holdings()}
    assert "device" not in rows
    assert rows["host"].counts == "host copy, pinned"
    assert rows["host"].nbytes is not None
    assert rows["host"].nbytes >= loaded["vision"].nbytes


def test_weights_go_from_host_to_disk_and_back(loaded: Residency) -> None:
    expected = logits(loaded)
    head = loaded["head"]
    head.park("host")
    assert "written to disk first" in head.park("disk").why
    assert [row.place for row in head.holdings()] == ["disk"]
    head.park("host").result(60)
    assert [row.place for row in head.holdings()] == ["host"]
    assert torch.equal(logits(loaded), expected)


def test_changed_weights_come_back_changed(loaded: Residency) -> None:
    loaded["head"].park()
    loaded["head"].wake()
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(2)
    sums = checksums(loaded)
    for place in ("host", "disk"):
        assert place != "host" or "the weights were changed" in loaded["head"].park("host").why
        loaded["head"].park(place)  # type: ignore[arg-type]
        loaded["head"].wake()
        assert checksums(loaded) == sums


def test_a_forward_wakes_parked_modules(loaded: Residency, events: list[Event]) -> None:
    expected = logits(loaded)
    for module in loaded.values():
        module.park()
    loaded.settle()
    events.clear()
    assert torch.equal(logits(loaded), expected)
    loaded.settle()
    assert [(event.kind, event.subject) for event in events] == [("woke", "text"), ("woke", "head")]


def test_a_view_of_the_weights_keeps_them_there(loaded: Residency) -> None:
    mine = loaded.model.lm_head.weight.detach()[:10]
    copy = mine.clone()
    with pytest.raises(ModuleError, match="still views its weights"):
        loaded["head"].park()
    assert torch.equal(mine, copy)
    del mine
    loaded["head"].park()


def test_another_thread_may_move_modules(loaded: Residency) -> None:
    expected = logits(loaded)
    problems: list[BaseException] = []

    def move() -> None:
        try:
            for name in ("text", "vision"):
                loaded[name].park()
                loaded[name].wake()
        except BaseException as error:  # noqa: BLE001 - shown below
            problems.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    thread.join()
    assert problems == []
    assert torch.equal(logits(loaded), expected)


def test_dummy_weights_are_the_same_on_every_device(loaded: Residency) -> None:
    resolved = resolve(config(), weights="dummy", dtype="bfloat16", device="cpu")
    from autoglm_lab.memory.accelerator import open_accelerator

    on_cpu = Residency(resolved, open_accelerator("cpu"))
    on_cpu["vision"].wake()
    name = "model.vision_tower.encoder.layers.3.mlp.fc1.weight"
    assert torch.equal(loaded.model.get_parameter(name).cpu(), on_cpu.model.get_parameter(name))
    on_cpu.close()


def test_a_folder_is_read_in_its_own_dtype(accelerator: Accelerator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = config(layers=2)
    model_class(small)(small).to(torch.bfloat16).save_pretrained(tmp_path)
    reference = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda().eval()
    resolved = resolve(tmp_path, device=accelerator.device)
    assert resolved.dtype == torch.bfloat16
    residency = Residency(resolved, accelerator)
    residency.materialise()
    with torch.no_grad():
        assert torch.equal(logits(residency), reference(input_ids=IDS.cuda()).logits)
    buffers = dict(reference.named_buffers())
    for name, buffer in residency.model.named_buffers():
        assert buffer.is_cuda, name
        assert torch.equal(buffer, buffers[name]), name
    residency.close()


def test_an_attached_model_moves_into_slabs(accelerator: Accelerator) -> None:
    small = config(layers=2)
    held = torch.cuda.memory_allocated()
    model = model_class(small)(small).to(torch.bfloat16).cuda().eval()
    with torch.no_grad():
        expected = model(input_ids=IDS.cuda()).logits.clone()
    residency = Residency(adopt(model), accelerator)
    residency.materialise()
    assert torch.equal(logits(residency), expected)
    assert torch.cuda.memory_allocated() - held < 64 * MiB
    before = free()
    residency["text"].park().result(60)
    assert free() - before >= residency["text"].nbytes
    assert torch.equal(logits(residency), expected)
    residency.close()
