import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax.worlds.moving_shapes import render, vocabulary

AREAS = {"circle": np.pi * 81, "square": 256.0, "triangle": 3 * np.sqrt(3) * 5.85**2}


def every_motion(colour="yellow", background="black"):
    """One prompt for each shape, direction and speed."""
    return [a for a in vocabulary.all_attributes() if (a.colour, a.background) == (colour, background)]


def coverage(video, attributes):
    """The renderer's coverage `[T, h, w]`, recovered from the red channel."""
    shape, background = vocabulary.COLOURS[attributes.colour][0], vocabulary.BACKGROUNDS[attributes.background][0]
    return (video[..., 0].astype(float) - background) / (shape - background)


@pytest.mark.parametrize("attributes", every_motion(), ids=lambda a: "-".join(a[1:4]))
def test_a_video_shows_what_the_prompt_says(attributes):
    video = render.sample(vocabulary.to_prompt(attributes), np.random.default_rng(0))
    assert video.shape == (render.FRAMES, render.SIZE, render.SIZE, 3) and video.dtype == np.uint8

    covered = coverage(video, attributes)
    area = covered.sum((1, 2))
    np.testing.assert_allclose(area, AREAS[attributes.shape], rtol=0.01)  # never cut by the border
    assert (video[:, 0, 0] == vocabulary.BACKGROUNDS[attributes.background]).all()
    pixel = np.arange(render.SIZE) + 0.5
    centre = np.stack([covered.sum(1) @ pixel, covered.sum(2) @ pixel], axis=1) / area[:, None]
    step = np.array(vocabulary.DIRECTIONS[attributes.direction]) * vocabulary.SPEEDS[attributes.speed]
    np.testing.assert_allclose((centre[-1] - centre[0]) / (render.FRAMES - 1), step, atol=2e-3)
    np.testing.assert_allclose(np.diff(centre, axis=0) - step, 0, atol=0.1)


@pytest.mark.parametrize("shape", vocabulary.SHAPES)
def test_edges_are_one_pixel_wide(shape):
    attributes = vocabulary.Attributes("yellow", shape, "left", "", "black")
    path = render.Path(np.array([24.3, 23.6]), np.zeros(2))
    covered = coverage(render.render(attributes, path, frames=1), attributes)[0]
    partial = (covered > 0.02) & (covered < 0.98)
    perimeter = {"circle": 2 * np.pi * 9, "square": 64, "triangle": 6 * np.sqrt(3) * 5.85}[shape]
    assert 0.5 * perimeter < partial.sum() < 1.5 * perimeter
    full = covered >= 0.98
    beside = np.zeros_like(full)
    for axis in (0, 1):
        for shift in (-1, 1):
            beside |= np.roll(full, shift, axis)
    assert not (beside & (covered <= 0.02)).sum() > 0.05 * perimeter  # full never touches empty, corners apart


def test_shapes_stay_inside_around_the_centre():
    rng = np.random.default_rng(1)
    for attributes in every_motion():
        side, up, down = render.EXTENTS[attributes.shape]
        for _ in range(8):
            x, y = render.sample_path(attributes, rng).centres(render.FRAMES).T
            box = np.stack([x - side, y - up, render.SIZE - x - side, render.SIZE - y - down])
            assert box.min() >= render.MARGIN - 1e-9
            middle = np.array([x.mean(), (y + (down - up) / 2).mean()])
            assert np.abs(middle - render.SIZE / 2).max() <= render.JITTER


@pytest.mark.parametrize("shape", vocabulary.SHAPES)
def test_extents_are_those_of_the_edge(shape):
    grid = np.arange(-15, 15, 0.05)
    inside = render.edge_distance(shape, grid[None, :], grid[:, None]) <= 0
    x, y = grid[inside.any(0)], grid[inside.any(1)]
    np.testing.assert_allclose(
        [x.max(), -x.min(), -y.min(), y.max()], np.array(render.EXTENTS[shape])[[0, 0, 1, 2]], atol=0.11
    )


def test_a_seed_fixes_a_video_and_another_moves_it():
    prompt = vocabulary.prompts("train")[0]
    first, again, other = (render.sample(prompt, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


def test_a_motion_too_long_for_the_frame_is_refused():
    attributes = vocabulary.Attributes("red", "circle", "left", "quickly", "black")
    with pytest.raises(ValueError, match="400 frames of quickly motion"):
        render.sample_path(attributes, np.random.default_rng(0), frames=400)


@pytest.mark.parametrize("prompts", [vocabulary.prompts("test"), vocabulary.prompts("test")[:1]])
def test_the_frames_that_are_allowed_are_those_that_can_be_drawn(prompts):
    def drawn(frames):
        try:
            return [render.sample(prompt, np.random.default_rng(0), frames) for prompt in prompts]
        except ValueError:
            return None

    render.check_frames(prompts, render.FRAMES)
    most = next(frames for frames in range(render.FRAMES, 400) if drawn(frames + 1) is None)
    render.check_frames(prompts, most)
    for frames in (most + 1, most + 40):
        with pytest.raises(ValueError, match=f"in {frames} frames .* at most {most}$"):
            render.check_frames(prompts, frames)


@pytest.mark.parametrize("shape", vocabulary.SHAPES)
def test_both_array_modules_draw_the_same_edge(shape):
    x, y = np.random.default_rng(0).uniform(-20, 20, (2, 50)).astype(np.float32)
    np.testing.assert_allclose(
        render.edge_distance(shape, x, y), render.edge_distance(shape, jnp.array(x), jnp.array(y), jnp), atol=1e-5
    )
