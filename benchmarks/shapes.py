"""One table of shapes from real models, features last, each with its source."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """An activation, or a kernel, that some model normalizes."""

    model: str
    norms: tuple[str, ...]
    shape: tuple[int, ...]
    """At the size of a batch on an accelerator."""
    cpu: tuple[int, ...] | None
    """The same with fewer examples, for a CPU; None leaves it out there."""
    source: str
    groups: int = 32

    @property
    def checked(self) -> tuple[int, ...]:
        """The same shape with so few examples that the oracle takes seconds."""
        sizes = list(self.cpu or self.shape)
        while math.prod(sizes) >= 2**23:
            first = next(i for i, n in enumerate(sizes) if n > 1)
            sizes[first] //= 2
        return tuple(sizes)

    def on(self, backend: str) -> tuple[int, ...] | None:
        """The shape for that backend; None if it is left out there."""
        return self.cpu if backend == "cpu" else self.shape


SHAPES = (
    Shape("ResNet-50 conv2", ("batch",), (256, 56, 56, 64), (16, 56, 56, 64),
          "He et al. 2015, table 1: the 3x3 convolutions of conv2_x"),
    Shape("ResNet-50 conv2 output", ("batch", "group", "instance"), (256, 56, 56, 256), None,
          "He et al. 2015, table 1: the last convolution of conv2_x"),
    Shape("ResNet-50 conv3 output", ("group",), (256, 28, 28, 512), (8, 28, 28, 512),
          "He et al. 2015, table 1; in 32 groups by Wu & He 2018, section 4.1"),
    Shape("ResNet-50 conv5 output", ("batch",), (256, 7, 7, 2048), (32, 7, 7, 2048),
          "He et al. 2015, table 1: the last convolution of conv5_x"),
    Shape("ViT-B/16", ("layer",), (256, 197, 768), (16, 197, 768),
          "Dosovitskiy et al. 2020, table 1: 14x14 patches and a class token"),
    Shape("GPT-2", ("layer",), (32, 1024, 768), (4, 1024, 768),
          "Radford et al. 2019, table 2: the smallest model, its whole context"),
    Shape("GPT-2 XL", ("layer",), (16, 1024, 1600), None,
          "Radford et al. 2019, table 2: the largest model"),
    Shape("Llama 2 7B", ("rms",), (4, 4096, 4096), (1, 512, 4096),
          "Touvron et al. 2023 (Llama 2), table 1, context; width of Llama's, table 2"),
    Shape("Llama 3 70B", ("rms",), (1, 8192, 8192), None,
          "Grattafiori et al. 2024, table 3: model dimension and context"),
    Shape("AlphaFold pair", ("layer",), (1, 384, 384, 128), (1, 160, 160, 128),
          "Jumper et al. 2021, supplement 1.11.8 and algorithm 6: crops, 128 channels"),
    Shape("Stable Diffusion U-Net", ("group",), (16, 64, 64, 320), (2, 64, 64, 320),
          "Rombach et al. 2022: latents of 512x512 images, the first stage's channels"),
    Shape("CycleGAN generator", ("instance",), (16, 64, 64, 256), (2, 64, 64, 256),
          "Zhu et al. 2017, appendix 7.2: residual blocks R256 on 256x256 images"),
    Shape("ragged rows", ("layer", "rms"), (16383, 1001), (1023, 1001),
          "no model: nothing is a multiple of anything"),
    Shape("ragged images", ("batch", "group", "instance"), (61, 27, 29, 99), (7, 27, 29, 99),
          "no model: nothing is a multiple of anything", 3),
    Shape("BiT ResNet kernel", ("weight",), (3, 3, 512, 512), (3, 3, 512, 512),
          "Kolesnikov et al. 2019: weight standardization of a 3x3 convolution of stage 4"),
)  # fmt: skip
QUICK = (Shape("small rows", ("layer",), (256, 768), (256, 768), "no model: a smoke test"),)
