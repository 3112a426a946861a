"""Whatever the OpenAPI page allows, and much that it does not, is answered as the page says: schemathesis makes it up.

Statuses, content types and bodies are compared with the page for each path and method, behind all guards, over a real
socket, and nothing may be a 5xx.
"""

from __future__ import annotations

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served_app import live, served

from lorakit.serve import logs
from lorakit.serve.guard.guarded import GuardSettings, guarded
from lorakit.serve.metrics import Metrics, add_metrics
from lorakit.serve.observe import observed

# A place where no adapter is, a tool without a name: a page cannot say everything that makes a request wrong.
BEYOND_A_SCHEMA = [positive_data_acceptance]


@pytest.fixture(scope="module")
def url():
    made = served("Hello!")
    metrics = Metrics(made.engine.stats)
    add_metrics(made.app, metrics)
    app = observed(guarded(made.app, GuardSettings(), logs.report), [metrics.observe])
    with live(app) as address:
        yield address


@pytest.fixture(scope="module")
def api(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


MODELS = ["base", "sql", "sql:0.7+chat:0.3", "base:chat", "nobody"]
OPERATIONS = {
    "GET /health",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /detokenize",
    "POST /tokenize",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
}


def test_the_page_has_every_path(api):
    assert {result.ok().label for result in api.get_all_operations()} == OPERATIONS


@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_every_request_is_answered_as_the_page_says(api, label):
    method, path = label.split()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy())
    def answered(case):
        # Names that are made up would all end in a 404.
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODELS[len(case.body["model"]) % len(MODELS)]
        case.call_and_validate(excluded_checks=BEYOND_A_SCHEMA)

    answered()


@pytest.mark.parametrize("name", ["", " ", "\t", "\x00", "a\r\nset-cookie: b", "é", " a ", "a" * 60])
def test_a_field_of_any_name_can_be_told_in_a_header(url, name):
    """A header that ends with a space, or holds a line end, is none: the connection would end without an answer."""
    body = {"model": "base", "prompt": "x", "max_tokens": 1, name: 1}
    answer = httpx2.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-lorakit-warning"].startswith("not used: ")
    assert "set-cookie" not in answer.headers
