"""Named parameter-shape lists: the tensors of real models and of the usual optimizer benchmarks."""

from collections.abc import Callable
from math import prod

Shape = tuple[int, ...]
Shapes = list[Shape]

MI = 2**20


def uniform(count: int, numel: int) -> Shapes:
    """`count` equal vectors of `numel` elements."""
    return [(numel,)] * count


def mixed(count: int = 500) -> Shapes:
    """Biases, odd vectors and matrices in turn, so that no tile or vector width divides them all.

    pytorch#178641 names "500 mixed" without its sizes; these are ours.
    """
    sizes = (7, 64, 1000, 16_385, 262_144)
    return [(sizes[i % len(sizes)],) for i in range(count)]


def resnet50() -> Shapes:
    """ResNet-50 for 1000 classes: 53 convolutions, each with a batch norm, and the classifier."""

    def conv_norm(out_channels: int, in_channels: int, kernel: int) -> Shapes:
        return [(out_channels, in_channels, kernel, kernel), (out_channels,), (out_channels,)]

    shapes, inputs = conv_norm(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(blocks):
            shapes += conv_norm(width, inputs, 1)
            shapes += conv_norm(width, width, 3)
            shapes += conv_norm(outputs, width, 1)
            if block == 0:
                shapes += conv_norm(outputs, inputs, 1)
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def encoder_layer(width: int) -> Shapes:
    """A transformer layer with biases: two norms, attention, and an MLP four times as wide."""
    return [
        *[(width,)] * 2,
        *[(3 * width, width), (3 * width,), (width, width), (width,)],
        *[(width,)] * 2,
        *[(4 * width, width), (4 * width,), (width, 4 * width), (width,)],
    ]


def vit(width: int, layers: int, patch: int = 16, image: int = 224, classes: int = 1000) -> Shapes:
    """Vision transformer: class token, patch and position embeddings, layers, norm, head."""
    tokens = (image // patch) ** 2 + 1
    embedding = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    head = [(width,), (width,), (classes, width), (classes,)]
    return embedding + layers * encoder_layer(width) + head


def gpt2(width: int, layers: int, vocabulary: int = 50_257, context: int = 1024) -> Shapes:
    """GPT-2 with the output embedding tied to the input one."""
    embedding = [(vocabulary, width), (context, width)]
    return embedding + layers * encoder_layer(width) + [(width,), (width,)]


def llama(width: int, layers: int, mlp: int, vocabulary: int, kv: int, tied: bool) -> Shapes:
    """Llama: `kv` is the width of keys and values (smaller than `width` with grouped queries)."""
    layer = [
        *[(width, width), (kv, width), (kv, width), (width, width)],
        *[(mlp, width), (mlp, width), (width, mlp), (width,), (width,)],
    ]
    head = [] if tied else [(vocabulary, width)]
    return [(vocabulary, width), *layers * layer, (width,), *head]


def lora(width: int, layers: int, rank: int) -> Shapes:
    """Low-rank adapters on the four attention matrices of each layer."""
    return layers * 4 * [(rank, width), (width, rank)]


def small(shapes: Shapes) -> Shapes:
    """The vectors of a model: norms and biases."""
    return [shape for shape in shapes if len(shape) == 1]


# In the order of a run: the cases with bars first. The last are skipped where memory or time does
# not suffice.
CASES: dict[str, Callable[[], Shapes]] = {
    "300x64": lambda: uniform(300, 64),
    "3000x1024": lambda: uniform(3000, 1024),
    "resnet50": resnet50,
    "1x64M": lambda: uniform(1, 64 * MI),
    "10000x64": lambda: uniform(10_000, 64),
    "1000x1024": lambda: uniform(1000, 1024),
    "500_mixed": mixed,
    "vit_b16": lambda: vit(768, 12),
    "gpt2_124m": lambda: gpt2(768, 12),
    "gpt2_124m_small": lambda: small(gpt2(768, 12)),
    "vit_s16": lambda: vit(384, 12),
    "10x16M": lambda: uniform(10, 16 * MI),
    "200x1M": lambda: uniform(200, MI),
    "3000x3500": lambda: uniform(3000, 3500),
    "lora_7b": lambda: lora(4096, 32, 16),
    "vit_l16": lambda: vit(1024, 24),
    "vit_h14": lambda: vit(1280, 32, patch=14),
    "llama_1b": lambda: llama(2048, 16, 8192, 128_256, kv=512, tied=True),
    "gpt2_xl": lambda: gpt2(1600, 48),
    "1x2G": lambda: uniform(1, 2**31 + 8),
    "llama_7b": lambda: llama(4096, 32, 11_008, 32_000, kv=4096, tied=False),
}


def numel(shapes: Shapes) -> int:
    """Number of elements of a shape list."""
    return sum(prod(shape) for shape in shapes)
