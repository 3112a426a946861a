"""Who gets a place on the device: hand-made cases, and that everyone gets one in the end."""

from __future__ import annotations

import random

from lorakit.serve.embedded.places import OnDevice, arrange


def held(**users: int) -> dict[str, OnDevice]:
    """On the device, the least recently used first; a number of users, or -1 for a pinned one."""
    return {key: OnDevice(max(n, 0), used, n < 0) for used, (key, n) in enumerate(users.items())}


def test_empty_places_come_first_then_the_least_recently_used():
    found = arrange(["x", "y", "z"], held(a=0, b=0, c=1), places=4)
    assert found.bring == {"x": None, "y": "a", "z": "b"}
    assert not found.after


def test_one_in_use_is_waited_for_and_a_pinned_one_never_leaves():
    found = arrange(["x", "y"], held(a=-1, b=2, c=1), places=3)
    assert not found.bring
    assert found.after == {"x": "b", "y": "c"}
    assert arrange(["x"], held(a=-1), places=1).after == {}


def test_what_is_asked_for_leaves_after_what_is_not():
    assert arrange(["x", "a"], held(a=0, b=0), places=2).bring == {"x": "b"}


def test_what_an_earlier_request_has_is_kept_for_it():
    found = arrange(["ax", "y"], held(a=0, b=1), places=2)
    assert found.after == {"x": "b"}
    assert "y" not in found.bring


def test_later_requests_do_not_overtake_one_that_gets_nothing():
    found = arrange(["abx", "y"], held(a=1, b=1), places=2)
    assert not found.bring
    assert not found.after


def test_each_of_many_mixes_gets_its_turn():
    """Requests of one to three adapters arrive all the time, and hold their places for a while."""
    chance = random.Random(3)
    there: dict[str, OnDevice] = {}
    waiting: list[tuple[int, str]] = []
    running: list[tuple[int, str]] = []
    waits = []
    for now in range(3000):
        if now < 2500 and len(waiting) < 20:
            waiting.append((now, "".join(chance.sample("abcdefgh", chance.choice([1, 1, 2, 3])))))
        for end, keys in [each for each in running if each[0] <= now]:
            running.remove((end, keys))
            for key in keys:
                there[key].users -= 1
        found = arrange([keys for _, keys in waiting], there, places=4)
        for key, victim in found.bring.items():
            if victim is not None:
                assert not there.pop(victim).users
            there[key] = OnDevice(0, now, False)
        assert len(there) <= 4
        blocked = set(found.after.values())
        for since, keys in list(waiting):
            if all(key in there and key not in blocked for key in keys):
                waiting.remove((since, keys))
                waits.append(now - since)
                running.append((now + chance.randint(1, 12), keys))
                for key in keys:
                    there[key].users += 1
                    there[key].used = now
    assert not waiting
    assert max(waits) < 20 * 13 * 2  # those before it, one after the other, twice
