"""What experiments/frame_stride says of scores."""

import numpy as np
import pytest

from experiments.frame_stride.measure import compared, with_strides

WHOLE = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
GROUPS = np.array([3, 3, 3, 5, 5, 5])
SPREAD = np.sqrt(2 / 3)  # of 0, 1, 2


def test_a_shift_is_bias_alone():
    assert compared(WHOLE + 1, WHOLE, GROUPS) == pytest.approx(
        {"bias": 1 / SPREAD, "error": 0, "rank_correlation": 1}
    )


def test_what_differs_between_the_videos_of_a_prompt_is_error():
    # either prompt the other way round
    found = compared(WHOLE[::-1] + [10, 10, 10, -10, -10, -10], WHOLE, GROUPS)
    assert found == pytest.approx(
        {"bias": 0, "error": np.sqrt(8 / 3) / SPREAD, "rank_correlation": -1}
    )


def test_a_shift_of_one_prompt_is_no_error():
    assert compared(WHOLE + [3, 3, 3, 0, 0, 0], WHOLE, GROUPS)["error"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("reward", "options", "strides", "expected"),
    [
        ("hpsv3", "{}", ["1", "a"], "--strides is '1,a'; expected"),
        ("hpsv3", "{}", ["0"], "--strides is '0'; expected"),
        ("hpsv3", "{", ["1"], "--options: "),
        ("hpsv3", "[]", ["1"], r"--options: expected a JSON object, not '\[\]'"),
        ("nope", "{}", ["1"], "unknown reward 'nope'"),
        ("hpsv3", '{"path": "nowhere"}', ["1"], "config.rewards.hpsv3: no nowhere/config.json"),
        ("shapes_vq", "{}", ["1"], "frame_stride"),
    ],
)
def test_what_cannot_be_measured_is_named_first(reward, options, strides, expected):
    with pytest.raises(ValueError, match=expected):
        with_strides(reward, options, strides)
