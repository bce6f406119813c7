"""LeNet-5 as it empties: its filters and a piece of its dense layer, epoch by epoch, as an animation and a still.

python results/emptying.py OUT [--data ylecun/mnist] [--data-root FOLDER] [--epochs 40]

A run that was broken off goes on when the command is given again. Writes emptying.gif and emptying.png into OUT, of
which docs/ has copies.
"""

import argparse
from pathlib import Path

import pages
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file

import vardrop as vd
from vardrop.checkpoint import Epoch
from vardrop.compress import error_and_nll
from vardrop.files import replace_file
from vardrop.train import Schedule, train
from vardrop.zoo import Batches, build_net, load_data

PATCH = 100
KERNELS, ACROSS = 20, 5
STILL = (0, 0.1, 0.25, 1)
"""Parts of the run at which the still shows the net."""


def frame(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The kernels of the first layer and a corner of the largest dense one, zero where the rule finds them dead."""
    vd.prune(net)
    weights = [site.noise.masked(site.weight.detach()) for site in vd.sites(net)]
    vd.unprune(net)
    dense = max((weight for weight in weights if weight.dim() == 2), key=torch.Tensor.numel)
    return {
        "kernels": weights[0][:KERNELS, 0].half().contiguous(),
        "dense": dense[:PATCH, :PATCH].half().contiguous(),
    }


def run(folder: Path, data_name: str, data_root: Path | None, epochs: int) -> None:
    """Trains the net in `folder`, a frame an epoch."""
    data = load_data(data_name, data_root=data_root)
    torch.manual_seed(0)
    net = build_net("lenet-5", input_shape=data.input_shape, num_classes=data.num_classes)
    vd.fast(vd.convert(net, vd.SparseVD(train_clip=True)))
    schedule = Schedule(epochs=epochs, decay_from=epochs // 2, warmup_start=epochs // 20, warmup_epochs=epochs // 4)
    (folder / "frames").mkdir(parents=True, exist_ok=True)

    def keep(epoch: Epoch) -> None:
        path = folder / "frames" / f"{epoch.epoch:04}.safetensors"
        about = {"compression": str(epoch.compression), "error": str(epoch.test_error)}
        replace_file(path, lambda aside: save_file(frame(net), aside, metadata=about))

    train(
        net,
        Batches(data.train, schedule.batch_size, seed=0),
        schedule,
        folder,
        num_data=len(data.train.y),
        evaluate=lambda model: (None, error_and_nll(model, data.test)[0]),
        identity=f"emptying {data_name} {epochs}",
        on_epoch=keep,
    )


def draw(folder: Path) -> None:
    """The animation and the still of the frames in `folder`."""
    frames = sorted((folder / "frames").glob("*.safetensors"))
    moments = [round(part * (len(frames) - 1)) for part in STILL]
    still = Figure(figsize=(3 * len(moments), 5.6), layout="constrained")
    for column, moment in enumerate(moments):
        Panels(still, len(moments), column).show(frames[moment])
    replace_file(folder / "emptying.png", lambda aside: still.savefig(aside, dpi=110, format="png"))
    moving = Figure(figsize=(3.2, 5.6), layout="constrained")
    panels = Panels(moving, 1, 0)
    animation = FuncAnimation(moving, lambda index: panels.show(frames[index]), len(frames))
    animation.save(folder / "emptying.gif", PillowWriter(fps=6), dpi=80)


class Panels:
    """One column of a figure: the kernels side by side above, the dense weights below."""

    def __init__(self, figure: Figure, columns: int, column: int) -> None:
        self.above = figure.add_subplot(2, columns, column + 1)
        self.below = figure.add_subplot(2, columns, columns + column + 1)

    def show(self, path: Path) -> None:
        """Draws the frame stored at `path`."""
        with safe_open(path, framework="pt") as stored:
            kernels, dense = stored.get_tensor("kernels").float(), stored.get_tensor("dense").float()
            about = stored.metadata()
        tiles = torch.nn.functional.pad(kernels, (0, 1, 0, 1), value=float("nan"))
        rows = [torch.cat(list(part), dim=1) for part in tiles.split(ACROSS)]
        for axis, picture in ((self.above, torch.cat(rows)), (self.below, dense)):
            axis.clear()
            axis.axis("off")
            bound = float(picture.nan_to_num().abs().max()) or 1.0
            axis.imshow(picture.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest")
        compression, error = float(about["compression"]), 100 * float(about["error"])
        self.above.set_title(
            f"epoch {int(path.stem) + 1}: {compression:.1f}x; unpruned {error:.2f} % error", fontsize=9
        )
        self.below.set_title(f"{int((dense != 0).sum()):,} of {dense.numel():,} dense weights alive", fontsize=9)


def main() -> None:
    """Trains as the arguments say, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="ylecun/mnist")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args()
    run(given.out, given.data, given.data_root, given.epochs)
    draw(given.out)


if __name__ == "__main__":
    pages.run(main)
