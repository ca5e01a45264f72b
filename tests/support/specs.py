"""Model specs without files, requests and instance rows, for tests that compute nothing."""

from aegaeon.types import (
    Instance,
    InstanceRecord,
    InstanceStatus,
    ModelSpec,
    Request,
    Role,
    SamplingParams,
)


def make_spec(name: str, weight_bytes: int = 100, context_tokens: int = 4096) -> ModelSpec:
    return ModelSpec(
        id=name,
        path=f"/nowhere/{name}",
        architecture="Null",
        weight_bytes=weight_bytes,
        kv_token_bytes=1,
        context_tokens=context_tokens,
        vocab_tokens=1000,
    )


def make_request(request_id: str, model: str, **changes) -> Request:
    fields = {
        "prompt_token_ids": (1, 2, 3),
        "sampling": SamplingParams(temperature=0.0),
        "max_tokens": 4,
        "stop_token_ids": (),
        "reply_to": "proxy",
        "arrival_s": 0.0,
        "deadline_s": 1e9,
    }
    return Request(id=request_id, model=model, **{**fields, **changes})


def make_instance(
    name: str, models: tuple[str, ...], role: Role = "colocated", **status
) -> Instance:
    record = InstanceRecord(
        id=name,
        incarnation=1,
        role=role,
        device="null",
        mailbox=f"{name}.1",
        pid=1,
        models=models,
    )
    return Instance(record, InstanceStatus(**{"state": "ready", **status}))
