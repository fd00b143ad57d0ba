"""A mixture that is killed again and again ends with the bytes of one that was left alone."""

from __future__ import annotations

import pytest
from killing import Killer, forked


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("mixtral", "GPTQ", {}),
        ("deepseek-v3", "Awq", {"calib": {"moe": "all_tokens"}}),
    ],
)
def test_killed_and_resumed_it_writes_the_same_bytes(case, family, method, changes):
    changes = {"base": {"checkpoint_every": 1}, **changes}
    calm, run = (case(family, method, **changes) for _ in range(2))
    with forked() as attempt:
        assert attempt({"arguments": calm.arguments, "log": str(calm.save_path.with_suffix(".log"))})["code"] == 0
        killer = Killer(run, calm.written(), 0.0, attempt, calm.save_path)
        while not killer.start(boundary=5 + 4 * len(killer.kills), prepared=True):
            assert len(killer.kills) < 30
    assert run.written() == killer.expected
    assert killer.kills.count("within") > 4
