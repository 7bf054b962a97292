"""`pygen simulate`: what a user types, what comes back, and that every mistake is one sentence."""

import os
import signal
import subprocess
import sys
import time

import pytest

for package in ("typer", "rich"):
    pytest.importorskip(package)

from pygen.ssa import examples  # noqa: E402
from pygen.ssa.run import load  # noqa: E402
from pygen.ssa.simulate import simulate  # noqa: E402

SMALL = ("--t", "0:2:5", "--trajectories", 50, "--seed", 3, "--threads", 1)
FEW = ("--trajectories", 3, "--method", "direct")


@pytest.fixture
def simulate_here(run_here):
    return lambda *words: run_here("simulate", *words)


def test_a_built_in_model_prints_its_mean_and_writes_file_and_picture(tmp_path, simulate_here):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "x.npz", tmp_path / "x.png"
    code, text, err = simulate_here("dimer_decay", *SMALL, "--species", "S2,S1", "--out", out, "--plot", plot)
    assert code == 0 and err == ""
    run = simulate(examples.dimer_decay(), [0, 0.5, 1, 1.5, 2], 50, 3, record=["S2", "S1"])
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in text.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0", "0.5", "1", "1.5", "2"]
    assert rows[-1][1] == f"{run.mean()[-1, 0]:.5g} ± {run.std()[-1, 0]:.4g}"
    assert "50 trajectories: 50 completed" in text and "per second; seed 3, direct on cpu" in text
    assert load(out).counts.equal(run.counts) and plot.stat().st_size > 5000


def test_options_reach_the_simulation(tmp_path, simulate_here):
    out = tmp_path / "x.npz"
    words = ("--set", "death=3", "--set", "immigration=0", "--initial", "X=7", "--stop", "X == 2", "--t", "0,1,50")
    reduced = ("--reduce", "first_passage, histogram")
    code, text, _ = simulate_here("immigration_death", *SMALL, *words, *reduced, "--out", out)
    assert code == 0 and "50 trajectories: 50 stopped" in text and "stopped at " in text
    run = load(out)
    assert run.t.tolist() == [0, 1, 50] and run.counts is None and run.stop_time.isfinite().all()
    assert run.parameters.tolist() == [[0, 3]] and run.mean()[:, 0].tolist()[::2] == [7, 2]
    code, text, err = simulate_here("immigration_death", *SMALL, "--max-events", 3)
    assert code == 0 and "50 of 50 trajectories ended early: 50 max_events" in err and len(err.splitlines()) == 1
    assert text.count(" - ") == 4, "no mean where no trajectory got"


def test_models_are_read_from_files_of_every_kind(tmp_path, real_data, simulate_here):
    case = real_data / "dsmts" / "00001"
    sbml = sorted(case.glob("*l3v1*.xml")) or sorted(case.glob("*.xml"))
    pytest.importorskip("libsbml")
    code, text, err = simulate_here(sbml[0], "--t", "0:1:2", *FEW)
    assert code == 0, err
    code, text, err = simulate_here(real_data / "heat_shock_stochkit.xml", "--t", "0:0.01:2", *FEW)
    assert code == 0 and "and 22 more species; choose with --species" in text, err
    code, text, err = simulate_here(real_data / "egfr_net.net", "--t", "0:0.001:2", *FEW)
    assert code == 0 and "and 350 more species" in text, err


MISTAKES = {
    "no model": (("nonsense", *SMALL), "no model or file 'nonsense'; built in: "),
    "no file": (("none.xml", *SMALL), "none.xml: No such file or directory"),
    "rules of BioNetGen": (("x.bngl", *SMALL), "BioNetGen writes the .net file that pygen reads"),
    "unknown ending": (("x.json", *SMALL), "a model is SBML (.xml, .sbml), StochKit (.xml) or BioNetGen (.net)"),
    "no times": (("sir",), "--t"),
    "half a grid": (("sir", "--t", "0:50"), "--t takes START:STOP:POINTS, as 0:50:51, or times with commas between"),
    "words as times": (("sir", "--t", "soon"), "--t takes numbers, got 'soon'"),
    "backwards": (("sir", "--t", "5:0:3"), "t must be ascending"),
    "half a parameter": (("sir", *SMALL, "--set", "k"), "--set takes NAME=VALUE, got 'k'"),
    "no number": (("sir", *SMALL, "--set", "k=fast"), "--set takes numbers, got 'fast'"),
    "unknown parameter": (("sir", *SMALL, "--set", "colour=3"), "parameters: unknown 'colour'; there is: "),
    "unknown species": (("sir", *SMALL, "--species", "Z"), "record: unknown 'Z'"),
    "half a molecule": (("sir", *SMALL, "--initial", "I=2.5"), "initial: I must be an integer from 0 to 2^53, got 2.5"),
    "unknown reduction": (("sir", *SMALL, "--reduce", "median"), "reduce must be None or some of moments"),
    "method": (("sir", *SMALL, "--method", "fast"), "method must be one of auto, direct"),
    "device": (("sir", *SMALL, "--device", "tpu"), "tpu"),
    "seed": (("sir", *SMALL, "--seed", "-1"), "seed must be an integer"),
    "stop": (("sir", *SMALL, "--stop", "I = 0"), "I = 0"),
    "ending of the file": (
        ("sir", *SMALL, "--out", "x.h5"),
        "x.h5: the name must end in one of .npz, .nc, .zarr, .csv",
    ),
    "ending of the picture": (("sir", *SMALL, "--plot", "x.doc"), "--plot x.doc: the name must end in one of "),
    "kind of picture": (("sir", *SMALL, "--kind", "bars"), "--kind must be one of mean, trajectories, histogram"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_and_exit_code_2(mistake, simulate_here):
    words, sentence = MISTAKES[mistake]
    code, _, err = simulate_here(*words)
    assert code == 2
    assert sentence in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("package", "words"),
    (
        ("xarray", ("sir", *SMALL, "--out", "x.nc")),
        ("libsbml", ("{tmp}/x.xml", *SMALL)),
        ("pandas", ("sir", *SMALL, "--out", "x.csv")),
    ),
)
def test_a_missing_package_is_named_with_its_extra(package, words, tmp_path, simulate_here, monkeypatch):
    (tmp_path / "x.xml").write_text("<sbml></sbml>")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what the import system takes for "not installed"
    code, _, err = simulate_here(*(str(word).replace("{tmp}", str(tmp_path)) for word in words))
    assert code == 2 and package in err and "pip install 'pygen[ssa]'" in err


def test_ctrl_c_writes_what_is_finished(tmp_path):
    out = tmp_path / "x.npz"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", READY, "simulate", "immigration_death", "--t", "0:2:3", "--threads", "1"]
    command += ["--trajectories", "1000000", "--out", str(out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "simulating\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 130, (text, err)
    assert "unfinished (interrupted)" in err and "Traceback" not in err
    assert "interrupted: the statistics are of the trajectories that were finished first" in text
    run = load(out)
    assert run.interrupted and 0 < run.status_counts["completed"] < 10**6


# The command, which says when the simulation begins: from there on Ctrl-C must keep what there is.
READY = """
from pygen import cli
from pygen.ssa import _watch
enter = _watch.Watch.__enter__
def entered(self):
    result = enter(self)
    print("simulating", flush=True)
    return result
_watch.Watch.__enter__ = entered
cli.main()
"""
