"""The command line: thin calls of public functions."""

from __future__ import annotations

import dataclasses
import sys
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vardrop.baselines import baselines
from vardrop.compress import Job
from vardrop.errors import InvalidValueError, VardropError, VardropWarning
from vardrop.files import EVALUATION
from vardrop.memory import keep_freed_memory
from vardrop.methods import Method, methods
from vardrop.screen import demo_table, evaluation_table, listeners_of, progress_of, result_table, short
from vardrop.settings import value_of
from vardrop.train import Schedule, end_process_group, is_first_process

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Make PyTorch networks Bayesian, sparse and really smaller.",
)
console = Console(quiet=not is_first_process())
errors = Console(stderr=True)
INTERRUPTED = 130

NetArgument = Annotated[
    str, typer.Argument(help="A network by name (see `vardrop methods`), or your own: file.py:function")
]
DataOption = Annotated[str, typer.Option(help="digits, a Hub data set such as ylecun/mnist, or file.py:function")]
MethodOption = Annotated[str, typer.Option(help="A method by name (see `vardrop methods`)")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="A field of the method, such as threshold=2.5; may be repeated")
]
PretrainedOption = Annotated[
    Path | None,
    typer.Option(help="Start from stored weights: a safetensors file, or a folder that vardrop.save wrote"),
]
RunArgument = Annotated[Path, typer.Argument(help="A folder that `vardrop compress` wrote")]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder with data sets in their Hub layout, such as ROOT/ylecun/mnist; default: the Hub"),
]


@app.command()
def compress(
    net: NetArgument,
    out: Annotated[Path, typer.Option(help="Folder for everything this run writes; a broken-off run goes on")],
    data: DataOption = "digits",
    method: MethodOption = "sparse-vd",
    set_: SetOption = None,
    data_root: DataRoot = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data")] = 200,
    batch_size: Annotated[int, typer.Option(help="Examples a step")] = 100,
    lr: Annotated[float, typer.Option(help="Adam's learning rate")] = 1e-3,
    gate_lr: Annotated[float | None, typer.Option(help="Learning rate of gates; default: the same")] = None,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty on the net's own parameters")] = 0.0,
    clip_norm: Annotated[float | None, typer.Option(help="Greatest norm of a step's gradient; default: none")] = None,
    shrink_every: Annotated[
        int | None,
        typer.Option(help="Epochs after which dead units leave the net for good, again and again; default: never"),
    ] = None,
    decay_from: Annotated[
        int | None,
        typer.Option(help="Epoch from which the learning rate falls to 0 on a line; default: half-way"),
    ] = None,
    warmup_start: Annotated[
        int | None,
        typer.Option(help="Last epoch without KL; default: a quarter of --warmup-epochs, at most a fifth of the run"),
    ] = None,
    warmup_epochs: Annotated[
        int | None, typer.Option(help="Epoch from which the KL is whole; default: four fifths of the run")
    ] = None,
    kl_factor: Annotated[float, typer.Option(help="Constant factor on the KL")] = 1.0,
    pretrain: Annotated[int, typer.Option(help="Epochs of plain training before the conversion")] = 0,
    pretrained: PretrainedOption = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Layers to convert, such as 'features.*'; may be repeated; default: all")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave plain; may be repeated")] = None,
    validation: Annotated[int, typer.Option(help="Training examples set apart, to choose options by")] = 0,
    on_empty: Annotated[
        Literal["keep-best", "refuse"], typer.Option(help="What to do with a layer whose weights are all dead")
    ] = "keep-best",
    on_unknown: Annotated[
        Literal["refuse", "keep"],
        typer.Option(help="What to do with an operation that compaction has no rule for: refuse, or keep its units"),
    ] = "refuse",
    seed: Annotated[int, typer.Option(help="Of the initialisation, the order and the noise")] = 0,
    fast: Annotated[bool, typer.Option(help="The fast path of training, or the plain reference")] = True,
) -> None:
    """Train a network under a method, prune it, and make it really smaller.

    Example: vardrop compress lenet-300-100 --data ylecun/mnist --method sparse-vd --out runs/a
    """
    from vardrop.compress import compress as run

    full_kl = 4 * epochs // 5 if warmup_epochs is None else warmup_epochs
    schedule = Schedule(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        gate_lr=gate_lr,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        shrink_every=shrink_every,
        decay_from=epochs // 2 if decay_from is None else decay_from,
        warmup_start=min(epochs // 5, full_kl // 4) if warmup_start is None else warmup_start,
        warmup_epochs=full_kl,
        kl_factor=kl_factor,
        seed=seed,
    )
    job = Job(
        net=net,
        data=data,
        method=make_method(method, set_ or []),
        schedule=schedule,
        validation=validation,
        pretrain=pretrain,
        pretrained=pretrained,
        data_root=data_root,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        on_empty=on_empty,
        on_unknown=on_unknown,
        fast=fast,
    )
    with progress_of(console) as progress:
        result = run(job, out, listeners=listeners_of(progress))
    console.print(result_table(result))
    if result["pruned"]["units"]:
        console.print(f"units {result['pruned']['units']}")
    console.print(escape(f"everything is in {out}; next: vardrop report {out}"), soft_wrap=True)


@app.command()
def sweep(
    net: NetArgument,
    out: Annotated[Path, typer.Option(help="Folder for the study, its runs, and the picture of its front")],
    search: Annotated[
        list[str] | None,
        typer.Option(help="What to vary: field=low:high, field=low:high:log or field=one,two; may be repeated"),
    ] = None,
    trials: Annotated[int, typer.Option(help="Finished trials the study is to have")] = 20,
    against: Annotated[
        Literal["compression", "flops"], typer.Option(help="The measure of size beside the validation error")
    ] = "compression",
    storage: Annotated[
        str | None, typer.Option(help="Where Optuna keeps the study, a URL; default: an SQLite file in --out")
    ] = None,
    data: DataOption = "digits",
    method: MethodOption = "sparse-vd",
    set_: SetOption = None,
    data_root: DataRoot = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data in each trial")] = 50,
    batch_size: Annotated[int, typer.Option(help="Examples a step")] = 100,
    pretrained: PretrainedOption = None,
    validation: Annotated[
        int, typer.Option(help="Training examples set apart, by which trials are judged; 0: those the data sets apart")
    ] = 300,
    seed: Annotated[int, typer.Option(help="Of the search and of each run")] = 0,
) -> None:
    """Search the hyper-parameters of a method for the front of error against size; start it again to go on.

    Example: vardrop sweep lenet-300-100 --search threshold=1:4 --out sweeps/a
    """
    from vardrop.sweep import parse_search
    from vardrop.sweep import sweep as run

    schedule = Schedule(
        epochs=epochs,
        batch_size=batch_size,
        decay_from=epochs // 2,
        warmup_start=epochs // 5,
        warmup_epochs=4 * epochs // 5,
        seed=seed,
    )
    job = Job(
        net=net,
        data=data,
        method=make_method(method, set_ or []),
        schedule=schedule,
        validation=validation,
        pretrained=pretrained,
        data_root=data_root,
    )
    table = Table("run", "validation error %", against, "values", title="The front")
    with progress_of(console) as progress:
        front = run(
            job,
            parse_search(search or [], job),
            out,
            trials=trials,
            against=against,
            storage=storage,
            listeners=listeners_of(progress),
        )
    for point in front:
        values = ", ".join(f"{name}={short(value)}" for name, value in point.values.items())
        table.add_row(point.run, f"{100 * point.error:.2f}", f"{point.size:,.1f}", values)
    console.print(table)
    console.print(escape(f"picture: {out / 'front.png'}"), soft_wrap=True)


@app.command()
def reproduce(
    tables: Annotated[list[str] | None, typer.Argument(help="Tables by id, or all; see --list")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only this row; may be repeated")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Only this column of a table whose columns are networks; may be repeated")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each row, with seeds from 0; 0 only shows what is there")] = 5,
    budget: Annotated[
        Literal["full", "short"], typer.Option(help="The paper's schedule as far as known, or a short one")
    ] = "full",
    jobs: Annotated[int, typer.Option(help="Runs side by side")] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train")] = "auto",
    data_root: DataRoot = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs; what is finished there is not run again")] = Path(
        "tables"
    ),
    store: Annotated[
        Path | None, typer.Option(help="Folder with a small record of each finished run, which is not run again")
    ] = None,
    together: Annotated[
        bool | None,
        typer.Option(
            "--together/--apart", help="Train the seeds of a row in one batched run; default: where there is a GPU"
        ),
    ] = None,
    own: Annotated[Path | None, typer.Option("--recipes", help="Folder with tables of your own, as TOML files")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the tables, and how much of each is done")] = False,
) -> None:
    """Make the result tables of the papers again, ours beside theirs; started again, it goes on.

    Example: vardrop reproduce svd-mnist-fc --budget short --seeds 1
    """
    from vardrop.tables import command, recipes, runner, show

    folder = recipes.PAPERS if own is None else own
    if list_ or not tables:
        console.print(show.overview(recipes.find_tables(tables or ["all"], folder), out, budget, seeds, store=store))
        return
    options = runner.Options(out, data_root=data_root, device=device, jobs=jobs, recipes=folder, together=together)
    failed = command.reproduce(
        tables, options, console, budget=budget, seeds=seeds, rows=row or (), columns=column or (), store=store
    )
    if failed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: RunArgument,
    data_root: DataRoot = None,
    samples: Annotated[int, typer.Option(help="Draws of the noise in the ensemble")] = 20,
    ood: Annotated[
        str | None, typer.Option(help="Strange inputs: a data set as in --data, or a folder; its test split is used")
    ] = None,
) -> None:
    """Evaluate a run again on its test data: small net, pruned net, one draw, and ensemble over the noise.

    Keeps the figures in RUN/evaluation.json, reliability diagrams in RUN/evaluation.png.

    Example with strange inputs beside: vardrop evaluate runs/mnist --ood OTHER/DATA
    """
    from vardrop.evaluate import PICTURE
    from vardrop.evaluate import evaluate as again

    console.print(evaluation_table(again(run, data_root=data_root, samples=samples, ood=ood)["rows"]))
    console.print(escape(f"figures: {run / EVALUATION}, picture: {run / PICTURE}"), soft_wrap=True)


@app.command()
def measure(
    run: RunArgument,
    data_root: DataRoot = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of each net; the median counts")] = 200,
    onnx: Annotated[bool, typer.Option(help="Time the nets in onnxruntime too")] = True,
) -> None:
    """Weigh and time the small net of a run beside the original, and keep the figures in RUN/measure.json."""
    from vardrop.evaluate import measure_run

    console.print(
        str(measure_run(run, data_root=data_root, repeats=repeats, onnx=onnx)), highlight=False, soft_wrap=True
    )


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The ONNX file to write")],
    data_root: DataRoot = None,
) -> None:
    """Export the small net of a run to ONNX, and check it in onnxruntime."""
    from vardrop.evaluate import export as write

    write(run, out, data_root=data_root)
    console.print(escape(f"{out}: {out.stat().st_size:,} bytes"), soft_wrap=True)


@app.command()
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The page to write; default: RUN/report.html")] = None,
) -> None:
    """Write a self-contained page about a run: curves, live weights, log alpha, pictures of the first layer."""
    from vardrop.report import report as write

    console.print(escape(f"the report is in {write(run, out)}"), soft_wrap=True)


@app.command("methods")
def list_methods() -> None:
    """List the methods with their fields, and the networks and data sets that have names."""
    from vardrop.zoo import DATASETS, NETS

    table = Table(Column("method", no_wrap=True), "what it is", "fields and defaults", title="Methods")
    for name, cls in (methods() | baselines()).items():
        defaults = ", ".join(f"{field.name}={short(field.default)}" for field in dataclasses.fields(cls))
        table.add_row(name, cls.one_line(), defaults)
    console.print(table)
    console.print(
        "[bold]Networks:[/bold] "
        + ", ".join(NETS)
        + "; mlp, char-lstm and word-lstm want a size, as in mlp-340, vgg-like and conv-small may have a scale, as in "
        "vgg-like-0.125; or your own: file.py:function"
    )
    console.print(
        "[bold]Data:[/bold] "
        + ", ".join(DATASETS)
        + ", another Hub id, or your own: file.py:function; NAME:random-labels draws the labels of NAME at random"
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo writes")] = Path("demo"),
) -> None:
    """The whole road in about a minute, on embedded data: train, convert, sparsify, compact, export, compare."""
    from vardrop.demo import demo as run

    with progress_of(console) as progress:
        shown = run(out, listeners=listeners_of(progress))
    console.print(demo_table(shown.rows))
    console.print(
        f"The small net gives the outputs of the pruned one (largest difference {shown.largest_difference:.1e}).\n"
        f"picture: {escape(str(shown.picture))}\nreport:  {escape(str(shown.page))}",
        soft_wrap=True,
    )


def make_method(name: str, settings: Sequence[str]) -> Method:
    """The method called `name` with fields given as ``field=value`` texts.

    Raises:
        InvalidValueError: the method or a field is unknown, or a value does not fit.

    >>> from vardrop.cli import make_method
    >>> make_method("gamma-ard", ["a=0.505", "rule=snr"]).a
    0.505
    """
    known = methods() | baselines()
    if name not in known:
        raise InvalidValueError(f"method {name!r} is unknown; known are: {', '.join(known)}")
    cls = known[name]
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign or key not in names:
            raise InvalidValueError(
                f"--set {setting!r}: must be field=value with a field of {name}: {', '.join(names)}"
            )
        try:
            values[key] = value_of(text, hints[key])
        except InvalidValueError as error:
            raise InvalidValueError(f"--set {setting}: {error}") from None
    return cls(**values)


def _show_warnings_as_lines() -> None:
    """The library's own warnings become one line on stderr, without the place in the code that raised them."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if issubclass(category, VardropWarning):
            errors.print(f"[bold yellow]warning:[/bold yellow] {escape(str(message))}", soft_wrap=True)
        else:
            usual(message, category, filename, lineno, *rest)

    warnings.showwarning = show  # type: ignore[assignment]


def main() -> None:
    """The entry point: an error raised on purpose is one line on stderr, not a trace."""
    keep_freed_memory()
    code: str | int | None = 0
    try:
        with warnings.catch_warnings():
            _show_warnings_as_lines()
            app()
    except SystemExit as end:  # typer ends every command so, and has said by then what is wrong with an option
        code = end.code
    except VardropError as error:
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        code = 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        errors.print("stopped; what was finished is kept, and the same command goes on from there")
    if not code:  # after an error the group may still be waited for
        end_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
