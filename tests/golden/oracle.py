"""The published DiT and its rollout in numpy, written from its description alone (docs/models.md):
an oracle for the runner's own tests.

It shares no code with astrolabe_jax. Weights keep their original names and layouts; the cache is
the shifting buffer of docs/models.md (KV cache) with its indices, quirks included. float64
throughout.
"""

import dataclasses

import numpy as np


def dit(weights: dict, config: dict, x, t, prompts, attend):
    """Velocity of latents x [B, F, C, H, W] at t [B, F] or [B, 1]; attend(layer, q, k, v) is the
    self-attention.
    """
    w = {name: np.asarray(tensor, np.float64) for name, tensor in weights.items()}
    heads, dim = config["num_heads"], config["dim"]
    batch, frames, channels, rows, columns = x.shape
    grid = (rows // 2, columns // 2)
    patches = x.reshape(batch, frames, channels, grid[0], 2, grid[1], 2).transpose(
        0, 1, 3, 5, 2, 4, 6
    )
    tokens = (
        patches.reshape(batch, -1, channels * 4) @ w["patch_embedding.weight"].reshape(dim, -1).T
    )
    tokens = tokens + w["patch_embedding.bias"]
    half = config["freq_dim"] // 2
    angles = np.asarray(t, np.float64)[..., None] * 10000 ** (-np.arange(half) / half)
    e = _linear(w, "time_embedding.0", np.concatenate([np.cos(angles), np.sin(angles)], -1))
    e = _linear(w, "time_embedding.2", _silu(e))
    e0 = _linear(w, "time_projection.1", _silu(e)).reshape(batch, -1, 6, dim)
    text = np.zeros((batch, config["text_len"], config["text_dim"]))
    text[:, : prompts.shape[1]] = prompts
    text = _linear(w, "text_embedding.2", _gelu(_linear(w, "text_embedding.0", text)))

    def split(x):
        return x.reshape(batch, -1, heads, dim // heads)

    def framed(x, scale, shift):  # one scale and shift for each entry of the time axis
        x = _norm(x).reshape(batch, scale.shape[1], -1, dim)
        return (x * (1 + scale[:, :, None]) + shift[:, :, None]).reshape(batch, -1, dim)

    def gated(y, gate):
        return (y.reshape(batch, gate.shape[1], -1, dim) * gate[:, :, None]).reshape(batch, -1, dim)

    for layer in range(config["num_layers"]):
        p = f"blocks.{layer}"
        m = w[f"{p}.modulation"][:, None] + e0
        a = framed(tokens, m[:, :, 1], m[:, :, 0])
        q = split(_rms(_linear(w, f"{p}.self_attn.q", a)) * w[f"{p}.self_attn.norm_q.weight"])
        k = split(_rms(_linear(w, f"{p}.self_attn.k", a)) * w[f"{p}.self_attn.norm_k.weight"])
        y = attend(layer, q, k, split(_linear(w, f"{p}.self_attn.v", a)))
        tokens = tokens + gated(
            _linear(w, f"{p}.self_attn.o", y.reshape(batch, -1, dim)), m[:, :, 2]
        )
        c = _norm(tokens) * w[f"{p}.norm3.weight"] + w[f"{p}.norm3.bias"]
        q = split(_rms(_linear(w, f"{p}.cross_attn.q", c)) * w[f"{p}.cross_attn.norm_q.weight"])
        k = split(_rms(_linear(w, f"{p}.cross_attn.k", text)) * w[f"{p}.cross_attn.norm_k.weight"])
        y = softmax_attention(q, k, split(_linear(w, f"{p}.cross_attn.v", text)))
        tokens = tokens + _linear(w, f"{p}.cross_attn.o", y.reshape(batch, -1, dim))
        b = framed(tokens, m[:, :, 4], m[:, :, 3])
        tokens = tokens + gated(
            _linear(w, f"{p}.ffn.2", _gelu(_linear(w, f"{p}.ffn.0", b))), m[:, :, 5]
        )
    h = w["head.modulation"][:, None] + e[:, :, None]
    out = _linear(w, "head.head", framed(tokens, h[:, :, 1], h[:, :, 0]))
    out = out.reshape(batch, frames, *grid, 2, 2, channels).transpose(0, 1, 6, 2, 4, 3, 5)
    return out.reshape(x.shape)


def softmax_attention(q, k, v, mask=None):
    """q [B, N, A, K], k and v [B, M, A, K], mask [N, M] -> [B, N, A, K]."""
    scores = np.einsum("bnak,bmak->banm", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("banm,bmak->bnak", scores / scores.sum(-1, keepdims=True), v)


def rope(x, frames, grid):
    """x [B, len(frames) h w, A, K] rotated, interleaved pairs, at the given frame positions."""
    d = x.shape[-1]
    third = d // 6
    sizes = (d // 2 - 2 * third, third, third)
    f, h, w = np.meshgrid(np.asarray(frames), np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    theta = [
        axis.reshape(-1, 1) * 10000.0 ** (-np.arange(size) / size)
        for axis, size in zip((f, h, w), sizes, strict=True)
    ]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(theta, -1))[
        None, :, None
    ]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def training_forward(weights, config, x, t, prompts, block: int, local: int):
    """The uncached forward under the dense mask (docs/models.md, Training mask); also returns that
    mask, frame by frame.
    """
    frames, length, grid = x.shape[1], config["fsl"], (config["lat_h"] // 2, config["lat_w"] // 2)
    i = np.arange(frames * length)
    end = (i // (block * length) + 1) * block * length
    mask = i[None] < end[:, None]
    if local != -1:
        mask &= i[None] >= end[:, None] - local * length
    mask |= np.eye(len(i), dtype=bool)

    def attend(layer, q, k, v):
        return softmax_attention(
            rope(q, range(frames), grid), rope(k, range(frames), grid), v, mask
        )

    return dit(weights, config, x, t, prompts, attend), mask[::length, ::length]


@dataclasses.dataclass
class Buffer:
    """The reference's cache: one K and V of `capacity` tokens for every layer, and two indices."""

    k: np.ndarray
    v: np.ndarray
    global_end: int = 0
    local_end: int = 0


def cached_pass(
    weights,
    config,
    scenario,
    buffer: Buffer,
    x,
    t,
    prompts,
    start_frame: int,
    cut: bool = False,
    force: bool = False,
):
    """One call of the cached forward on the block at `start_frame`; updates the buffer, returns
    the velocity.

    cut: the block behind a hard cut; force: sink_recache_after_switch.
    """
    length, grid = config["fsl"], (config["lat_h"] // 2, config["lat_w"] // 2)
    n, s, sink = x.shape[1] * length, start_frame * length, scenario["sink"] * length
    capacity, most = buffer.k.shape[2], config["max_global"]
    if scenario["local"] != -1:
        most = scenario["local"] * length
    e, g, end = s + n, buffer.global_end, buffer.local_end
    recompute = e <= g and s > 0
    k_old, v_old, rolled = buffer.k, buffer.v, False
    if scenario["local"] != -1 and e > g and n + end > capacity:
        evict, rolled = n + end - capacity, True
        keep = end - evict - sink
        k_old, v_old = k_old.copy(), v_old.copy()
        for part in (k_old, v_old):
            part[:, :, sink : sink + keep] = part[:, :, sink + evict : sink + evict + keep].copy()
        end = end + (e - g) - evict
    else:
        end = end + (e - g)
    first = end - n
    put = max(first, sink) if recompute and not (force and not rolled) else first
    k_new, v_new = k_old.copy(), v_old.copy()

    def attend(layer, q, k, v):
        absolute = start_frame + np.arange(x.shape[1])
        if cut:
            absolute[-3:] = (45, 46, 47)
        stored = k if scenario["infer"] else rope(k, absolute, grid)
        if put < end:
            k_new[layer, :, put:end] = stored[:, put - first :]
            v_new[layer, :, put:end] = v[:, put - first :]
        keys, values = k_new[layer], v_new[layer]
        if scenario["infer"]:
            at = scenario["local"] - x.shape[1] if rolled else first // length
            q = rope(q, at + np.arange(x.shape[1]), grid)
            keys = np.concatenate(
                [rope(keys[:, :end], range(end // length), grid), keys[:, end:]], 1
            )
        else:
            q = rope(q, absolute, grid)
        if sink:
            read = [*range(min(sink, capacity)), *range(max(sink, end - max(most - sink, 0)), end)]
        else:
            read = [*range(max(0, end - most), end)]
        return softmax_attention(q, keys[:, read], values[:, read])

    velocity = dit(weights, config, x, t, prompts, attend)
    buffer.k, buffer.v = k_new, v_new
    if not recompute:
        buffer.global_end, buffer.local_end = e, end
    return velocity


def flush(buffer: Buffer, length: int) -> None:
    """A scene boundary (docs/sampling.md, Flush)."""
    for part in (buffer.k, buffer.v):
        part[:, :, length : 3 * length] = part[:, :, -2 * length :].copy()
    buffer.local_end = 3 * length


def recache(weights, config, scenario, buffer: Buffer, latents, prompts):
    """A prompt switch behind the frames `latents` (docs/sampling.md, Re-caching): (input, velocity,
    first frame) of its call.
    """
    if not scenario["gsink"]:
        buffer.k[:], buffer.v[:] = 0, 0
    end = latents.shape[1]
    start = 0 if scenario["local"] == -1 else max(end - scenario["local"], 0)
    x, t = latents[:, start:], np.full((latents.shape[0], end - start), float(scenario["ctx"]))
    return (
        x,
        cached_pass(
            weights, config, scenario, buffer, x, t, prompts, start, force=not scenario["gsink"]
        ),
        start,
    )


def rollout(
    weights: dict, config: dict, noise, renoise, prompts, initial=None, scene_of=None, cuts=()
) -> dict:
    """A whole rollout under config['scenario']: every array of a c_* file but its
    inputs.

    prompts [scenes, B, S, E]; scene_of: the scene of each block; cuts: whether each scene ends in a
    hard cut. With `switch` in the scenario a new prompt re-caches, else it flushes.
    """
    scenario, length, heads = config["scenario"], config["fsl"], config["num_heads"]
    block, batch, given = (
        scenario["block"],
        noise.shape[0],
        0 if initial is None else initial.shape[1],
    )
    total = given + noise.shape[1]
    capacity = (scenario["local"] if scenario["local"] != -1 else total) * length
    shape = (config["num_layers"], batch, capacity, heads, config["head_dim"])
    buffer = Buffer(np.zeros(shape), np.zeros(shape))
    scene_of = [0] * (noise.shape[1] // block) if scene_of is None else scene_of
    sigmas, times = schedule(scenario["shift"])
    steps = [float(d) for d in scenario["steps"]]
    if scenario["warp"]:
        steps = [float(np.append(times, 0)[1000 - int(d)]) for d in steps]
    calls = len(steps) + 1

    def sigma(t):
        return sigmas[np.argmin(np.abs(times - t))]

    out, contexts = {"denoising_step_list": np.asarray(steps)}, 0
    latents = [] if initial is None else [np.asarray(initial, np.float64)]
    for start in range(0, given, block):
        x = latents[0][:, start : start + block]
        flow = cached_pass(
            weights, config, scenario, buffer, x, np.zeros((batch, 1)), prompts[0], start
        )
        out |= _context(contexts, x, flow, np.zeros((batch, 1)), start * length, 0)
        contexts += 1
    records: dict[str, list] = {}
    for b, start in enumerate(range(given, total, block)):
        now, cut = prompts[scene_of[b]], False
        if b and scene_of[b] != scene_of[b - 1]:
            cut = bool(cuts and cuts[scene_of[b - 1]])
            if scenario["switch"] is None:
                flush(buffer, length)
            else:
                past, flow, at = recache(
                    weights, config, scenario, buffer, np.concatenate(latents, 1), now
                )
                t = np.full(past.shape[:2], float(scenario["ctx"]))
                out |= _context(contexts, past, flow, t, at * length, b * calls)
                contexts += 1
        x = np.asarray(noise[:, start - given : start - given + block], np.float64)
        for j, t in enumerate([*steps, float(scenario["ctx"])]):
            t_all = np.full((batch, block), t)
            flow = cached_pass(weights, config, scenario, buffer, x, t_all, now, start, cut)
            x0 = x - sigma(t) * flow
            row = {
                "x0": x0,
                "flow": flow,
                "timestep": t,
                "start_token": start * length,
                "scene_cut": cut,
            }
            row |= {"global_end": buffer.global_end, "local_end": buffer.local_end}
            for name, value in row.items():
                records.setdefault(f"call_{name}", []).append(value)
            if j + 1 < len(steps):
                level = sigma(steps[j + 1])
                x = (1 - level) * x0 + level * renoise[b, j].reshape(x0.shape)
            elif j + 1 == len(steps):
                latents.append(x0)
                x = x0
    out |= {key: np.stack(v).reshape(-1, calls, *np.shape(v[0])) for key, v in records.items()}
    out |= {"latents": np.concatenate(latents, 1), "cache0_k": buffer.k[0], "cache0_v": buffer.v[0]}
    ends = {"cache0_global_end": buffer.global_end, "cache0_local_end": buffer.local_end}
    return out | {key: np.array([value]) for key, value in ends.items()}


def _context(j: int, x, flow, t, start_token: int, before_call: int) -> dict[str, np.ndarray]:
    """The arrays of the j-th call outside the denoising loop."""
    values = {"input": x, "flow": flow, "timestep": t}
    values |= {"start_token": np.array(start_token), "before_call": np.array(before_call)}
    return {f"ctx{j}/{name}": value for name, value in values.items()}


def schedule(
    shift: float,
    steps: int = 1000,
    sigma_min: float = 0.0,
    sigma_max: float = 1.0,
    extra_one_step: bool = True,
    denoising_strength: float = 1.0,
    inverse_timesteps: bool = False,
    reverse_sigmas: bool = False,
):
    """(sigmas, timesteps) of the general table (docs/sampling.md, Schedule), in the reference's
    float32.
    """
    start = sigma_min + (sigma_max - sigma_min) * denoising_strength
    i = np.arange(steps) / (steps if extra_one_step else steps - 1)
    u = (start + (sigma_min - start) * i).astype(np.float32)
    u = u[::-1] if inverse_timesteps else u
    shift = np.float32(shift)
    sigmas = shift * u / (1 + (shift - 1) * u)
    sigmas = 1 - sigmas if reverse_sigmas else sigmas
    return sigmas.astype(np.float64), (sigmas * np.float32(1000)).astype(np.float64)


def scheduler(inputs: dict, sigmas, times, final: float) -> dict[str, np.ndarray]:
    """All outputs of one group of an a_* file but the warped lists (MANIFEST); `final` is the sigma
    after the last.
    """
    x0, noise, flow = (inputs[name] for name in ("x0", "noise", "flow"))
    n = len(times)
    bell = np.exp(-2 * ((times - n / 2) / n) ** 2)
    bell -= bell.min()
    out = {"sigmas": sigmas, "timesteps": times, "training_weights": bell * n / bell.sum()}

    def nearest(t):
        return np.argmin(np.abs(times[:, None] - t), axis=0)

    def column(sigma):
        return sigma.reshape(-1, *[1] * (x0.ndim - 1))

    for suffix in ("", "_int"):
        sigma = column(sigmas[nearest(inputs[f"t{suffix}"])])
        out[f"add_noise{suffix}"] = (1 - sigma) * x0 + sigma * noise
        out[f"flow_to_x0{suffix}"] = x0 - sigma * flow
        out[f"x0_to_flow{suffix}"] = (x0 - flow) / sigma
    for name, t in (("step", inputs["t"]), ("step_mid", inputs["t_mid"])):
        at = nearest(t)
        end = np.any(at + 1 == n)  # one sample at the last entry sends the whole batch to the end
        later = np.full(len(t), final) if end else sigmas[at + 1]
        out[name] = x0[: len(t)] + flow[: len(t)] * column(later - sigmas[at])
    return out


def _linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def _rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
