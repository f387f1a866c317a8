"""`Peer`: what is behind an endpoint, and what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoglm_lab.engine.protocol import Capabilities
from autoglm_lab.engine.remote.dialect import LLAMA, OTHER, OURS, SGLANG, TRANSFORMERS, VLLM, Dialect
from autoglm_lab.engine.remote.link import Link
from autoglm_lab.engine.service_load import ServiceLoad, llama_load, sglang_load, vllm_load
from autoglm_lab.engine.wire import from_wire
from autoglm_lab.errors import EndpointError

_OWNERS = {"vllm": VLLM, "sglang": SGLANG, "llamacpp": LLAMA}
_TRANSFORMERS_MARK = "/load_model"


@dataclass(frozen=True)
class Peer:
    """What is behind an endpoint.

    Attributes:
        model: the name that requests carry.
    """

    dialect: Dialect
    model: str
    capabilities: Capabilities

    def load(self, link: Link) -> ServiceLoad | None:
        """How busy it is now; None where it has no metrics."""
        if self.dialect is VLLM:
            return vllm_load(_text(link.look("/metrics")))
        if self.dialect is SGLANG:
            return sglang_load(_text(link.look("/metrics")))
        if self.dialect is LLAMA:
            return llama_load(_text(link.look("/metrics")), link.look("/slots"))
        return None


def find_peer(link: Link, model: str | None = None) -> Peer:
    """Ask an endpoint what it is.

    Args:
        model: None: the first that it lists.

    Raises:
        EndpointError: no server, a wrong key, no OpenAI-compatible API, or no such model.
    """
    models = _models(link)
    dialect, ours = _recognised(link, models)
    names = [str(one["id"]) for one in models]
    if model is None and not names:
        raise EndpointError(f"{link.host} lists no model: name one with model=")
    if model is not None and model not in names and dialect is not TRANSFORMERS:
        raise EndpointError(f"{link.host} has no model {model!r}; it has {', '.join(names) or 'none'}")
    chosen = model or names[0]
    where = f"at {link.host}, {dialect.name}"
    if ours is not None:
        return Peer(dialect, chosen, replace(from_wire(Capabilities, ours), where=where, server=dialect.name))
    listed = next((one for one in models if one["id"] == chosen), {})
    props = _mapping(link.look("/props")) if dialect is LLAMA else {}
    capabilities = Capabilities(
        model=chosen,
        where=where,
        device="",
        dtype="",
        modalities=_modalities(props),
        thinking=dialect.thinking != "nowhere",
        memory_control=False,
        context_tokens=_context(listed, props),
        server=dialect.name,
    )
    return Peer(dialect, chosen, capabilities)


def _models(link: Link) -> list[Mapping[str, Any]]:
    try:
        listed = link.ask("GET", "/v1/models")
    except EndpointError:
        # transformers serve lists what was fetched from the hub, and fails where nothing ever was.
        if _TRANSFORMERS_MARK not in _paths(link):
            raise
        return []
    models = listed.get("data") if isinstance(listed, Mapping) else None
    if not isinstance(models, list):
        raise EndpointError(f"{link.host} lists no models as OpenAI's API does: is {link.url} the base of one?")
    return [one for one in models if isinstance(one, Mapping) and "id" in one]


def _recognised(link: Link, models: list[Mapping[str, Any]]) -> tuple[Dialect, Any]:
    """The kind of server, and what one of ours says that it can do."""
    owners = {str(one.get("owned_by", "")).lower() for one in models}
    for owner, dialect in _OWNERS.items():
        if owner in owners:
            return dialect, None
    ours = link.look("/v1/memory/capabilities")
    if isinstance(ours, Mapping) and "memory_control" in ours:
        return OURS, ours
    paths = _paths(link)
    for mark, dialect in ((_TRANSFORMERS_MARK, TRANSFORMERS), ("/flush_cache", SGLANG), ("/tokenize", VLLM)):
        if mark in paths:
            return dialect, None
    if "default_generation_settings" in _mapping(link.look("/props")):
        return LLAMA, None
    return OTHER, None


def _paths(link: Link) -> Mapping[str, Any]:
    return _mapping(_mapping(link.look("/openapi.json")).get("paths"))


def _modalities(props: Mapping[str, Any]) -> tuple[str, ...]:
    """What may be sent. A server that does not say refuses by itself what its model cannot read."""
    told = props.get("modalities")
    if not isinstance(told, Mapping):
        return ("text", "image", "audio")
    return ("text", *("image",) * bool(told.get("vision")), *("audio",) * bool(told.get("audio")))


def _context(listed: Mapping[str, Any], props: Mapping[str, Any]) -> int | None:
    told = (
        listed.get("max_model_len"),
        _mapping(props.get("default_generation_settings")).get("n_ctx"),
        _mapping(listed.get("meta")).get("n_ctx_train"),
    )
    return next((number for number in told if isinstance(number, int)), None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
