"""The truth bench beside other tools: they are no requirement, and what is missing is said."""
import sys

import numpy as np

import truth

QUICK = ["--rivals", "--families", "moon", "--seeds", "2", "--size", "60x90"]


def test_without_any_rival_it_says_how_to_install_them(monkeypatch, capsys):
    for package in ("photutils", "seiza"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert truth.main(["--rivals"]) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("no rival is installed")
    assert line.endswith("pip install photutils seiza")


def test_a_missing_rival_is_left_out_and_one_that_gives_up_has_done_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "seiza", None)

    def rival(planes, border):
        """Gives up on a picture with missing pixels, and has a flat sky for the other."""
        assert planes.dtype == np.float32 and planes.shape[0] in (1, 3)
        if np.isnan(planes).any() == border:
            raise ValueError("too few boxes")
        return np.full_like(planes, 0.5)

    monkeypatch.setitem(truth.RIVALS, "photutils", ("numpy", rival, {"border": True}))
    assert truth.main(QUICK) == 0
    out, err = capsys.readouterr()
    assert "left out, not installed" in err and err.splitlines()[0].endswith("pip install seiza")
    assert "photutils" in out and "seiza" not in out and "plain" not in out
    assert "worse than doing nothing: 0" in out and "1/2" in out
