"""Tables in READMEs are what the committed result files say."""

from __future__ import annotations

import sys

import pytest

from helpers.paths import ROOT


@pytest.mark.parametrize(
    "name",
    [
        *("tuning", "continual", "protecting", "identification_noise", "plan_trackers", "in_context"),
        *("real_heads", "identification_pays", "silencing_roles", "serving"),
    ],
)
def test_the_readme_shows_the_result_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for module in ("tuning", "readme", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    module = __import__(name)
    assert module.fill(check=True) == [], f"run: python benchmarks/{name}.py --table"
