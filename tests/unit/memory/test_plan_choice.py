from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

import autoglm_lab as lab
from autoglm_lab import opening
from autoglm_lab.errors import PolicyError
from autoglm_lab.memory.planning.choice_options import loss, qualities
from autoglm_lab.memory.planning.device_constants import plan_device
from autoglm_lab.memory.planning.plan_choice import SPARE, Choice, choose
from autoglm_lab.memory.planning.planner import Planner, planner
from autoglm_lab.memory.planning.workload import Workload
from autoglm_lab.models.loading import Outline, outline
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.units import GiB, format_bytes

PHONE_STEP = Workload(context=4096, images=1)
MANY = Workload(context=3800, new_tokens=200, images=1, audio_seconds=2.0, conversations=8)


@pytest.fixture(scope="module")
def phone() -> Outline:
    return outline("autoglm-phone-9b")


@pytest.fixture(scope="module")
def tiny() -> Planner:
    return planner(outline("autoglm-tiny", device="cpu"), plan_device("cpu", None, None))


def choose_for(phone: Outline, budget: int | str, workload: Workload = PHONE_STEP) -> Choice:
    policy = MemoryPolicy(budget=budget)
    return choose(planner(phone, plan_device(None, policy.budget, None)), policy, workload)


def just_fits(planner: Planner, workload: Workload, **settings: object) -> int:
    """The least budget under which ``settings`` may be chosen."""
    needed = planner.plan(MemoryPolicy(**settings), workload, search=False).largest.needed
    return round(needed / (1 - SPARE)) + 64


def test_a_card_of_24_gib_takes_the_phone_step_without_giving_anything_up(phone):
    choice = choose_for(phone, "24GiB")
    assert choice.fits
    assert choice.plan.policy == choice.policy == MemoryPolicy(budget="24GiB")
    first, second = choice.why.splitlines()
    assert "in " in first and "of 24.00 GiB" in first
    assert second == "Nothing is given up: answers are exact, every module stays on the device."
    assert choice.why in choice.plan.to_dict()["why"]


@pytest.mark.parametrize("card", ["16GiB", "12GiB", "8GiB"])
def test_what_the_card_cannot_hold_stays_on_the_host_and_no_more_of_it(phone, card):
    choice = choose_for(phone, card)
    assert choice.fits
    assert choice.policy.kv.precision == "model"
    asked = choice.policy.placement.host_bytes
    assert asked > 0
    fewer = choice.policy.replace(placement={"host_bytes": asked - (256 << 20)})
    predict = planner(phone, plan_device(None, choice.policy.budget, None))
    assert predict.plan(fewer, PHONE_STEP, search=False).largest.needed > choice.plan.limit * (1 - SPARE)
    assert f"{format_bytes(predict.passing(choice.policy))} of the layers come from the host" in choice.why
    faster = {"16GiB": "quantize='int8' needs no", "12GiB": "quantize='int4' needs no", "8GiB": "slow"}[card]
    assert faster in choice.why.splitlines()[1].split(". ")[-1]
    stages = [row.nbytes for row in choice.plan.largest.rows if row.name == "text stages"]
    assert len(stages) == 1
    assert choice.plan.host_needed >= predict.passing(choice.policy)


@pytest.mark.parametrize("card", ["2GiB", "1GiB"])
def test_where_nothing_fits_it_says_by_how_much_and_which_budget_would(phone, card):
    choice = choose_for(phone, card)
    assert not choice.fits
    needed = choice.plan.largest.needed
    first, second = choice.why.splitlines()
    assert f"the leanest needs {format_bytes(needed)}" in first
    assert f"{format_bytes(needed - round(choice.plan.limit * (1 - SPARE)))} are missing" in first
    assert "of it weights" in first
    assert second.startswith("One change would do: a budget of ")
    budget = float(second.split("budget of ")[1].removesuffix(" GiB.")) * GiB
    assert choose_for(phone, round(budget + 0.01 * GiB)).fits
    assert not choose_for(phone, round(needed)).fits


def test_fewer_conversations_are_named_where_that_alone_would_do(tiny):
    lean = {"modules": {"vision": "on-demand", "audio": "on-demand"}}
    one, many = Workload(context=3800, new_tokens=200), Workload(context=3800, new_tokens=200, conversations=640)
    budget = min(just_fits(tiny, one, **lean, kv={"chunk": size}) for size in (2048, 1024, 512, 256))
    choice = choose(tiny, MemoryPolicy(budget=budget), many)
    assert not choice.fits
    assert "One change would do: one conversation, or a budget of" in choice.why
    assert choose(tiny, MemoryPolicy(budget=budget), one).fits


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_quality_comes_before_speed(tiny, share):
    most = just_fits(tiny, MANY)
    least = just_fits(tiny, MANY, modules={"vision": "on-demand", "audio": "on-demand"}, kv={"precision": "int4"})
    choice = choose(tiny, MemoryPolicy(budget=round(least + share * (most - least))), MANY)
    assert choice.fits
    order = ("model", "int8", "int4")
    better = order[: order.index(choice.policy.kv.precision)]
    exacter = [
        tiny.plan(choice.policy.replace(modules=modules, kv={"precision": precision, "chunk": chunk}), MANY)
        for precision in better
        for modules in ({"vision": "keep"}, {"vision": "on-demand", "audio": "on-demand"})
        for chunk in (2048, 1024, 512, 256)
    ]
    assert not [plan for plan in exacter if plan.largest.needed <= plan.limit * (1 - SPARE)]
    assert choice.policy.kv.max_tokens is None or choice.policy.kv.max_tokens >= MANY.context + MANY.new_tokens


def test_nothing_is_moved_off_the_device_while_keeping_it_fits(tiny):
    """Speed: of all combinations of one quality, none that keeps more modules fits."""
    one = Workload(context=1024, images=1, audio_seconds=1.0)
    for kept in ({}, {"audio": "on-demand"}, {"vision": "on-demand", "audio": "on-demand"}):
        fitting = min(just_fits(tiny, one, modules=kept, kv={"chunk": size}) for size in (2048, 1024, 512, 256))
        choice = choose(tiny, MemoryPolicy(budget=fitting), one)
        assert choice.fits
        assert choice.policy.kv.precision == "model"
        chosen = sum(choice.policy.module(name).residency == "on-demand" for name in ("vision", "audio"))
        assert chosen <= len(kept)
        more = [dict(zip(("vision", "audio"), both, strict=True)) for both in product(("keep", "on-demand"), repeat=2)]
        for modules in (both for both in more if sum(one == "on-demand" for one in both.values()) < chosen):
            for size in (2048, 1024, 512, 256):
                assert just_fits(tiny, one, modules=modules, kv={"chunk": size}) > fitting


def test_what_is_chosen_costs_are_told_with_what_is_missing_without_it(tiny):
    kept = just_fits(tiny, MANY)
    choice = choose(tiny, MemoryPolicy(budget=kept - (1 << 20)), MANY)
    first, second = choice.why.splitlines()
    assert first.startswith("Chosen: ")
    assert "Nothing that costs less fits: without it" in second
    assert "It costs: " in second


def test_as_a_last_resort_old_turns_are_forgotten(tiny):
    lean = {"modules": {"vision": "on-demand", "audio": "on-demand"}}
    short = {"precision": "int4", "max_tokens": 2048, "overflow": "drop-oldest-turns"}
    budget = min(just_fits(tiny, MANY, **lean, kv={**short, "chunk": size}) for size in (2048, 1024, 512, 256))
    choice = choose(tiny, MemoryPolicy(budget=budget), MANY)
    assert choice.fits
    assert choice.policy.kv.max_tokens == 2048
    assert choice.policy.kv.overflow == "drop-oldest-turns"
    assert "turns older than 2,048 tokens are forgotten (lossy)" in choice.why


def test_images_are_read_in_fewer_tokens_where_they_do_not_fit_whole(phone):
    policy = MemoryPolicy(budget="5GiB")
    device = replace(plan_device("RTX 4090", None, None), host_free=32 * GiB)
    choice = choose(planner(phone, device), policy, PHONE_STEP)
    assert choice.fits
    assert choice.policy.max_image_tokens == 2048
    assert choice.policy.kv.precision == "model"
    assert "images are read in 2,048 of 3,354 tokens: small print goes (lossy)" in choice.why
    wider = choose(planner(phone, device), policy.replace(budget="7GiB"), PHONE_STEP)
    assert wider.fits and wider.policy.max_image_tokens is None
    without = choose(planner(phone, device), policy, replace(PHONE_STEP, images=0))
    assert without.fits and without.policy.max_image_tokens is None


def test_fewer_tokens_than_a_person_set_are_not_more(phone):
    predict, policy = planner(phone, plan_device("RTX 4090", None, None)), MemoryPolicy(max_image_tokens=700)
    ways = [way for part in qualities(predict, policy, PHONE_STEP, rounded=False) for way in part]
    settings = [option.settings for way in ways for option in way]
    chosen = {one["max_image_tokens"] for one in settings if "max_image_tokens" in one}
    assert chosen == {512, 256}


def test_a_conversation_may_grow_into_what_is_left(phone):
    least = just_fits(planner(phone, plan_device("RTX 4090", None, None)), PHONE_STEP)
    choice = choose_for(phone, least + 100 * (1 << 20))
    bound = choice.policy.kv.max_tokens
    assert bound is not None
    assert f"kv.max_tokens={bound:,} is what a conversation may grow to" in choice.why
    predict = planner(phone, plan_device(None, choice.policy.budget, None))

    def needs(tokens: int) -> int:
        workload = Workload(context=tokens - PHONE_STEP.new_tokens, images=1)
        free = choice.policy.replace(kv={"max_tokens": None})
        return predict.plan(free, workload, search=False).largest.needed

    limit = round(choice.plan.limit * (1 - SPARE))
    assert needs(bound) <= limit < needs(bound + 512)


def test_other_settings_stay_as_they_are(tiny):
    policy = MemoryPolicy(generation={"temperature": 0.5}, kv={"precision": "int8", "reuse": False}, budget="100GiB")
    assert choose(tiny, policy, MANY).policy == policy


SHORT = Workload(context=250, new_tokens=40)
LEAN = {"vision": {"residency": "on-demand"}, "audio": {"residency": "on-demand"}}


def rounded(precisions: dict[str, str]) -> dict[str, dict[str, str]]:
    """The leanest modules with these precisions."""
    known = {name: one for name, one in precisions.items() if name != "head"}  # the embedded model's is its embedding
    return {name: LEAN.get(name, {}) | ({"precision": known[name]} if name in known else {}) for name in LEAN | known}


def least(tiny: Planner, precisions: dict[str, str], kv: str) -> int:
    """The least budget under which weights and keys and values may be kept so, by a plan of such layers."""
    exact = tiny.kept_in({name: one for name, one in precisions.items() if name != "head"})
    return just_fits(exact, SHORT, modules=rounded(precisions), kv={"precision": kv})


def test_weights_are_rounded_where_nothing_exact_fits_and_no_more_than_it_takes(tiny):
    budget = least(tiny, {"text": "int8"}, "int8")
    choice = choose(tiny, MemoryPolicy(budget=budget), SHORT, rounded=True)
    assert choice.fits
    assert choice.policy.precisions() == {"text": "int8"}
    kept = choice.policy.kv.precision
    assert kept in {"model", "int8"}
    milder = [({}, "model"), ({}, "int8"), *([({"text": "int8"}, "model")] if kept == "int8" else [])]
    assert all(least(tiny, precisions, kv) > budget for precisions, kv in milder)
    assert "weights are rounded (lossy)" in choice.why.splitlines()[1]
    exact = tiny.kept_in({"text": "int8"})
    assert exact.plan(choice.policy, SHORT, search=False).largest.needed == choice.plan.largest.needed


def test_what_changes_answers_less_comes_first(tiny):
    (kept, *_) = qualities(tiny, MemoryPolicy(), SHORT, rounded=True)
    names = [" and ".join(option.written for option in way if option.written) for way in kept]
    assert names[:4] == [
        "",
        "kv.precision='int8'",
        "quantize='int8'",
        "quantize='int8' and kv.precision='int8'",
    ]
    assert (
        names.index("quantize='int4'")
        < names.index("kv.precision='int4'")
        < names.index("quantize={'text': 'int4', 'vision': 'int4'}")
    )
    (exact, *_) = qualities(tiny, MemoryPolicy(), SHORT, rounded=False)
    assert len(exact) == 3
    assert len(kept) == 3 * (1 + 5)
    assert 0 == loss(()) < loss(("KV in int8",)) < loss(("KV in int8", "text and head in int8")) < loss(("KV in int4",))


def test_who_does_not_ask_for_it_keeps_exact_weights_and_is_told_what_would_do(tiny):
    budget = least(tiny, {"text": "int4"}, "int4")
    choice = choose(tiny, MemoryPolicy(budget=budget), SHORT)
    assert not choice.fits
    assert not choice.policy.precisions()
    assert "One change would do: rounded weights, quantize='auto' (lossy), or a budget of" in choice.why
    assert choose(tiny, MemoryPolicy(budget=budget), SHORT, rounded=True).fits


def test_a_host_without_room_for_layers_lets_weights_be_rounded(phone):
    device = replace(plan_device(None, 12 * GiB, None), host_free=4 * GiB)
    policy = MemoryPolicy(budget="12GiB")
    exact = choose(planner(phone, device), policy, SHORT)
    assert not exact.fits
    assert "with 1% to spare, and the host has no room for layers: the leanest needs" in exact.why
    assert "One change would do: rounded weights, quantize='auto' (lossy), or a budget of" in exact.why
    choice = choose(planner(phone, device), policy, SHORT, rounded=True)
    assert choice.fits
    assert choice.policy.precisions()["text"] == "int8"
    assert choice.plan.host_needed <= 4 * GiB
    roomy = choose(planner(phone, replace(device, host_free=64 * GiB)), policy, SHORT, rounded=True)
    assert not roomy.policy.precisions(), "layers on the host are exact"
    small_host = replace(plan_device(None, 24 * GiB, None), host_free=1 * GiB)
    assert choose(planner(phone, small_host), MemoryPolicy(budget="24GiB"), SHORT).fits, "it needs no host"


def test_a_model_is_loaded_with_the_weights_that_were_chosen(monkeypatch, tiny):
    free = least(tiny, {"text": "int8"}, "model")
    monkeypatch.setattr(opening, "plan_device", lambda *_: replace(tiny.device, free=free))
    with lab.load("autoglm-tiny", device="cpu", policy="auto", quantize="auto", workload=SHORT) as wb:
        assert wb.policy.precisions() == {"text": "int8"}
        assert wb.memory.nbytes("text") < 0.4 * tiny.plan(MemoryPolicy(), SHORT)["load"].of("text")
        (chosen,) = [one.why for one in wb.sampler.events() if one.subject == "chosen"]
        assert "quantize='int8'" in chosen
    plan = lab.plan("autoglm-tiny", "auto", device="cpu", quantize="auto", context=250, new_tokens=40)
    assert plan.policy.precisions() == {"text": "int8"}
    assert lab.plan("autoglm-tiny", device="cpu", quantize="int4").policy.precisions() == {"text": "int4"}


def test_rounding_is_chosen_only_with_all_the_rest():
    for call in (lab.plan, lab.load):
        with pytest.raises(PolicyError, match="pass policy='auto' too"):
            call("autoglm-tiny", device="cpu", quantize="auto")
