from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from autoglm_lab.errors import PolicyError
from autoglm_lab.policy import (
    GenerationPolicy,
    HistoryPolicy,
    KvPolicy,
    MemoryPolicy,
    ModulePolicy,
    PlacementPolicy,
    ReclaimPolicy,
    TrainingPolicy,
)
from autoglm_lab.units import GiB

FULL = MemoryPolicy(
    modules={
        "vision": ModulePolicy(residency="on-demand", park_to="disk", keep_alive=2.5, precision="int4"),
        "audio": "off",
    },
    kv=KvPolicy(
        max_tokens=4096, max_bytes="160MiB", overflow="drop-oldest-turns", sinks=4, observation=16, precision="int8",
        place="host", chunk=512, graphs=False, reuse=False, max_conversations=2, prefix_bytes="1GiB",
        prefix_host_bytes="2GiB", encoder_bytes="64MiB",
    ),
    reclaim=ReclaimPolicy(every_answers=None, cached_share=0.5, traceback=True, expandable_segments=True),
    generation=GenerationPolicy(
        max_new_tokens=128, min_new_tokens=32, temperature=0.7, top_p=0.9, repetition_penalty=1.2, eos=False,
        thinking=True, seed=7, frequency_penalty=0.2, presence_penalty=-0.5, stop=("\n\n", "。"),
    ),
    history=HistoryPolicy(media="strip"),
    training=TrainingPolicy(
        checkpointing="every-k", every=4, offload=0.5, loss_chunk=128, optimizer="adamw-8bit", micro_batch=1,
        accumulation=8, cache_features=False,
    ),
    placement=PlacementPolicy(host_bytes="8GiB"),
    budget="24GiB",
    pinned="8GiB",
    max_image_tokens=640,
)  # fmt: skip


def test_the_defaults_keep_everything_and_write_nothing() -> None:
    policy = MemoryPolicy()
    assert policy.module("vision").residency == "keep"
    assert policy.to_dict() == {}
    assert (policy.generation.max_new_tokens, policy.generation.temperature) == (256, 0)
    assert policy.reclaim.every_answers == 10


@pytest.mark.parametrize("policy", [MemoryPolicy(), FULL, MemoryPolicy(modules={"audio": "off"})])
def test_yaml_and_json_read_back_what_they_wrote(policy: MemoryPolicy) -> None:
    assert MemoryPolicy.from_yaml(policy.to_yaml()) == policy
    assert MemoryPolicy.from_json(policy.to_json()) == policy
    assert MemoryPolicy.from_dict(policy.to_dict()) == policy


def test_the_full_policy_has_no_setting_at_its_default() -> None:
    """So that the round trip above covers every setting there is."""
    written = FULL.to_dict()
    assert set(written) == set(MemoryPolicy.model_fields)
    parts = {name: type(value) for name, value in FULL if isinstance(value, BaseModel)}
    assert len(parts) == 6
    for name, part in parts.items():
        assert set(written[name]) == set(part.model_fields)
    assert set(written["modules"]["vision"]) == set(ModulePolicy.model_fields)


def test_a_yaml_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("kv: {max_tokens: 512}\nbudget: 8 GiB\n", encoding="utf-8")
    assert MemoryPolicy.from_yaml(file) == MemoryPolicy(kv={"max_tokens": 512}, budget=8 * GiB)


def test_an_empty_yaml_is_the_default() -> None:
    assert MemoryPolicy.from_yaml("# nothing yet\n") == MemoryPolicy()


def test_an_unquoted_2_4_in_yaml_is_no_time() -> None:
    policy = MemoryPolicy.from_yaml("modules: {text: {precision: 2:4}}")
    assert policy.precisions() == {"text": "2:4"}
    assert MemoryPolicy.from_yaml(policy.to_yaml()) == policy


@pytest.mark.parametrize(
    "text", ["modules: {audio: off}", "modules: {audio: {residency: off}}", 'modules: {audio: "off"}']
)
def test_an_unquoted_off_in_yaml_means_off(text: str) -> None:
    assert MemoryPolicy.from_yaml(text).module("audio").residency == "off"


def test_the_python_statement_gives_the_same_policy() -> None:
    import autoglm_lab as lab

    class Workbench:
        policy = MemoryPolicy()

    wb = Workbench()
    exec(FULL.to_python(), {"wb": wb, "lab": lab})
    assert wb.policy == FULL


def test_replace_merges_part_by_part() -> None:
    changed = FULL.replace(kv={"max_tokens": 64}, modules={"vision": "keep", "text": "on-demand"})
    assert changed.kv == KvPolicy(**{**FULL.kv.model_dump(), "max_tokens": 64})
    assert changed.module("vision") == FULL.module("vision").model_copy(update={"residency": "keep"})
    assert changed.module("audio").residency == "off"
    assert changed.module("text").residency == "on-demand"
    assert changed.budget == 24 * GiB
    assert FULL.kv.max_tokens == 4096, "replace gives a new policy, the old one stays"


def test_replace_takes_parts_and_none() -> None:
    assert FULL.replace(generation=GenerationPolicy()).generation == GenerationPolicy()
    assert FULL.replace(budget=None).budget is None
    assert FULL.replace(kv={"max_tokens": None}).kv.max_tokens is None


def test_precisions_name_the_modules_that_are_not_kept_as_loaded() -> None:
    assert FULL.precisions() == {"vision": "int4"}
    assert MemoryPolicy(modules={"text": "off"}).precisions() == {}


def test_a_policy_does_not_change_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FULL.budget = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        FULL.kv.reuse = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vision": "off"},
            "there is no setting 'vision'; valid settings are modules, kv, reclaim, generation, history",
        ),
        (
            {"kv": {"max_token": 1}},
            "there is no setting 'kv.max_token'; valid settings are max_tokens, max_bytes",
        ),
        (
            {"modules": {"audio": {"place": "host"}}},
            "there is no setting 'modules.audio.place'; valid settings are residency, park_to, keep_alive",
        ),
        (
            {"reclaim": {"every": 3}},
            "there is no setting 'reclaim.every'; valid settings are every_answers, cached_share, traceback",
        ),
        ({"modules": {"audio": "gone"}}, "'keep', 'on-demand' or 'off' (got 'gone')"),
        ({"modules": {"audio": {"park_to": "moon"}}}, "'auto', 'host' or 'disk' (got 'moon')"),
        ({"modules": {"text": {"precision": "int3"}}}, "or '2:4' (got 'int3')"),
        ({"kv": {"overflow": "spill"}}, "'stop', 'drop-oldest-turns', 'window', 'evict' or 'refuse' (got 'spill')"),
        (
            {"kv": {"overflow": "evict", "max_tokens": 80}},
            "kv: overflow 'evict' has too few to choose from: 64 of 80 are sinks; raise max_tokens to 96, or lower",
        ),
        ({"kv": {"observation": 0}}, "kv.observation: Input should be greater than or equal to 1 (got 0)"),
        ({"kv": {"max_tokens": 3}}, "kv.max_tokens: Input should be greater than or equal to 16 (got 3)"),
        ({"kv": {"max_conversations": 0}}, "kv.max_conversations: Input should be greater than or equal to 1 (got 0)"),
        ({"reclaim": {"cached_share": 1.5}}, "reclaim.cached_share: Input should be less than or equal to 1 (got 1.5)"),
        ({"generation": {"temperature": -1}}, "generation.temperature: Input should be greater than or equal to 0"),
        (
            {"generation": {"min_new_tokens": 300}},
            "generation: min_new_tokens 300 is more than max_new_tokens 256",
        ),
        ({"budget": "a lot"}, "budget: cannot read 'a lot' as a size; write for example '24GiB'"),
        ({"budget": -1}, "budget: a size cannot be negative, got -1"),
    ],
)
def test_what_cannot_be_set_is_refused_with_what_can(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        MemoryPolicy(**settings)
    assert message in str(caught.value)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        MemoryPolicy(kv={"max_tokens": 1}, budget="?")
    assert "kv.max_tokens" in str(caught.value)
    assert "budget" in str(caught.value)


def test_replace_refuses_like_the_constructor() -> None:
    with pytest.raises(PolicyError, match=r"there is no setting 'kv\.size'"):
        FULL.replace(kv={"size": 1})


def test_text_that_is_no_policy_is_refused() -> None:
    with pytest.raises(PolicyError, match="the policy is not JSON"):
        MemoryPolicy.from_json("{")
    with pytest.raises(PolicyError, match="the policy is not YAML"):
        MemoryPolicy.from_yaml("kv: [")
    with pytest.raises(PolicyError, match="a policy is a mapping of settings, not list"):
        MemoryPolicy.from_json(json.dumps([1]))


def test_an_image_takes_at_least_some_tokens() -> None:
    assert MemoryPolicy(max_image_tokens=16).max_image_tokens == 16
    with pytest.raises(PolicyError, match=r"max_image_tokens: .*greater than or equal to 16 \(got 8\)"):
        MemoryPolicy(max_image_tokens=8)
