"""How the console script ends: wrong arguments, errors that name options of Python, interrupts."""

from __future__ import annotations

import threading

import pytest

from genlm_backend import cli
from genlm_backend.errors import RemoteCodeRefused, UnsafeWeights

NO_UTF_8 = "\udcff"  # how Python hands on the byte 0xff of an argument


@pytest.mark.parametrize("error", [UnsafeWeights("a-model", "hf_opts={}"), RemoteCodeRefused("a-model")])
def test_an_error_whose_remedy_is_an_option_of_python_says_what_to_do_here(script, monkeypatch, error):
    def load(*_):
        raise error

    monkeypatch.setattr("genlm_backend.cli.sis.load", load)
    ended = script("sis", "x")
    assert ended.code == 2 and ended.last_line.startswith(f"error: {error}; commands have no such option")
