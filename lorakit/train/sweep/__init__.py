"""Train many adapters on one base at once: sweeps over settings, their leaderboard, and the learning-rate search."""
