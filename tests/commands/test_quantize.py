from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import cubin
from cubin import __main__ as command
from cubin.weights import Weights
from cubin.weights.codes import load_codes


def run(*arguments):
    return command.main([*map(str, arguments)])


@pytest.fixture
def net(tmp_path, rng):
    arrays = {"a": rng.standard_normal((8, 24)), "b": rng.standard_normal((6, 4, 2))}
    np.savez(tmp_path / "net.npz", **arrays, bias=np.ones(3))
    return tmp_path / "net.npz", arrays


@pytest.mark.parametrize("solver", ["greedy", "refined"])
def test_codes_are_those_of_quantize(net, tmp_path, solver):
    path, arrays = net
    out = tmp_path / "c.safetensors"
    assert run("quantize", path, "--bits", 2, "--solver", solver, "--output", out) == 0
    assert dict(load_codes(out)) == {
        name: cubin.quantize(array, 2, channel_axis=0, solver=solver)
        for name, array in arrays.items()
    }


def test_codes_of_groups_and_maps(net, tmp_path):
    path, arrays = net
    out = tmp_path / "c.safetensors"
    for group in (8, 10):
        assert run("quantize", path, "--bits", 2, "--group-size", group, "--output", out) == 0
        assert dict(load_codes(out)) == {
            name: cubin.quantize(array.reshape(len(array), -1), 2, group_size=group)
            for name, array in arrays.items()
        }
    assert run("quantize", path, "--bits", 3, "--map", "budget:1.4", "--output", out) == 0
    for name, code in load_codes(out):
        bits = cubin.bitmaps.budget(arrays[name], 1.4, channel_axis=0)
        assert code == cubin.quantize(arrays[name], bits, channel_axis=0)


def test_codes_with_a_shift(net, tmp_path):
    path, arrays = net
    out = tmp_path / "c.safetensors"
    assert run("quantize", path, "--bits", 2, "--shift", "--output", out) == 0
    assert dict(load_codes(out)) == {
        name: cubin.quantize(array, 2, channel_axis=0, shift=True) for name, array in arrays.items()
    }


@pytest.mark.parametrize("options", [[], ["--shift", "--solver", "refined"]])
def test_codes_of_several_precisions(net, tmp_path, capsys, options):
    path, arrays = net
    out = tmp_path / "c.safetensors"
    asked = ["--bits", 4, "--precisions", "1,3-4", *options]
    assert run("quantize", path, *asked, "--output", out) == 0
    found = dict(load_codes(out))
    for name, array in arrays.items():
        expected = cubin.quantize(
            array,
            4,
            channel_axis=0,
            precisions=(1, 3, 4),
            shift="--shift" in options,
            solver="refined" if options else "greedy",
        )
        assert found[name] == expected
        for precision in (1, 3):
            assert found[name].at(precision) == expected.at(precision)
    capsys.readouterr()
    assert run("show", out) == 0
    assert "1,3,4" in capsys.readouterr().out
    assert run("show", out, "--json") == 0
    shown = json.loads(capsys.readouterr().out)["tensors"]
    assert [(one["bits"], one["precisions"]) for one in shown] == [(4, [1, 3, 4])] * 2


def test_a_checkpoint_of_many_types(checkpoint, tmp_path, capsys):
    out = tmp_path / "c.safetensors"
    assert run("quantize", checkpoint, "--bits", 2, "--output", out) == 1
    said = capsys.readouterr()
    assert "10 of 11 weight tensors" in said.out
    assert "bad (3x4, float32): 12 of 12 values" in said.out
    read = dict(load_codes(out))
    tensors = {tensor.name: tensor for tensor in Weights(checkpoint).tensors}
    assert read.keys() == tensors.keys() - {"model-2-of-2:bad"}
    for name, code in read.items():
        assert code == cubin.quantize(tensors[name].load(), 2, channel_axis=0)
    assert run("quantize", checkpoint, "--bits", 2, "--strict", "--output", out) == 2


def test_show(net, tmp_path, capsys):
    path, arrays = net
    out = tmp_path / "c.safetensors"
    run("quantize", path, "--bits", 2, "--output", out)
    capsys.readouterr()
    assert run("show", out) == 0
    printed = capsys.readouterr().out
    assert "2 tensors, 240 weights: 2.000 payload bits" in printed
    assert "MSE" not in printed
    assert run("show", out, "--weights", path, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    for one in said["tensors"]:
        array = arrays[one["name"]]
        code = cubin.quantize(array, 2, channel_axis=0)
        expected = float(cubin.errors.relative_mse(array, code.dequantize()))
        assert one["relative_mse"] == expected
        assert one["effective_bits"] == code.effective_bits
        assert one["precisions"] is None
    assert said["overall"]["file_bits"] == 8 * out.stat().st_size / 240
    assert run("show", out, "--weights", path) == 0
    assert "rel. MSE" in capsys.readouterr().out


def test_show_of_a_single_code(tmp_path, capsys):
    out = tmp_path / "c.safetensors"
    cubin.quantize(np.ones((3, 4)), 2).save(out)
    assert run("show", out) == 0
    head, line, total = capsys.readouterr().out.splitlines()
    assert line.startswith("(no name)")
    assert len(head) == len(line)
    assert total.startswith("1 tensor, 12 weights")


def test_show_of_groups_with_the_weights(net, tmp_path, capsys):
    path, _ = net
    out = tmp_path / "c.safetensors"
    run("quantize", path, "--bits", 2, "--group-size", 8, "--output", out)
    assert run("show", out, "--weights", path) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("show none.safetensors", "none.safetensors"),
        ("show net.npz", "no intact file of codes: it is no .safetensors file"),
        ("show net.npz", "cubin.BinaryCode.load reads .npz files"),
        ("quantize empty.npz --bits 1 --output d.safetensors", "(it is empty)"),
        ("show c.safetensors --weights other.npz", "no tensor 'a'"),
        ("quantize net.npz --bits 17 --output d.safetensors", "17"),
        ("quantize net.npz --bits 1 --map budget:1.4 --output d.safetensors", "--bits"),
        ("quantize net.npz --bits 4 --precisions 1-3 --output d.safetensors", "1,2,3"),
        (
            "quantize net.npz --bits 2 --precisions 1-2 --map budget:1 --output d.safetensors",
            "--precisions and --map",
        ),
        ("quantize nan.npy --bits 1 --output d.safetensors", "12 of 12 values"),
        ("quantize net.npz --bits 1 --output no/folder/d.safetensors", "no folder no/folder"),
        ("quantize net.npz --bits 1 --output .", "it is a folder"),
        ("quantize net.npz --bits 1 --output net.npz", "end its name so"),
    ],
)
def test_errors_are_one_line(net, tmp_path, monkeypatch, capsys, arguments, problem):
    monkeypatch.chdir(tmp_path)
    run("quantize", "net.npz", "--bits", 1, "--output", "c.safetensors")
    np.savez("other.npz", z=np.ones((2, 2)))
    np.save("nan.npy", np.full((3, 4), np.nan))
    (tmp_path / "empty.npz").touch()
    capsys.readouterr()
    assert run(*arguments.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "d.safetensors").exists()


def test_codes_do_not_replace_the_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    safetensors.numpy.save_file({"w": np.ones((4, 8))}, "w.safetensors")
    before = Path("w.safetensors").read_bytes()
    Path("link.safetensors").symlink_to("w.safetensors")
    for source, output in (("w.safetensors", "w.safetensors"), (".", "link.safetensors")):
        assert run("quantize", source, "--bits", 1, "--output", output) == 2
        assert "the weights are in it" in capsys.readouterr().err
    assert Path("w.safetensors").read_bytes() == before
    Path("c.safetensors").write_bytes(b"")
    assert run("quantize", "w.safetensors", "--bits", 1, "--output", "c.safetensors") == 0
