"""A residual network and a GPT, of any size: what else a training step consists of.

At their published sizes they have exactly the parameters that `bench/cases.py` lists.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """Three convolutions with batch norms, and a shortcut around them."""

    def __init__(self, inputs: int, width: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        outputs = 4 * width
        self.main = nn.Sequential(
            *conv_norm(inputs, width, 1),
            activation(inplace=True),
            *conv_norm(width, width, 3, stride),
            activation(inplace=True),
            *conv_norm(width, outputs, 1),
        )
        self.last = activation(inplace=True)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Sequential(*([] if same else conv_norm(inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.main(x) + self.shortcut(x))


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def resnet(
    width: int = 64, blocks=(3, 4, 6, 3), classes: int = 1000, activation=nn.ReLU
) -> nn.Module:
    """ResNet for images [n, 3, size, size]; the defaults are ResNet-50."""
    layers = [*conv_norm(3, width, 7, 2), activation(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(inputs, width * 2**stage, stride, activation))
            inputs = 4 * width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Layer(nn.Module):
    """A transformer layer with causal attention, norms first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norms[1](x))


class Gpt(nn.Module):
    """GPT-2 for tokens [n, length], the output embedding tied; the defaults are GPT-2 124M."""

    def __init__(self, width=768, layers=12, heads=12, vocabulary=50_257, context=1024):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = F.linear(self.norm(self.layers(x)), self.tokens.weight)
        return logits.flatten(0, 1)


def image_batches(count: int, n: int, size: int, classes: int, device) -> list[tuple]:
    """Random images and labels."""
    return [
        (
            torch.randn(n, 3, size, size, device=device),
            torch.randint(classes, (n,), device=device),
        )
        for _ in range(count)
    ]


def token_batches(count: int, n: int, length: int, vocabulary: int, device) -> list[tuple]:
    """Random tokens, and the tokens that come next."""
    texts = [torch.randint(vocabulary, (n, length + 1), device=device) for _ in range(count)]
    return [(text[:, :-1].contiguous(), text[:, 1:].flatten()) for text in texts]
