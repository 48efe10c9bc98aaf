"""The notebook, executed, and the page made of it: `python docs/backtracking/make_notebook.py [FOLDER]`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
CELLS = re.split(
    r"^# %%.*\n",
    """# %%
# A tour in a notebook

[The notebook](notebook.ipynb), as it ran on SmolLM2-135M-Instruct. A cell may `await`; a synchronous call such as
`Generator.generate` works in one too.
# %%
import asyncio

from genlm_backend import load_model_by_name
from genlm_backend.backtracking import Generator, Overlay, ProbabilityThreshold, Trace, phrases, regexes, walk

llm = load_model_by_name("smollm2")
prompt = "Once upon a time, there was a"
# %%
## Phrases that must not come

They are found in the text, whatever the tokens; the walk goes back to where the phrase began, and draws something else.
# %%
ban = phrases(["little girl", "young girl", "the", "of"])
outcome = await walk(llm, prompt, ban, max_new_tokens=30, seed=7)
print(outcome.text)
print(f"taken back {outcome.n_undos} times, {outcome.forwards_per_token:.2f} prefixes computed per token")
# %%
The trace shows what was taken back, struck out where it stood.
# %%
Trace.of(llm, outcome, prompt)
# %%
## What is sampled

The [mode](modes.md) says what the texts are draws from. In mode `exact` they are draws from the model given that no
rule objects; an overlay shared by walks of one prompt remembers what was removed, so later ones waste less.
# %%
for mode in ("local", "first", "mask"):
    outcome = await walk(llm, prompt, ban, max_new_tokens=16, top_k=50, seed=3, mode=mode)
    print(f"{mode:6} {outcome.n_undos:2} taken back |{outcome.text}")
overlay = Overlay()
for seed in range(3):
    outcome = await walk(llm, prompt, ban, max_new_tokens=6, seed=seed, mode="exact", overlay=overlay)
    print(f"exact  {outcome.n_undos:2} taken back |{outcome.text}")
# %%
## Many at once

Walks are coroutines; those that wait at the same time share forward passes.
# %%
rules = [ban, regexes(r"\\d+")]
outcomes = await asyncio.gather(*(walk(llm, prompt, rules, max_new_tokens=12, seed=i) for i in range(6)))
for outcome in outcomes:
    print(outcome.text.replace("\\n", " "))
# %%
## As it comes

What is given out is final. Text is held back only while it may be the beginning of a phrase.
# %%
async for piece in walk(llm, prompt, ban, max_new_tokens=16, seed=2).text():
    print(piece, end="|")
# %%
## Operators

The operators of backtracking-llm, and any function of their form.
# %%
print(Generator(llm).generate(prompt, ProbabilityThreshold(0.05), max_new_tokens=20, seed=1))
# %%
def no_commas(logits, probabilities, position, token):
    return int("," in token)


print(Generator(llm).generate(prompt, no_commas, max_new_tokens=20, seed=1))
# %%
await llm.aclose()
""",
    flags=re.MULTILINE,
)[1:]
TEXT = re.compile(r"^(#+ |\[|[A-Z][a-z]* [a-z]+ )")


def main(folder: Path) -> None:
    notebook = nbformat.v4.new_notebook()
    for i, source in enumerate(CELLS):
        cell = nbformat.v4.new_markdown_cell if _is_text(source) else nbformat.v4.new_code_cell
        notebook.cells.append(cell(source.strip(), id=f"cell-{i}"))
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata = {}  # when each cell ran
        if cell.cell_type == "code":
            cell.outputs = _outputs(cell.outputs)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, folder / "notebook.ipynb")
    (folder / "notebook.md").write_text("\n\n".join(map(_in_markdown, notebook.cells)) + "\n", encoding="utf-8")


def _outputs(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Without progress bars; what was printed in pieces is together."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def _is_text(source: str) -> bool:
    """Whether a cell is prose."""
    return TEXT.match(source) is not None


def _in_markdown(cell: nbformat.NotebookNode) -> str:
    if cell.cell_type == "markdown":
        return str(cell.source)
    blocks = [f"```python\n{cell.source}\n```"]
    for output in cell.outputs:
        if output.output_type == "stream":
            blocks.append(f"```text\n{output.text.rstrip()}\n```")
        elif "text/html" in output.get("data", {}):
            blocks.append(output.data["text/html"].replace("\n", "<br>"))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
