"""Sizes of Qwen2-VL and of the reward models made of it."""

import dataclasses

PATCH = (2, 14, 14)  # frames, height and width of a patch
PATCH_VALUES = 3 * 2 * 14 * 14  # in the order channel, frame, row, column
MERGE = 2  # patches along each side of the square that becomes one token


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """Sizes of both towers and the head; the defaults are Qwen2-VL-7B-Instruct.

    `dim` is D, `head_dim` K. `head` has the widths of a reward's linears after the last hidden
    state, with ReLU between them: none for the plain model. A single linear has no bias
    (VideoAlign), several have (HPSv3).
    """

    vocab_size: int = 152064
    dim: int = 3584
    dim_kv: int = 512  # of all heads of the keys, as of the values
    dim_ffn: int = 18944
    num_layers: int = 28
    head_dim: int = 128
    eps: float = 1e-6
    rope_theta: float = 1e6
    # frequencies that turn with the frame, row and column; the rewards count all three alike
    mrope_section: tuple[int, ...] = (16, 24, 24)
    vision_dim: int = 1280
    vision_ffn: int = 5120
    vision_layers: int = 32
    vision_heads: int = 16
    vision_eps: float = 1e-6
    head: tuple[int, ...] = ()
    image_token: int = 151655  # ids in whose place the tokens of the vision tower are put
    video_token: int = 151656
    # the kernels of all layers are int8, with a float32 scale for each output
    quantised: bool = False
    dtype: str = "bfloat16"  # of the activations
    param_dtype: str = "bfloat16"  # but for the head, which is float32

    def __post_init__(self):
        for field, unit, name in (
            ("dim", self.head_dim, "head_dim"),
            ("dim_kv", self.head_dim, "head_dim"),
            ("dim", self.dim_kv, "dim_kv"),
            # a quarter of a head turns with the row
            ("vision_dim", 4 * self.vision_heads, "4 vision_heads"),
        ):
            if getattr(self, field) % unit:
                raise ValueError(
                    f"Qwen2VLConfig.{field} is {getattr(self, field)}; expected a multiple of "
                    f"{name}, {unit}"
                )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"Qwen2VLConfig.mrope_section is {self.mrope_section}; expected three numbers "
                f"whose sum is half of head_dim, {self.head_dim // 2}"
            )


QWEN2_VL_7B = Qwen2VLConfig()
QWEN2_VL_2B = Qwen2VLConfig(vocab_size=151936, dim=1536, dim_kv=256, dim_ffn=8960)
HPSV3 = dataclasses.replace(QWEN2_VL_7B, vocab_size=151658, head=(1024, 16, 2))
VIDEOALIGN = dataclasses.replace(QWEN2_VL_2B, vocab_size=151660, head=(1,))
