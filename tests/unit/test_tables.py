"""The tables: their recipes, what a figure is and when it counts as reached, and what the pages show."""

import json
import re
from pathlib import Path

import pytest

import vardrop as vd
from vardrop.errors import InvalidValueError, StorageError
from vardrop.tables import Cell, Found, find_run, found_in, load_tables, stored_in
from vardrop.tables.figures import FIGURES, Joined, join, mark
from vardrop.tables.page import contents, lines_of, markdown, page, verdicts
from vardrop.tables.recipes import find_tables
from vardrop.tables.runner import Options, cells_of
from vardrop.tables.store import CELL, keep, record_of
from vardrop.zoo import build_net

TABLES = load_tables()
SHAPES = {
    "ylecun/mnist": ((1, 28, 28), 10),
    "uoft-cs/cifar10": ((3, 32, 32), 10),
    "uoft-cs/cifar100": ((3, 32, 32), 100),
    "ufldl-stanford/svhn": ((3, 32, 32), 10),
    "stanfordnlp/imdb": ((200,), 2),
    "penn_treebank": ((100,), 50),
}

RECIPE = """
title = "Digits"
source = "arXiv:1701.05369"
where = "nowhere"
columns = ["error", "compression"]

[recipe]
net = "mlp-20"
data = "digits"
method = "ard"
full = { epochs = 2, decay_from = 1, warmup_start = 0, warmup_epochs = 1 }

[[rows]]
name = "A"
paper = { error = 2.5, compression = 10 }
std = { error = 0.5 }

[[rows]]
name = "B"
paper = { error = 3.5, compression = 20 }
reason = "no reason"

[[rows]]
name = "C|D"
paper = { error = 1.0 }
not_run = "nobody knows how"

[[orderings]]
better = "A"
than = ["B"]
columns = ["error"]

[[orderings]]
better = "B"
columns = ["compression"]
"""


def tables_in(folder: Path, text: str = RECIPE, **changed: str):
    folder.mkdir(exist_ok=True)
    for before, after in changed.items():
        assert before in text
        text = text.replace(before, after)
    (folder / "own.toml").write_text(text)
    return load_tables(folder)["own"]


def record(error: float, compression: float, net: str = "mlp-20") -> dict:
    config = {"net": net, "schedule": {"epochs": 7}}
    return {"config": config, "pruned": {"error": error / 100, "compression": compression}}


def found_of(table, **figures: list[tuple[float, float]]) -> Found:
    found = Found()
    for row, values in figures.items():
        for seed, value in enumerate(values):
            found.add(table.rows[row].runs[""].place, "full", seed, record(*value))
    return found


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_recipe_makes_a_job_whose_layers_and_parts_are_there(table):
    for budget in ("full", "short"):
        for cell in cells_of([table], budget, 1):
            job = cell.job(Path("tables"))
            assert job.schedule.seed == 0 and job.schedule.epochs >= (1 if budget == "short" else 50)
            assert (job.pretrained is None) == (cell.before is None)
            if budget == "short" and cell.run.recipe.get("from") != "noisy":
                shape, classes = SHAPES[job.data.removesuffix(":random-labels")]
                net = build_net(job.net, input_shape=shape, num_classes=classes)
                methods = {**dict(job.parts), "*": job.method}
                vd.convert(net, methods, include=job.include or None, exclude=job.exclude or None)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_what_is_claimed_of_the_order_of_rows_is_so_in_the_papers_own_figures(table):
    for ordering in table.orderings:
        for column in ordering.columns:
            figure, better = table.figures[column], table.rows[ordering.better]
            best, spread = better.paper[column], better.std.get(column)
            for name in ordering.than:
                other = table.rows[name].paper[column]
                assert figure.beats(best, other), (ordering, column, name)
                assert not figure.alike(best, other, spread, table.rows[name].std.get(column)), (ordering, column, name)


def test_the_tables_are_those_of_the_papers_and_every_row_has_figures_and_a_run_or_a_reason():
    assert len(TABLES) == 25
    for table in TABLES.values():
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", table.source) and table.title and table.where
        for row in table.rows.values():
            assert row.paper and set(row.paper) <= set(table.columns), (table.id, row.name)
            assert bool(row.runs) != bool(row.not_run), (table.id, row.name)


def test_a_row_that_two_tables_share_is_run_once_and_measured_for_both():
    shared = find_run("vbd-5-conv", "VD")
    assert shared is not find_run("svd-mnist-conv", "Sparse VD") and shared == find_run("svd-mnist-conv", "Sparse VD")
    assert shared.needs == {"times"}
    places = [cell.place for cell in cells_of(list(TABLES.values()), "full", 1)]
    assert len(places) == len(set(places))


@pytest.mark.parametrize(("table", "column"), [("vbd-2-cifar10", ""), ("svd-mnist-fc", "error")])
def test_a_column_for_which_nothing_is_trained_is_refused_with_those_that_have_a_run(table, column):
    row = next(iter(TABLES[table].rows))
    with pytest.raises(InvalidValueError, match=f"column='{column}'.*must be one of"):
        find_run(table, row, column)


def test_what_a_cell_starts_from_comes_before_it_also_when_only_its_row_is_asked_for():
    cells = cells_of([TABLES["bb-2-fc"]], "short", 1, ["DBB"])
    assert [cell.run.row for cell in cells] == ["Original", "BB", "DBB"]
    job = cells[-1].job(Path("out"))
    assert job.pretrained == Path("out").resolve() / "bb-2-fc/bb/short-seed-0/noisy"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({'columns = ["error", "compression"]': 'columns = ["errors"]'}, "a column of table own: 'errors' is unknown"),
        ({'reason = "no reason"': 'reasons = "no"'}, "row 'B' of table own: 'reasons' is unknown"),
        ({'reason = "no reason"': "full = { epoch = 3 }"}, "full of row 'B' of table own: 'epoch' is unknown"),
        ({'reason = "no reason"': 'after = "Z"'}, "'Z' is unknown; known are: A, B"),
        ({'reason = "no reason"': 'same_as = "other/Z"'}, "'other' is unknown; known are: own"),
        ({'reason = "no reason"': 'from = "big"'}, "from='big' of row 'B' of table own: must be small or noisy"),
        ({'than = ["B"]': 'than = ["X"]'}, "a row of an ordering of table own: 'X' is unknown"),
        ({"error = 2.5": "eror = 2.5"}, "a figure of the paper in row 'A' of table own: 'eror' is unknown"),
        ({"std = { error": "std = { eror"}, "a figure of the paper in row 'A' of table own: 'eror' is unknown"),
        ({'where = "nowhere"': 'where = "x"\nstatistic = "medain"'}, "the statistic of table own: 'medain' is unknown"),
        ({'better = "A"\n': ""}, "an ordering of table own has no 'better': must say it"),
        ({'reason = "no reason"': 'after = "B"'}, "row 'B' of table own starts from itself"),
        ({'reason = "no reason"': 'same_as = "own/B"'}, "row 'B' of table own starts from itself"),
        ({'than = ["B"]': "than = B"}, "own.toml is not readable as TOML: Invalid value (at line"),
        ({'where = "nowhere"\n': ""}, "table own has no 'where': must say it"),
        ({'columns = ["error", "compression"]\n': ""}, "table own has no 'columns': must say it"),
        ({'columns = ["error", "compression"]': "nets = { a = 'mlp-20' }"}, "table own has no 'figure': must say it"),
        ({'name = "C|D"\n': ""}, "a row of table own has no 'name': must say it"),
        ({'method = "ard"\n': ""}, "row 'A' of table own, or its [recipe], has no 'method': must say it"),
        ({'net = "mlp-20"\n': ""}, "row 'A' of table own, or its [recipe], has no 'net': must say it"),
    ],
)
def test_a_recipe_with_a_slip_is_refused_by_name(tmp_path, changed, message):
    with pytest.raises(InvalidValueError, match=re.escape(message)):
        tables_in(tmp_path / "own", **changed)


def test_unknown_tables_rows_and_methods_name_those_that_there_are(tmp_path):
    with pytest.raises(InvalidValueError, match="table 'svd' is unknown; known are: ard-1-cifar10, ard-1-mnist"):
        find_tables(["svd"])
    assert find_tables(["svd-mnist-fc", "all"]) == list(TABLES.values())
    with pytest.raises(InvalidValueError, match="row 'SVD' is not in table svd-mnist-fc; it has: Original, Pruning"):
        cells_of([TABLES["svd-mnist-fc"]], "full", 1, ["SVD"])
    table = tables_in(tmp_path / "a", **{'method = "ard"': 'method = "magic"'})
    with pytest.raises(
        InvalidValueError, match="the method of a recipe: 'magic' is unknown; known are: adversarial-dropout, ard"
    ):
        Cell(table.rows["A"].runs[""], "full", 0).job(tmp_path)
    table = tables_in(tmp_path / "b", **{'method = "ard"': 'method = "ard"\nfields = { strength = 1 }'})
    with pytest.raises(InvalidValueError, match="a field of method ard: 'strength' is unknown; known are: init"):
        Cell(table.rows["A"].runs[""], "full", 0).job(tmp_path)
    with pytest.raises(InvalidValueError, match="holds no tables"):
        load_tables(tmp_path / "nothing")


def test_a_table_of_networks_may_be_run_for_some_of_them():
    cells = cells_of([TABLES["vbd-1-mnist"]], "full", 2, ["VBD"], ["n=100", "n=580"])
    assert [cell.place.removeprefix("vbd-1-mnist/") for cell in cells] == [
        "vbd-n-100/full-seed-0",
        "vbd-n-580/full-seed-0",
        "vbd-n-100/full-seed-1",
        "vbd-n-580/full-seed-1",
    ]
    with pytest.raises(InvalidValueError, match=r"column 'n=7' is no network of table vbd-1-mnist; it has: n=100"):
        cells_of([TABLES["vbd-1-mnist"]], "full", 1, columns=["n=7"])
    with pytest.raises(InvalidValueError, match="'error' is no network of table svd-mnist-fc; its columns are figures"):
        cells_of([TABLES["svd-mnist-fc"]], "full", 1, columns=["error"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"jobs": 0}, "jobs=0: must be at least 1"), ({"device": "tpu"}, "device='tpu': must be one of auto, cpu, cuda")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=message):
        Options(Path("out"), **options)


@pytest.mark.parametrize(
    ("name", "ours", "std", "paper", "paper_std", "said"),
    [
        ("error", 1.92, None, 1.92, None, "within"),
        ("error", 1.925, None, 1.92, None, "within"),
        ("error", 1.93, None, 1.92, None, "short by 0.01"),
        ("error", 1.93, 0.02, 1.92, None, "within"),
        ("error", 1.80, 0.02, 1.92, 0.05, "better"),
        ("error", 1.86, 0.03, 1.90, 0.03, "within"),
        ("compression", 61.0, None, 68, None, "short by 7"),
        ("compression", 68.4, None, 68, None, "within"),
        ("compression", 111.0, 3.0, 68, None, "better"),
        ("units", (784.0, 90.0), None, (784, 100), None, "better"),
        ("units", (784.0, 110.0), None, (784, 100), None, "short by 10"),
        ("units", (784.0, 110.0, 3.0), None, (784, 100), None, ""),
        ("units", (784.0, 110.0), 12.0, (784, 100), None, "within"),
        ("sparsity_per_layer", (10.0,), None, (90.0,), None, ""),
        ("train_accuracy", 12.0, None, 100, None, "off by 88"),
        ("train_accuracy", 99.6, None, 100, None, "within"),
    ],
)
def test_marks_say_within_better_or_short_by_how_much(name, ours, std, paper, paper_std, said):
    assert mark(FIGURES[name], Joined(ours, std, 5), paper, paper_std) == said


@pytest.mark.parametrize(("net", "units"), [("mlp-20", "20-10, better"), ("mlp-10", "20-10")])
def test_units_of_another_net_are_not_held_against_the_papers(tmp_path, net, units):
    changed = {'["error", "compression"]': '["error", "units"]', "compression = 10": "units = [784, 100]"}
    table = tables_in(tmp_path, **changed, **{"compression = 20": "units = [784, 100]", '["compression"]': '["units"]'})
    found, kept = Found(), record(2.5, 10.0, net)
    kept["pruned"]["units"], kept["compacted"] = "20-10", {}
    found.add(table.rows["A"].runs[""].place, "full", 0, kept)
    assert lines_of(table, found)[1].cells == ("2.50, within", units)


def test_seeds_are_joined_by_mean_or_median_with_the_sample_deviation():
    assert join([], "mean") is None
    assert join([2.0], "mean") == Joined(2.0, None, 1)
    assert join([1.0, 2.0, 6.0], "median").value == 2.0
    assert join([1.0, 2.0, 6.0], "mean").std == pytest.approx((14 / 2) ** 0.5)
    assert join([(1.0, 4.0), (3.0, 6.0)], "mean") == Joined((2.0, 5.0), pytest.approx(8.0**0.5), 2)


def test_lines_hold_the_papers_figures_ours_and_the_reasons_and_nothing_made_up(tmp_path):
    table = tables_in(tmp_path / "own")
    assert [(line.row, line.origin, line.cells, line.remark) for line in lines_of(table, Found())] == [
        ("A", "paper", ("2.50 ± 0.50", "10"), ""),
        ("A", "ours", ("—", "—"), "not run yet"),
        ("B", "paper", ("3.50", "20"), ""),
        ("B", "ours", ("—", "—"), "not run yet; no reason"),
        ("C|D", "paper", ("1.00", "—"), ""),
        ("C|D", "ours", ("—", "—"), "nobody knows how"),
    ]
    found = found_of(table, A=[(2.0, 8.0), (3.0, 12.0)], B=[(4.0, 30.0)])
    lines = lines_of(table, found)
    assert lines[1].origin == "full, 7 epochs, seeds 0 to 1"
    assert lines[1].cells == ("2.50 ± 0.71, within", "10 ± 3, within")
    assert lines[3].origin == "full, 7 epochs, seed 0"
    assert lines[3].cells == ("4.00, short by 0.50", "30, better") and lines[3].remark == "no reason"


def test_a_budget_may_have_a_net_of_its_own_which_is_said(tmp_path):
    table = tables_in(tmp_path, **{"std = { error = 0.5 }": 'short = { net = "mlp-5", epochs = 1, decay_from = 0 }'})
    run = table.rows["A"].runs[""]
    assert [Cell(run, budget, 0).job(tmp_path).net for budget in ("full", "short")] == ["mlp-20", "mlp-5"]
    found = Found()
    found.add(run.place, "short", 0, record(2.0, 8.0, "mlp-5"))
    assert lines_of(table, found)[1].origin == "short, 7 epochs, mlp-5, seed 0"


def test_claims_hold_fail_or_are_not_run(tmp_path):
    table = tables_in(tmp_path / "own")
    claims = [claim for claim, _ in verdicts(table, Found())]
    assert claims == ["A is better than B in test error (%)", "B is better than every other row in compression"]

    def said(**figures):
        return [verdict for _, verdict in verdicts(table, found_of(table, **figures))]

    assert said() == said(A=[(2.0, 8.0)]) == ["not run", "not run"]
    assert said(A=[(2.0, 8.0)], B=[(4.0, 30.0)]) == [
        "holds (full, single seed)",
        "holds (full, single seed; without C|D)",
    ]
    assert said(A=[(4.1, 40.0)], B=[(4.0, 30.0)])[0] == "does not hold here (full, single seed; against B)"
    assert said(A=[(4.0, 40.0)], B=[(4.0, 30.0)])[1].startswith("does not hold here (full")


def test_a_claim_is_too_close_to_say_within_the_deviations_or_what_is_shown(tmp_path):
    table = tables_in(tmp_path / "own")

    def said(**figures):
        return verdicts(table, found_of(table, **figures))[0][1]

    assert said(A=[(3.996, 8.0)], B=[(4.0, 30.0)]) == "too close to say (full, single seed; close to B)"
    assert said(A=[(4.004, 8.0)], B=[(4.0, 30.0)]) == "too close to say (full, single seed; close to B)"
    assert said(A=[(3.0, 8.0), (3.4, 8.0)], B=[(3.4, 30.0), (3.6, 30.0)]) == "too close to say (full; close to B)"
    assert said(A=[(3.0, 8.0), (3.4, 8.0)], B=[(3.6, 30.0), (3.8, 30.0)]) == "holds (full)"


def test_a_difference_of_single_seeds_that_few_test_examples_make_is_too_close_to_say(tmp_path):
    changed = {
        'data = "digits"': 'data = "ylecun/mnist"',
        'not_run = "nobody knows how"': "fields = { init_spread = 0.2 }",
    }
    table = tables_in(tmp_path, **changed)

    def said(**figures):
        return verdicts(table, found_of(table, **figures))[0][1]

    assert said(A=[(4.0, 8.0)], B=[(4.2, 30.0)]) == "too close to say (full, single seed; close to B)"
    assert said(A=[(4.0, 8.0)], B=[(4.4, 30.0)]) == "holds (full, single seed)"
    assert said(A=[(4.0, 8.0), (4.0, 8.0)], B=[(4.2, 30.0), (4.2, 30.0)]) == "holds (full)"
    several = [(8.0, 20.0), (9.0, 20.0)]  # which differ by more than the examples leave to chance
    assert (
        said(A=[(4.0, 8.0)], B=[(4.4, 30.0)], **{"C|D": several}) == "too close to say (full, single seed; close to B)"
    )


def test_a_column_that_the_paper_counts_otherwise_has_no_mark(tmp_path):
    plain = tables_in(tmp_path / "plain")
    table = tables_in(tmp_path / "unmarked", **{'name = "B"\n': 'name = "B"\nunmarked = ["compression"]\n'})
    cells = [lines_of(each, found_of(each, B=[(4.0, 30.0)]))[3].cells for each in (plain, table)]
    assert cells == [("4.00, short by 0.50", "30, better"), ("4.00, short by 0.50", "30")]


def test_that_dead_units_leave_while_a_net_trains_is_told(tmp_path):
    table = tables_in(tmp_path)
    found, kept = Found(), record(2.0, 8.0)
    kept["config"]["schedule"]["shrink_every"] = 5
    found.add(table.rows["A"].runs[""].place, "full", 0, kept)
    assert lines_of(table, found)[1].origin == "full, 7 epochs, dead units leave every 5 epochs, seed 0"
    assert contents([table], found).splitlines()[2].split(" | ")[2] == "1 of 3"


def test_a_claim_on_a_figure_that_no_run_has_is_told_from_one_that_is_not_run(tmp_path):
    table = tables_in(
        tmp_path / "own",
        **{
            '"compression"]\n\n[recipe]': '"test_mse"]\n\n[recipe]',
            'columns = ["error"]': 'columns = ["test_mse"]',
            'columns = ["compression"]': 'columns = ["error"]',
            "compression = 10": "test_mse = 10",
            "compression = 20": "test_mse = 20",
        },
    )

    def said(**figures):
        return verdicts(table, found_of(table, **figures))[0][1]

    assert said() == said(A=[(3.0, 8.0)], B=[(4.0, 30.0)]) == "not to be had here"


def test_markdown_and_html_hold_every_line_and_escape(tmp_path):
    table = tables_in(tmp_path / "own")
    found = found_of(table, A=[(2.0, 8.0)])
    text = markdown(table, found)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(lines_of(table, found))
    assert "| C\\|D | paper | 1.00 | — |  |" in rows
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert markdown(table, found) == text
    shown = page([table], found)
    assert shown.count("<tr") == 1 + len(lines_of(table, found)) and "2.00, within" in shown
    assert "http" not in shown


def test_the_contents_count_rows_and_claims_and_lead_to_each_table(tmp_path):
    table = tables_in(tmp_path / "own")
    *_, line = contents([table], found_of(table, A=[(4.0, 8.0)], B=[(3.0, 30.0)])).splitlines()
    assert line.endswith("| 2 of 3 | 1 | 1 | 0 | 0 |")
    assert contents([table], Found()).endswith("| 0 of 3 | 0 | 0 | 0 | 2 |\n")
    written = (Path(__file__).parents[2] / "docs" / "tables.md").read_text()
    anchors = [
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall("^## (.*)$", written, re.M)
    ]
    led_to = re.findall(r"\(#(.*?)\)", written)
    assert led_to == anchors[: len(led_to)] and len(led_to) == len(load_tables())


def test_figures_are_read_where_a_run_keeps_them():
    run = {
        "config": {"net": "lenet-500-300"},
        "num_data": 10,
        "layers": {"1": 100, "3": 50},
        "history": [{"train_nll": 9.0, "kl": 9.0}, {"train_nll": 2.0, "kl": 3.0}],
        "trained": {"error": 0.25},
        "pruned": {
            "error": 0.5,
            "nll": 0.6931471805599453,
            "train_error": 0.75,
            "nonzero": 30,
            "total": 150,
            "alive": {"1": 10, "3": 20},
            "units": "",
            "compression": 5.0,
        },
        "compacted": {"units": [4, 3, 2]},
        "times": {"seconds, torch, batch 128, threads 1": {"ratio": 2.0}},
        "ensemble": {"1": {"error": 0.2}, "20": {"error": 0.1}},
    }
    expected = {
        "error": 50.0,
        "compression": 5.0,
        "sparsity_per_layer": (90.0, 60.0),
        "sparsity": 80.0,
        "units": (4.0, 3.0, 2.0),
        "speedup_cpu": 2.0,
        "speedup_gpu": None,
        "speedup_flops": 545_000 / 38,
        "bb_speedup": 546_610 / (38 + 2 * 5 + 10),
        "bb_memory": 100 * (38 + 15) / 545_810,
        "train_accuracy": 25.0,
        "test_accuracy": 50.0,
        "test_mse": None,
        "valid_bpc": None,
        "test_bpc": 1.0,
        "elbo": -23.0,
        "deterministic_accuracy": 75.0,
        "stochastic_accuracy": 80.0,
        "ensemble_accuracy": 90.0,
    }
    assert set(expected) == set(FIGURES)
    for name, value in expected.items():
        assert FIGURES[name].read(run) == pytest.approx(value), name
    gated = {**run, "pruned": {**run["pruned"], "units": "7-5-3"}}
    assert FIGURES["units"].read(gated) == (7.0, 5.0, 3.0)
    in_part = {**run, "pruned": {**run["pruned"], "units": "7-5"}}
    assert FIGURES["units"].read(in_part) == (4.0, 3.0, 2.0)
    assert FIGURES["bb_memory"].read({**run, "compacted": {"units": [4, 3]}}) is None
    assert FIGURES["speedup_flops"].read({**run, "config": {"net": "mlp-100"}}) is None


def test_behind_gates_that_depend_on_their_input_an_average_one_is_counted():
    record = {
        "config": {"net": "lenet-500-300"},
        "pruned": {"units": "294-110-71"},
        "compacted": {"open_units": [106, 29, 32]},
    }
    layers = (106 + 2) * 110 + (29 + 2) * 71 + (32 + 1) * 10
    assert FIGURES["units"].read(record) == (106, 29, 32)
    assert FIGURES["bb_speedup"].read(record) == pytest.approx(546_610 / (layers + 4 * (294 + 110 + 71)))


def test_a_record_of_another_recipe_or_a_damaged_one_is_refused_and_one_that_lacks_a_figure_is_not_finished(tmp_path):
    table = tables_in(tmp_path / "own")
    cell = Cell(table.rows["A"].runs[""], "full", 3)
    path = tmp_path / "out" / cell.place / CELL
    assert record_of(cell, tmp_path / "out") is None
    path.parent.mkdir(parents=True)
    config = json.loads(json.dumps(cell.job(tmp_path / "out").config))
    path.write_text(json.dumps({**record(2.0, 8.0), "config": config}))
    assert record_of(cell, tmp_path / "out")["pruned"]["compression"] == 8.0
    assert found_in(tmp_path / "out", [cell.run]).of(cell.run, "full").keys() == {3}
    del config["fast"], config["schedule"]["clip_norm"]
    path.write_text(json.dumps({**record(2.0, 8.0), "config": config}))
    assert record_of(cell, tmp_path / "out") is not None, "a field that came later may be missing"
    for key, other in (("parts", {"0": config["method"]}), ("pretrained", "another/net")):
        path.write_text(json.dumps({**record(2.0, 8.0), "config": {**config, key: other}}))
        with pytest.raises(StorageError, match=r"it differs in (parts|the net that it starts from)"):
            record_of(cell, tmp_path / "out")
    config["schedule"]["epochs"] += 1
    path.write_text(json.dumps({**record(2.0, 8.0), "config": config}))
    with pytest.raises(StorageError, match=r"made by another recipe \(it differs in schedule\)"):
        record_of(cell, tmp_path / "out")
    found = found_in(tmp_path / "out", [cell.run])
    assert not found.records and "made by another recipe" in found.refused[0]
    path.write_text("{")
    with pytest.raises(StorageError, match="not a readable record"):
        record_of(cell, tmp_path / "out")
    measured = Cell(find_run("sbp-mnist-fc", "Original"), "full", 0)
    path = tmp_path / "out" / measured.place / CELL
    path.parent.mkdir(parents=True)
    config = json.loads(json.dumps(measured.job(tmp_path / "out").config))
    path.write_text(json.dumps({**record(2.0, 8.0), "config": config}))
    assert record_of(measured, tmp_path / "out") is None


def test_stored_records_are_small_and_found_again(tmp_path):
    table = tables_in(tmp_path / "own", **{'reason = "no reason"': 'after = "A"'})
    cell = Cell(table.rows["B"].runs[""], "full", 1)
    whole = {
        **record(2.0, 8.0),
        "config": json.loads(json.dumps(cell.job(tmp_path).config)) | {"pretrained": "/some/where"},
        "history": [{"epoch": 0, "x": "y" * 60_000}, {}],
    }
    path = keep(cell, whole, tmp_path / "results")
    assert path == tmp_path / "results" / "tables" / "own" / "b" / "full-seed-1.json"
    stored = stored_in(tmp_path / "results", [cell.run]).of(cell.run, "full")[1]
    assert stored["history"] == [{}] and stored["config"]["pretrained"] == "own/a/full-seed-1"
    keep(cell, {**whole, "history": [{}, {}]}, tmp_path / "results")
    assert json.loads(path.read_text())["history"] == [{}, {}]


@pytest.mark.parametrize("field", ["threshold", "treshold"])
def test_a_budget_may_change_parts_of_the_method(tmp_path, field):
    full = f'full = {{ parts = {{ "1" = {{ {field} = 0.5 }} }}, epochs'
    cell = Cell(tables_in(tmp_path, **{"full = { epochs": full}).rows["A"].runs[""], "full", 0)
    if field == "threshold":
        assert cell.job(tmp_path).parts == (("1", vd.ARD(threshold=0.5)),)
    else:
        with pytest.raises(InvalidValueError, match="a field of method ard: 'treshold' is unknown"):
            cell.job(tmp_path)
