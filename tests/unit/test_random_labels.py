"""The figure on random labels shows what the stored runs say."""

from vardrop.tables import load_tables
from vardrop.tables.store import Found


def test_training_error_and_living_weights_stand_over_the_epochs(load_script):
    script = load_script("random_labels")
    table = load_tables()["svd-random-labels-mnist"]
    stored = Found()
    for name, errors, compressions in (("Bernoulli dropout", (0.9, 0.1), (1, 1)), ("Sparse VD", (0.9, 0.9), (2, 1000))):
        pairs = enumerate(zip(errors, compressions, strict=True))
        history = [{"epoch": epoch, "train_error": error, "compression": size} for epoch, (error, size) in pairs]
        stored.add(table.rows[name].runs[""].place, "short", 0, {"history": history})
        stored.add(table.rows[name].runs[""].place, "full", 0, {"history": history[-1:]})
    error, alive = script.draw([table], stored).axes
    lines = {line.get_label(): [list(data) for data in line.get_data()] for line in error.lines}
    assert lines == {"Bernoulli dropout, short": [[1, 2], [90.0, 10.0]], "Sparse VD, short": [[1, 2], [90.0, 90.0]]}
    assert [list(line.get_ydata()) for line in alive.lines] == [[100.0, 100.0], [50.0, 0.1]]
