"""The plan against what one H200 measured (docs/benchmarks.md), without a GPU and without weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import autoglm_lab as lab
from autoglm_lab.errors import LabError
from autoglm_lab.memory.kv.page_format import PageFormat
from autoglm_lab.memory.planning.allocator_model import AllocatorModel
from autoglm_lab.memory.planning.device_constants import plan_device
from autoglm_lab.memory.planning.planner import Planner, planner
from autoglm_lab.memory.planning.traced_model import TracedModel
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.catalog import preset
from autoglm_lab.models.loading import outline
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.schedule import prefill_chunks
from autoglm_lab.units import GiB, MiB
from tests.unit.models import tiny_models

H200 = {"device": "H200"}


@pytest.fixture(scope="module")
def phone() -> Planner:
    return planner(outline("autoglm-phone-9b"), plan_device("H200", None, None))


def over_the_weights(planner: Planner, context: int, **kv: object) -> int:
    """What the bench calls the peak over the weights: of a process that has read prompts before."""
    plan = planner.plan(MemoryPolicy(kv=kv), Workload(context=context, new_tokens=1))
    return plan["prefill"].of("KV") + plan["prefill"].of("activations") + plan["prefill"].of("allocator cache")


@pytest.mark.parametrize(("tokens", "measured"), [(1024, 172), (4096, 312), (8192, 476)])
def test_the_peak_of_reading_a_prompt_is_what_the_driver_showed(phone, tokens, measured):
    assert over_the_weights(phone, tokens) == pytest.approx(measured * MiB, rel=0.015)


@pytest.mark.parametrize(("precision", "measured"), [("int8", 322), ("int4", 256)])
def test_the_peak_with_rounded_keys_and_values_is_what_the_driver_showed(phone, precision, measured):
    assert over_the_weights(phone, 8192, precision=precision) == pytest.approx(measured * MiB, rel=0.03)


@pytest.mark.parametrize(
    ("tokens", "chunk", "measured"),
    [
        (1024, 2048, 0.100),
        (4096, 2048, 0.145),
        (4096, 1366, 0.115),
        (8192, 2048, 0.149),
        (8192, 1366, 0.122),
        (8192, 2731, 0.184),
    ],
)
def test_tensors_of_a_chunked_prefill_are_those_of_the_gpu(phone, tokens, chunk, measured):
    plan = phone.plan(MemoryPolicy(kv={"chunk": chunk}), Workload(context=tokens))
    predicted = plan["prefill"].of("activations")
    # When these were measured, the cache of a past chunk, and of the prompt before, could live on with the keys and
    # values of one layer until Python collected it. It is let go since.
    past = len(prefill_chunks(0, tokens, chunk)) * 1024 * chunk
    assert predicted <= measured * 1.005e9
    assert predicted + past >= measured * 0.995e9


@pytest.mark.parametrize(("patches", "measured"), [((38, 84), 0.17), ((78, 172), 0.71)])
def test_tensors_of_encoding_an_image_are_those_of_the_gpu(patches, measured):
    traced = TracedModel(preset("autoglm-phone-9b").config(), torch.bfloat16, "cuda", 3)
    pixels = torch.zeros(patches[0] * patches[1], 1176, dtype=torch.bfloat16)
    tape, nbytes = traced.encode("image", {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *patches]])})
    assert tape.peak - pixels.nbytes == pytest.approx(measured * 1e9, rel=0.01)
    assert nbytes == patches[0] * patches[1] // 4 * 4096 * 2


@pytest.mark.parametrize(("tokens", "measured"), [(4096, 0.7519), (8192, 1.5037)])
def test_tensors_of_the_stock_forward_are_those_of_the_gpu(tokens, measured):
    config = preset("autoglm-phone-9b").config()
    few, more = (
        TracedModel(config, torch.bfloat16, "cuda", layers, lean=False).prefill(None, 0, tokens).peak
        for layers in (2, 3)
    )
    assert few + 38 * (more - few) == pytest.approx(measured * 1e9, rel=2e-4)


def test_a_turn_with_a_screenshot_peaks_where_the_phone_agent_did(phone):
    # A screenshot of 1080 x 2400 at 1,219 tokens, after 2,040 tokens. 542 MiB over the weights were measured where one
    # had been encoded before; 52 MiB more are what cuDNN takes to bring a convolution's weight into order.
    plan = phone.plan(MemoryPolicy(), Workload(context=3259, new_tokens=64, images=1, image_size=(644, 1484)))
    rows = [row for row in plan["prefill"].rows if row.kind not in ("weights", "context") and row.name != "workspaces"]
    assert sum(row.nbytes for row in rows) == pytest.approx((542 + 52) * MiB, rel=0.02)
    assert plan["prefill"].needed < plan["encode"].needed < plan["prefill"].nbytes


@pytest.mark.parametrize(("conversations", "measured"), [(1, 2.0), (4, 44.6)])
def test_captured_steps_take_what_they_took(phone, conversations, measured):
    plan = phone.plan(MemoryPolicy(), Workload(conversations=conversations))
    assert plan["decode"].of("decode graphs") == pytest.approx(measured * MiB, rel=0.03)
    assert not phone.plan(MemoryPolicy(kv={"graphs": False}), Workload())["decode"].of("decode graphs")


def test_weights_are_whole_slabs_and_the_model_is_never_loaded(phone):
    plan = phone.plan(MemoryPolicy(), Workload())
    vision = 1_784_996_864
    assert plan["load"].of("vision") == -(-vision // (2 * MiB)) * 2 * MiB
    assert 20.58e9 < plan["load"].of_kind("weights") < 20.60e9
    assert 19.8 * GiB < plan["load"].nbytes < 20.0 * GiB


def test_a_second_plan_runs_no_code_of_the_model(phone, monkeypatch):
    phone.plan(MemoryPolicy(), Workload(context=5000))
    for step in ("prefill", "decode", "encode"):
        monkeypatch.delattr(TracedModel, step)
    plans = [phone.plan(MemoryPolicy(), Workload(context=context)) for context in (4500, 7000, 16_000)]
    assert len({plan["prefill"].of("activations") for plan in plans}) == 3
    assert not [note for note in plans[-1].notes if "could not be traced" in note]


def test_layers_repeat_so_that_a_few_tell_of_all():
    config = preset("autoglm-phone-9b").config()
    form = PageFormat.of(config, torch.bfloat16)
    peaks = set()
    for layers in (3, 5):
        allocator = AllocatorModel()
        allocator.play(TracedModel(config, torch.bfloat16, "cuda", layers).prefill(form, 2048, 2048))
        peaks.add((allocator.peak_allocated, allocator.reserved))
    assert len(peaks) == 1


def test_a_plan_between_the_traced_lengths_equals_a_trace_of_its_own(phone):
    config = preset("autoglm-phone-9b").config()
    form = PageFormat.of(config, torch.bfloat16)
    assert form is not None
    traced = TracedModel(config, torch.bfloat16, "cuda", 3)
    for before, new in ((0, 777), (0, 300), (1234, 1801), (5000, 200)):
        learnt = phone._activations._prefill_tape(form, before, new)
        assert learnt.peak == traced.prefill(form, before, new).peak


def test_modules_that_are_off_or_on_demand_come_off_where_they_are_not_needed(phone):
    keep, demand = (
        phone.plan(MemoryPolicy(modules={"vision": residency}), Workload()) for residency in ("keep", "on-demand")
    )
    for phase in ("load", "prefill", "decode"):
        assert keep[phase].needed - demand[phase].needed == keep[phase].of("vision")
    with_image = phone.plan(MemoryPolicy(modules={"vision": "on-demand"}), Workload(images=1))
    assert with_image["encode"].of("vision") and not with_image["load"].of("vision")
    assert with_image["decode"].of("vision") and with_image["decode"].nbytes > with_image["decode"].needed


def test_limits_of_keys_and_values_cut_what_is_planned(phone):
    plan = phone.plan(MemoryPolicy(kv={"max_tokens": 2048}), Workload(context=8192))
    assert plan["decode"].of("KV") == 80 * MiB
    assert "8,448 tokens are more than the 2,048 that may be kept: it is cut to that" in plan.notes
    refused = phone.plan(MemoryPolicy(kv={"max_tokens": 2048, "overflow": "refuse"}), Workload(context=8192))
    assert "kv.overflow 'refuse' will refuse this: 8,448 tokens are more than 2,048" in refused.notes
    on_host = phone.plan(MemoryPolicy(kv={"place": "host"}), Workload())
    assert not on_host["decode"].of("KV")
    assert on_host["decode"].of("KV stages") == 2 * 1024 * 16 * 1024


def test_keys_and_values_on_the_host_are_held_to_what_the_host_has(phone):
    work, on_host = Workload(context=32_768, new_tokens=256), MemoryPolicy(kv={"place": "host"})
    roomy, short = (phone.of(replace(phone.device, host_free=nbytes)) for nbytes in (2 * GiB, 1 * GiB))
    assert roomy.plan(on_host, work).fits
    plan = short.plan(on_host, work)
    pages = (32_768 + 256) // 16
    assert plan.host_needed == pages * 16 * 40_960
    assert plan.margin > 0 and not plan.fits and plan.verdict == "fits with changes"
    assert plan.alternatives[0].change == "kv.place='device'"
    assert "keys, values and parked weights need 1.26 GiB of the host, which has 1.00 GiB" in str(plan)
    assert plan.to_dict()["host_needed"] == plan.host_needed
    parked = short.plan(MemoryPolicy(modules={"vision": "on-demand"}), work)
    assert parked.host_needed == phone.plan(MemoryPolicy(), work)["load"].of("vision")
    assert phone.plan(on_host, work).host_limit is None


def test_images_of_patches_are_known_for_every_size_after_two(monkeypatch):
    predict = Planner(outline("autoglm-phone-9b"), plan_device("H200", None, None))
    for size in ((336, 336), (532, 1176)):
        predict.plan(MemoryPolicy(), Workload(context=4096, images=1, image_size=size))
    monkeypatch.delattr(TracedModel, "encode")
    plan = predict.plan(MemoryPolicy(), Workload(context=4096, images=1, image_size=(1092, 2408)))
    assert not [note for note in plan.notes if "could not be traced" in note]
    monkeypatch.undo()
    config = preset("autoglm-phone-9b").config()
    pixels = torch.zeros(78 * 172, 1176)
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 78, 172]])}
    tape, _ = TracedModel(config, torch.bfloat16, "cuda", 3).encode("image", inputs)
    assert plan["encode"].of("activations") == pytest.approx(tape.peak, rel=2e-3)


def test_what_does_not_fit_says_what_would(phone):
    lean = phone.plan(MemoryPolicy(), Workload(context=16384)).largest.needed
    plan = phone.plan(MemoryPolicy(budget=lean - 300 * MiB), Workload(context=16384))
    assert plan.verdict == "fits with changes" and plan.margin == -300 * MiB
    best = plan.alternatives[0]
    assert best.fits and best.nbytes <= plan.limit
    again = phone.plan(best.policy, plan.workload)
    assert again.fits and again.largest.needed == best.nbytes
    small = phone.plan(MemoryPolicy(budget="2GiB"), Workload())
    assert small.verdict == "does not fit"
    assert "does not fit: " in str(small) and "missing" in str(small)


def test_a_model_that_a_card_cannot_hold_is_offered_layers_on_the_host_or_fewer_bits(phone):
    plan = phone.plan(MemoryPolicy(modules={"vision": "off"}, budget="11GiB"), Workload(context=2048))
    by_change = {one.change: one for one in plan.alternatives}
    assert by_change["quantize='int8'"].fits and by_change["quantize='int8'"].lossy
    (on_host,) = [one for change, one in by_change.items() if change.startswith("placement.host_bytes=")]
    assert on_host.fits and not on_host.lossy
    assert on_host.reload and by_change["quantize='int8'"].reload
    whole = phone.plan(
        plan.policy.replace(modules={"text": {"precision": "int8"}, "head": {"precision": "int8"}}), Workload()
    )
    assert whole["load"].of("text") < 0.53 * plan["load"].of("text")


def test_a_plan_shows_as_text_html_and_json(phone):
    plan = lab.plan("autoglm-phone-9b", **H200, images=1, image_size=(336, 336))
    assert str(plan).startswith("autoglm-phone-9b fits: ")
    assert "H200, bfloat16: 8,192 tokens read, 256 written, 1 image of 336 x 336" in str(plan)
    assert "<b>needed</b>" in plan._repr_html_()
    data = plan.to_dict()
    assert data["verdict"] == "fits" and data["phases"][0]["name"] == "load"
    assert all(phase["nbytes"] == sum(row["nbytes"] for row in phase["rows"]) for phase in data["phases"])
    with pytest.raises(KeyError, match="this plan has no phase 'train'; it has load, encode, prefill, decode"):
        plan["train"]


def test_cards_are_devices_and_say_that_they_are_estimated():
    plan = lab.plan("autoglm-phone-9b", device="rtx 4090", context=2048)
    assert plan.limit == round(23.6 * GiB) and plan.estimated
    assert "RTX 4090 (estimated)" in str(plan)
    with pytest.raises(LabError, match=r"there is no device or card 'RTX 9': use 'cuda', 'cpu' or a card: T4, .*H200"):
        lab.plan("autoglm-phone-9b", device="RTX 9")
    with pytest.raises(LabError, match="at least 1"):
        lab.plan("autoglm-tiny", context=0)


def test_a_hub_id_that_a_preset_knows_needs_no_files():
    plan = lab.plan("zai-org/AutoGLM-Phone-9B", budget="24GiB", context=1024)
    assert plan.verdict == "fits"


@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name != "whisper"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_any_family_can_be_planned(family, device):
    predict = planner(outline(tiny_models.FAMILIES[family](), device=device), plan_device(device, 8 * GiB, None))
    plan = predict.plan(MemoryPolicy(), Workload(context=1500, new_tokens=50))
    assert plan["prefill"].of("activations") > 0 and plan["prefill"].of("KV") > 0
    assert not [note for note in plan.notes if "could not be traced" in note]
    # What was learnt holds for every length: no step differs from run to run, or from length to length, but in sizes.
    assert all(family is not None for family in predict._activations._families.values())


def test_what_cannot_be_traced_is_said():
    plan = lab.plan(tiny_models.whisper(), device="cpu", context=100)
    assert any("could not be traced, so their activations are not counted" in note for note in plan.notes)


def test_the_embedded_model_is_planned_with_all_its_media():
    plan = lab.plan("autoglm-tiny", device="cpu", context=600, new_tokens=64, images=2, audio_seconds=3)
    assert [phase.name for phase in plan.phases] == ["load", "encode", "prefill", "decode"]
    assert plan["encode"].of("activations") > 1 * MiB
    assert plan["prefill"].of("encoder outputs") > 0
    assert plan["load"].of_kind("weights") > 20 * MiB


def test_an_open_workbench_is_planned_with_what_was_measured_on_it():
    with lab.load("autoglm-tiny", device="cpu") as wb:
        plan = lab.plan(wb, context=500, new_tokens=20)
        assert plan["load"].of("context") == wb.engine.state.accelerator.context
        assert not plan.estimated
        assert plan["load"].of_kind("weights") == wb.memory.of_kind("weights")
