"""Bars of long steps."""

from __future__ import annotations

import sys

import pytest

from shadowllm.progress import no_progress, progress


def test_nothing_is_shown_without_a_terminal():
    with progress("Working", 2) as advance:
        assert advance is no_progress


def test_a_bar_inside_another_is_not_shown(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("Working", 2) as outer:
        with progress("A part", 1) as inner:
            inner(1)
        outer(1)
        assert (outer is no_progress, inner is no_progress) == (False, True)


def test_a_bar_that_ended_with_an_error_is_forgotten(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def fail():
        with progress("Working", 1):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with progress("Working", 1) as advance:
        assert advance is not no_progress
