"""Several devices for one model: how it is cut, and that it answers as on one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import nn

import autoglm_lab as lab
from autoglm_lab.errors import LabError, LoadError
from autoglm_lab.memory.accelerator import open_accelerator
from autoglm_lab.models.anatomy import anatomy, named_tensors, parted
from autoglm_lab.models.loading import outline, resolve
from autoglm_lab.models.spread import Load, balanced, mapped
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.spreading import open_devices
from autoglm_lab.workbench import Workbench

TWO = (torch.device("cuda:0"), torch.device("cuda:1"))


@pytest.fixture(scope="module")
def phone() -> nn.Module:
    return resolve("autoglm-phone-9b", weights="dummy", dtype="bfloat16", device=torch.device("cpu")).model


def held(model: nn.Module, of: object) -> list[int]:
    found: dict[int, int] = {}
    for name, tensor in named_tensors(model):
        number = of(name)  # type: ignore[operator]
        found[number] = found.get(number, 0) + tensor.numel() * tensor.element_size()
    return [found[number] for number in sorted(found)]


def test_weights_are_balanced_to_half_a_layer(phone: nn.Module) -> None:
    spread = balanced(phone, TWO)
    one, two = held(phone, spread.of)
    layer = 204_000_000 * 2
    assert abs(one - two) <= layer
    assert sorted(spread.layers) == list(spread.layers)
    assert spread.of("lm_head.weight") == 1
    assert spread.of("model.language_model.norm.weight") == 1
    assert spread.of("model.language_model.embed_tokens.weight") == 0
    assert spread.of("model.visual.patch_embed.proj.weight") == 0


def test_keys_values_and_an_encoder_at_work_move_layers_to_the_other_device(phone: nn.Module) -> None:
    plain = balanced(phone, TWO).layers.count(0)
    assert balanced(phone, TWO, Load(first=2_000_000_000)).layers.count(0) < plain
    assert balanced(phone, TWO, Load(last=2_000_000_000)).layers.count(0) > plain
    # Keys and values lie beside their layers: where they outweigh all else, both devices get as many layers.
    assert balanced(phone, TWO, Load(layer=10**12)).layers.count(0) == len(balanced(phone, TWO).layers) // 2


def test_a_head_tied_to_the_embedding_runs_where_that_lies() -> None:
    model = outline("autoglm-tiny", device="cpu").model
    spread = balanced(model, TWO)
    assert spread.crossings["lm_head"] == 0
    assert spread.of("model.language_model.embed_tokens.weight") == 0
    assert spread.at("model.language_model.norm") == 1
    assert mapped(model, {"": 0, "lm_head": 1}).crossings["lm_head"] == 0


def test_four_devices_get_a_run_of_layers_each(phone: nn.Module) -> None:
    devices = tuple(torch.device("cuda", index) for index in range(4))
    spread = balanced(phone, devices)
    assert {*spread.layers} == {0, 1, 2, 3}
    assert all(after - before in {0, 1} for before, after in pairwise(spread.layers))
    sizes = held(phone, spread.of)
    assert max(sizes) - min(sizes) <= 2 * 408_000_000


def test_more_devices_than_layers_are_refused() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    with pytest.raises(LoadError, match="3 devices need at least as many layers"):
        balanced(model, (*TWO, torch.device("cuda:2")))


def test_a_device_map_is_respected(phone: nn.Module) -> None:
    spread = mapped(phone, {"": "cuda:0", "model.language_model.layers.39": 1, "lm_head": "cuda:1"})
    assert spread.devices == TWO
    assert spread.layers == (*(0,) * 39, 1)
    assert spread.of("lm_head.weight") == 1
    assert spread.of("model.language_model.norm.weight") == 0
    assert {name for name in spread.tensors if "layers.39" not in name} == {"lm_head.weight"}


def test_a_device_map_with_a_gap_or_a_disk_is_refused(phone: nn.Module) -> None:
    with pytest.raises(LoadError, match=r"says nothing of model\."):
        mapped(phone, {"lm_head": 0})
    with pytest.raises(LoadError, match="'disk'"):
        mapped(phone, {"": 0, "lm_head": "disk"})


def test_a_module_on_two_devices_is_two_modules(phone: nn.Module) -> None:
    specs = anatomy(phone)
    found = {spec.name: spec for spec in parted(phone, specs, balanced(phone, TWO).of)}
    assert [*found] == ["vision", "text", "text@1", "head"] or [*found] == [
        "vision",
        "projector",
        "text",
        "text@1",
        "head",
    ]
    assert (found["text"].card, found["text@1"].card, found["head"].card) == (0, 1, 1)
    assert sum(spec.nbytes for spec in found.values()) == sum(spec.nbytes for spec in specs)
    # No name is lost, and each has hooks where its weights are used.
    assert {name for spec in found.values() for name in spec.tensors} == {
        name for spec in specs for name in spec.tensors
    }
    assert found["text@1"].roots


def test_a_policy_for_a_module_holds_for_its_parts() -> None:
    policy = MemoryPolicy(modules={"text": {"residency": "on-demand"}})
    assert policy.module("text@1").residency == "on-demand"
    assert policy.replace(modules={"text@1": {"residency": "off"}}).module("text@1").residency == "off"


@pytest.fixture(scope="module")
def pair() -> Iterator[Workbench]:
    """The embedded model on two devices, both of which are this machine's memory."""
    resolved = resolve("autoglm-tiny", device=torch.device("cpu"))
    spread = balanced(resolved.model, (torch.device("cpu"), torch.device("cpu")))
    with Workbench(
        resolved, MemoryPolicy(), open_accelerator("cpu"), open_accelerator("cpu"), spread=spread
    ) as workbench:
        yield workbench


def test_it_answers_as_on_one_device(pair: Workbench, loaded: lab.Workbench) -> None:
    for text in ("你是谁?", "What can you do?"):
        assert str(pair.chat(text, conversation="a").result()) == str(loaded.chat(text, conversation="a").result())
    several = [pair.chat("Hello", conversation=name) for name in ("b", "c", "d")]
    assert len({str(turn.result()) for turn in several}) == 1
    loaded.drop("a")


def test_each_ledger_shows_its_own_share(pair: Workbench) -> None:
    pair.chat("Hello", conversation="shares").result()
    first, second = pair.engine.ledgers()
    assert (first.card, second.card) == (0, 1)
    assert first.nbytes("text") and not first.nbytes("text@1")
    assert second.nbytes("text@1") and not second.nbytes("text")
    kv = [ledger.nbytes("KV shares") for ledger in (first, second)]
    assert min(kv) > 0
    assert sum(kv) == next(info.kv_bytes for info in pair.conversations if info.name == "shares")


def test_a_part_is_parked_and_comes_back_for_the_next_turn(pair: Workbench) -> None:
    before = str(pair.chat("Hello", conversation="parked").result())
    part = pair.modules["text@1"]
    part.park()
    assert part.info.place == "disk"
    assert pair.engine.ledgers()[1].nbytes("text@1") == 0
    pair.drop("parked")
    assert str(pair.chat("Hello", conversation="parked").result()) == before
    assert part.info.place == "device"


def test_quantised_pages_lie_on_both(pair: Workbench) -> None:
    pair.policy = pair.policy.replace(kv={"precision": "int8"})
    assert str(pair.chat("你是谁?", conversation="int8").result())
    assert all(ledger.nbytes("KV int8") for ledger in pair.engine.ledgers())
    pair.policy = MemoryPolicy()


def test_what_is_for_one_device_is_refused_in_a_sentence(pair: Workbench) -> None:
    before = pair.policy
    with pytest.raises(LabError, match=r"kv\.place='host' is for one device"):
        pair.policy = before.replace(kv={"place": "host"})
    assert pair.policy == before
    with pytest.raises(LabError, match="a plan is of one device, and this model lies on 2"):
        pair.plan()
    with pytest.raises(LabError, match="fine-tuning is for one device, and this model lies on 2"):
        pair.finetune([])
    assert pair.chat("Hello", conversation="goes on").result().text


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        (("cpu", "cpu"), "names cpu twice"),
        (("cpu", "cuda:0"), "several GPUs, or on one device"),
        ((), "is empty"),
        (99, "torch sees"),
    ],
)
def test_devices_that_cannot_be_are_refused(devices: object, told: str) -> None:
    with pytest.raises(LabError, match=told):
        open_devices(devices)  # type: ignore[arg-type]


def test_the_dashboard_shows_a_bar_and_a_plot_for_each(pair: Workbench) -> None:
    for sampler in pair.samplers:
        sampler.sample()
    dashboard = pair.dashboard()
    try:
        bars = [{segment["name"] for segment in bar.state["segments"]} for bar in dashboard.device_bars]
        assert len(dashboard.live_plots) == 2
        assert "text" in bars[0]
        assert "text@1" in bars[1]
        assert "text@1" not in bars[0]
        assert {module["name"] for module in dashboard.modules.state["modules"]} >= {"text", "text@1"}
        assert dashboard._still().count("<img ") == 2
    finally:
        dashboard.close()
