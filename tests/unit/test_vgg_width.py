"""The figure over the width of the net shows what the stored runs say."""

import json


def test_error_and_dead_weights_stand_over_the_width(load_script, tmp_path):
    script = load_script("vgg_width")
    runs = [(0.5, "ard", 0.1, 30), (0.25, "ard", 0.2, 60), (0.25, "plain", 0.3, 100), (0.5, "plain", 0.4, 100)]
    for width, method, error, nonzero in [*runs, (0.25, "alone", 0.5, 10)]:
        run = {"config": {"net": f"vgg-like-{width}", "method": {"name": method}}}
        run["pruned"] = {"error": error, "nonzero": nonzero, "total": 100}
        (tmp_path / f"vgg-like-{width}-{method}.json").write_text(json.dumps(run))
    error, dead = script.draw(script.stored(tmp_path)).axes
    lines = {line.get_label(): [list(data) for data in line.get_data()] for line in error.lines}
    assert lines == {"ard": [[0.25, 0.5], [20.0, 10.0]], "plain": [[0.25, 0.5], [30.0, 40.0]]}
    assert [list(data) for data in dead.lines[0].get_data()] == [[0.25, 0.5], [40.0, 70.0]]
    assert len(dead.lines) == 1, "a method without a rule has no dead weights"
