"""genlm-control's own model-free tests, on the genlm-backend it asks for and on this one: part of `make test-all`.

    .venv-ecosystem/bin/python tests/ecosystem/control_own_tests.py

They are in its source distribution, which is fetched once. Every test that passes on its own backend must pass on ours,
except those named in `DIFFERENT`. Hypothesis runs them derandomized, with fewer examples and no deadline.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import platformdirs

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
# Those that need no model and no network.
FILES = (
    *(f"tests/test_{name}.py" for name in ("util", "typing", "constant", "draw_batch", "viz")),
    *(
        f"tests/potential/test_{name}.py"
        for name in (
            *("autobatch", "base", "coerce", "ensemble", "json", "mp", "operators"),
            *("product", "reweight", "stateful", "testing", "wcfg", "wfsa"),
        )
    ),
    "tests/sampler",
)
# Equal objects have equal hashes here; both expect that a token equal to b" " is not found in {b" "}.
DIFFERENT = {
    "tests.test_util::test_lazy_weights_bytes_fallback": "expects a warning that tokens hash by their ids",
    "tests.sampler.test_unit_sampler::test_token_set_boundary_real_token_grain": "asserts that they do",
}
BACKENDS = {"genlm-backend": (), "ours": ("-p", "genlm_backend.compat")}


def main() -> int:
    folder = source()
    outcomes = {name: run(folder, name, plugin) for name, plugin in BACKENDS.items()}
    for name, of_backend in outcomes.items():
        counts = Counter(of_backend.values())
        print(f"{name:>14}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()), flush=True)
    theirs, ours = outcomes.values()
    if not theirs or len(theirs) != len(ours):
        print(f"not the same tests ran: {len(theirs)} and {len(ours)}")
        return 1
    worse = {test for test, outcome in theirs.items() if outcome == "passed" and ours.get(test) != "passed"}
    for test in sorted(worse):
        print(f"{test}: {ours.get(test, 'not run')} here ({DIFFERENT.get(test, 'not expected')})")
    return int(bool(worse - DIFFERENT.keys()))


def source() -> Path:
    """The folder of genlm-control's source distribution, of the version installed here."""
    version = importlib.metadata.version("genlm-control")
    cache = platformdirs.user_cache_path("genlm_backend") / "ecosystem"
    folder = cache / f"genlm_control-{version}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as fetched:
            pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
            wanted = ["--no-binary", "genlm-control", f"genlm-control=={version}"]
            subprocess.run([*pip, "--dest", fetched, *wanted], check=True)
            (archive,) = Path(fetched).glob("*.tar.gz")
            with tarfile.open(archive) as members:
                members.extractall(fetched, filter="data")
            (Path(fetched) / folder.name).rename(folder)
    return folder


def run(folder: Path, name: str, plugin: tuple[str, ...]) -> dict[str, str]:
    """Outcome by test; what fails runs once more without the others, because some compare times."""
    with tempfile.TemporaryDirectory() as out:
        options = ["-q", "-W", "ignore", "--timeout=300", "-o", f"cache_dir={out}", "-p", "steady_hypothesis"]
        command = [sys.executable, "-m", "pytest", *FILES, *options, *plugin]
        print(f"genlm-control's tests on {name} ...", flush=True)
        outcomes = run_once(folder, command, Path(out) / "report.xml")
        print("those that fail once more ...", flush=True)
        failed = ["--last-failed", "--last-failed-no-failures=none"]
        return outcomes | run_once(folder, [*command, *failed], Path(out) / "again.xml")


def run_once(folder: Path, command: list[str], report: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(REPOSITORY), str(HERE)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, f"--junitxml={report}"], cwd=folder, env=environment, capture_output=True, text=True
    )
    if not report.exists():
        raise SystemExit(f"pytest did not run:\n{done.stdout}\n{done.stderr}")
    print(*(line for line in done.stdout.splitlines() if line.startswith("Monte Carlo")), sep="\n", flush=True)
    outcomes = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds.pop() if kinds else "passed"
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
