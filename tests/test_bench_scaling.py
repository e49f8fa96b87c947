"""The benchmark of growth, at small sizes: every curve, its table and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts_loaded import loaded


def test_curves_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with loaded("bench_scaling") as bench:
        files = {"picture": tmp_path / "curves.svg", "output": tmp_path / "curves.json"}
        bench.main(bench.Arguments(runs=1, quick=True, **files))
        shares = [bench.padding(count) for count in (16, 512)]
        straight = bench.Curve("bytes", "", [1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0], True)
        square = bench.Curve("tokens", "", [1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0], False)
    printed = capsys.readouterr().out
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert [curve["what"] for curve in curves] == ["examples", "classes", "heads", "tokens"]
    for curve in curves:
        assert len(curve["seconds"]) == len(curve["sizes"]) == 3
        assert min(curve["seconds"]) > 0
        assert f"| {curve['what']} | {curve['sizes'][-1]:,} | 4 |" in printed
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    for patches, tokens, programs in shares:
        assert 0 < patches < 0.5, "even of few images, more is shown than padded"
        assert 0 < tokens < 0.5
        assert programs < 100
    assert shares[1][0] < 0.07, "of many images little is padding"
    assert straight.exponent() == pytest.approx(1)
    assert square.exponent() == pytest.approx(2)
