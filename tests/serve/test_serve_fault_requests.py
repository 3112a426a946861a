"""The requests of scripts/serve_faults.py to the application with all its guards, above an engine without a model."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest
from served_app import served

from lorakit.serve.guard.guarded import GuardSettings, guarded

SCRIPTS = Path(__file__).parents[2] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("scripts/ is not part of an installed lorakit", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))
from faults.mutations import SOUND, mutated  # noqa: E402
from serve_faults import _is_error  # noqa: E402

COUNT = 200  # the script sends 10,000


def test_mutated_requests_get_an_answer_or_an_error_object(caplog):
    app, broken, statuses = served(), [], Counter()
    guards = guarded(app.app, GuardSettings(), lambda name, error: broken.append(repr(error)))
    rng = random.Random(5)

    async def all_of_them():
        transport = httpx2.ASGITransport(guards, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for _ in range(COUNT):
                bad = mutated(rng)
                body = bad.body.replace(b'"embedded"', b'"base"').replace(b'"a"', b'"sql"').replace(b'"b"', b'"chat"')
                headers = {"content-type": "application/json", **bad.headers}
                path = quote(bad.path, safe="/?=%")
                answer = await client.request(bad.method, path, content=body, headers=headers)
                statuses[answer.status_code] += 1
                bad_error = answer.status_code >= 400 and not _is_error(bad.method, answer.content)
                if answer.status_code >= 500 or bad_error:
                    broken.append((bad.method, bad.path, bad.body[:300], answer.status_code, answer.text[:99]))

    asyncio.run(all_of_them())
    assert not broken
    assert app.leased == 0
    assert sum(statuses.values()) == COUNT
    assert statuses[200] > COUNT / 20
    assert statuses[400] > COUNT / 10


@pytest.mark.parametrize("path", [path for path in SOUND if "lora" not in path])
def test_what_is_mutated_is_sound_before(path):
    """Else the mutations would be tried on what is refused anyway."""
    app = served()
    for body in SOUND[path]:
        names = {"embedded": "base", "a": "sql", "b": "chat", "a:0.7+b:0.3": "sql:0.7+chat:0.3"}
        assert app.post(path, {**body, "model": names[body["model"]]}).status_code == 200, body


def test_unknown_keys_may_have_the_names_of_other_requests_fields():
    """pydantic gives them out as attributes, unchecked."""
    more = {"messages": 10**300, "tools": 7, "tool_choice": [], "response_format": {"type": "text"}, "prompt": {}}
    for path, body in SOUND.items():
        if "lora" in path:
            continue
        for key in more.keys() - body[0].keys():
            answer = served().post(path, {**body[0], "model": "sql", key: more[key]})
            assert answer.status_code in (200, 400), (path, key)
