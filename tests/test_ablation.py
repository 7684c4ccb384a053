from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml

from framework.ablation.grid import Cell, Grid, choose, load_grid
from framework.ablation.report import write_report
from framework.ablation.training import survey, train_cells
from framework.config import ConfigError, dump_yaml, resolve
from framework.engine.experiment import Experiment
from framework.evaluation.tables import Estimate, column_texts, csv_text, escape_latex, estimate, latex, markdown
from framework.runs import RunError
from tests.tiny_run import ROOT, TINY, files_of, run_tool

MSE = {"path": "rate_distortion/per_length/mse", "lengths": [1, 16], "scale": 1000}


def tiny() -> dict[str, object]:
    values = {path: yaml.safe_load(value) for path, value in (text.split("=") for text in TINY)}
    return values | {"train.max_steps": 2, "run.threads": 1}


def write_grid(folder: Path, **changes: object) -> Path:
    """The file of a grid of 2 x 2 tiny cells for each seed."""
    tree = {
        "config": str(ROOT / "projects/adatok/ntm.yaml"),
        "dir": str(folder / "grid"),
        "seeds": [0, 1],
        "overrides": tiny(),
        "grid": {
            "masking": {"NTM": {}, "no masking": {"tokenizer.masking": {"name": "FullLength"}}},
            "patch": {"8": {}, "4 & more": {"tokenizer.encoder.patch_size": 4, "tokenizer.decoder.head": {}}},
        },
        "metrics": {"MSE x 1000": MSE},
    } | changes
    (folder / "grid.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "grid.yaml"


def finish(cell: Cell, errors: dict[int, float], **metrics: object) -> None:
    """Leave what a finished run leaves, as far as the report reads it."""
    evaluation = cell.folder / "evaluation"
    evaluation.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(dump_yaml(resolve(cell.config, Experiment)))
    times = {"started": "2026-01-01T00:00:00+0000", "ended": "2026-01-01T00:01:30+0000"}
    sessions = [times | {"outcome": "finished", "step": 2, "git": "abc"}]
    (cell.folder / "run.json").write_text(json.dumps({"sessions": sessions}))
    (evaluation / "table.md").write_text("| a table |\n")
    rows = [{"length": length, "mse": error} for length, error in errors.items()]
    part = {"protocol": {"images": 40, "data": {"split": "validation"}}, "per_length": rows}
    (evaluation / "metrics.json").write_text(json.dumps({"rate_distortion": part} | metrics))


# The file and its cells


def test_cells_are_the_product_seed_by_seed(tmp_path: Path) -> None:
    grid, cells = load_grid(write_grid(tmp_path))
    assert [cell.name for cell in cells][:5] == [
        "ntm_8/seed_0", "ntm_4-more/seed_0", "no-masking_8/seed_0", "no-masking_4-more/seed_0", "ntm_8/seed_1"
    ]
    last = cells[-1].config.tree
    assert last["tokenizer"]["masking"] == {"name": "FullLength"}  # the node is replaced with its name
    assert last["tokenizer"]["encoder"]["patch_size"] == 4 and last["train"]["max_steps"] == 2
    assert last["run"] == {"dir": str(cells[-1].folder), "seed": 1, "threads": 1}
    assert cells[-1].folder == tmp_path / "grid/no-masking_4-more/seed_1"


def test_changes_are_of_the_grid_or_of_every_cell(tmp_path: Path) -> None:
    _, cells = load_grid(write_grid(tmp_path), ["seeds=[7]", "train.max_steps=3", "dir=elsewhere"])
    assert {(cell.seed, cell.config.tree["train"]["max_steps"]) for cell in cells} == {(7, 3)} and len(cells) == 4
    assert cells[0].folder == Path("elsewhere/ntm_8/seed_7")


def test_a_pattern_chooses_cells(tmp_path: Path) -> None:
    _, cells = load_grid(write_grid(tmp_path))
    assert [cell.name for cell in choose(cells, "no*_8/*")] == ["no-masking_8/seed_0", "no-masking_8/seed_1"]
    with pytest.raises(RunError, match="no cell is called 'ntm'; there are ntm_8/seed_0, "):
        choose(cells, "ntm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 0]}, "seeds must differ"),
        ({"grid": {}}, "there must be an axis"),
        ({"grid": {"a": {}}}, "there must be an axis"),
        ({"grid": {"a": {"x: y": {}, "X y": {"train.max_steps": 3}}}}, "'X y' and 'x: y' of a have one folder 'x-y'"),
        ({"grid": {"a": {"***": {}}}}, "names no folder"),
        ({"metrics": {"MSE": {"path": "mse", "best": "low"}}}, "did you mean 'lowest'"),
        ({"sed": [0]}, "unknown key 'sed': did you mean 'seeds'"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_grid(write_grid(tmp_path, **changes))
    assert message in str(caught.value) and "grid.yaml:" in str(caught.value)


def test_all_errors_of_all_cells_are_told_before_any_starts(tmp_path: Path) -> None:
    labels = {
        "right": {},
        "path": {"tokenizer.maskin.name": "FullLength"},
        "value": {"train.max_steps": "many"},
        "twin": {"train.max_steps": 2},
        "seed": {"run.seed": 5},
    }
    with pytest.raises(RunError) as caught:
        load_grid(write_grid(tmp_path, grid={"a": labels}))
    first, *lines = str(caught.value).splitlines()
    assert first == "wrong in the cells of the grid, 4 times:"
    assert [line.split(":")[0] for line in lines] == ["path", "value", "twin, seed", "seed"]
    assert "unknown key 'maskin': did you mean 'masking'?" in lines[0]
    assert "train.max_steps: expected an integer" in lines[1]
    assert lines[2] == "twin, seed: the same runs as right: let an override differ"
    assert lines[3] == "seed: run.seed=5: seeds and dir of the grid decide it"
    assert not (tmp_path / "grid").exists()


# Training


def program(tmp_path: Path, source: str) -> list[str]:
    """A program in place of tools/train_net.py, which takes a cell's arguments."""
    (tmp_path / "program.py").write_text(f"import os, pathlib, signal, sys, time\nfolder = sys.argv[-1][8:]\n{source}")
    return [sys.executable, str(tmp_path / "program.py")]


def test_a_grid_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    labels = {"8": {}, "broken": {"tokenizer.encoder.patch_size": 5}}
    axes = {"patch": labels, "steps": {"2": {}, "3": {"train.max_steps": 3}}}
    file = write_grid(tmp_path, seeds=[0], grid=axes, overrides=tiny() | {"data.validation.num_crops": 8})
    command = ("--config", file, "--jobs", 2)
    assert run_tool(monkeypatch, "ablate", *command) == 1
    out = capsys.readouterr().out
    assert "failed broken_2/seed_0, exit code 2" in out and "patch_size must divide" in out
    assert "2 of 4 cells done, 0 running, 2 failed" in out
    folder = tmp_path / "grid"
    assert "- 2 of 4 cells finished, missing: broken_2/seed_0, broken_3/seed_0" in (folder / "table.md").read_text()
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    rows = {row["cell"]: row for row in csv.DictReader((folder / "table.csv").open())}
    assert list(rows) == ["8_2/seed_0", "8_3/seed_0"]
    for name, steps in (("8_2", 2), ("8_3", 3)):
        metrics = json.loads((folder / name / "seed_0/evaluation/metrics.json").read_text())
        for measured in metrics["rate_distortion"]["per_length"]:
            assert float(rows[f"{name}/seed_0"][f"{MSE['path']} @ {measured['length']}"]) == measured["mse"]
        assert rows[f"{name}/seed_0"]["grid.steps"] == rows[f"{name}/seed_0"]["steps"] == str(steps)
        assert rows[f"{name}/seed_0"]["images"] == "8"

    finished = files_of(folder / "8_2"), files_of(folder / "8_3")
    capsys.readouterr()
    assert run_tool(monkeypatch, "ablate", *command, "--only", "8_*") == 0
    assert "2 cells, 0 to train" in capsys.readouterr().out
    assert (files_of(folder / "8_2"), files_of(folder / "8_3")) == finished
    assert run_tool(monkeypatch, "ablate", *command, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:28] for line in lines] == [
        "finished   8_2/seed_0: data.", "finished   8_3/seed_0: data.",
        "to train   broken_2/seed_0: ", "to train   broken_3/seed_0: ",
    ]  # fmt: skip
    (folder / "table.md").unlink()
    assert run_tool(monkeypatch, "ablate", *command, "--report") == 0
    assert (folder / "table.md").read_text() in capsys.readouterr().out


def test_what_ends_a_cell_ends_no_other(tmp_path: Path) -> None:
    grid, cells = load_grid(write_grid(tmp_path, seeds=[0]))
    finish(cells[0], {1: 0.1, 16: 0.1})
    finish(cells[1], {1: 0.1, 16: 0.1})
    (cells[1].folder / "config.yaml").write_text("run: {seed: 5}\n")
    killed = program(tmp_path, "print('so far'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)")
    said: list[str] = []
    assert train_cells(grid, cells, cells, killed, 2, said.append) == "failed"
    text = "\n".join(said)
    assert "failed ntm_4-more/seed_0: " in text and "-run: {seed: 5}" in text  # runs.py's difference
    for cell in cells[2:]:
        assert f"failed {cell.name}, killed by SIGKILL" in text and cell.log.read_text().endswith("so far\n")
    assert "  so far" in text and "1 of 4 cells done, 0 running, 3 failed" in text
    assert not cells[0].log.exists() and not cells[1].log.exists()
    assert survey(cells)[0] == [cells[0]] and list(survey(cells)[1]) == [cells[1]]


def test_a_signal_is_passed_on_and_starts_nothing_more(tmp_path: Path) -> None:
    grid, cells = load_grid(write_grid(tmp_path))
    saves = program(
        tmp_path,
        "def save(*_):\n  pathlib.Path(folder, 'saved').touch()\n  sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)",
    )
    said: list[str] = []
    assert train_cells(grid, cells, cells, saves, 1, said.append) == "stopped"
    assert [(cell.folder / "saved").exists() for cell in cells] == [True] + 7 * [False]
    assert not cells[1].folder.exists() and "failed" not in "".join(said)


def test_cells_at_a_time_must_say_their_threads(tmp_path: Path) -> None:
    grid, cells = load_grid(write_grid(tmp_path), ["run.threads=null"])
    with pytest.raises(RunError, match="run.threads=1"):
        train_cells(grid, cells, cells, ["false"], 2, print)


# The report


def errors(row: int, seed: int) -> dict[int, float]:
    return {1: 0.01 * (row + 1) + 0.001 * seed, 4: 0.005, 16: 0.003 - 0.0005 * row + 0.0002 * seed * row}


def reported(tmp_path: Path, leave_out: int = 0, **changes: object) -> Grid:
    grid, cells = load_grid(write_grid(tmp_path, **changes))
    for at, cell in enumerate(cells[: len(cells) - leave_out]):
        finish(cell, errors(at % 4, cell.seed), fid=3.5)
    write_report(grid, cells, survey(cells)[0])
    return grid


def test_tables_hold_the_numbers(tmp_path: Path) -> None:
    folder = Path(reported(tmp_path, seeds=[0, 1, 2]).dir)
    table, differences = (folder / "table.md").read_text().split("\n\n- ")[0].split("Difference to 'NTM, 8'")
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["masking", "patch", "seeds", "MSE x 1000 @ 1", "MSE x 1000 @ 16"]
    assert [line[:3] for line in lines[2:]] == [
        ["NTM", "8", "3"], ["NTM", "4 & more", "3"], ["no masking", "8", "3"], ["no masking", "4 & more", "3"]
    ]
    assert [line[3] for line in lines[2:]] == ["**11.0 ± 1.0**", "21.0 ± 1.0", "31.0 ± 1.0", "41.0 ± 1.0"]
    last = [1000 * errors(3, seed)[16] for seed in (0, 1, 2)]
    assert lines[5][4] == f"**{fmean(last):.2f} ± {stdev(last):.2f}**"
    assert "| no masking | 4 & more | 3 | 30.0 ± 0.0 | −0.90 ± 0.35 |" in differences  # paired: seeds cancel

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["missing"] == [] and summary["variants"][3]["labels"]["patch"] == "4 & more"
    mean = summary["variants"][3]["means"]["MSE x 1000 @ 16"]
    assert (mean["mean"], mean["spread"], mean["num_values"]) == (fmean(last), stdev(last), 3)
    records = list(csv.DictReader((folder / "table.csv").open()))
    assert len(records) == 12 and {record["git"] for record in records} == {"abc"}
    for at, record in enumerate(records):
        for length, error in errors(at % 4, int(record["seed"])).items():
            assert float(record[f"{MSE['path']} @ {length}"]) == error
        assert (record["seconds"], record["split"], record["steps"]) == ("90.0", "validation", "2")
    tex = (folder / "table.tex").read_text()
    assert tex.count(r"\begin{tabular}{lllrr}") == 2
    assert r"NTM & 8 & 3 & \textbf{11.0 $\pm$ 1.0}" in tex and r"no masking & 4 \& more" in tex


def test_missing_cells_are_told(tmp_path: Path) -> None:
    folder = Path(reported(tmp_path, leave_out=1).dir)
    table = (folder / "table.md").read_text()
    assert "| no masking | 4 & more | 1 | 40.00 |" in table and "| no masking | 8 | 2 |" in table
    assert "- 7 of 8 cells finished, missing: no-masking_4-more/seed_1" in table
    assert json.loads((folder / "summary.json").read_text())["missing"] == ["no-masking_4-more/seed_1"]


def test_the_seed_stands_in_values(tmp_path: Path) -> None:
    donor = {"tokenizer.encoder.weights": str(tmp_path / "runs/ntm_{seed}")}
    _, cells = load_grid(write_grid(tmp_path, grid={"donor": {"own": {}, "other": donor}}))
    found = [cell.config.tree["tokenizer"]["encoder"].get("weights") for cell in cells]
    assert found == [None, str(tmp_path / "runs/ntm_0"), None, str(tmp_path / "runs/ntm_1")]


def test_metrics_of_unknown_columns_wait_for_the_first_cell(tmp_path: Path) -> None:
    grid, cells = load_grid(write_grid(tmp_path, metrics={"loss": {"path": "nothing/yet"}}))
    write_report(grid, cells, [])
    assert "| NTM | 8 | 0 |" in (Path(grid.dir) / "table.md").read_text()


def test_a_report_of_nothing_is_a_table_to_fill(tmp_path: Path) -> None:
    folder = Path(reported(tmp_path, leave_out=8).dir)
    assert "| NTM | 8 | 0 |  |  |" in (folder / "table.md").read_text()
    assert not (folder / "plot.png").exists()


def test_metrics_without_lengths_and_of_every_length(tmp_path: Path) -> None:
    metrics = {"FID": {"path": "fid", "best": "highest"}, "MSE": {"path": MSE["path"]}}
    table = (Path(reported(tmp_path, metrics=metrics).dir) / "table.md").read_text()
    assert "| FID | MSE @ 1 | MSE @ 4 | MSE @ 16 |" in table and table.count("**3.50 ± 0.00**") == 4


def test_a_protocol_of_all_numbers_goes_before_those_of_parts(tmp_path: Path) -> None:
    """As generators have it, beside a judge that has its own."""
    grid, cells = load_grid(write_grid(tmp_path))
    finish(cells[0], {1: 0.1, 16: 0.1}, protocol={"images": 64, "data": {"split": "test"}}, judge={"protocol": {}})
    write_report(grid, cells, cells[:1])
    assert "- images: 64\n- split: test\n" in (Path(grid.dir) / "table.md").read_text()


@pytest.mark.parametrize("path", ["rate_distortion/per_length/msse", "rate_distortion/protocol", "fid/x"])
def test_a_metric_that_is_not_there_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(RunError, match=f"the metric path {path}: metrics.json has no number there"):
        reported(tmp_path, metrics={"a": {"path": path}})


def test_estimates_and_their_texts() -> None:
    assert estimate([]) is None and estimate([2.0]) == Estimate(2.0, None, 1)
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, 1.0, 3)
    assert estimate([1.0, 3.0], of_the_mean=True) == Estimate(2.0, 1.0, 2)
    assert column_texts([Estimate(4.583, 0.14, 3), None, Estimate(-23.2, None, 1)]) == ["4.58 ± 0.14", "", "−23.20"]
    assert column_texts([Estimate(0.01234, None, 1), Estimate(0.0, None, 1)]) == ["0.0123", "0.0000"]
    assert column_texts([Estimate(0.0, None, 1)]) == ["0"] and column_texts([None]) == [""]


def test_texts_are_escaped() -> None:
    assert escape_latex(r"50% & a_b #1 {x}$ ~^\ <>|") == (
        r"50\% \& a\_b \#1 \{x\}\$ \textasciitilde{}\textasciicircum{}\textbackslash{} "
        r"\textless{}\textgreater{}\textbar{}"
    )
    rows = [["a_b", "n"], ["x|y", "−1 ± 2"]]
    assert latex(rows, 1, {(1, 1)}).splitlines() == [
        r"\begin{tabular}{lr}", r"\toprule", r"a\_b & n \\", r"\midrule",
        r"x\textbar{}y & \textbf{$-$1 $\pm$ 2} \\", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    assert markdown(rows, 1, {(1, 1)}) == "| a_b | n |\n| --- | ---: |\n| x\\|y | **−1 ± 2** |\n"
    assert csv_text([{"a": 'x,"y"', "b": 0.1 + 0.2}, {"c": 1}]) == 'a,b,c\n"x,""y""",0.30000000000000004,\n,,1\n'
