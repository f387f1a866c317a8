"""Slabs, parking and waking on a GPU: about 1.2 GiB of made-up weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf

from autoglm_lab.errors import ModuleError
from autoglm_lab.memory.accelerator import Accelerator
from autoglm_lab.memory.cuda_slab import CudaSlab
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.residency import Residency
from autoglm_lab.memory.slab import HostSlab, SlabInUseError
from autoglm_lab.models.loading import adopt, resolve
from autoglm_lab.models.skeleton import model_class
from autoglm_lab.units import GiB, MiB

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


def free() -> int:
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def test_a_slab_keeps_its_address_and_gives_its_bytes_back(device: torch.device) -> None:
    slab = CudaSlab(300 * MiB + 1, device)
    assert slab.size >= 300 * MiB + 1
    before = free()
    region = slab.commit()
    assert (region.device, region.dtype, region.numel()) == (device, torch.uint8, slab.size)
    address = region.data_ptr()
    assert before - free() >= slab.size
    region.fill_(3)
    del region
    slab.release()
    assert before - free() < 4 * MiB
    again = slab.commit()
    assert again.data_ptr() == address == slab.address
    again.fill_(5)
    assert int(again[-1]) == 5
    del again
    slab.close()
    assert before - free() < 4 * MiB


def test_a_slab_that_is_viewed_is_not_unmapped(device: torch.device) -> None:
    slab = CudaSlab(4 * MiB, device)
    view = slab.commit()[:1000]
    view.fill_(9)
    with pytest.raises(SlabInUseError):
        slab.release()
    assert int(view.sum()) == 9000
    del view
    slab.close()


def test_a_slab_that_cannot_be_had_leaves_nothing_behind(device: torch.device) -> None:
    before = free()
    slab = CudaSlab(1 << 42, device)  # 4 TiB
    with pytest.raises(MemoryError, match="cuMemCreate failed with 2"):
        slab.commit()
    assert slab.committed == 0
    slab.close()
    assert before - free() < 4 * MiB


def test_releasing_waits_for_kernels_of_every_stream(device: torch.device) -> None:
    slab = CudaSlab(256 * MiB, device)
    weights = slab.commit().view(torch.float32)[: 4096 * 4096].view(4096, 4096)
    weights.fill_(1.0)
    inputs = torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(50):
            result = inputs @ weights
    del weights
    slab.release()
    torch.cuda.synchronize()
    assert float(result.min()) == float(result.max()) == 4096.0
    slab.close()


def test_host_copies_are_exact_and_pinned(device: torch.device) -> None:
    nbytes = 33 * MiB + 4096
    host = HostSlab(nbytes, pin=True)
    region = host.commit()
    region.fill_(7)
    host.pin()
    assert host.pinned, host.note
    assert host.committed == nbytes
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target.copy_(region, non_blocking=True)
    assert int(target.sum(dtype=torch.int64)) == 7 * nbytes
    del region
    host.close()
    assert host.committed == 0


@pytest.mark.parametrize("place", ["host", "disk"])
def test_parking_gives_the_bytes_back_and_waking_gives_the_answers_back(loaded: Residency, place: str) -> None:
    expected, sums = logits(loaded), checksums(loaded)
    addresses = {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()}
    parameters = dict(loaded.model.named_parameters())
    text = loaded["text"]
    assert text.nbytes > GiB // 2
    before = free()
    text.park(place)  # type: ignore[arg-type]
    # The driver takes a little for itself when host memory is pinned for the first time.
    assert free() - before >= text.nbytes - 4 * MiB
    assert text.place == place
    text.wake()
    assert abs(before - free()) < 4 * MiB
    assert {name: parameter.data_ptr() for name, parameter in loaded.model.named_parameters()} == addresses
    assert all(parameters[name] is parameter for name, parameter in loaded.model.named_parameters())
    assert checksums(loaded) == sums
    assert torch.equal(logits(loaded), expected)


def test_twenty_cycles_lose_no_byte(loaded: Residency, accelerator: Accelerator) -> None:
    for module in loaded.values():
        module.park()
        module.wake()
    sums, before, slabs = checksums(loaded), free(), accelerator.reading().slabs
    for _ in range(20):
        for module in loaded.values():
            module.park("host")
        for module in loaded.values():
            module.wake()
    assert checksums(loaded) == sums
    assert accelerator.reading().slabs == slabs
    assert abs(before - free()) < 4 * MiB


def test_a_second_park_copies_nothing(loaded: Residency, events: list[Event]) -> None:
    assert "first host copy made" in loaded["vision"].park().why
    loaded["vision"].wake()
    assert events[-1].why == "from host"
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
    head.park("host")
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
    events.clear()
    assert torch.equal(logits(loaded), expected)
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
    residency["text"].park()
    assert free() - before >= residency["text"].nbytes
    assert torch.equal(logits(residency), expected)
    residency.close()
