"""Pictures of tries: their source, their shades, what is left out, and how they are rendered."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from genlm_backend.errors import BackendUnavailable, NoSuchNode, WeightsMismatch
from genlm_backend.tokenization import Token
from genlm_backend.trie import TokenCharacterTrie
from tests.trie.oracle import FOUR_WORDS

graphviz = pytest.importorskip("graphviz")

from genlm_backend.trie import drawing  # noqa: E402
from genlm_backend.trie.drawing import readable  # noqa: E402


@pytest.fixture
def no_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without the command `dot`."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_a_small_trie_is_drawn_whole() -> None:
    trie = TokenCharacterTrie(FOUR_WORDS)
    graph = trie.visualize()
    assert isinstance(graph, graphviz.Digraph)
    for node in range(13):
        assert f"\t{node} [label=" in graph.source
    assert graph.source.count(" -> ") == 12
    assert '"token 3"' in graph.source and "_more" not in graph.source


def test_masses_are_written_and_shown_as_shade() -> None:
    trie = TokenCharacterTrie(FOUR_WORDS)
    source = trie.visualize(trie.mass_sum([0.4, 0.1, 0.5, 0.0])).source
    assert r'12 [label="(start)\n1" fillcolor="#56a0d3"]' in source
    assert r'7 [label="token 3\n0" fillcolor="#ffffff"' in source
    assert r'5 [label="c\n0.5"' in source


@pytest.mark.parametrize("mass", [[1.0] * 12, [1.0] * 14, [[1.0] * 13], [0.4, 0.1, 0.3, 0.2]])
def test_masses_of_another_length_are_refused(mass: Any) -> None:
    with pytest.raises(WeightsMismatch):
        TokenCharacterTrie(FOUR_WORDS).visualize(mass)


def test_log_masses_and_negative_weights_can_be_drawn() -> None:
    trie = TokenCharacterTrie(FOUR_WORDS)
    source = trie.visualize(trie.weight_max([-1.0, -2.0, float("-inf"), float("nan")])).source
    assert r"\n-inf" in source and r"\nnan" in source


def test_a_large_trie_is_drawn_from_a_prefix_to_a_depth_with_the_heaviest_children() -> None:
    words = [bytes([a, b, c]) for a in b"abcdef" for b in b"abcdef" for c in b"abcdef"]
    trie = TokenCharacterTrie(words)
    weights = [float(word.count(b"a") ** 4) for word in words]
    mass = trie.mass_sum(weights)
    source = trie.visualize(mass).source
    assert source.count(" -> ") < 150
    assert r'label="a\n' in source and 'label="+ ' in source
    one = trie.visualize(mass, prefix=b"ba", depth=1, n_children=2).source
    assert one.count(" -> ") == 5 and r'label="baa\n16"' in one and r'"+ 4 tokens\n4"' in one
    assert trie.visualize(prefix=b"ba").source.count(" -> ") == 12
    assert trie.visualize(depth=1, n_children=1).source.count('label="+ ') == 2


def test_a_prefix_that_no_token_has_is_refused() -> None:
    with pytest.raises(NoSuchNode):
        TokenCharacterTrie(FOUR_WORDS).visualize(prefix=b"cow")


def test_bytes_are_readable() -> None:
    assert readable(b" a\n") == "␣a\\n"
    assert readable("é…".encode()) == "é…"
    assert readable(b"\xe2\x80") == "\\xe2\\x80"
    assert readable([97, 300, "x"]) == "a 300 x"


@pytest.mark.parametrize("word", [b'"', b"\\", b"\\n", b"\n", b"<b>", b"\xff", b" ", "\u202e".encode(), b"a\\"])
@pytest.mark.thorough
def test_odd_bytes_draw(word: bytes) -> None:
    pytest.importorskip("pygraphviz")
    picture = TokenCharacterTrie([Token(0, word), Token(1, word + b"x")]).visualize().pipe(format="svg")
    assert b"<svg" in picture


@pytest.mark.thorough
@pytest.mark.usefixtures("no_dot")
def test_without_dot_the_library_within_pygraphviz_draws(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    graph = TokenCharacterTrie(FOUR_WORDS).visualize()
    assert graph.pipe(format="png").startswith(b"\x89PNG")
    assert "<svg" in graph.pipe(format="svg", encoding="utf-8")
    path = graph.render(tmp_path / "four", format="svg", cleanup=True)
    assert Path(path).read_bytes().startswith(b"<?xml") and [p.name for p in tmp_path.iterdir()] == ["four.svg"]
    assert Path(graph.render(outfile=tmp_path / "other.pdf")).read_bytes().startswith(b"%PDF")
    assert "image/svg+xml" in graph._repr_mimebundle_()
    with pytest.raises(ValueError, match="bitmap of dreams"):
        graph.pipe(format="bitmap of dreams")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_dot_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dot = tmp_path / "bin" / "dot"
    dot.parent.mkdir()
    dot.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        'case "$*" in *-O*) echo stand-in > "$last.svg";; *) /bin/cat > /dev/null; echo stand-in;; esac\n'
    )
    dot.chmod(0o755)
    monkeypatch.setenv("PATH", str(dot.parent))
    graph = TokenCharacterTrie(FOUR_WORDS).visualize()
    assert graph.pipe(format="svg", encoding="utf-8") == "stand-in\n"
    assert Path(graph.render(tmp_path / "four", format="svg")).read_text() == "stand-in\n"
    assert graph._repr_mimebundle_() == {"image/svg+xml": "stand-in\n"}


@pytest.mark.usefixtures("no_dot")
def test_without_graphviz_the_source_is_there_and_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    graph = TokenCharacterTrie(FOUR_WORDS).visualize()
    assert graph._repr_mimebundle_() == {"text/plain": graph.source}
    with pytest.raises(BackendUnavailable, match="viz"):
        graph.pipe(format="svg")
