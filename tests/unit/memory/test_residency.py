from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from autoglm_lab.errors import ModuleError, OutOfMemoryError
from autoglm_lab.memory.accelerator import Accelerator, open_accelerator
from autoglm_lab.memory.events import Event
from autoglm_lab.memory.ledger import LedgerBook
from autoglm_lab.memory.residency.residency import Residency
from autoglm_lab.models.loading import adopt, resolve
from autoglm_lab.models.skeleton import model_class
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB
from tests.unit.memory.conftest import IDS, Build, checksums, logits
from tests.unit.models.tiny_models import llama, llava


def test_a_parked_gibibyte_leaves_the_process(accelerator: Accelerator, events: list[Event]) -> None:
    config = llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=5, num_attention_heads=16)
    residency = Residency(resolve(config, weights="dummy", device="cpu"), accelerator, on_event=events.append)
    residency.materialise()
    text = residency["text"]
    assert text.nbytes >= GiB
    before = accelerator.reading().process
    text.park()
    after = accelerator.reading().process
    assert before is not None
    assert after is not None
    assert before - after >= 0.9 * text.nbytes
    assert [event.kind for event in events if event.subject == "text"] == ["loaded", "spilled", "parked"]
    spilled = next(event for event in events if event.kind == "spilled")
    assert spilled.nbytes == text.nbytes
    residency.close()


def test_answers_are_the_same_after_parking_and_waking(loaded: Residency) -> None:
    expected, sums = logits(loaded), checksums(loaded)
    for _ in range(5):
        for name in loaded:
            loaded[name].park()
        for name in reversed(list(loaded)):
            loaded[name].wake()
    assert checksums(loaded) == sums
    assert torch.equal(logits(loaded), expected)


def test_parameters_stay_the_same_objects(loaded: Residency) -> None:
    before = dict(loaded.model.named_parameters())
    for module in loaded.values():
        module.park()
    parked = dict(loaded.model.named_parameters())
    assert all(parked[name] is parameter for name, parameter in before.items())
    assert all(parameter.shape == before[name].shape for name, parameter in parked.items())
    assert all(parameter.isnan().all() for parameter in parked.values())
    for module in loaded.values():
        module.wake()
    assert all(parameter is before[name] for name, parameter in loaded.model.named_parameters())


def test_a_plain_forward_wakes_what_it_needs_and_no_more(loaded: Residency, events: list[Event]) -> None:
    expected = logits(loaded)
    for module in loaded.values():
        module.park()
    events.clear()
    assert torch.equal(logits(loaded), expected)
    assert [(event.kind, event.subject) for event in events] == [("woke", "text"), ("woke", "head")]
    assert loaded["vision"].place == "disk"


def test_waking_in_inference_mode_leaves_ordinary_parameters(loaded: Residency) -> None:
    for module in loaded.values():
        module.park()
    with torch.inference_mode():
        loaded.model(input_ids=IDS)
    assert not any(parameter.is_inference() for parameter in loaded.model.parameters())
    loaded.model(input_ids=IDS).logits.sum().backward()
    assert loaded.model.lm_head.weight.grad is not None


def test_saving_a_model_wakes_its_parked_weights(loaded: Residency, tmp_path: Path) -> None:
    expected = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    loaded["text"].park()
    saved = loaded.model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_changed_weights_are_kept_and_said_so(loaded: Residency, events: list[Event]) -> None:
    with torch.no_grad():
        loaded.model.lm_head.weight.add_(1)
    changed = loaded.model.lm_head.weight.detach().clone()
    event = loaded["head"].park()
    assert "the weights were changed" in event.why
    assert [event.kind for event in events[-2:]] == ["spilled", "parked"]
    loaded["head"].wake()
    assert torch.equal(loaded.model.lm_head.weight, changed)
    assert "changed" not in loaded["head"].park().why


def test_weights_that_were_pointed_elsewhere_are_kept(loaded: Residency) -> None:
    loaded.model.lm_head.weight.data = torch.full_like(loaded.model.lm_head.weight, 3.0)
    loaded["head"].park()
    loaded["head"].wake()
    assert (loaded.model.lm_head.weight == 3).all()


def test_weights_of_another_dtype_refuse_to_be_parked(loaded: Residency) -> None:
    loaded.model.lm_head.half()
    with pytest.raises(ModuleError, match=r"lm_head\.weight was replaced \(torch\.float16"):
        loaded["head"].park()
    assert loaded["head"].place == "device"


def test_a_variable_that_views_the_weights_keeps_them_there(loaded: Residency) -> None:
    expected = logits(loaded)
    mine = loaded.model.lm_head.weight.detach()[:10]
    copy = mine.clone()
    with pytest.raises(ModuleError, match="a variable outside the model still views its weights"):
        loaded["head"].park()
    assert loaded["head"].place == "device"
    assert torch.equal(mine, copy)
    assert torch.equal(logits(loaded), expected)
    del mine
    gc.collect()
    assert loaded["head"].park().nbytes is not None
    assert loaded["head"].place == "disk"


def test_on_a_cpu_the_device_is_the_host(loaded: Residency) -> None:
    with pytest.raises(ModuleError, match="the device is the host on this machine"):
        loaded["audio" if "audio" in loaded else "vision"].park("host")
    assert loaded["vision"].place == "device"


def test_unknown_modules_and_places_name_what_there_is(loaded: Residency) -> None:
    with pytest.raises(ModuleError, match="no module 'audio': this model has vision, projector, text, head"):
        loaded["audio"]
    with pytest.raises(ModuleError, match="no module 'audio'"):
        loaded.apply(MemoryPolicy(modules={"audio": "off"}))
    with pytest.raises(ModuleError, match="not to 'attic'"):
        loaded["vision"].park("attic")  # type: ignore[arg-type]


def test_parking_twice_says_that_nothing_was_to_do(loaded: Residency, events: list[Event]) -> None:
    loaded["vision"].park()
    events.clear()
    assert loaded["vision"].park().why == "was on disk already"
    assert loaded["vision"].park("disk").nbytes == 0
    assert events == []


def test_a_module_that_exceeds_the_budget_is_refused(build: Build, accelerator: Accelerator) -> None:
    residency = build()
    accelerator.set_budget(accelerator.context)
    with pytest.raises(OutOfMemoryError, match=r"out of memory in load: needed .* raise budget=") as caught:
        residency.materialise()
    assert caught.value.phase == "load"
    assert caught.value.needed is not None
    assert all(module.place == "disk" for module in residency.values())
    accelerator.set_budget(None)
    residency.materialise()


def test_parking_and_waking_work_in_inference_mode(loaded: Residency) -> None:
    expected = logits(loaded)
    with torch.inference_mode():
        mine = loaded.model.lm_head.weight.detach()[:3]
        with pytest.raises(ModuleError, match="still views"):
            loaded["head"].park()
        del mine
        loaded["text"].park()
        loaded["text"].wake()
    assert not any(parameter.is_inference() for parameter in loaded.model.parameters())
    loaded["head"].park()
    assert torch.equal(logits(loaded), expected)


def test_two_threads_may_move_the_same_module(loaded: Residency) -> None:
    expected = logits(loaded)
    problems: list[BaseException] = []

    def move(name: str) -> None:
        try:
            for _ in range(30):
                loaded[name].park()
                loaded[name].wake()
                list(loaded.holdings())
        except BaseException as error:  # noqa: BLE001 - shown below
            problems.append(error)

    threads = [threading.Thread(target=move, args=(name,)) for name in ("text", "text", "vision", "head")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert torch.equal(logits(loaded), expected)


def test_a_module_that_another_thread_runs_is_not_parked(loaded: Residency) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        inside.set()
        leave.wait(10)

    handle = loaded.model.model.language_model.norm.register_forward_hook(hold)
    thread = threading.Thread(target=logits, args=(loaded,))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(ModuleError, match="'text' is in use by a forward pass of another thread"):
        loaded["text"].park()
    loaded["vision"].park()
    leave.set()
    thread.join()
    handle.remove()
    loaded["text"].park()


def test_an_interrupted_forward_does_not_block_parking(loaded: Residency) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = loaded.model.model.language_model.norm.register_forward_hook(interrupt)

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            logits(loaded)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    handle.remove()
    assert loaded["text"].park().kind == "parked"


def test_rows_tell_where_each_module_is(loaded: Residency) -> None:
    loaded["vision"].park()
    rows = {(row.name, row.place): row for row in loaded.holdings()}
    assert ("vision", "device") not in rows
    assert rows["vision", "disk"].nbytes == loaded["vision"].nbytes
    assert rows["text", "device"].nbytes is not None
    assert rows["text", "device"].nbytes >= loaded["text"].nbytes
    info = loaded["vision"].info()
    assert (info.place, info.dtype, info.nbytes) == ("disk", "float32", loaded["vision"].nbytes)
    assert info.last_event is not None
    assert info.last_event.kind == "parked"


def test_an_attached_model_keeps_its_values_and_its_objects(accelerator: Accelerator) -> None:
    torch.manual_seed(1)
    config = llava()
    model = model_class(config)(config).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits.clone()
    before = dict(model.named_parameters())
    residency = Residency(adopt(model), accelerator)
    residency.materialise()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(logits(residency), expected)
    residency["text"].park()
    assert torch.equal(logits(residency), expected)
    residency.close()


def test_the_bytes_of_an_attached_model_change_owner() -> None:
    config = llama(hidden_size=512, intermediate_size=4096, num_hidden_layers=5)
    model = model_class(config)(config)
    accelerator = open_accelerator("cpu")
    residency = Residency(adopt(model), accelerator)
    book = LedgerBook(accelerator)
    book.register(residency)
    residency.materialise()
    ledger = book.read()
    assert residency["text"].nbytes > 100 << 20
    assert abs(ledger.unattributed) < 20 << 20
    before = ledger.process
    residency["text"].park()
    after = book.read().process
    assert before is not None
    assert after is not None
    assert before - after >= 0.9 * residency["text"].nbytes
    residency.close()


def test_strides_and_odd_dtypes_survive(accelerator: Accelerator) -> None:
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.randn(8, 3).t())
    model.b = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    model.register_buffer("count", torch.tensor(7))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("none", torch.empty(0))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    strides = model.a.stride()
    model.config = None
    residency = Residency(adopt(model), accelerator)  # type: ignore[arg-type]
    residency.materialise()
    for _ in range(2):
        residency["text"].park()
        residency["text"].wake()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.a.stride() == strides
    assert model.a.data_ptr() % 256 == 0
    residency.close()
