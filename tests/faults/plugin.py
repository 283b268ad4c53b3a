"""A pytest plugin for runs on faulty code: the same examples in every run, and no search for a
smaller one that fails too."""

from __future__ import annotations

import os

import hypothesis


def pytest_configure() -> None:
    hypothesis.settings.register_profile(
        "faults",
        hypothesis.settings.get_profile("quick"),
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        report_multiple_bugs=False,
        max_examples=int(os.environ.get("HOGWILD_FAULTS_EXAMPLES", "25")),
    )
    hypothesis.settings.load_profile("faults")
