"""The page /metrics: it counts what was answered, and no request can make it grow."""

from __future__ import annotations

import time

from asgi_calls import call, echo
from prometheus_client.parser import text_string_to_metric_families
from served_app import served

from lorakit.serve.engine import Stats
from lorakit.serve.metrics import MAX_ADAPTERS, OTHER, Metrics
from lorakit.serve.observe import RequestLog, observed

CHAT = "/v1/chat/completions"


def seen(path=CHAT, status=200, adapter=None, method="POST", first=0.2):
    return RequestLog("127.0.0.1", method, path, status, 0.3, first, True, adapter, "req-1")


def samples(metrics):
    """The page as Prometheus reads it: (name, labels) -> value."""
    page = metrics.page()[0].decode()
    families = text_string_to_metric_families(page)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics, name, **labels):
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def test_requests_are_counted_by_path_status_and_adapter():
    metrics = Metrics(Stats, [CHAT])
    for one in (seen(), seen(adapter="sql@3fa9c1"), seen(adapter="sql@77aa00"), seen(status=429, first=None)):
        metrics.observe(one)
    assert value(metrics, "lorakit_http_requests_total", method="POST", path=CHAT, status="200") == 3
    assert value(metrics, "lorakit_http_requests_total", method="POST", path=CHAT, status="429") == 1
    assert value(metrics, "lorakit_adapter_requests_total", adapter="sql") == 2
    assert value(metrics, "lorakit_http_request_seconds_count", path=CHAT) == 4
    assert value(metrics, "lorakit_http_first_byte_seconds_count", path=CHAT) == 3


def test_the_engines_counts_are_those_of_now():
    now = [Stats(running=3, waiting=1, answer_tokens=70, on_device=2, last_step=time.monotonic() - 5)]
    metrics = Metrics(lambda: now[0], [CHAT])
    assert value(metrics, "lorakit_requests_running") == 3
    assert value(metrics, "lorakit_answer_tokens_total") == 70
    assert value(metrics, "lorakit_engine_up") == 1
    assert 5 <= value(metrics, "lorakit_seconds_since_last_step") < 60
    now[0] = Stats(running=4, alive=False)
    assert value(metrics, "lorakit_requests_running") == 4
    assert value(metrics, "lorakit_engine_up") == 0
    assert ("lorakit_seconds_since_last_step", ()) not in samples(metrics)


def test_what_clients_make_up_adds_no_labels():
    metrics = Metrics(Stats, [CHAT])
    for one in (seen(), seen(path="/x"), seen(method="BREW"), seen(adapter="a@1"), seen(adapter=f"{OTHER}@2")):
        metrics.observe(one)
    before = set(samples(metrics))
    for n in range(1000):
        metrics.observe(seen(path=f"/{n}"))
        metrics.observe(seen(method=f"METHOD{n}"))
    assert set(samples(metrics)) == before
    for n in range(1000):
        metrics.observe(seen(adapter=f"name-{n}@1"))
    adapters = [labels for name, labels in samples(metrics) if name == "lorakit_adapter_requests_total"]
    assert len(adapters) <= MAX_ADAPTERS + 1
    assert value(metrics, "lorakit_adapter_requests_total", adapter=OTHER) > 800


def test_mixes_have_one_label():
    """As the API names them in its answers."""
    app, metrics = served(), Metrics(Stats, [CHAT])
    for mix in ("sql:0.7+chat:0.3", "sql+team/sql:0.5", "chat:2+sql"):
        answer = app.post("/v1/completions", {"model": mix, "prompt": "x", "max_tokens": 1})
        assert answer.status_code == 200
        metrics.observe(seen(adapter=answer.headers["x-lorakit-adapter"]))
    assert value(metrics, "lorakit_adapter_requests_total", adapter="mix") == 3


def test_a_watcher_sees_what_was_answered():
    got = []

    async def app(scope, receive, send):
        if scope["path"] == "/gone":
            return
        await send({"type": "http.response.start", "status": 418, "headers": [(b"x-lorakit-adapter", b"sql@1")]})
        await send({"type": "http.response.body", "body": b"x", "more_body": scope["path"] == "/cut"})

    for path in ("/a", "/cut", "/gone"):
        call(observed(app, [got.append]), path, "POST")
    assert [(s.path, s.status, s.complete, s.adapter) for s in got] == [
        ("/a", 418, True, "sql@1"),
        ("/cut", 418, False, "sql@1"),
        ("/gone", 499, False, None),
    ]
    assert call(observed(echo, []), parts=[b"as it was"]).body == b"as it was"
