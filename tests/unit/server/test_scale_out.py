from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from autoglm_lab.cli import app
from autoglm_lab.models.loading import outline
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.server.scale_out import Deployment, ModelFacts, VllmCommand, vllm_command
from autoglm_lab.units import GiB

PHONE = ModelFacts("zai-org/AutoGLM-Phone-9B", 65536, ("text", "image"), 40960.0, "bfloat16")


def made(policy: MemoryPolicy | None = None, facts: ModelFacts = PHONE, **deployment: Any) -> VllmCommand:
    return vllm_command(policy or MemoryPolicy(), facts, Deployment("phone", **deployment))


def test_the_facts_are_read_from_the_model_without_its_weights() -> None:
    facts = ModelFacts.of(outline("autoglm-phone-9b"), "autoglm-phone-9b")
    assert facts == PHONE
    assert facts.image_edges is not None
    assert facts.image_edges(256)["longest_edge"] == 256 * 28 * 28 * 2  # an image counts as two frames


def test_the_default_policy_makes_a_whole_command() -> None:
    assert made().flags == {
        "served-model-name": "phone",
        "host": "127.0.0.1",
        "port": 8000,
        "dtype": "bfloat16",
        "max-model-len": 65536,
        "max-num-seqs": 32,
        "max-num-batched-tokens": 2048,
        "limit-mm-per-prompt": {"image": {"count": 4, "width": 1080, "height": 2400}, "video": 0},
        "kv-cache-dtype": "auto",
        "enable-prefix-caching": True,
        "enable-prompt-tokens-details": True,
        "override-generation-config": {"temperature": 0.0},
    }
    assert made().notes == ()


@pytest.mark.parametrize(
    ("settings", "flag", "value"),
    [
        ({"kv": {"max_tokens": 4096}}, "max-model-len", 4096),
        ({"kv": {"max_bytes": 40960 * 1000}}, "max-model-len", 1000),
        ({"kv": {"max_bytes": 40960 * 1000, "max_conversations": 3}}, "kv-cache-memory-bytes", 40960 * 3000),
        ({"kv": {"precision": "int4"}}, "kv-cache-dtype", "fp8"),
        ({"kv": {"chunk": 512}}, "max-num-batched-tokens", 512),
        ({"kv": {"reuse": False}}, "enable-prefix-caching", False),
        ({"kv": {"graphs": False}}, "enforce-eager", True),
        ({"budget": "12GiB"}, "gpu-memory-utilization", 0.5),
        ({"modules": {"text": {"precision": "float16"}}}, "dtype", "float16"),
        ({"modules": {"text": {"precision": "int8"}}}, "quantization", "fp8"),
        ({"placement": {"host_bytes": "6GiB"}}, "cpu-offload-gb", 6.0),
        ({"modules": {"vision": "off"}}, "limit-mm-per-prompt", {"image": 0, "video": 0}),
        (
            {"generation": {"max_new_tokens": 9, "top_p": 0.5}},
            "override-generation-config",
            {"temperature": 0.0, "max_new_tokens": 9, "top_p": 0.5},
        ),
    ],
)
def test_each_setting_has_its_flag(settings: dict[str, Any], flag: str, value: Any) -> None:
    assert made(MemoryPolicy(**settings), card=24 * GiB).flags[flag] == value


def test_a_text_model_is_not_told_of_images() -> None:
    facts = ModelFacts("smol", 2048, ("text",), 100.0, "float32")
    assert "limit-mm-per-prompt" not in made(facts=facts).flags


def test_several_gpus_share_the_model_or_copy_it() -> None:
    flags = made(tensor_parallel=2, data_parallel=3).flags
    assert (flags["tensor-parallel-size"], flags["data-parallel-size"]) == (2, 3)


def test_what_vllm_has_not_is_said() -> None:
    policy = MemoryPolicy(
        kv={"precision": "int8", "overflow": "window", "place": "host"},
        modules={"vision": {"residency": "on-demand", "precision": "int8"}, "text": {"precision": "int4"}},
        placement={"host_bytes": "1GiB"},
        max_image_tokens=256,
        budget="20GiB",
    )
    command = made(policy)
    notes = "\n".join(command.notes)
    for said in ("fp8 instead", "vision on demand", "overflow window", "kv.place host", "the card is not known"):
        assert said in notes
    for said in ("modules.vision.precision int8", "modules.text.precision int4", "whole layers", "max_image_tokens"):
        assert said in notes
    assert not {"quantization", "mm-processor-kwargs"} & set(command.flags)


def test_the_most_tokens_of_an_image_are_bounds_of_its_pixels() -> None:
    facts = replace(PHONE, image_edges=lambda most: {"shortest_edge": 10, "longest_edge": 784 * most})
    command = made(MemoryPolicy(max_image_tokens=256), facts=facts)
    assert command.flags["mm-processor-kwargs"] == {"size": {"shortest_edge": 10, "longest_edge": 200_704}}
    assert command.notes == ()


def test_the_text_of_a_command_is_the_command() -> None:
    command = made(MemoryPolicy(kv={"precision": "int8", "reuse": False}), tensor_parallel=2)
    assert shlex.split(str(command).replace("\\\n", " "), comments=True) == command.arguments()
    assert "--no-enable-prefix-caching" in command.arguments()


def test_ray_serve_gets_the_same_settings() -> None:
    command = made(MemoryPolicy(kv={"max_tokens": 4096}))
    (application,) = yaml.safe_load(command.ray_serve(copies=2))["applications"]
    (config,) = application["args"]["llm_configs"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    assert config["model_loading_config"] == {"model_id": "phone", "model_source": PHONE.source}
    assert config["deployment_config"]["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 2}
    assert config["engine_kwargs"]["max_model_len"] == 4096
    assert config["engine_kwargs"]["limit_mm_per_prompt"]["video"] == 0
    assert not {"host", "port", "served_model_name"} & set(config["engine_kwargs"])


def test_kubernetes_gets_the_same_command_with_its_gpus_and_its_key() -> None:
    command = made(tensor_parallel=2, port=9000)
    deployment, service = yaml.safe_load_all(command.kubernetes(copies=3))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    expected = ["0.0.0.0" if word == "127.0.0.1" else word for word in command.arguments()]
    assert container["command"] == expected
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "phone-key", "key": "api-key"}
    assert deployment["spec"]["replicas"] == 3
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items() and labels["llm-d.ai/inferenceServing"] == "true"
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == 9000


def test_the_command_line_prints_it(tmp_path: Any) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("budget: 20GiB\nkv: {max_tokens: 8192}\n")
    words = ["serve", "autoglm-phone-9b", "--engine", "vllm", "--print", "--policy", str(policy)]
    done = CliRunner().invoke(app, [*words, "--device", "RTX 4090", "--images", "2", "--tensor-parallel", "2"])
    assert done.exit_code == 0
    for said in ("vllm serve zai-org/AutoGLM-Phone-9B", "--max-model-len 8192", "--gpu-memory-utilization 0.8"):
        assert said in done.stdout
    assert '"count": 2' in done.stdout and "--tensor-parallel-size 2" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["autoglm-phone-9b", "--engine", "tgi"], "--engine is local or vllm, not 'tgi'"),
        (["autoglm-phone-9b", "--print"], "--engine is local or vllm, not 'local'"),
        (
            ["autoglm-phone-9b", "--engine", "vllm", "--print", "--as", "helm"],
            "--as is one of command, ray, kubernetes",
        ),
        (["autoglm-tiny", "--engine", "vllm", "--print"], "vLLM does not know autoglm-tiny"),
    ],
)
def test_what_cannot_be_is_said(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["serve", *words])
    assert done.exit_code != 0
    assert message in str(done.exception) + done.output
