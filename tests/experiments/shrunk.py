"""The script that makes the moving-shapes base, at full sizes of the nets but with a few steps on a
few clips.
"""

from absl import app

from experiments.moving_shapes_base import train_generator, train_vae

train_generator.VIDEOS, train_generator.TRAJECTORIES, train_generator.BATCH = 8, 8, 4
train_generator.TEACHER_STEPS = 2
train_generator.STUDENT_ROUNDS = tuple(
    (2, rate, noise) for _, rate, noise in train_generator.STUDENT_ROUNDS
)
train_vae.SHORT_STEPS, train_vae.SHORT_BATCH, train_vae.FULL_BATCH = 1, 1, 1
statistics = train_vae.with_statistics
train_vae.with_statistics = lambda graphdef, params: statistics(graphdef, params, count=8)

if __name__ == "__main__":
    app.run(train_generator.main)
