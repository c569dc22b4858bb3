"""Names and shapes of the parameters of real models, in the order of the model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

__all__ = ["MODELS", "Named", "layers_of", "module_of", "shapes_of"]

Shape = tuple[int, ...]
Named = tuple[str, Shape]


def shapes_of(model: str) -> list[tuple[str, Shape]]:
    """Names and shapes of the parameters of one of ``MODELS``."""
    return list(MODELS[model]())


def layers_of(model: str) -> list[list[Named]]:
    """The parameters of one of ``MODELS``, by layer."""
    by_layer = itertools.groupby(shapes_of(model), lambda named: module_of(named[0]))
    return [list(named) for _, named in by_layer]


def module_of(name: str) -> str:
    """The layer of a parameter: its path up to the first number, as ``encoder.layers.3``."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)|[^.]+", name)
    return found[0] if found else ""


def _resnet50() -> Iterator[Named]:
    """He et al., arXiv 1512.03385: 161 tensors, 25.6M parameters."""

    def convolution(name: str, outputs: int, inputs: int, kernel: int) -> Iterator[Named]:
        yield f"{name}.weight", (outputs, inputs, kernel, kernel)
        yield f"{name}.norm.weight", (outputs,)
        yield f"{name}.norm.bias", (outputs,)

    yield from convolution("stem", 64, 3, 7)
    inputs = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            yield from convolution(f"{name}.reduce", width, inputs, 1)
            yield from convolution(f"{name}.convolve", width, width, 3)
            yield from convolution(f"{name}.expand", 4 * width, width, 1)
            if block == 0:
                yield from convolution(f"{name}.shortcut", 4 * width, inputs, 1)
            inputs = 4 * width
    yield from _linear("head", 1000, inputs)


def _resnet20() -> Iterator[Named]:
    """He et al. for CIFAR-10: 59 tensors, 0.27M parameters; shortcuts have none."""

    def convolution(name: str, outputs: int, inputs: int) -> Iterator[Named]:
        yield f"{name}.weight", (outputs, inputs, 3, 3)
        yield from _norm(f"{name}.norm", outputs)

    yield from convolution("stem", 16, 3)
    inputs = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            yield from convolution(f"stage{stage}.{block}.first", width, inputs)
            yield from convolution(f"stage{stage}.{block}.second", width, width)
            inputs = width
    yield from _linear("head", 10, inputs)


def _transformer() -> Iterator[Named]:
    """The base model of Vaswani et al., arXiv 1706.03762, with shared embeddings."""
    width, inner, vocabulary = 512, 2048, 37000
    yield "embedding", (vocabulary, width)
    for side, attentions in (("encoder", 1), ("decoder", 2)):
        for layer in range(6):
            name = f"{side}.{layer}"
            for attention in range(attentions):
                for part in ("query", "key", "value", "output"):
                    yield from _linear(f"{name}.attention{attention}.{part}", width, width)
                yield from _norm(f"{name}.attention{attention}.norm", width)
            yield from _linear(f"{name}.inner", inner, width)
            yield from _linear(f"{name}.outer", width, inner)
            yield from _norm(f"{name}.norm", width)


def _dlrm() -> Iterator[Named]:
    """Naumov et al., arXiv 1906.00091, on 26 tables that hashing has cut to 20,000 rows each."""
    width, tables, rows = 32, 26, 20_000
    for table in range(tables):
        yield f"table{table}", (rows, width)
    interactions = (tables + 1) * tables // 2 + width
    for side, sizes in (("bottom", (13, 512, 256, width)), ("top", (interactions, 512, 256, 1))):
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            yield from _linear(f"{side}.{layer}", outputs, inputs)


def _digits() -> Iterator[Named]:
    """The CNN of ``examples/digits_cnn.py``."""
    from hvd_gqsgd.bench.digits import Digits  # the other models need no PyTorch

    for name, parameter in Digits(rank=0).named_parameters():
        yield name, tuple(parameter.shape)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[Named]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[Named]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


MODELS = {
    "resnet50": _resnet50,
    "transformer": _transformer,
    "dlrm": _dlrm,
    "resnet20": _resnet20,
    "digits": _digits,
}
"""Models, by name."""
