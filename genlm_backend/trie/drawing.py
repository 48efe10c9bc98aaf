"""Pictures of tries: Graphviz graphs, and how they are rendered where the command `dot` is missing.

Graphviz comes as the command `dot`, or within the wheel of `pygraphviz` (the extra `viz`), which has its library but
not that command. The library is called in a process of its own: it must not be entered by two threads, and it writes
warnings about fonts to the error stream.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import graphviz  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from genlm_backend.errors import BackendUnavailable
from genlm_backend.trie.layout import Layout

SMALL = 100  # nodes that still read well on one page
LARGE_DEPTH = 3
LARGE_N_CHILDREN = 4
LARGE_LEAST_SHARE = 1e-3  # of the mass at the top; what has less is counted only

_WHITE = (255, 255, 255)
_HEAVY = (86, 160, 211)  # dark text stays readable on it
_RENDER = (
    "import sys, pygraphviz; graph = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode()); "
    "sys.stdout.buffer.write(graph.draw(format=sys.argv[1], prog=sys.argv[2]))"
)


class TrieGraph(graphviz.Digraph):  # type: ignore[misc]
    """A `graphviz.Digraph` that is rendered by `dot`, or by the Graphviz within `pygraphviz` where there is no `dot`.

    `source` is there in any case.
    """

    def pipe(self, format: str | None = None, *, encoding: str | None = None, **options: Any) -> bytes | str:
        """The picture: bytes, or text if an encoding is given. Options are those of `graphviz.Digraph.pipe`.

        Raises:
            BackendUnavailable: No Graphviz is installed.
        """
        if shutil.which("dot"):
            return super().pipe(format=format, encoding=encoding, **options)  # type: ignore[no-any-return]
        picture = _render_by_library(self.source, format or self.format, options.get("engine") or self.engine)
        return picture if encoding is None else picture.decode(encoding)

    def render(
        self,
        filename: str | Path | None = None,
        directory: str | Path | None = None,
        view: bool = False,
        cleanup: bool = False,
        format: str | None = None,
        *,
        outfile: str | Path | None = None,
        **options: Any,
    ) -> str:
        """Write the source and the picture; the path of the picture. Arguments are those of `graphviz.Digraph.render`.

        Raises:
            BackendUnavailable: No Graphviz is installed.
        """
        if shutil.which("dot"):
            return super().render(  # type: ignore[no-any-return]
                filename, directory=directory, view=view, cleanup=cleanup, format=format, outfile=outfile, **options
            )
        if outfile is None:
            format = format or self.format
            source = Path(self.save(filename, directory=directory))
            picture = source.with_name(f"{source.name}.{format}")
        else:
            picture = Path(outfile)
            format = format or picture.suffix[1:] or self.format
            source = Path(self.save(filename or picture.with_suffix(".gv"), directory=directory))
        picture.write_bytes(_render_by_library(self.source, format, options.get("engine") or self.engine))
        if cleanup:
            source.unlink()
        if view:
            self._view(str(picture), format=format, quiet=bool(options.get("quiet_view")))
        return str(picture)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> dict[str, bytes | str]:
        """What a notebook shows: the picture, or the source where no Graphviz is installed."""
        if not _is_renderable():
            return {"text/plain": self.source}
        return super()._repr_mimebundle_(include, exclude, **options)  # type: ignore[no-any-return]


class _Shown(NamedTuple):
    node: int
    depth: int


def draw_trie(
    layout: Layout,
    masses: npt.NDArray[np.float64] | None,
    node: int,
    depth: int | None = None,
    n_children: int | None = None,
) -> TrieGraph:
    """The graph of the part of a trie below a node.

    Args:
        layout: The trie.
        masses: (n_nodes,) written on the nodes and shown as shade; None for none.
        node: Where to start.
        depth: Most letters below it; None is no limit if that part is small, else `LARGE_DEPTH`.
        n_children: Most children of a node; None likewise, else `LARGE_N_CHILDREN`.
    """
    heaviest = _heaviest(masses, node)
    least = -np.inf
    if _n_below(layout, node) > SMALL:
        least = LARGE_LEAST_SHARE * heaviest if heaviest else least
        depth = LARGE_DEPTH if depth is None else depth
        n_children = LARGE_N_CHILDREN if n_children is None else n_children
    starts, ends = layout.leaf_range
    weights = ends - starts if masses is None else masses
    token_of_leaf = {leaf: i for i, leaf in enumerate(layout.leaf.tolist())}
    graph = TrieGraph(comment="Token-character trie")
    graph.attr(rankdir="LR", nodesep="0.12", ranksep="0.3")
    graph.attr("node", shape="box", style="rounded,filled", fillcolor="white", fontname="monospace", fontsize="11")
    graph.attr("edge", fontname="monospace", fontsize="11", arrowsize="0.6", color="#555555")
    stack = [_Shown(node, 0)]
    while stack:
        shown = stack.pop()
        name = str(shown.node)
        fill = _shade(None if masses is None else masses[shown.node], heaviest)
        mass = [] if masses is None else [f"{masses[shown.node]:.3g}"]
        if shown.node in token_of_leaf:
            lines = [f"token {token_of_leaf[shown.node]}", *mass]
            graph.node(name, _label(lines), fillcolor=fill, style="filled", peripheries="2")
            continue
        letters = layout.prefix(shown.node)
        graph.node(name, _label([readable(letters) if letters else "(start)", *mass]), fillcolor=fill)
        children = layout.children_of(shown.node)
        drawn, left_out = _chosen(children, layout.code, weights, n_children, least, shown.depth == depth)
        for child in drawn:
            code = int(layout.code[child])
            graph.edge(name, str(child), label=_label([readable([layout.letter(code)])]) if code >= 0 else "")
            stack.append(_Shown(child, shown.depth + (code >= 0)))
        if left_out:
            n_tokens = sum(int(ends[child] - starts[child]) for child in left_out)
            share = [] if masses is None else [f"{sum(float(masses[child]) for child in left_out):.3g}"]
            noun = "token" if n_tokens == 1 else "tokens"
            graph.node(f"{name}_more", _label([f"+ {n_tokens} {noun}", *share]), style="dashed", color="#888888")
            graph.edge(name, f"{name}_more", style="dashed")
    return graph


def readable(letters: Sequence[Any]) -> str:
    """Letters as text to show: UTF-8 where they are, escapes where nothing could be seen, ␣ for a space."""
    if not all(isinstance(letter, int) and 0 <= letter < 256 for letter in letters):
        return " ".join(readable([x]) if isinstance(x, int) and 0 <= x < 256 else str(x) for x in letters)
    text = bytes(letters).decode("utf-8", "backslashreplace")
    return "".join("␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _chosen(
    children: npt.NDArray[np.int32],
    code: npt.NDArray[np.int32],
    weights: npt.NDArray[Any],
    n_children: int | None,
    least: float,
    is_last: bool,
) -> tuple[list[int], list[int]]:
    """Children to draw, of at least some weight and at the last depth only leaves; and children to leave out."""
    able = children[code[children] < 0] if is_last else children
    able = able[~(weights[able] < least)]  # NaN is drawn
    heaviest = able[np.argsort(-weights[able], kind="stable")][: len(able) if n_children is None else n_children]
    drawn = np.sort(heaviest).tolist()
    return drawn, sorted(set(children.tolist()) - set(drawn))


def _n_below(layout: Layout, node: int) -> int:
    """Nodes at or below a node: in post-order they are those from the first leaf on."""
    first = node
    while len(children := layout.children_of(first)):
        first = int(children[0])
    return node - first + 1


def _heaviest(masses: npt.NDArray[np.float64] | None, node: int) -> float:
    """The mass that is shaded fully: that of the node at the top if it is positive, as sums are."""
    return float(masses[node]) if masses is not None and np.isfinite(masses[node]) and masses[node] > 0 else 0.0


def _shade(mass: float | None, heaviest: float) -> str:
    """Between white for nothing and blue for all; by the square root, so that a hundredth differs from nothing."""
    share = 0.0 if mass is None or not heaviest or not mass > 0 else min(float(mass) / heaviest, 1.0) ** 0.5
    return "#" + "".join(f"{round(w + (h - w) * share):02x}" for w, h in zip(_WHITE, _HEAVY, strict=True))


def _label(lines: Sequence[str]) -> str:
    # Backslashes are doubled for Graphviz, except in the line breaks.
    label: str = "\\n".join(str(graphviz.escape(line)) for line in lines)
    return graphviz.nohtml(label)  # type: ignore[no-any-return]


def _is_renderable() -> bool:
    return shutil.which("dot") is not None or importlib.util.find_spec("pygraphviz") is not None


def _render_by_library(source: str, format: str, engine: str) -> bytes:
    if not _is_renderable():
        raise BackendUnavailable("Graphviz", "pip install 'genlm-backend[viz]', or the system's package graphviz")
    command = [sys.executable, "-c", _RENDER, format, engine]
    done = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
    if done.returncode or not done.stdout:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no output"]
        raise ValueError(f"Graphviz could not draw this as {format!r}: {reason[0]}")
    return done.stdout
