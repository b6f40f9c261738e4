"""SEA-RAFT in torch, from its description, and its weights by their
published names.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from astrolabe_jax.rewards.flow.net import SeaRaftConfig

TINY = SeaRaftConfig(
    dim=8,
    initial_dim=4,
    block_dims=(4, 6, 10),
    blocks=(1, 2, 1),
    levels=4,
    radius=2,
    num_blocks=2,
    iterations=3,
)

# Of the fewest parts, with as many iterations as the published one: no tensor tells how many.
TINIEST = dataclasses.replace(TINY, blocks=(1, 1, 1), radius=1, num_blocks=1, iterations=4)


def published(config: SeaRaftConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of model.safetensors; bn3 has a second name, which .pth files hold, too."""
    dim, found = config.dim, {}

    def conv(name, features_in, features, size, groups=1):
        found[f"{name}.weight"] = (features, features_in // groups, size, size)
        found[f"{name}.bias"] = (features,)

    def norm(name, features):
        found.update(
            {
                f"{name}.{part}": (features,)
                for part in ("weight", "bias", "running_mean", "running_var")
            }
        )

    for net, channels in (("cnet", 6), ("fnet", 3)):
        conv(f"{net}.conv1", channels, config.initial_dim, 7)
        norm(f"{net}.bn1", config.initial_dim)
        width = config.initial_dim
        for stage, (features, count) in enumerate(
            zip(config.block_dims, config.blocks, strict=True)
        ):
            for i in range(count):
                block = f"{net}.layer{stage + 1}.{i}"
                conv(f"{block}.conv1", width, features, 3)
                conv(f"{block}.conv2", features, features, 3)
                norm(f"{block}.bn1", features)
                norm(f"{block}.bn2", features)
                if width != features or (stage and not i):
                    norm(f"{block}.bn3", features)
                    conv(f"{block}.downsample.0", width, features, 1)
                width = features
        conv(f"{net}.final_conv", width, 2 * dim, 1)
    conv("init_conv", 2 * dim, 2 * dim, 3)
    conv("upsample_weight.0", dim, 2 * dim, 3)
    conv("upsample_weight.2", 2 * dim, 576, 1)
    conv("flow_head.0", dim, 2 * dim, 3)
    conv("flow_head.2", 2 * dim, 6, 3)
    conv("update_block.encoder.convc1", config.levels * (2 * config.radius + 1) ** 2, 2 * dim, 1)
    conv("update_block.encoder.convc2", 2 * dim, dim + dim // 2, 3)
    conv("update_block.encoder.convf1", 2, dim, 7)
    conv("update_block.encoder.convf2", dim, dim // 2, 3)
    conv("update_block.encoder.conv", 2 * dim, dim - 2, 3)
    for i in range(config.num_blocks):
        block = f"update_block.refine.{i}"
        conv(f"{block}.dwconv", 3 * dim, 3 * dim, 7, 3 * dim)
        found |= {
            f"{block}.norm.weight": (3 * dim,),
            f"{block}.norm.bias": (3 * dim,),
            f"{block}.gamma": (3 * dim,),
        }
        found |= {
            f"{block}.pwconv1.weight": (4 * dim, 3 * dim),
            f"{block}.pwconv1.bias": (4 * dim,),
        }
        found |= {
            f"{block}.pwconv2.weight": (3 * dim, 4 * dim),
            f"{block}.pwconv2.bias": (3 * dim,),
        }
        conv(f"{block}.final", 3 * dim, dim, 1)
    return found


def weights(config: SeaRaftConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random, such that flow is a few positions wide and every part has a say."""
    rng, found = np.random.default_rng(seed), {}
    for name, shape in published(config).items():
        tensor = rng.standard_normal(shape)
        if len(shape) > 1:
            tensor *= np.prod(shape[1:]) ** -0.5
        elif name.endswith("running_var"):
            tensor = 0.5 + rng.random(shape)
        else:
            tensor = 0.2 * tensor + float(name.endswith(("weight", "gamma")))
        found[name] = tensor.astype(np.float32)
    found["flow_head.2.weight"] *= 3
    return found


class Oracle:
    """The net on given weights; `used` are the names that it has read."""

    def __init__(self, config: SeaRaftConfig, given: dict[str, np.ndarray]):
        self.config, self.used = config, set()
        self.given = {name: torch.from_numpy(tensor) for name, tensor in given.items()}

    def get(self, name):
        self.used.add(name)
        return self.given[name]

    def conv(self, x, name, stride=1, groups=1):
        weight = self.get(f"{name}.weight")
        return F.conv2d(
            x, weight, self.get(f"{name}.bias"), stride, weight.shape[-1] // 2, 1, groups
        )

    def norm(self, x, name):
        mean, var, weight, bias = (
            self.get(f"{name}.{part}") for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def encoder(self, x, net):
        x = F.relu(self.norm(self.conv(x, f"{net}.conv1", 2), f"{net}.bn1"))
        for stage, count in enumerate(self.config.blocks):
            for i in range(count):
                block, stride = f"{net}.layer{stage + 1}.{i}", 2 if stage and not i else 1
                y = F.relu(self.norm(self.conv(x, f"{block}.conv1", stride), f"{block}.bn1"))
                y = F.relu(self.norm(self.conv(y, f"{block}.conv2"), f"{block}.bn2"))
                if f"{block}.bn3.weight" in self.given:
                    x = self.norm(self.conv(x, f"{block}.downsample.0", stride), f"{block}.bn3")
                x = F.relu(x + y)
        return self.conv(x, f"{net}.final_conv")

    def head(self, x, name):
        return self.conv(F.relu(self.conv(x, f"{name}.0")), f"{name}.2")

    def lookup(self, first, second, flow):
        batch, channels, height, width = first.shape
        radius, found = self.config.radius, []
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = (flow + torch.stack([xs, ys])).permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
        steps = torch.arange(-radius, radius + 1.0)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)  # x slow, y fast
        for level in range(self.config.levels):
            h, w = second.shape[2:]
            volume = torch.einsum("ncp,nchw->nphw", first.flatten(2), second) / channels**0.5
            wanted = places / 2**level + offsets
            wanted = 2 * wanted / torch.tensor([w - 1, h - 1]) - 1
            found.append(
                F.grid_sample(volume.reshape(-1, 1, h, w), wanted, align_corners=True).reshape(
                    batch, height, width, -1
                )
            )
            if level + 1 < self.config.levels:
                second = F.interpolate(
                    second, scale_factor=0.5, mode="bilinear", align_corners=False
                )
        return torch.cat(found, -1).permute(0, 3, 1, 2)

    def update(self, state, context, found, flow):
        prefix = "update_block.encoder"
        found = F.relu(self.conv(F.relu(self.conv(found, f"{prefix}.convc1")), f"{prefix}.convc2"))
        seen = F.relu(self.conv(F.relu(self.conv(flow, f"{prefix}.convf1")), f"{prefix}.convf2"))
        motion = torch.cat(
            [F.relu(self.conv(torch.cat([found, seen], 1), f"{prefix}.conv")), flow], 1
        )
        for i in range(self.config.num_blocks):
            block = f"update_block.refine.{i}"
            x = torch.cat([state, context, motion], 1)
            y = self.conv(x, f"{block}.dwconv", groups=x.shape[1]).permute(0, 2, 3, 1)
            y = F.layer_norm(
                y,
                y.shape[-1:],
                self.get(f"{block}.norm.weight"),
                self.get(f"{block}.norm.bias"),
                1e-6,
            )
            y = F.gelu(
                F.linear(y, self.get(f"{block}.pwconv1.weight"), self.get(f"{block}.pwconv1.bias"))
            )
            y = F.linear(y, self.get(f"{block}.pwconv2.weight"), self.get(f"{block}.pwconv2.bias"))
            x = x + (self.get(f"{block}.gamma") * y).permute(0, 3, 1, 2)
            state = self.conv(x, f"{block}.final")
        return state

    def upsampled(self, flow, weights):
        batch, _, height, width = flow.shape
        mix = weights.reshape(batch, 1, 9, 8, 8, height, width).softmax(2)
        near = F.unfold(8 * flow, 3, padding=1).reshape(batch, 2, 9, 1, 1, height, width)
        return (
            (mix * near).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * height, 8 * width)
        )

    @torch.no_grad()
    def flow(self, first, second):
        """As SeaRaft, of numpy arrays."""
        height, width = first.shape[1:3]
        down, right = -height % 8, -width % 8
        pads = (right // 2, right - right // 2, down // 2, down - down // 2)
        first, second = (
            F.pad(
                2 * torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - 1,
                pads,
                mode="replicate",
            )
            for x in (first, second)
        )
        both = self.conv(self.encoder(torch.cat([first, second], 1), "cnet"), "init_conv")
        state, context = both.chunk(2, 1)
        first, second = self.encoder(first, "fnet"), self.encoder(second, "fnet")
        flow = self.head(state, "flow_head")[:, :2]
        for _ in range(self.config.iterations):
            state = self.update(state, context, self.lookup(first, second, flow), flow)
            flow = flow + self.head(state, "flow_head")[:, :2]
        flow = self.upsampled(flow, 0.25 * self.head(state, "upsample_weight"))
        return flow[:, :, pads[2] :, pads[0] :][:, :, :height, :width].permute(0, 2, 3, 1).numpy()
