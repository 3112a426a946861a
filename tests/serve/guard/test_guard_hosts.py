"""Only names of this server are answered: a page whose name was made to resolve to 127.0.0.1 gets nothing."""

from __future__ import annotations

import pytest
from asgi_calls import call, echo

from lorakit.errors import ConfigError
from lorakit.serve.guard.hosts import host_names, only_hosts

OWN = ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "[::1]", "localhost."]
FOREIGN = [
    "evil.example",
    "localhost.evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "127.0.0.1@evil.example",
    "localhost evil.example",
    "localhost:99999999",
    "localhost:",
    "[::2]",
    "[::1",
    "0.0.0.0",
    "",
    "/localhost",
]


@pytest.mark.parametrize("host", OWN)
def test_requests_for_this_machine_are_answered(host):
    assert call(only_hosts(echo, host_names("127.0.0.1", [])), host=host).status == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_requests_for_another_name_are_refused_before_their_body_is_read(host):
    answer = call(only_hosts(echo, host_names("0.0.0.0", [])), "/v1/chat/completions", "POST", host=host)
    assert (answer.status, answer.code, answer.reads) == (400, "host_not_allowed", 0)
    assert "--allow-host" in answer.message
    assert answer.headers["x-should-retry"] == "false"


def test_a_request_with_no_host_or_with_two_is_refused():
    app = only_hosts(echo, host_names("127.0.0.1", []))
    assert call(app, host=None).status == 400
    assert call(app, headers=[("host", "evil.example")], host="localhost").status == 400


def test_names_that_were_allowed_and_the_one_that_is_bound_are_answered():
    names = host_names("192.168.1.5", ["Models.Example.org", "fe80::1"])
    for host in ("models.example.org", "models.example.org:443", "192.168.1.5:8000", "[fe80::1]", "127.0.0.1"):
        assert call(only_hosts(echo, names), host=host).status == 200, host
    assert call(only_hosts(echo, names), host="example.org").status == 400


def test_a_star_turns_the_check_off():
    assert call(only_hosts(echo, host_names("0.0.0.0", ["*"])), host="any.example").status == 200


@pytest.mark.parametrize("name", ["http://models.example.org", "models.example.org:80", "*.example.org", "a b", ""])
def test_what_is_no_name_is_an_error_of_the_command(name):
    with pytest.raises(ConfigError, match="expected the name alone"):
        host_names("127.0.0.1", [name])
